"""Limits as options, and the cgroup files that put them into force, for both interfaces of the kernel."""

from __future__ import annotations

import pytest

from runtime.confine import (
    V1,
    V2,
    CannotConfine,
    Hierarchy,
    Limits,
    Struck,
    Write,
    group_of,
    parse_cpu,
    parse_hierarchies,
    parse_memory,
    parse_pids,
    parse_weight,
    plan,
    struck,
)
from runtime.errors import ConfigError

ALL = Limits(memory_bytes=64 * 2**20, cpu=0.5, pids=32, cpu_weight=50)

SYSTEMD_V2 = """\
24 30 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw
31 24 0:26 / /sys/fs/cgroup rw,nosuid,nodev shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
"""
V1_MOUNTS = """\
40 24 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
41 24 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
42 24 0:32 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
43 24 0:33 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
44 24 0:34 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
45 24 0:31 / /mnt/again rw - cgroup cgroup rw,memory
"""
V1_OWN = "5:name=systemd:/\n4:pids:/\n3:memory:/box/7\n2:cpu,cpuacct:/\n0::/\n"


def nothing(directory: str) -> frozenset[str]:
    return frozenset()


# --- limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64M", 64 * 2**20),
        ("64m", 64 * 2**20),
        ("64MiB", 64 * 2**20),
        ("1G", 2**30),
        ("8192 K", 2**23),
        ("5000000", 5_000_000),
        ("4M", 2**22),
    ],
)
def test_a_size_is_read_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "M", "64X", "-64M", "1.5G", "64 M B", "٦٤M", "3M", "0", "99999999T"])
def test_what_is_no_size_or_holds_no_process_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_memory(text)


@pytest.mark.parametrize(("text", "share"), [("50%", 0.5), ("200%", 2.0), ("1%", 0.01), ("12.5%", 0.125)])
def test_cpu_is_in_percent_of_one_processor(text: str, share: float) -> None:
    assert parse_cpu(text) == share


@pytest.mark.parametrize("text", ["", "50", "0%", "0.5%", "-1%", "%", "1e2%", "99999999999%"])
def test_what_is_no_share_of_a_processor_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--cpu"):
        parse_cpu(text)


def test_pids_and_weight_have_bounds() -> None:
    assert (parse_pids("1"), parse_pids("4194304"), parse_weight("1"), parse_weight("10000")) == (1, 2**22, 1, 10_000)
    for parse, texts in ((parse_pids, ["0", "", "-1", "4194305", "x", "²"]), (parse_weight, ["0", "10001", "1%", ""])):
        for text in texts:
            with pytest.raises(ConfigError):
                parse(text)


# --- where --------------------------------------------------------------------------------------------


def test_a_unit_of_systemd_on_v2() -> None:
    [found] = parse_hierarchies(SYSTEMD_V2, "0::/system.slice/edgezmq.service\n")
    assert found == Hierarchy(V2, "/sys/fs/cgroup", "/sys/fs/cgroup/system.slice/edgezmq.service", frozenset())


def test_v1_with_a_v2_that_has_no_controllers_beside_it() -> None:
    found = parse_hierarchies(V1_MOUNTS, V1_OWN)
    assert [(each.version, each.directory, sorted(each.controllers)) for each in found] == [
        (V1, "/sys/fs/cgroup/cpu,cpuacct", ["cpu", "cpuacct"]),
        (V1, "/sys/fs/cgroup/memory/box/7", ["memory"]),
        (V1, "/sys/fs/cgroup/pids", ["pids"]),
        (V2, "/sys/fs/cgroup/unified", []),
    ]


def test_in_a_container_paths_begin_where_the_mount_does() -> None:
    mount = "31 24 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    [found] = parse_hierarchies(mount, "0::/docker/abc/inner\n")
    assert found.directory == "/sys/fs/cgroup/inner"
    [found] = parse_hierarchies(mount, "0::/docker/abc\n")
    assert found.directory == "/sys/fs/cgroup"
    [found] = parse_hierarchies(mount, "0::/docker/abcdef\n")
    assert found.directory == "/sys/fs/cgroup"


def test_a_blank_in_a_mount_point_is_unescaped_and_nonsense_is_passed_over() -> None:
    text = "31 24 0:26 / /a\\040b rw - cgroup2 c rw\n\nnonsense - cgroup2\n1 2 - cgroup x rw\n"
    assert [found.mount for found in parse_hierarchies(text, "0::/\nnonsense\n")] == ["/a b"]


def test_two_nodes_share_no_cgroup() -> None:
    homes = ["/var/lib/edgezmq", "/var/lib-edgezmq", "/var/lib/edgezmq-2", "/var/lib/edgezmq/2", "/vär"]
    assert group_of(homes[0]) == "edgezmq-var-lib-edgezmq"
    assert len({group_of(home) for home in homes}) == len(homes)
    assert not any("/" in group_of(home) for home in homes)


# --- what ---------------------------------------------------------------------------------------------


