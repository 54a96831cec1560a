"""The outbox under round trip times and backlogs: `python -m bench.outbox [--link quic] [--backlog N]`.

Per round trip time: 10,000 uploads of 200 B through a real broker and edgehub to cloudsim, each receipt awaited; the
rate, and the bytes edgehub had written to storage meanwhile (proc(5), io). Then a backlog, written offline: rate of
acceptance, time from a fresh start to `served` with an empty file and with the backlog, the rate at which it drains,
and of broker and edgehub the most memory (PSS, looked at five times a second; and the kernel's peak of what was
resident).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.memory import parse_smaps_rollup, peak_mib
from cloudsim import CloudSim, SimConfig
from runtime.client import Bus
from runtime.config import (
    EdgeHubExtras,
    EdgeHubSection,
    NodeConfig,
    QuicSection,
    RuntimeSection,
    WebsocketSection,
    store,
)
from runtime.home import HOME_VARIABLE, Home
from runtime.message import Message
from runtime.names import Group

NODE = "bench-node"
MESSAGES = 10_000
PAYLOAD = b'{"celsius":21.5,"filler":"' + b"x" * 170 + b'"}'


def written_bytes(pid: int) -> int:
    """Bytes a process has had written to storage."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("write_bytes:")))


def pss_mib(pid: int) -> float:
    return parse_smaps_rollup(Path(f"/proc/{pid}/smaps_rollup").read_text()).pss_mib


class Peaks:
    """The most PSS of each process, looked at now and then."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._most = dict.fromkeys(pids, 0.0)

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            for name, pid in self._pids.items():
                self._most[name] = max(self._most[name], await asyncio.to_thread(pss_mib, pid))
            await asyncio.sleep(0.2)

    def __str__(self) -> str:
        return ", ".join(
            f"{name} at most {most:.1f} MiB PSS (resident {peak_mib(self._pids[name]):.1f})"
            for name, most in self._most.items()
        )


def upload(number: int) -> Message:
    return Message(
        id=f"u{number}",
        timestamp=1,
        source="bench",
        group="user",
        operation="upload",
        resource=f"bench/{number}",
        content=PAYLOAD,
    )


class Bench:
    def __init__(self, home: Path, sim: CloudSim) -> None:
        """Over QUIC where `sim` speaks it."""
        self.home = Home(home)
        self.sim = sim
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def configure(self) -> None:
        self.home.prepare()
        pair = self.sim.certificate(NODE)
        hub = EdgeHubSection(
            message_qps=0,
            tls_ca_file=str(self.sim.ca.certificate),
            tls_cert_file=str(pair.certificate),
            tls_private_key_file=str(pair.key),
            websocket=WebsocketSection(enable=not self.sim.quic_port, server=f"127.0.0.1:{self.sim.port}"),
            quic=QuicSection(enable=bool(self.sim.quic_port), server=f"127.0.0.1:{self.sim.quic_port or 1}"),
        )
        extras = RuntimeSection(edgehub=EdgeHubExtras(retry_cap_seconds=1.0))
        store(NodeConfig(node_name=NODE, edge_hub=hub, runtime=extras), self.home)

    def start(self, module: str) -> int:
        environment = os.environ | {HOME_VARIABLE: str(self.home.path)}
        with (self.home.log / f"{module}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", module], env=environment, stdout=log, stderr=log)
        self.running[module] = process
        return process.pid

    def end(self, module: str, *, kill: bool = False) -> None:
        process = self.running.pop(module)
        if kill:
            process.kill()
        else:
            process.terminate()
        process.wait()


async def status(bus: Bus) -> dict[str, object]:
    question = Message.build(group="edgezmq", resource="edgehub/link", operation="status")
    answer: dict[str, object] = (await bus.request("edgehub", question, timeout=30)).json()
    return answer


async def send(bus: Bus, first: int, count: int) -> float:
    """Messages a second, each receipt awaited."""
    begun = time.perf_counter()
    receipts = [await bus.send(Group("hub"), upload(number)) for number in range(first, first + count)]
    for receipt in receipts:
        await receipt
    return count / (time.perf_counter() - begun)


def move(source: Path, target: Path) -> None:
    """The outbox's files, from one directory to another."""
    target.mkdir(exist_ok=True)
    for path in source.glob("outbox.db*"):
        path.rename(target / path.name)


