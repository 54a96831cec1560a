"""Modules as users of their own with limits, beside one that misbehaves: the recipe of docs/isolation.md at work.

Its first part starts a node as that page says, with the files of deploy/isolation: a supervisord that is root, the
node's processes as one user, each module as another, through its own socket, in its own cgroup. Two modules talk all
the time and note how long each answer took; bad neighbours are put beside them, one after the other.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runtime import cgroups, confine
from runtime.broker import STRANGERS_PER_SECOND
from tests.support.aio import until_sync
from tests.support.deadline import DEADLINE
from tests.support.node import Node
from tests.support.users import opening

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "deploy" / "isolation"

NODE_USER = "backup"
"A user that every Debian has, in place of the recipe's `edgezmq`."
UIDS = {"asker": 61_001, "answerer": 61_002, "bad": 61_003}
"No names are needed: the kernel knows none."

QUIET_SECONDS = 3.0
BAD_SECONDS = 4.0
"Long enough for some hundred requests, so that a p99 is one of several."
FACTOR = 20.0
FLOOR_SECONDS = DEADLINE / 40
"The p99 beside a bad neighbour may be so many times the one before, and this much in any case: two processors carry\
 all of it and the other tests, so this tells a node that is hurt (seconds, timeouts) from one that is busy."

CONFIGURATION = f"""
modules:
  edged: {{hostnameOverride: edge-1}}
  edgeHub: {{websocket: {{enable: true, server: "127.0.0.1:9"}}}}
  eventBus: {{mqttMode: 2, mqttServerExternal: "tcp://127.0.0.1:9"}}
runtime:
  broker: {{heartbeatSeconds: 0.5}}
  metrics: {{port: 0}}
  watchdog: {{pollSeconds: 0.5, hangGraceSeconds: 0.5}}
  modules: {{asker: {{}}, answerer: {{}}, bad: {{}}}}
  policy:
    enable: true
    modules:
      asker: {{users: [{UIDS["asker"]}], ownSocket: true, to: [answerer, bad]}}
      answerer: {{users: [{UIDS["answerer"]}], ownSocket: true}}
      bad: {{users: [{UIDS["bad"]}], ownSocket: true, to: [answerer], messagesPerSecond: 500}}
"""

ANSWERER = """
from runtime.module import Module, run

class Answerer(Module):
    name = "answerer"

    async def handle(self, message):
        if message.delivery.expects_reply:
            await self.bus.respond(message, message.response("yes"))

run(Answerer)
"""

# About 150 requests a second, each at its own time: one that takes long holds up no other.
ASKER = """
import asyncio, os, time
from runtime.errors import EdgezmqError
from runtime.message import Message
from runtime.module import Module, run

class Asker(Module):
    name = "asker"

    async def start(self):
        self.file = open(os.environ["EDGEZMQ_HOME"] + "/times", "a", buffering=1)
        self.tasks.create_task(self.ask_on())

    async def ask_on(self):
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self.tasks.create_task(self.ask(due))
            try:
                self.bus.send_nowait("bad", Message.build(content="for you")).add_done_callback(lambda receipt: None)
            except EdgezmqError:
                pass  # it reads nothing: the window to it is full
            due += 1 / 150
            await asyncio.sleep(due - loop.time())

    async def ask(self, due):
        try:
            await self.bus.request("answerer", Message.build(operation="get"), timeout=10)
            fate = "answered"
        except EdgezmqError as fault:
            fate = f"{type(fault).__name__} {fault}"
        self.file.write(f"{due} {time.monotonic() - due} {fate}\\n")

