// A module of an edgezmq node, in JavaScript: it answers requests with what it was asked, and uploads a reading now
// and then.
//
//   edgezmq send js-example -r anything --content '{"x": 1}' --request

import { setTimeout as sleep } from "node:timers/promises"
import { Client, Fenced } from "./emp.js"

const client = new Client({ name: "js-example", handle: async (delivery) => delivery.content })
const stopping = new AbortController()

for (const signal of ["SIGTERM", "SIGINT"]) {
  process.on(signal, () => {
    stopping.abort()
    void client.stop()
  })
}

/** Every UPLOAD_SECONDS a reading. `send` waits while the window is full, so none is left out when the broker is away. */
async function upload() {
  const seconds = Number(process.env.UPLOAD_SECONDS) || (process.env.EDGEZMQ_CONFORM ? 0.2 : 10)
  for (let number = 1; !stopping.signal.aborted; number++) {
    const settled = await client.send("@hub", {
      source: "js-example",
      group: "user",
      resource: "default/js-example/reading",
      operation: "upload",
      content: Buffer.from(JSON.stringify({ number })),
    })
    settled().catch((fault) => stopping.signal.aborted || console.error(`reading ${number}: ${fault.message}`))
    await sleep(seconds * 1000, undefined, { signal: stopping.signal })
  }
}

upload().catch((fault) => stopping.signal.aborted || console.error(fault.message))
try {
  await client.run()
  process.exit(0)
} catch (fault) {
  console.error(fault.message)
  process.exit(fault instanceof Fenced ? 3 : 1)
}