async def main(backlog: int, *, is_quic: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="outbox") as directory:
        config = SimConfig(
            directory=Path(directory) / "cloud", port=0, quic_port=0 if is_quic else None, max_ids=2_000_000
        )
        async with CloudSim(config) as sim:
            bench = Bench(Path(directory) / "home", sim)
            bench.configure()
            broker = bench.start("runtime.broker")
            edgehub = bench.start("modules.edgehub")
            try:
                endpoint = f"ipc://{bench.home.bus_socket}"
                async with Bus.connect("bench-sender", endpoint=endpoint) as bus:
                    await sim.wait_served(NODE)
                    first = 0
                    for milliseconds in (0, 50, 300, 600):
                        await sim.inject("clear")
                        if milliseconds:
                            await sim.inject("delay", NODE, seconds=milliseconds / 1000)
                            await sim.inject("drop", NODE)  # a connection that knows no other round trip
                            await sim.wait_for(lambda: not sim.is_served(NODE))
                            await sim.wait_served(NODE)
                            while (await status(bus))["state"] != "served":
                                await asyncio.sleep(0.1)
                        await send(bus, first, 5000)  # the window finds its size
                        first += 5000
                        before = written_bytes(edgehub)
                        rate = await send(bus, first, MESSAGES)
                        first += MESSAGES
                        wrote = written_bytes(edgehub) - before
                        print(f"round trip {milliseconds:3d} ms: {rate:8,.0f} confirmed/s, {wrote} bytes written")
                    if not backlog:
                        return
                    await sim.inject("clear")
                    await sim.inject("refuse")
                    await sim.inject("drop", NODE)
                    await sim.wait_for(lambda: not sim.is_served(NODE))
                    peaks = Peaks({"broker": broker, "edgehub": edgehub})
                    watching = asyncio.create_task(peaks.watch())
                    rate = await send(bus, first, backlog)
                    watching.cancel()
                    size = (bench.home.data / "outbox.db").stat().st_size / 2**20
                    print(f"offline: {rate:8,.0f} accepted/s (on disk), file {size:.0f} MiB; {peaks}")
                    aside = bench.home.data / "outbox.aside"
                    served = {}
                    for stored in (0, backlog):
                        bench.end("modules.edgehub", kill=True)
                        await sim.inject("refuse")
                        await sim.wait_for(lambda: not sim.is_served(NODE))
                        if stored:
                            for path in bench.home.data.glob("outbox.db*"):
                                path.unlink()
                            move(aside, bench.home.data)
                        else:
                            move(bench.home.data, aside)
                        await sim.inject("clear")
                        begun = time.perf_counter()
                        edgehub = bench.start("modules.edgehub")
                        await sim.wait_served(NODE)
                        served[stored] = time.perf_counter() - begun
                    print(", ".join(f"{n:,} stored: served {took:.2f} s after the start" for n, took in served.items()))
                    peaks = Peaks({"broker": broker, "edgehub": edgehub})
                    watching = asyncio.create_task(peaks.watch())
                    drained = time.perf_counter()
                    while (await status(bus))["stored"]:
                        await asyncio.sleep(0.2)
                    rate = backlog / (time.perf_counter() - drained)
                    watching.cancel()
                    print(f"drained at {rate:8,.0f}/s; {peaks}")
            finally:
                for module in list(bench.running):
                    bench.end(module)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backlog", type=int, default=1_000_000, help="messages stored offline (default 1,000,000)")
    parser.add_argument("--link", choices=["wss", "quic"], default="wss", help="(default wss)")
    options = parser.parse_args()
    asyncio.run(main(options.backlog, is_quic=options.link == "quic"))
