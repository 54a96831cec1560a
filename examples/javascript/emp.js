// A client of EMP/1, the Edge Module Protocol of edgezmq (docs/emp.md). Copy this file into a module of your own; it
// needs the packages `zeromq` and `@msgpack/msgpack`.
//
// Each lane's messages are handled one after another, in their order; requests side by side. Nothing has to be
// stored: what was sent is kept until the broker says that it is settled, and sent again after every reconnect.

import { randomBytes, randomUUID } from "node:crypto"
import { homedir } from "node:os"
import { isAbsolute, join } from "node:path"
import { decode, encode } from "@msgpack/msgpack"
import { Dealer } from "zeromq"

export const Priority = Object.freeze({ REQUEST: 1, SIGNAL: 2, DATA: 3 })
const REPLY_PRIORITY = 0
const MAX_BOOKS = 4096 // of lanes towards us, and as many senders
const Flag = Object.freeze({ EXPECTS_REPLY: 1, REPLY: 2, RESENT: 4, REDELIVERED: 16, FROM_STORE: 32 })

const HELLO_MS = 500
const DRAIN_MS = 8000
const WINDOW = 1024 // unsettled messages of a lane; the broker's own limit is taken when it is lower
const MAX_FLOORS = 1024 // in one PING
const RETRY_MS = [100, 500] // a handler that fails is tried again after these
const FATAL = new Set(["denied", "version", "too-many"])
const FIELDS = ["id", "parentId", "timestamp", "sync", "resourceVersion", "source", "group", "resource", "operation"]

// Sessions are larger than what a Number holds exactly.
const CODEC = { useBigInt64: true }

/** A message that was not handled, or, thrown by a handler, will not be: `reason` goes to its sender. */
export class Refused extends Error {
  constructor(reason) {
    super(`refused: ${reason}`)
    this.reason = reason
  }
}

/** A newer process has our name: exit. */
export class Fenced extends Error {}

/** Where the bus is, by the environment. */
export function endpoint(env = process.env) {
  if (env.EDGEZMQ_BUS) return env.EDGEZMQ_BUS
  const state = isAbsolute(env.XDG_STATE_HOME ?? "") ? env.XDG_STATE_HOME : join(homedir(), ".local", "state")
  return `ipc://${join(env.EDGEZMQ_HOME || join(state, "edgezmq"), "run", "bus.sock")}`
}

class Lane {
  next = 1
  open = [] // unsettled, in order: {number, flags, requester, body, deadline, resolve, reject}
  bytes = 0
  get floor() {
    return this.open.length ? this.open[0].number : this.next
  }
}

class Book {
  // What is known of one lane towards us: all up to `high`, outcomes of all up to `done`.
  constructor(floor) {
    this.base = floor
    this.high = this.done = floor - 1
    this.finished = new Set() // above done, out of order
    this.failed = new Map() // number -> reason
    this.session = null
    this.lane = null
    this.sessionHigh = 0
    this.told = 0
    this.tail = Promise.resolve() // the handling of this lane so far
  }

  finish(number, reason) {
    if (reason) this.failed.set(number, reason)
    this.finished.add(number)
    while (this.finished.delete(this.done + 1)) this.done += 1
  }
}

