"""What a module may use of the machine, and which cgroup files say so to the kernel. A core.

Limits come from the options of `edgezmq exec` (docs/isolation.md). They hold for the module and everything it starts,
because a cgroup counts memory that is really used: RLIMIT_AS would count address space, of which Go, Java and Node
reserve gigabytes, and RLIMIT_NPROC counts all processes of a user.

Both interfaces of the kernel are known: cgroup v2 (Documentation/admin-guide/cgroup-v2.rst) and v1 (cgroup-v1/), also
side by side (systemd's "hybrid"), where each controller belongs to one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from runtime.errors import ConfigError, EdgezmqError

V1: Final = 1
V2: Final = 2

MEMORY: Final = "memory"
CPU: Final = "cpu"
PIDS: Final = "pids"

NODE_LEAF: Final = "edgezmq-node"
"Where the node's own processes go: in v2 a cgroup that hands controllers on may hold no processes itself."
GROUP_PREFIX: Final = "edgezmq-"

LEAST_MEMORY_BYTES: Final = 4 * 2**20
"Below it not even a small C program with libzmq gets through its start."
LEAST_CPU: Final = 0.01
"The kernel takes no quota below 1 ms, which is this much of `PERIOD_MICROSECONDS`."
PERIOD_MICROSECONDS: Final = 100_000
"The kernel's own default: a module that has used its quota pauses for less than that."
LEAST_PIDS: Final = 1
WEIGHTS: Final = (1, 10_000)
"cpu.weight; 100 is what everybody has."

_SIZE: Final = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_FACTORS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_PERCENT: Final = re.compile(r"(\d+(?:\.\d+)?)%", re.ASCII)
_SPEAKING: Final = re.compile(r"[A-Za-z0-9:_.]")


class CannotConfine(EdgezmqError):
    """This machine or this user cannot set a limit; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one module; None: no limit."""

    memory_bytes: int | None = None
    "Beyond it the kernel kills the module."
    cpu: float | None = None
    "In processors: 0.5 is half of one. Beyond it the module pauses."
    pids: int | None = None
    "Processes and threads together; beyond it fork fails with EAGAIN."
    cpu_weight: int | None = None
    "Its share while others want the processor too, from 1 to 10000; 100 is what everybody has."

    def __bool__(self) -> bool:
        return self != Limits()


def parse_memory(text: str) -> int:
    """`64M`, `1G`, `500000`: bytes, in powers of 1024. Raises ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError("--memory", text, "a size such as 64M or 1G")
    size = int(found[1]) * _FACTORS[found[2].upper()]
    if not LEAST_MEMORY_BYTES <= size < 2**60:
        raise ConfigError("--memory", text, f"{LEAST_MEMORY_BYTES // 2**20}M or more: less does not hold a process")
    return size


def parse_cpu(text: str) -> float:
    """`50%` is half of one processor, `200%` two. Raises ConfigError."""
    found = _PERCENT.fullmatch(text.strip())
    if found is None:
        raise ConfigError("--cpu", text, "percent of one processor, such as 50% or 200%")
    share = float(found[1]) / 100
    if not LEAST_CPU <= share <= 10_000:
        raise ConfigError("--cpu", text, "1% or more: the kernel takes no smaller quota")
    return share


def parse_pids(text: str) -> int:
    """How many processes and threads. Raises ConfigError."""
    if not (text.isascii() and text.isdigit() and LEAST_PIDS <= int(text) <= 2**22):
        raise ConfigError("--pids", text, f"a number of processes and threads, {LEAST_PIDS} to {2**22}")
    return int(text)


def parse_weight(text: str) -> int:
    """Raises ConfigError."""
    if not (text.isascii() and text.isdigit() and WEIGHTS[0] <= int(text) <= WEIGHTS[1]):
        raise ConfigError("--cpu-weight", text, f"a number of {WEIGHTS[0]} to {WEIGHTS[1]}; 100 is what everybody has")
    return int(text)


