"""Hostile lengths: what a decoder allocates follows what came, not what a length in it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.seeds import join_frames

ROOT = Path(__file__).parents[2]
MIB = 2**20
ROOM_BYTES = 96 * MIB
"Of address space that the decoders get beyond what Python and the libraries have mapped."
ALLOWED_FACTOR = 40
"Bytes of Python objects for one byte of input: a list of empty lists needs most."
ALLOWED_BYTES = MIB

_HEAD = b"HTTP/1.1 200 OK\r\n"
HOSTILE: dict[str, list[bytes]] = {
    "websocket_from_cloud": [
        b"\x81\x7f\x7f" + b"\xff" * 7 + b"x",
        b"\x01\x00" + b"\x00\x00" * 50_000,
        b"\x01\x7e\x0f\xff" + b"x" * 5000 + b"\x80\x7f\x00\x00\x00\xff\xff\xff\xff\xff",
    ],
    "websocket_to_cloud": [
        b"\x81\xff\x7f" + b"\xff" * 7 + bytes(4) + b"x",
        b"\x01\x80" + bytes(4) + b"\x00\x80\0\0\0\0" * 20_000,
    ],
    "json_from_cloud": [b'{"content":' + b"[" * 100_000, b'{"content":' + b"9" * 100_000 + b"}", b'{"a":' * 50_000],
    "json_to_cloud": [
        b'{"x":1,"content":' + b"[" * 100_000,
        b'{"x":1,"content":' + b"9" * 100_000 + b"}",
        b"[" * 100_000,
    ],
    "json_content": [b"[" * 100_000 + b"]" * 100_000, b"9" * 100_000, b"1e" + b"9" * 100_000],
    "viaduct_stream": [
        b"msg" + bytes.fromhex("01010100010002000000") + b"x",
        b"msg" + bytes.fromhex("010101000100ffffffff"),
    ],
    "viaduct_message": [b"\x0a\x00\x12\x00\x1a\xff\xff\xff\xff\x07x", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"],
    "certificate_answer": [
        _HEAD + b"Content-Length: 999999999999\r\n\r\nx",
        _HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\nx",
        _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1;" + b"e" * 250 + b"\r\nx\r\n") * 20_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000,
        _HEAD + b"a: b\r\n" * 100_000,
    ],
    "proxy_answer": [_HEAD + b"a: b\r\n" * 100_000, b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000],
    "request_to_cloud": [b"GET / HTTP/1.1\r\nHost: a\r\nExtKeyUsages: " + b"[" * 60_000],
    "token": [b"ab" * 32 + b"." + b"A" * 100_000 + b".A.A", b"Bearer " + b"W1tb" * 20_000 + b".e30."],
    "emp_frames": [
        join_frames([verb, header])
        for verb in (b"HELLO/1", b"ACK/1", b"PING/1")
        for header in (
            b"\xdd\xff\xff\xff\xff",
            b"\x98\xdb\xff\xff\xff\xff",
            b"\x98\xc6\xff\xff\xff\xff",
            b"\x92\x01\xdf\xff\xff\xff\xff",
        )
    ],
    "message_batch": [
        b"\xdd\xff\xff\xff\xff",
        b"\x91\x9d\xdb\xff\xff\xff\xff",
        b"\x91\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
    ],
    "mqtt_packets": [
        b"\x00\x30\xff\xff\xff\x7f\x00\x03a/b",
        b"\x00\x20\xff\xff\xff\x7f",
        b"\xff\x30\xff\xff\xff\x7f\xff\xffa",
    ],
    "mqtt_topics": [b"a/" * 30_000 + b"\n" + b"+/" * 30_000],
    "subscription_file": [b'{"wanted":' + b"[" * 100_000],
    "edgecore_yaml": [
        # What refers to what refers to …: as small as it is written until somebody shows or merges it.
        b"kind: [&a0 [x, x], "
        + b", ".join(b"&a%d [%s]" % (n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12))
        + b"]",
        b"kind: [&a0 {x: 1}, "
        + b", ".join(b"&a%d {<<: [%s]}" % (n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 9))
        + b"]",
        b"kind: &a [*a]",
        b"kind: " + b"[" * 100 + b"]" * 100,
        b"runtime: " + b"[" * 300,
    ],
    "node_json": [b'{"node_name":' + b"[" * 100_000],
    "certificate_der": [b"\x30\x84\xff\xff\xff\xff\x30", b"\x30\x80" * 50_000],
}

CHILD = """
import json, resource, sys, time, tracemalloc
from fuzz.targets import TARGETS
import fuzz.seeds
fuzz.seeds.certificate()
cases = [(name, bytes.fromhex(data)) for name, data in json.load(sys.stdin)]
for name in {name for name, _ in cases}:
    for seed in TARGETS[name].seeds():
        TARGETS[name].check(seed)  # what is made once is made now
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + int(sys.argv[1]), resource.RLIM_INFINITY))
tracemalloc.start()
for name, data in cases:
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        TARGETS[name].check(data)
        fault = ""
    except BaseException as error:
        fault = f"{type(error).__name__}: {str(error)[:200]}"
    _, peak = tracemalloc.get_traced_memory()
    print(json.dumps([name, len(data), peak - before, fault]), flush=True)
"""


def test_hostile_lengths_allocate_nothing() -> None:
    cases = [(name, data.hex()) for name, inputs in HOSTILE.items() for data in inputs]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(ROOM_BYTES)],
        cwd=ROOT,
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(cases), (
        f"it ended with {done.returncode} at {cases[len(results)][0]}: {done.stderr[-2000:]}"
    )
    wrong = [result for result in results if result[3] or result[2] > ALLOWED_BYTES + ALLOWED_FACTOR * result[1]]
    assert not wrong, "target, bytes of input, bytes allocated, what it raised"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_inputs_are_for_targets_that_there_are(name: str) -> None:
    from fuzz.targets import TARGETS

    assert name in TARGETS
