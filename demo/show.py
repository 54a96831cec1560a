"""The performance: traffic in both directions, processes killed in its middle, and what became of every message."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final, NoReturn

from demo.around import QUIC
from demo.children import DemoFailed
from demo.cloud import CloudApplication
from demo.device import COMMANDS, MEASUREMENTS, Device
from demo.stage import NODE, Stage, wait
from demo.tally import Kill, Tally
from demo.telling import Teller

READY_SECONDS: Final = 30.0
"From the node's start until the first message has crossed it in both directions."
REPEAT_SECONDS: Final = 2.0
"The cloud application asks again when no answer has come for so long."
HELLO_SECONDS: Final = 0.3
"Between two attempts to be heard at the start, while eventbus has not yet subscribed."
PATIENCE_SECONDS: Final = 30.0
"Without any progress for so long, what has not arrived is lost."
QUIET_SECONDS: Final = 1.0
"After everything has arrived: time for a duplicate to show."
_TICK_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What is to be shown."""

    uploads: int = 2000
    commands: int = 200
    seconds: float = 8.0
    "Over which the traffic is spread, not counting the time for recovery."
    kills: Sequence[str] = ("edgehub", "broker")
    "Programs to kill with SIGKILL, one after another, evenly spread over the traffic."


ROLES: Final = {
    "edgehub": "edgehub, the process that holds the connection to the cloud",
    "broker": "the broker, through which every message between processes goes",
    "eventbus": "eventbus, the process that talks MQTT",
    "watchdog": "the watchdog, which has dead processes started again at once",
}