# --- where --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted tree of cgroups, and where in it this process is."""

    version: int
    mount: str
    directory: str
    "Of this process's cgroup, an absolute path; the mount itself for its root."
    controllers: frozenset[str]
    "Of v1 only: a mount's controllers never change there."


def parse_hierarchies(mountinfo: str, own: str) -> list[Hierarchy]:
    """From /proc/self/mountinfo and /proc/self/cgroup (proc(5), cgroups(7))."""
    paths: dict[str, str] = {}
    for line in own.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                paths[controller] = parts[2]
    found: list[Hierarchy] = []
    seen: set[str] = set()
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if not separator or len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        root, mount = _unescape(fields[3]), _unescape(fields[4])
        if kind[0] == "cgroup2":
            version, controllers, key = V2, frozenset[str](), ""
        else:
            named = [option for option in kind[2].split(",") if option in paths and "=" not in option]
            if not named:
                continue  # systemd's own, `name=systemd`, has no controller
            version, controllers, key = V1, frozenset(named), named[0]
        if key in paths and key not in seen:  # the same tree may be mounted twice
            seen.add(key)
            found.append(Hierarchy(version, mount, _below(mount, root, paths[key]), controllers))
    return found


def _below(mount: str, root: str, path: str) -> str:
    """In a container a mount may begin further down (`root`) than the paths of /proc/self/cgroup."""
    if root != "/":
        path = path.removeprefix(root) if path == root or path.startswith(root + "/") else "/"
    return mount if path in ("", "/") or path.startswith("/..") else mount + path


def _unescape(text: str) -> str:
    """mountinfo writes blanks as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def group_of(home: str) -> str:
    """The cgroup above those of all modules of the node in `home`, so that two nodes share none."""
    escaped = "".join(
        part if _SPEAKING.fullmatch(part) else "-" if part == "/" else "".join(f"\\x{b:02x}" for b in part.encode())
        for part in home.strip("/")
    )
    return GROUP_PREFIX + escaped


# --- what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Write:
    """`value` into a file of the module's cgroup."""

    file: str
    value: str
    is_wanted: bool = True
    "False: a kernel without this file does without."


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The module's cgroup in one hierarchy. `parent`, then `directory` in it, are to be made."""

    version: int
    base: str
    "Exists; in v2 its processes have to go to its child `NODE_LEAF` before it hands controllers on."
    parent: str
    directory: str
    controllers: tuple[str, ...]
    writes: tuple[Write, ...]


def plan(
    limits: Limits,
    hierarchies: Sequence[Hierarchy],
    v2_controllers: Callable[[str], frozenset[str]],
    *,
    group: str,
    name: str,
) -> list[Cgroup]:
    """The cgroups that put `limits` into force, one for each hierarchy concerned.

    `v2_controllers(directory)` is what `cgroup.controllers` there says. Pids are counted where they can be, also
    without a limit: to end a fork bomb its processes must be found. Raises CannotConfine for a controller that no
    hierarchy has.
    """
    wanted: dict[str, bool] = {}
    if limits.memory_bytes is not None:
        wanted[MEMORY] = True
    if limits.cpu is not None or limits.cpu_weight is not None:
        wanted[CPU] = True
    wanted[PIDS] = limits.pids is not None
    chosen: dict[str, tuple[Hierarchy, str, list[str]]] = {}
    for controller, is_needed in wanted.items():
        for hierarchy in hierarchies:
            base = base_of(hierarchy)
            has = v2_controllers(base) if hierarchy.version == V2 else hierarchy.controllers
            if controller in has:
                chosen.setdefault(hierarchy.mount, (hierarchy, base, []))[2].append(controller)
                break
        else:
            if is_needed:
                raise CannotConfine(_missing(controller, hierarchies))
    return [
        Cgroup(
            hierarchy.version,
            base,
            f"{base}/{group}",
            f"{base}/{group}/{name}",
            tuple(controllers),
            tuple(write for controller in controllers for write in _writes(hierarchy.version, controller, limits)),
        )
        for hierarchy, base, controllers in chosen.values()
    ]