export class Client {
  #incarnation = randomBytes(16)
  #socket = new Dealer({
    immediate: true,
    linger: 1000,
    sendHighWaterMark: 0,
    receiveHighWaterMark: 0,
    reconnectInterval: 20,
    reconnectMaxInterval: 500,
    sendTimeout: 0,
  })
  #out = []
  #flushing = false
  #attached = false
  #draining = false
  #ended = null
  #epoch = ""
  #session = -1n
  #generation = 0
  #heartbeat = 1000
  #limits = { message: 1 << 20, window: 64, windowBytes: 1 << 20 }
  #nonce = 0
  #pingedAt = null // when the PING went that has no PONG
  #pingDue = 0
  #helloDue = 0
  #takenSince = null
  #freshAt = Number.NEGATIVE_INFINITY // when the last answered PING was sent
  #freshWaiters = []
  #roomWaiters = []
  #lanes = new Map()
  #books = new Map()
  #generations = new Map()
  #waiters = new Map()
  #running = 0
  #timer = null

  /** `handle(delivery)` returns the reply's content (a Buffer) for a request; liveness is in milliseconds. */
  constructor({ name, groups = [], handle = null, liveness = 15000, address = endpoint() }) {
    Object.assign(this, { name, groups, handle, liveness, address })
  }

  /** Attach and serve until `stop` has drained, or the broker turns us away (rejects). */
  async run() {
    this.#socket.connect(this.address)
    this.#tick()
    try {
      for await (const frames of this.#socket) {
        try {
          this.#read(frames, performance.now())
        } catch (fault) {
          console.error(`emp: ${frames[0]} cannot be read: ${fault.message}`)
        }
        if (this.#ended) break
      }
    } catch (fault) {
      if (!this.#ended) throw fault
    } finally {
      clearTimeout(this.#timer)
      this.#release()
      await this.#flush()
      this.#socket.close()
    }
    if (this.#ended instanceof Error) throw this.#ended
  }

  /** Drain: nothing new is begun; what is in hand and what was sent is finished, for at most 8 s. Then BYE. */
  async stop() {
    if (this.#draining || this.#ended) return
    this.#draining = true
    this.#wake(this.#freshWaiters)
    const until = performance.now() + DRAIN_MS
    if (this.#attached) this.#put("DRAIN/1", [DRAIN_MS])
    while (performance.now() < until && !this.#ended && (this.#running || this.#unsettled())) {
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    if (this.#ended) return
    if (this.#attached) this.#put("BYE/1", [false])
    this.#ended = true
    await this.#flush()
    this.#socket.close()
  }

  /**
   * Give the message to its lane, waiting for room while the window is full. Resolves to a function: its promise
   * resolves when the message was handled and rejects with Refused when it was not.
   */
  async send(to, message, { priority = Priority.DATA } = {}) {
    const { receipt } = await this.#send(to, message, { priority })
    return () => receipt
  }

  /** Ask a module and wait for its answer, at most `timeout` milliseconds. */
  async request(to, message, timeout) {
    const id = message.id ?? randomUUID()
    let timer
    const answer = new Promise((resolve, reject) => {
      const asked = to.startsWith("@") ? null : to // of a group, whoever answers first
      this.#waiters.set(id, { asked, resolve }) // before the question goes
      timer = setTimeout(() => reject(new Error(`no answer from ${to} within ${timeout} ms`)), timeout)
      const deadline = performance.now() + timeout
      this.#send(to, { ...message, id }, { priority: Priority.REQUEST, flags: Flag.EXPECTS_REPLY, deadline })
        .then(({ receipt }) => receipt) // refused: there will be no answer
        .catch(reject)
    })
    try {
      return await answer
    } finally {
      clearTimeout(timer)
      this.#waiters.delete(id)
    }
  }

  async #send(to, message, { priority, flags = 0, requester = null, deadline = null }) {
    const body = encode([[
      message.id ?? randomUUID(), message.parentId ?? "", message.timestamp ?? Date.now(), false,
      message.resourceVersion ?? "", message.source ?? this.name, message.group ?? "", message.resource ?? "",
      message.operation ?? "", message.kind ?? "json", message.content ?? Buffer.from("null"),
    ]])
    const key = `${priority} ${to}`
    let lane = this.#lanes.get(key)
    if (!lane) this.#lanes.set(key, (lane = Object.assign(new Lane(), { destination: to, priority })))
    while (!this.#ended && priority !== REPLY_PRIORITY && !this.#hasRoom(lane, body.length)) {
      await new Promise((resolve) => this.#roomWaiters.push(resolve))
    }
    if (this.#ended) throw new Error("the client has ended")
    if (body.length > this.#limits.message) throw new Refused("too-large")
    const batch = { number: lane.next++, flags, requester, body, deadline }
    const receipt = new Promise((resolve, reject) => Object.assign(batch, { resolve, reject }))
    receipt.catch(() => {}) // whoever wants to know, asks
    lane.open.push(batch)
    lane.bytes += body.length
    if (this.#attached) this.#putBatch(lane, batch)
    return { receipt } // wrapped: an async function would wait for a bare promise
  }

  #hasRoom(lane, size) {
    const { window, windowBytes } = this.#limits
    return lane.open.length === 0 || (lane.open.length < window && lane.bytes + size <= windowBytes)
  }

  #unsettled() {
    return [...this.#lanes.values()].some((lane) => lane.open.length > 0)
  }

  // --- out -------------------------------------------------------------------------------------------

  #put(verb, header, body) {
    this.#out.push(body ? [verb, encode(header, CODEC), body] : [verb, encode(header, CODEC)])
    void this.#flush()
  }

  #putBatch(lane, batch) {
    const ttl = batch.deadline === null ? null : Math.max(0, Math.ceil(batch.deadline - performance.now()))
    const { number, flags, requester, body } = batch
    this.#put("SEND/1", [lane.destination, lane.priority, number, 1, lane.floor, flags, ttl, requester], body)
    batch.flags |= Flag.RESENT // if it goes once more
  }

  async #flush() {
    if (this.#flushing) return // one send at a time: the others follow in their order
    this.#flushing = true
    try {
      while (this.#out.length) await this.#socket.send(this.#out.shift())
    } catch {
      this.#out = [] // no connection: WELCOME will bring it again
      this.#attached = false
    } finally {
      this.#flushing = false
    }
  }

  // --- time ------------------------------------------------------------------------------------------

  #tick() {
    const now = performance.now()
    if (this.#attached && this.#pingedAt !== null && now - this.#pingedAt > this.liveness) this.#attached = false
    if (!this.#attached && now >= this.#helloDue) this.#hello(now)
    if (this.#attached && this.#pingedAt === null && now >= this.#pingDue) this.#ping(now)
    if (!this.#ended) this.#timer = setTimeout(() => this.#tick(), Math.min(50, this.#heartbeat / 2))
  }

  #hello(now) {
    this.#helloDue = now + HELLO_MS
    const incarnation = new Uint8Array(this.#incarnation)
    this.#put("HELLO/1", [
      this.name, this.groups, incarnation, this.#generation, this.liveness, "js-example", 2048, 8 << 20, process.pid,
    ])
  }

  #ping(now) {
    this.#nonce += 1
    this.#pingedAt = now
    this.#pingDue = now + this.#heartbeat
    const idle = [...this.#lanes.values()].filter((lane) => lane.open.length === 0).slice(0, MAX_FLOORS)
    this.#put("PING/1", [this.#nonce, {}, idle.map((lane) => [lane.destination, lane.priority, lane.next])])
  }

  // --- in --------------------------------------------------------------------------------------------

  #read(frames, now) {
    if (frames.length < 2) return
    const header = decode(frames[1], CODEC)
    if (!Array.isArray(header)) return
    switch (frames[0].toString()) {
      case "WELCOME/1":
        return this.#onWelcome(header, now)
      case "WHO/1":
        if (this.#attached) {
          this.#attached = false
          this.#hello(now)
        }
        return
      case "PONG/1":
        if (this.#pingedAt !== null && Number(header[0]) === this.#nonce) {
          this.#freshAt = this.#pingedAt
          this.#pingedAt = null
          this.#wake(this.#freshWaiters)
        }
        return
      case "SETTLED/1":
        return this.#onSettled(header)
      case "DELIVER/1":
        return frames.length === 3 ? this.#onDeliver(header, frames[2]) : undefined
      case "FENCED/1":
        if (Number(header[0]) >= this.#generation) this.#end(new Fenced(`${this.name}: a newer process has our name`))
        return
      case "REFUSED/1":
        return this.#onRefused(header, now)
    }
  }

  #onWelcome([epochBytes, session, generation, heartbeat, , limits], now) {
    if (epochBytes?.length !== 8 || !(session >= 0) || !(generation >= 1) || !(heartbeat >= 1)) {
      return console.error("emp: a WELCOME that makes no sense")
    }
    const epoch = Buffer.from(epochBytes).toString("hex")
    if (epoch === this.#epoch && BigInt(session) <= this.#session) return // an old one that lay unread
    this.#epoch = epoch
    this.#session = BigInt(session)
    this.#generation = generation
    this.#heartbeat = Math.min(Number(heartbeat), this.liveness / 3)
    this.#attached = true
    this.#takenSince = null
    if (limits?.length >= 3) {
      const [message, window, windowBytes] = limits.map(Number)
      this.#limits = { message, window: Math.min(window, WINDOW), windowBytes }
    }
    for (const lane of this.#lanes.values()) {
      for (const batch of lane.open) this.#putBatch(lane, batch) // everything unsettled, in order (rule 4)
    }
    if (this.#draining) this.#put("DRAIN/1", [DRAIN_MS])
    this.#ping(now)
    this.#wake(this.#roomWaiters)
  }

  #onRefused([code, text], now) {
    if (this.#attached) return console.error(`emp: the broker refused a frame: ${code}: ${text}`)
    this.#takenSince ??= now
    const isTaken = code === "name-taken" && now - this.#takenSince > this.liveness
    if (isTaken || FATAL.has(code)) this.#end(new Error(`the broker does not take us as ${this.name}: ${code}: ${text}`))
  }

  #onSettled([destination, priority, cumulativeNumber, exceptions = []]) {
    const lane = this.#lanes.get(`${priority} ${destination}`)
    const cumulative = Number(cumulativeNumber)
    if (!lane || !(cumulative >= lane.floor) || cumulative >= lane.next) return
    const refused = new Map(exceptions.map(([number, reason]) => [Number(number), reason]))
    while (lane.open.length && lane.open[0].number <= cumulative) {
      const batch = lane.open.shift()
      lane.bytes -= batch.body.length
      const reason = refused.get(batch.number)
      if (reason === undefined) batch.resolve()
      else batch.reject(new Refused(reason))
    }
    this.#wake(this.#roomWaiters)
  }

  #onDeliver(header, body) {
    const [session, laneNumber, sender, incarnation, , destination, priority] = header
    const [generation, first, count, from, floor] = [header[4], ...header.slice(7, 11)].map(Number)
    const [voids = [], flags = 0] = [header[11], Number(header[12] ?? 0)]
    const last = first + count - 1
    if (!(count >= 1 && first <= from && from <= last && floor <= from)) {
      return console.error(`emp: a DELIVER that makes no sense: first ${first} count ${count} from ${from}`)
    }
    // By sender too: that the broker vouches for, and an incarnation others can say as well.
    const process = `${sender} ${Buffer.from(incarnation).toString("hex")}`
    const key = `${process} ${priority} ${destination}`
    let book = this.#books.get(key)
    if (!book) {
      book = new Book(floor)
      const known = this.#generations.get(sender) ?? 0
      const counts = !(flags & (Flag.REPLY | Flag.FROM_STORE))
      if (counts && generation < known) { // rule 20
        book.high = book.done = last
        for (let number = from; number <= last; number++) book.failed.set(number, "fenced")
      } else {
        if (counts && generation > known) {
          this.#generations.delete(sender)
          this.#generations.set(sender, generation)
          this.#forget((other) => other.startsWith(`${sender} `) && !other.startsWith(`${process} `)) // rules 18, 19
        }
        if (this.#books.size >= MAX_BOOKS) this.#forget(() => this.#books.size >= MAX_BOOKS)
        if (this.#generations.size > MAX_BOOKS) this.#generations.delete(this.#generations.keys().next().value)
        this.#books.set(key, book)
      }
    }
    if (this.#books.delete(key)) this.#books.set(key, book) // those unused longest stand first
    for (const number of book.failed.keys()) if (number < floor) book.failed.delete(number)
    if (from > book.high + 1) { // rule 15: everything below `from` is known now
      for (const [number, reason] of voids) {
        if (number > book.high && number < from) book.failed.set(Number(number), reason)
      }
      for (let number = book.high + 1; number < from; number++) book.finish(number)
      book.high = from - 1
    }
    for (let number = from; number <= Math.min(last, book.base - 1); number++) book.failed.set(number, "overtaken")
    if (BigInt(session) === this.#session) {
      if (book.session !== this.#session || book.lane !== laneNumber) {
        Object.assign(book, { session: this.#session, lane: laneNumber, sessionHigh: 0, told: 0 })
      }
      book.sessionHigh = Math.max(book.sessionHigh, last)
      book.told = Math.min(book.told, from - 1) // duplicates get the same answer again
    }
    const messages = messagesOf(body, count)
    for (let number = Math.max(from, book.high + 1); number <= last; number++) {
      book.high = number
      const delivery = messages && {
        ...messages[number - first],
        sender,
        incarnation,
        expectsReply: Boolean(flags & Flag.EXPECTS_REPLY),
        redelivered: Boolean(flags & Flag.REDELIVERED),
      }
      if (flags & Flag.REPLY) {
        const waiter = this.#waiters.get(delivery?.parentId) // ids can be guessed: only who was asked can answer
        if (waiter && (waiter.asked === null || waiter.asked === sender)) waiter.resolve(delivery)
        book.finish(number)
      } else if (!this.#draining) {
        this.#work(book, number, delivery)
      } // else it is not begun, and goes back to the mailbox
    }
    this.#acknowledge(book)
  }

  /** Books without anything in hand: what is forgotten too early can lead to a repeat, never to a loss (rule 18). */
  #forget(which) {
    for (const [key, book] of this.#books) if (book.done === book.high && which(key)) this.#books.delete(key)
  }

  #work(book, number, delivery) {
    const job = () => this.#handle(book, number, delivery)
    if (delivery?.expectsReply) void job()
    else book.tail = book.tail.then(job)
  }

  async #handle(book, number, delivery) {
    while (!this.#ended && !this.#draining && performance.now() - this.#freshAt > this.liveness) { // rule 21
      await new Promise((resolve) => this.#freshWaiters.push(resolve))
    }
    if (this.#ended || this.#draining) return // not begun: the next process gets it
    this.#running += 1
    try {
      book.finish(number, await this.#outcome(delivery))
    } finally {
      this.#running -= 1
    }
    this.#acknowledge(book)
  }

  /** Call the handler, again if it fails; the reply goes before anything is acknowledged (rule 28). */
  async #outcome(delivery) {
    if (!delivery) return "invalid"
    if (!this.handle) return "unroutable"
    for (const pause of [...RETRY_MS, null]) {
      try {
        const content = await this.handle(delivery)
        if (delivery.expectsReply && content !== undefined) {
          const { id, source, group, resource, kind } = delivery
          const reply = { parentId: id, source, group, resource, operation: "response", kind, content }
          const requester = delivery.incarnation
          await this.#send(delivery.sender, reply, { priority: REPLY_PRIORITY, flags: Flag.REPLY, requester }).catch(
            (fault) => console.error(`emp: no reply to ${delivery.sender}: ${fault.message}`),
          )
        }
        return null
      } catch (fault) {
        if (fault instanceof Refused) return fault.reason
        if (pause === null) console.error(`emp: handling ${delivery.resource} failed:`, fault)
        else await new Promise((resolve) => setTimeout(resolve, pause))
      }
    }
    return "failed"
  }

  #acknowledge(book) {
    const done = Math.min(book.done, book.sessionHigh)
    if (!this.#attached || book.session !== this.#session || done <= book.told) return
    const refused = [...book.failed].filter(([number]) => number > book.told && number <= done)
    book.told = done
    this.#put("ACK/1", [this.#session, [[book.lane, done, refused.sort(([a], [b]) => a - b)]]])
  }

  #wake(waiters) {
    for (const resolve of waiters.splice(0)) resolve()
  }

  #end(why) {
    this.#ended = why
    this.#release()
  }

  /** Whoever waits for something that will not come, is told. */
  #release() {
    for (const lane of this.#lanes.values()) {
      for (const batch of lane.open.splice(0)) batch.reject(new Error("the client has ended"))
    }
    this.#wake(this.#roomWaiters)
    this.#wake(this.#freshWaiters)
  }
}

/** The messages of a body, or null when it is no array of `count` of them. Fields may be missing, or be new to us. */
function messagesOf(body, count) {
  let arrays
  try {
    arrays = decode(body, CODEC)
  } catch {
    return null
  }
  if (!Array.isArray(arrays) || arrays.length !== count || !arrays.every(Array.isArray)) return null
  return arrays.map((fields) => ({
    ...Object.fromEntries(FIELDS.map((name, place) => [name, fields[place] ?? ""])),
    kind: fields[9] ?? "json",
    content: Buffer.from(fields[10] ?? "null"),
  }))
}