class Show:
    """One run of a `Script` on a started `Stage`; `run` once."""

    def __init__(self, stage: Stage, script: Script, teller: Teller) -> None:
        self.tally = Tally()
        self._stage = stage
        self._script = script
        self._teller = teller
        self._mark = secrets.token_hex(4)
        "In every payload, so that nothing but this run's messages is counted."
        self._cloud = CloudApplication(stage.control_port, NODE, is_content_bytes=stage.link == QUIC)
        self._device: Device | None = None
        self._at_device: SimpleQueue[int] = SimpleQueue()
        self._payloads: dict[int, str] = {}
        self._damaged = 0
        self._heard_up = self._heard_down = False
        self._asked_at: dict[int, float] = {}
        "When each unanswered command was sent last."
        self._progress_at = 0.0
        self._pids: dict[str, int] = {}
        self._watched: Kill | None = None
        "The kill whose recovery has not yet been told."

    # --- before the traffic ------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Until one message has crossed the whole node in each direction; those two do not count."""
        cloud, stage = self._cloud, self._stage
        cloud.listen()
        wait(cloud.is_served, "the cloud link", READY_SECONDS, log=stage.home.log / "edgehub.log")
        self._device = Device(stage.mqtt_port, f"demo-device-{self._mark}", self._obey)
        deadline = time.monotonic() + READY_SECONDS
        again = 0.0
        while not (self._heard_up and self._heard_down):
            now = time.monotonic()
            if now > deadline:
                what = "from the cloud to the device" if self._heard_up else "from the device to the cloud"
                raise DemoFailed(f"no message gets {what}", stage.home.log / "eventbus.log")
            if now > again:
                again = now + HELLO_SECONDS
                stage.check()
                if not self._heard_up:
                    self._device.publish(MEASUREMENTS, self._payload(hello=0))
                if not self._heard_down:
                    cloud.command(COMMANDS, {"run": self._mark, "hello": 0})
            self._hear(now)
        self._pids = stage.pids()

    def close(self) -> None:
        if self._device is not None:
            self._device.close()

    # --- the traffic ---------------------------------------------------------------------------------

    def run(self) -> Tally:
        """Send everything, kill what the script says, and wait until nothing more comes."""
        script, tally = self._script, self.tally
        acts = len(script.kills) + 1
        started = time.monotonic()
        paused = 0.0  # seconds that the traffic stood still because a process had not come back yet
        last = started
        self._progress_at = started
        complete_at: float | None = None
        while True:
            now = time.monotonic()
            act = len(tally.kills)
            # While one kill has not been recovered from, traffic goes on up to where the next is due.
            share = (now - started - paused) / script.seconds
            limit = (act + 1) / acts
            if share >= limit:
                if act == len(script.kills):
                    share = 1.0
                elif tally.current_kill is None:
                    self._kill(script.kills[act], now)
                else:
                    paused += now - last
                share = min(share, limit)
            last = now
            self._send(share, now)
            self._ask_again(now)
            self._hear(now)
            self._watch_kill(now)
            self._teller.progress(tally, script.uploads, script.commands)
            everything_sent = tally.uploads.sent == script.uploads and tally.commands.sent == script.commands
            if everything_sent and tally.is_complete(len(script.kills)):
                complete_at = complete_at or now
                if now - complete_at > QUIET_SECONDS:
                    break
            elif now - self._progress_at > PATIENCE_SECONDS:
                break
        self._teller.end_progress()
        return tally

    def _send(self, share: float, now: float) -> None:
        script, tally = self._script, self.tally
        assert self._device is not None
        for number in range(tally.uploads.sent, int(script.uploads * share)):
            payload = self._payload(upload=number, celsius=round(20 + number % 100 / 10, 1))
            self._payloads[number] = payload.decode()
            tally.uploads.send(number, now)
            self._device.publish(MEASUREMENTS, payload)
        for number in range(tally.commands.sent, int(script.commands * share)):
            tally.commands.send(number, now)
            tally.at_device.send(number, now)
            self._command(number, now)

    def _command(self, number: int, now: float) -> None:
        # Also when the cloud has no session with the node just now: that is what asking again is for.
        self._asked_at[number] = now
        self._cloud.command(COMMANDS, {"run": self._mark, "command": number, "light": number % 2 == 0})

    def _ask_again(self, now: float) -> None:
        due = [number for number, asked in self._asked_at.items() if now - asked > REPEAT_SECONDS]
        for number in due:
            self._command(number, now)

    def _payload(self, **content: Any) -> bytes:
        return json.dumps({"run": self._mark, **content}).encode()

    def _obey(self, payload: bytes) -> bytes | None:
        """The device gets a command (in the MQTT client's thread): do it, and answer naming it."""
        content = _json(payload)
        if content.get("run") != self._mark:
            return None
        if "hello" in content:
            return self._payload(hello_answer=0)
        number = content.get("command")
        if not isinstance(number, int):
            return None
        self._at_device.put(number)
        return self._payload(answer_to=number, done=True)

    def _hear(self, now: float) -> None:
        """Take in what has come up to the cloud, and what the device has got. Waits a moment for the first."""
        tally = self.tally
        numbers = []
        timeout = _TICK_SECONDS
        with contextlib.suppress(Empty):
            while True:
                arrived = self._cloud.inbox.get(timeout=timeout) if timeout else self._cloud.inbox.get_nowait()
                timeout = 0.0
                if arrived is None:
                    self._cloud_has_ended()
                number = self._arrived(arrived[1])
                if number is not None:
                    numbers.append(number)
        with contextlib.suppress(Empty):
            while True:
                tally.at_device.arrive(self._at_device.get_nowait())
        kill = tally.current_kill
        if kill is not None and not kill.served_at and tally.uploads.arrived_since(kill.at, numbers):
            kill.served_at = time.monotonic()

    def _cloud_has_ended(self) -> NoReturn:
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            self._stage.check()  # tells how it ended; sockets close a moment before it can be seen
            time.sleep(0.01)
        raise DemoFailed("cloudsim has ended its stream of events", self._stage.log / "cloudsim.log")

    def _arrived(self, content: Any) -> int | None:
        """One message has come up; the number of an upload that is ours and undamaged."""
        text = content if isinstance(content, str) else ""
        fields = _json(text)
        if fields.get("run") != self._mark:
            return None
        self._heard_up = self._heard_up or "hello" in fields
        self._heard_down = self._heard_down or "hello_answer" in fields
        answered = fields.get("answer_to")
        if isinstance(answered, int):
            if self._asked_at.pop(answered, None) is not None:
                self._progress_at = time.monotonic()
            self.tally.commands.arrive(answered)
            return None
        number = fields.get("upload")
        if not isinstance(number, int):
            return None
        if text != self._payloads.get(number):
            self._damaged += 1  # then it counts as lost
            return None
        self.tally.uploads.arrive(number)
        self._progress_at = time.monotonic()
        return number

    # --- the kills ---------------------------------------------------------------------------------------

    def _kill(self, program: str, now: float) -> None:
        pid = self._stage.pids().get(program, 0)
        if not pid:
            raise DemoFailed(f"{program} does not run", self._stage.home.log / f"{program}.log")
        self._teller.end_progress()
        self._teller.step(
            f"Now kill -9 {pid}: {ROLES.get(program, program)}, dies at once and cannot say goodbye.", style="bold red"
        )
        self._watched = Kill(program, pid, time.monotonic())
        self.tally.kills.append(self._watched)
        os.kill(pid, signal.SIGKILL)
        self._progress_at = now

    def _watch_kill(self, now: float) -> None:
        self._stage.check()
        kill = self._watched
        if kill is None:
            return
        if not kill.new_pid:
            pid = self._stage.pid_in_lock(kill.program)
            if pid and pid != kill.old_pid:
                kill.new_pid, kill.back_at = pid, time.monotonic()
        if kill.is_over:
            self._teller.end_progress()
            self._teller.step(
                f"{kill.program} is back as process {kill.new_pid} after {kill.back_at - kill.at:.2f} s; after "
                f"{kill.served_at - kill.at:.2f} s the first measurement published since the kill was in the cloud.",
                style="bold green",
            )
            self._watched = None
            self._progress_at = now

    # --- afterwards ----------------------------------------------------------------------------------------

    def verdict(self) -> list[str]:
        """What is not as it should be, in words; empty when all is well."""
        tally, script = self.tally, self._script
        faults = []
        if tally.uploads.lost:
            faults.append(f"{tally.uploads.lost} uploads did not arrive: {_some(tally.uploads.missing())}")
        if tally.uploads.sent < script.uploads or tally.commands.sent < script.commands:
            faults.append("not everything was sent, because a killed process did not come back in time")
        if self._damaged:
            faults.append(f"{self._damaged} uploads arrived with another content than they were sent with")
        if tally.commands.lost:
            faults.append(f"{tally.commands.lost} commands were never answered: {_some(tally.commands.missing())}")
        if tally.recovered < len(script.kills):
            faults.append(f"{tally.recovered} of {len(script.kills)} kills were made and recovered from")
        expected = {kill.program for kill in tally.kills}
        for program, pid in self._stage.pids().items():
            if program not in expected and self._pids.get(program, pid) != pid:
                faults.append(f"{program} was started again though nobody killed it")
        return faults


def _json(payload: bytes | str) -> dict[str, Any]:
    try:
        content = json.loads(payload)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (", …" if len(numbers) > 8 else "")