def base_of(hierarchy: Hierarchy) -> str:
    """Below what the node has; a node whose processes were moved to their leaf still has the cgroup above it."""
    return hierarchy.directory.removesuffix("/" + NODE_LEAF) or "/"


def _missing(controller: str, hierarchies: Sequence[Hierarchy]) -> str:
    if not hierarchies:
        return f"no cgroups are mounted here, so nothing can limit {controller}"
    if any(hierarchy.version == V2 for hierarchy in hierarchies):
        return (
            f"the cgroup of this node has no {controller} controller: under systemd the unit wants Delegate=yes, "
            "in a container the cgroups must be its own and writable; see `cat /sys/fs/cgroup/cgroup.controllers`"
        )
    return f"no {controller} controller is mounted: the kernel was started without it (cgroup_enable={controller}?)"


def _writes(version: int, controller: str, limits: Limits) -> list[Write]:
    if controller == MEMORY:
        return _memory(version, str(limits.memory_bytes))
    if controller == PIDS:
        return [Write("pids.max", "max" if limits.pids is None else str(limits.pids))]
    found = []
    if limits.cpu is not None:
        quota = round(limits.cpu * PERIOD_MICROSECONDS)
        found += (
            [Write("cpu.max", f"{quota} {PERIOD_MICROSECONDS}")]
            if version == V2
            else [Write("cpu.cfs_period_us", str(PERIOD_MICROSECONDS)), Write("cpu.cfs_quota_us", str(quota))]
        )
    if limits.cpu_weight is not None:
        # 100 of v2 is 1024 of v1, which takes 2 at least.
        shares = max(2, round(limits.cpu_weight * 1024 / 100))
        found.append(Write("cpu.weight", str(limits.cpu_weight)) if version == V2 else Write("cpu.shares", str(shares)))
    return found


def _memory(version: int, size: str) -> list[Write]:
    """Without swap: a module that swaps slows the disk for all, long before its limit strikes."""
    if version == V2:
        return [
            Write("memory.max", size),
            Write("memory.swap.max", "0", is_wanted=False),
            # All of the module's processes or none: half a module is worse than one that starts anew.
            Write("memory.oom.group", "1", is_wanted=False),
        ]
    return [
        # Memory with swap may not be below memory, so it goes up first and down last.
        Write("memory.memsw.limit_in_bytes", "-1", is_wanted=False),
        Write("memory.limit_in_bytes", size),
        Write("memory.memsw.limit_in_bytes", size, is_wanted=False),
    ]


# --- what struck --------------------------------------------------------------------------------------

EVENT_FILES: Final = {
    V1: {MEMORY: "memory.oom_control", CPU: "cpu.stat", PIDS: "pids.events"},
    V2: {MEMORY: "memory.events", CPU: "cpu.stat", PIDS: "pids.events"},
}
"Where each controller counts what it did to a cgroup."


@dataclass(frozen=True, slots=True)
class Struck:
    """What the limits did to one run of a module."""

    oom_kills: int = 0
    "Processes that the kernel killed for memory."
    forks_refused: int = 0
    cpu_pauses: int = 0
    "Periods of a tenth of a second in which the module had used up its quota."

    def __str__(self) -> str:
        return f"oom_kills={self.oom_kills} forks_refused={self.forks_refused} cpu_pauses={self.cpu_pauses}"

    @property
    def is_worth_a_warning(self) -> bool:
        """To be slowed down is what a quota of CPU is for; to be killed is not."""
        return bool(self.oom_kills or self.forks_refused)


def struck(texts: Mapping[str, str]) -> Struck:
    """From the text of each controller's file of events, by controller; what is missing counts as nothing."""
    memory, cpu, pids = (_counts(texts.get(controller, "")) for controller in (MEMORY, CPU, PIDS))
    return Struck(memory.get("oom_kill", 0), pids.get("max", 0), cpu.get("nr_throttled", 0))


def _counts(text: str) -> dict[str, int]:
    found = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.isascii() and value.isdigit():
            found[key] = int(value)
    return found