run(Asker)
"""


# --- what this machine can do -------------------------------------------------------------------------


PROBE = ["--name", "probe", "--user", "61000", "--memory", "64M", "--cpu", "50%", "--pids", "8", "--", "true"]


def as_user(user: object, *command: str) -> list[str]:
    return ["setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups", *command]


def why_not() -> str:
    """Why this cannot be run here, or nothing."""
    if os.geteuid() != 0:
        return "needs root, to be several users"
    with other_users_directory() as directory:
        (directory / "run").mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "runtime.exec", *PROBE],
            env={**os.environ, "EDGEZMQ_HOME": str(directory)},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        remove_cgroups(directory)
        if done.returncode:
            return f"needs cgroups that can be written: {done.stderr.strip()}"
        if (prefix := opening()) and subprocess.run([*prefix, "true"], check=False).returncode:
            return f"needs a Python that other users can reach, unlike {sys.base_prefix}"
    return ""


@contextmanager
def other_users_directory() -> Iterator[Path]:
    """pytest's own are closed to other users."""
    directory = Path(tempfile.mkdtemp(prefix="edgezmq-isolation-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def cgroups_of(home: Path) -> dict[str, list[Path]]:
    """The cgroups of each module by its name."""
    with open("/proc/self/mountinfo") as mountinfo, open("/proc/self/cgroup") as own:
        hierarchies = confine.parse_hierarchies(mountinfo.read(), own.read())
    found: dict[str, list[Path]] = {}
    for hierarchy in hierarchies:
        base = Path(hierarchy.directory.removesuffix("/" + confine.NODE_LEAF))
        for directory in (base / confine.group_of(str(home))).glob("*/"):
            found.setdefault(directory.name, []).append(directory)
    return found


def remove_cgroups(home: Path) -> None:
    for directories in cgroups_of(home).values():
        for directory in directories:
            until_sync(lambda directory=directory: not (directory / "cgroup.procs").read_text(), f"{directory} empty")
            directory.rmdir()
            if not any(directory.parent.glob("*/")):
                directory.parent.rmdir()


def events(home: Path, name: str) -> confine.Struck:
    """What the limits have done to the module since its start."""
    texts = {}
    for directory in cgroups_of(home).get(name, []):
        for files in confine.EVENT_FILES.values():
            for controller, file in files.items():
                # A module that is just starting anew gets another cgroup: the file is gone, or ENODEV.
                with suppress(OSError):
                    texts[controller] = (directory / file).read_text()
    return confine.struck(texts)


# --- the node -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What the asker saw of a stretch of time."""

    seconds: list[float]
    lost: list[str]

    @property
    def p99(self) -> float:
        return sorted(self.seconds)[int(len(self.seconds) * 0.99)]


class ConfinedNode(Node):
    """A node after docs/isolation.md."""

    def __init__(self, directory: Path) -> None:
        subprocess.run([RECIPE / "prepare.sh", directory, NODE_USER], check=True)
        super().__init__(directory)
        self.environ["EDGEZMQ_USER"] = NODE_USER
        self.environ["EDGEZMQ_SUPERVISORD_CONF"] = str(RECIPE / "supervisord.conf")

    def up(self) -> None:
        done = subprocess.run(
            [*opening(), sys.executable, "-m", "runtime.cli", "up", "-d"],
            env=self.environ,
            stderr=subprocess.PIPE,
            text=True,
            timeout=4 * DEADLINE,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def add_user_module(self, name: str, code: str, limits: str) -> None:
        file = self.home.path / "code" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
        # As the recipe's own programs are.
        text = (RECIPE / "modules.d" / "thermostat.conf").read_text()
        command = (
            f'command="%(ENV_EDGEZMQ_PYTHON)s" -m runtime.exec --name {name} --user {UIDS[name]} '
            f'{limits.replace("%", "%%")} -- "%(ENV_EDGEZMQ_PYTHON)s" {file}'
        )
        text = re.sub(r"command=.*", lambda _: command, text).replace("thermostat", name)
        (self.home.modules / f"{name}.conf").write_text(text)

    def pids(self) -> dict[str, int]:
        """Of what is to live throughout: mqtt-broker ends by itself, as configuration wants it."""
        passing = {"bad", "mqtt-broker"}
        return {program.name: program.pid for program in self.supervisor.programs() if program.name not in passing}

    @contextmanager
    def neighbour(self, code: str, limits: str) -> Iterator[None]:
        """A bad module for as long as the block lasts."""
        self.add_user_module("bad", code, limits)
        self.supervisor.reread()
        self.supervisor.add("bad")
        try:
            yield
        finally:
            self.supervisor.stop("bad", wait=False)
            self.until(lambda: self.program("bad").state in ("STOPPED", "EXITED", "FATAL"), "it to be stopped")
            self.supervisor.remove("bad")
            (self.home.modules / "bad.conf").unlink()
            (self.home.log / "bad.log").unlink(missing_ok=True)

    def log(self, name: str) -> str:
        return super().log(name) if (self.home.log / f"{name}.log").exists() else ""

    def answers(self, begin: float, end: float) -> Answers:
        """Of the requests that fell due between the two; waits until the last has its answer, or none."""
        file = self.home.own_home("asker") / "times"

        def rows() -> list[list[str]]:
            return [line.split(" ", 2) for line in file.read_text().splitlines()]

        due = int((end - begin) * 150 * 0.9)

        def there() -> bool:
            return sum(begin <= float(row[0]) < end for row in rows()) >= due and any(
                float(row[0]) > end for row in rows()
            )

        self.until(there, f"{due} requests")
        found = [row for row in rows() if begin <= float(row[0]) < end]
        return Answers([float(row[1]) for row in found], [row[2] for row in found if row[2] != "answered"])

    def processes(self) -> list[int]:
        """Also those of modules, whose homes are within the node's."""
        mark = f"EDGEZMQ_HOME={self.home.path}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if any(each.startswith(mark) for each in (entry / "environ").read_bytes().split(b"\0")):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def end(self) -> None:
        super().end()
        remove_cgroups(self.home.path)


@pytest.fixture(scope="module")
def node() -> Iterator[ConfinedNode]:
    if reason := why_not():
        pytest.skip(reason)
    with other_users_directory() as directory:
        node = ConfinedNode(directory / "home")
        try:
            node.configure(CONFIGURATION)
            node.add_user_module("answerer", ANSWERER, "--memory 96M --cpu 100% --pids 16")
            node.add_user_module("asker", ASKER, "--memory 96M --cpu 100% --pids 16")
            node.up()
            for name in ("broker", "edgehub", "eventbus", "watchdog", "asker", "answerer"):
                node.wait_running(name)
            node.until(lambda: (node.home.own_home("asker") / "times").exists(), "the first answer")
            yield node
            done = node.edgezmq("down")
            assert done.returncode == 0, done.stderr
            assert not node.processes()
            assert not cgroups_of(node.home.path)
        finally:
            node.end()


def status(node: ConfinedNode) -> dict[str, Any]:
    """Asked as the node's own user, as an operator does."""
    done = subprocess.run(
        [*opening(), *as_user(NODE_USER, sys.executable, "-m", "runtime.cli", "status", "--json")],
        env=node.environ,
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE,
        check=False,
    )
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def paced(node: ConfinedNode) -> int:
    """Messages of the bad module that wait for its quota."""
    return next((int(row.get("paced", 0)) for row in status(node)["modules"] if row["name"] == "bad"), 0)


def refused_frames(node: ConfinedNode) -> int:
    return sum(status(node)["broker"]["refused_frames"].values())


# --- who is who ---------------------------------------------------------------------------------------


def test_each_process_is_the_user_that_the_recipe_says_and_can_become_nobody_else(node: ConfinedNode) -> None:
    uids = {}
    for name, pid in node.pids().items():
        text = Path(f"/proc/{pid}/status").read_text() if pid else ""
        found = re.search(r"^Uid:\t(\d+)\t(\d+)\t(\d+)\t(\d+)$", text, re.MULTILINE)
        if found:
            assert len(set(found.groups())) == 1
            uids[name] = int(found[1])
        if name in UIDS:
            assert "NoNewPrivs:\t1" in text
            assert "CapEff:\t0000000000000000" in text
            assert re.search(r"^Groups:\s*$", text, re.MULTILINE)
    own = pwd.getpwnam(NODE_USER).pw_uid
    assert uids == {
        **dict.fromkeys(("broker", "edgehub", "eventbus", "watchdog"), own),
        "asker": UIDS["asker"],
        "answerer": UIDS["answerer"],
    }


def test_a_module_sees_nothing_of_the_nodes_files_nor_of_anothers(node: ConfinedNode) -> None:
    home = node.home
    secrets = [home.node_json, home.log / "broker.log", home.bus_socket, home.supervisor_socket]
    secrets += [home.own_home("asker") / "times", home.path / "edgecore.yaml"]
    (home.path / "edgecore.yaml").chmod(0o640)
    for secret in secrets:
        assert secret.exists()
        done = subprocess.run(
            as_user(UIDS["bad"], "sh", "-c", 'test ! -r "$0" && test ! -w "$0" && echo closed', str(secret)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "closed\n", secret


def test_root_gives_the_node_another_policy_while_it_runs(node: ConfinedNode) -> None:
    done = node.edgezmq("reload")
    assert done.returncode == 0, done.stderr
    assert node.home.node_json.stat().st_mode & 0o777 == 0o640
    assert node.home.node_json.stat().st_gid == pwd.getpwnam(NODE_USER).pw_gid


# --- bad neighbours -----------------------------------------------------------------------------------


@contextmanager
def unharmed(node: ConfinedNode, what: str, code: str, limits: str) -> Iterator[None]:
    """The others answer all that they are asked, about as fast as before, and none of them is restarted."""
    begin = time.monotonic()
    time.sleep(QUIET_SECONDS)  # measures
    quiet = node.answers(begin, begin + QUIET_SECONDS)
    pids = node.pids()
    with node.neighbour(code, limits):
        begin = time.monotonic()
        yield
        rest = begin + BAD_SECONDS - time.monotonic()
        if rest > 0:
            time.sleep(rest)  # measures
        end = time.monotonic()
        disturbed = node.answers(begin, end)
    print(
        f"\n{what}: p99 {quiet.p99 * 1000:.1f} ms before, {disturbed.p99 * 1000:.1f} ms beside it, "
        f"requests={len(disturbed.seconds)} lost={len(disturbed.lost)}"
    )
    assert not quiet.lost
    assert not disturbed.lost
    assert node.pids() == pids
    assert disturbed.p99 <= max(FLOOR_SECONDS, FACTOR * quiet.p99)


FLOOD = """
from runtime.message import Message
from runtime.module import Module, run

class Flood(Module):
    name = "bad"

    async def start(self):
        self.tasks.create_task(self.flood())

    async def flood(self):
        while True:
            await self.bus.send("answerer", Message.build(content="x" * 200))

    async def handle(self, message):
        pass

run(Flood)
"""


def test_one_that_sends_without_end_is_held_to_its_quota(node: ConfinedNode) -> None:
    with unharmed(node, "flood", FLOOD, "--memory 96M --cpu 50% --pids 16"):
        node.until(lambda: paced(node), "messages that wait for the quota")


HAMMER = """
import os, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(os.environ["EDGEZMQ_BUS"])
while True:
    socket.send_multipart([b"EMP/1", b"nonsense" * 20])
"""


def test_one_that_talks_nonsense_as_fast_as_it_can_is_listened_to_now_and_then(node: ConfinedNode) -> None:
    with unharmed(node, "nonsense", HAMMER, "--memory 96M --cpu 25% --pids 16"):
        begin, before = time.monotonic(), refused_frames(node)
        node.until(lambda: refused_frames(node) - before > STRANGERS_PER_SECOND, "some of it to be refused")
        assert refused_frames(node) - before <= STRANGERS_PER_SECOND * (2 + time.monotonic() - begin)


LEAK = """
import time
kept = []
while True:
    kept.append(b"x" * 2**20)
    time.sleep(0.002)
"""


def test_one_that_leaks_is_killed_and_starts_anew(node: ConfinedNode) -> None:
    with unharmed(node, "leak", LEAK, "--memory 48M --cpu 50% --pids 16"):
        node.until(lambda: re.search(r"last run of bad hit its limits: oom_kills=[1-9]", node.log("bad")), "a kill")


BOMB = """
import os, time
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except BlockingIOError:
        time.sleep(0.001)
"""


def test_one_that_forks_without_end_stays_within_its_number_and_leaves_nothing_behind(node: ConfinedNode) -> None:
    with unharmed(node, "fork", BOMB, "--memory 96M --cpu 50% --pids 24"):
        node.until(lambda: events(node.home.path, "bad").forks_refused > 100, "forks that are refused")
        children = {pid for pid in node.processes() if os.stat(f"/proc/{pid}").st_uid == UIDS["bad"]}
        assert 2 <= len(children) <= 24
        first = node.program("bad").pid
        os.kill(first, signal.SIGKILL)
        # Its children live, and have its lock. The next start ends them.
        node.wait_running("bad", not_pid=first)
        node.until(lambda: "left behind: processes=" in node.log("bad"), "the leftovers to be ended")
        assert re.search(r"last run of bad hit its limits: oom_kills=\d+ forks_refused=[1-9]", node.log("bad"))
        node.until(lambda: children.isdisjoint(node.processes()), "the end of all of them")
        # Those of the last start are for `edgezmq down`.


BURN = """
import os
for _ in range(3):
    os.fork()
while True:
    pass
"""


def test_one_that_computes_without_end_pauses(node: ConfinedNode) -> None:
    with unharmed(node, "burn", BURN, "--memory 96M --cpu 50% --pids 16"):
        node.until(lambda: events(node.home.path, "bad").cpu_pauses > 10, "the quota of the processor")


STOPPED = """
import asyncio, os, signal
from runtime.module import Module, run

class Stopped(Module):
    name = "bad"
    liveness = 1.5

    async def start(self):
        self.tasks.create_task(self.stop_soon())

    async def stop_soon(self):
        await asyncio.sleep(1)
        os.kill(os.getpid(), signal.SIGSTOP)

    async def handle(self, message):
        pass

run(Stopped)
"""


def test_one_that_stops_reading_is_ended_though_the_watchdog_is_another_user(node: ConfinedNode) -> None:
    with unharmed(node, "stopped", STOPPED, "--memory 96M --cpu 50% --pids 16"):
        first = node.wait_running("bad")
        node.until(lambda: node.program("bad").pid not in (0, first), "the next one")
        counts = json.loads(node.home.watchdog_json.read_text())["bad"]
        assert counts["kills"] >= 1


# --- edgezmq exec by itself ---------------------------------------------------------------------------


@pytest.fixture
def home() -> Iterator[Path]:
    if reason := why_not():
        pytest.skip(reason)
    with other_users_directory() as directory:
        (directory / "run").mkdir()
        (directory / "run").chmod(0o777)
        yield directory
        list(cgroups.end_modules(directory, lambda pid: True))


LIMITED = "--memory=64M --cpu=50% --pids=8"


def exec_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "runtime.exec", *arguments]


def run_exec(home: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*opening(), *command],
        # Root's own, such as a virtual environment's, is not to be needed.
        env={"PATH": os.environ["PATH"], "EDGEZMQ_HOME": str(home)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_what_a_module_leaves_behind_is_ended_by_its_next_start_though_it_has_its_lock(home: Path) -> None:
    command = exec_command("--name", "cam", *LIMITED.split(), "--", "sh", "-c", "setsid sleep 1000 >&- 2>&- & echo $!")
    left = int(run_exec(home, command).stdout)
    assert Path(f"/proc/{left}").exists()
    done = run_exec(home, exec_command("--name", "cam", *LIMITED.split(), "--", "echo", "runs"))
    assert done.stdout == "runs\n"
    assert done.stderr == "edgezmq exec: killed what the last run of cam left behind: processes=1\n"


def test_one_that_lives_is_not_ended_by_a_second_start(home: Path) -> None:
    command = exec_command("--name", "cam", *LIMITED.split(), "--", "sh", "-c", "echo runs; exec sleep 1000")
    environ = {"PATH": os.environ["PATH"], "EDGEZMQ_HOME": str(home)}
    with subprocess.Popen(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"runs\n"
        done = run_exec(home, exec_command("--name", "cam", *LIMITED.split(), "--", "true"))
        assert done.returncode == 1
        assert f"is held by pid {first.pid}: it is already running" in done.stderr
        assert first.poll() is None
        first.kill()


def test_the_end_of_a_node_is_the_end_of_what_its_modules_left_behind_and_of_their_cgroups(home: Path) -> None:
    command = exec_command("--name", "cam", *LIMITED.split(), "--", "sh", "-c", "setsid sleep 1000 >&- 2>&- & echo $!")
    left = int(run_exec(home, command).stdout)
    assert list(cgroups.end_modules(home, lambda pid: False)) == []
    assert cgroups_of(home)
    assert set(cgroups.end_modules(home, lambda pid: pid == left)) == {("cam", left)}
    assert not cgroups_of(home)


def test_a_user_without_rights_is_told_what_to_do(home: Path) -> None:
    done = run_exec(home, as_user(61_000, *exec_command("--name", "a", "--user", "nobody", "--", "true")))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "expected root, who alone can become another user; or a systemd unit with User=" in done.stderr
    done = run_exec(home, as_user(61_000, *exec_command("--name", "a", "--memory", "64M", "--", "true")))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "closed to this user: limits need root, or a systemd unit with Delegate=yes" in done.stderr


def test_a_module_cannot_write_into_the_file_of_its_lock(home: Path) -> None:
    """Whose pid stands there is ended as a leftover, so that a module is not to choose it."""
    command = exec_command(
        "--name", "cam", "--user", "61000", "--", "sh", "-c", "ls -l /proc/self/fd; echo $EDGEZMQ_HOME"
    )
    done = run_exec(home, command)
    [line] = [line for line in done.stdout.splitlines() if line.endswith("run/cam.lock")]
    assert line.startswith("lr-x"), line
    assert done.stdout.endswith(f"{home}/homes/cam\n")
    assert (home / "homes" / "cam").stat().st_uid == 61_000