def test_everything_on_v2_is_one_cgroup_beside_the_nodes_own_leaf() -> None:
    own = parse_hierarchies(SYSTEMD_V2, "0::/system.slice/edgezmq.service/edgezmq-node\n")
    base = "/sys/fs/cgroup/system.slice/edgezmq.service"
    asked: list[str] = []

    def controllers(directory: str) -> frozenset[str]:
        asked.append(directory)
        return frozenset({"memory", "cpu", "pids", "io"})

    [found] = plan(ALL, own, controllers, group="edgezmq-x", name="camera")
    assert set(asked) == {base}
    assert (found.base, found.parent) == (base, f"{base}/edgezmq-x")
    assert found.directory == f"{base}/edgezmq-x/camera"
    assert found.controllers == ("memory", "cpu", "pids")
    assert [(write.file, write.value) for write in found.writes] == [
        ("memory.max", "67108864"),
        ("memory.swap.max", "0"),
        ("memory.oom.group", "1"),
        ("cpu.max", "50000 100000"),
        ("cpu.weight", "50"),
        ("pids.max", "32"),
    ]


def test_on_v1_it_is_one_in_each_hierarchy() -> None:
    found = plan(ALL, parse_hierarchies(V1_MOUNTS, V1_OWN), nothing, group="edgezmq-x", name="camera")
    assert {cgroup.directory: [(write.file, write.value) for write in cgroup.writes] for cgroup in found} == {
        "/sys/fs/cgroup/memory/box/7/edgezmq-x/camera": [
            ("memory.memsw.limit_in_bytes", "-1"),
            ("memory.limit_in_bytes", "67108864"),
            ("memory.memsw.limit_in_bytes", "67108864"),
        ],
        "/sys/fs/cgroup/cpu,cpuacct/edgezmq-x/camera": [
            ("cpu.cfs_period_us", "100000"),
            ("cpu.cfs_quota_us", "50000"),
            ("cpu.shares", "512"),
        ],
        "/sys/fs/cgroup/pids/edgezmq-x/camera": [("pids.max", "32")],
    }


def test_each_controller_is_taken_where_it_is() -> None:
    """systemd's hybrid: some belong to v2, the others stay in v1."""
    mounts = V1_MOUNTS.replace("rw,memory", "rw,hugetlb")
    found = plan(
        ALL,
        parse_hierarchies(mounts, V1_OWN.replace("memory", "hugetlb")),
        lambda directory: frozenset({"memory"}) if directory.endswith("unified") else frozenset(),
        group="g",
        name="n",
    )
    assert {(cgroup.version, cgroup.controllers) for cgroup in found} == {
        (V2, ("memory",)),
        (V1, ("cpu",)),
        (V1, ("pids",)),
    }


def test_processes_are_counted_even_without_a_limit_so_that_leftovers_are_found() -> None:
    found = plan(Limits(memory_bytes=2**26), parse_hierarchies(V1_MOUNTS, V1_OWN), nothing, group="g", name="n")
    assert [cgroup.controllers for cgroup in found] == [("memory",), ("pids",)]
    assert found[1].writes == (Write("pids.max", "max"),)


def test_a_controller_that_is_nowhere_is_told_with_what_to_do() -> None:
    own = parse_hierarchies(SYSTEMD_V2, "0::/x.service\n")
    with pytest.raises(CannotConfine, match=r"no memory controller.*Delegate=yes"):
        plan(ALL, own, nothing, group="g", name="n")
    with pytest.raises(CannotConfine, match="no cgroups are mounted"):
        plan(Limits(pids=3), [], nothing, group="g", name="n")
    [only_cpu, *_] = parse_hierarchies(V1_MOUNTS, V1_OWN)
    with pytest.raises(CannotConfine, match="started without it"):
        plan(Limits(pids=3), [only_cpu], nothing, group="g", name="n")
    assert plan(Limits(cpu=1.0), [only_cpu], nothing, group="g", name="n")  # without pids it goes all the same


def test_no_limits_are_false() -> None:
    assert not Limits()
    assert Limits(pids=1)


# --- what struck --------------------------------------------------------------------------------------


def test_what_struck_is_read_from_the_kernels_counts() -> None:
    v2 = {
        "memory": "low 0\nhigh 0\nmax 31\noom 2\noom_kill 3\noom_group_kill 1\n",
        "pids": "max 17\n",
        "cpu": "usage_usec 5\nnr_periods 9\nnr_throttled 4\nthrottled_usec 100\n",
    }
    assert struck(v2) == Struck(oom_kills=3, forks_refused=17, cpu_pauses=4)
    v1 = {"memory": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", "pids": "max x\nnonsense\n"}
    assert struck(v1) == Struck(oom_kills=2)
    assert struck({}) == Struck()


def test_to_be_killed_is_worth_a_warning_to_be_slowed_is_not() -> None:
    assert Struck(oom_kills=1).is_worth_a_warning
    assert Struck(forks_refused=1).is_worth_a_warning
    assert not Struck(cpu_pauses=1000).is_worth_a_warning
    assert str(Struck(1, 2, 3)) == "oom_kills=1 forks_refused=2 cpu_pauses=3"
