"""Faults from inside a process: a loop that stands still while threads go on, clocks that jump; and those who take no orders."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import FaultNotVerified, injected
from inference_runtime.testing.hooked import ORDER, REPLY
from inference_runtime.testing.inside import BlockLoop, ClockJump, Suspend

#: A program with an event loop and a thread, each of which writes down what the clocks say, again and again.
PROGRAM = """
import asyncio, datetime, json, os, threading, time
import uvloop

def look(who):
    clocks = {
        "who": who,
        "wall": time.time(),
        "ns": time.time_ns() / 1e9,
        "now": datetime.datetime.now(datetime.UTC).timestamp(),
        "local": time.mktime(time.localtime()),
        "boot": time.clock_gettime(time.CLOCK_BOOTTIME),
        "monotonic": time.monotonic(),
    }
    os.write(1, json.dumps(clocks).encode() + b"\\n")

def thread():
    while True:
        look("thread")
        time.sleep(0.02)

async def main():
    threading.Thread(target=thread, daemon=True).start()
    while True:
        look("loop")
        await asyncio.sleep(0.02)

uvloop.run(main())
"""


class Hooked:
    """As much of a cluster as these faults ask for: one hooked process that writes down what it sees."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "clockwatcher.py").write_text(PROGRAM)
        self.hooks = {"watcher": folder}
        with (folder / "seen").open("wb") as seen:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "inference_runtime.testing.hooked", str(folder), "clockwatcher"],
                stdout=seen,
                env={**os.environ, "PYTHONPATH": str(folder)},
            )

    def pids(self) -> dict[str, int]:
        """Of the one process."""
        return {"watcher": self.process.pid}

    async def wait_ready(self) -> None:
        """It always is."""

    def seen(self, who: str) -> list[dict[str, Any]]:
        """What the loop or the thread wrote down."""
        lines = (self.folder / "seen").read_text().splitlines(keepends=True)
        return [look for line in lines if line.endswith("\n") and (look := json.loads(line))["who"] == who]

    async def next(self, who: str) -> dict[str, Any]:
        """What it writes down next but one: the one after an order began after it."""
        before = len(self.seen(who))
        async with asyncio.timeout(20):
            while len(self.seen(who)) < before + 2:  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.01)
        return self.seen(who)[-1]


@pytest.fixture
async def hooked(tmp_path: Path) -> Any:
    program = Hooked(tmp_path)
    try:
        await program.next("loop")
        yield program
    finally:
        program.process.kill()
        program.process.wait()


async def test_a_blocked_loop_stands_still_and_threads_go_on(hooked: Hooked) -> None:
    """M-03: what a watchdog thread finds."""
    fault = BlockLoop(cast(Cluster, hooked), "watcher", 1.0)
    async with injected(fault):
        loop_saw = len(hooked.seen("loop"))
        await hooked.next("thread")
        assert fault.is_injected()
        assert len(hooked.seen("loop")) == loop_saw
    assert not fault.died
    await hooked.next("loop")


async def test_a_wall_clock_that_jumps_takes_no_other_clock_along(hooked: Hooked) -> None:
    """C-01: whichever way the wall clock is read."""
    fault = ClockJump(cast(Cluster, hooked), ["watcher"], wall_s=-86400)
    async with injected(fault):
        seen = await hooked.next("loop")
        for clock in ("wall", "ns", "now", "local"):
            assert abs(seen[clock] - (time.time() - 86400)) < 5, clock
        assert abs(seen["boot"] - time.clock_gettime(time.CLOCK_BOOTTIME)) < 5
        assert abs(seen["monotonic"] - time.monotonic()) < 5
    seen = await hooked.next("loop")
    assert abs(seen["wall"] - time.time()) < 5


async def test_a_suspend_moves_boot_time_and_the_wall_clock_and_not_the_monotonic_one(hooked: Hooked) -> None:
    """C-02."""
    async with injected(Suspend(cast(Cluster, hooked), "watcher", 60)):
        seen = await hooked.next("loop")
        assert 55 < seen["boot"] - time.clock_gettime(time.CLOCK_BOOTTIME) < 65
        assert 55 < seen["wall"] - time.time() < 65
        assert abs(seen["monotonic"] - time.monotonic()) < 5


async def test_a_process_that_obeys_nothing_makes_the_fault_fail(hooked: Hooked, monkeypatch: pytest.MonkeyPatch) -> None:
    """§4.2, control runs: a wrong target, and one that is frozen."""
    monkeypatch.setattr("inference_runtime.testing.faults.VERIFY_S", 0.3)
    with pytest.raises(FaultNotVerified, match="not started through"):
        BlockLoop(cast(Cluster, hooked), "another", 1)
    with pytest.raises(FaultNotVerified, match="no clock jumps"):
        ClockJump(cast(Cluster, hooked), ["watcher"], wall_s=0)
    hooked.process.send_signal(signal.SIGSTOP)
    try:
        fault = Suspend(cast(Cluster, hooked), "watcher", 60)
        fault.inject()
        assert not fault.is_injected()
        assert not (hooked.folder / REPLY).exists()
        assert (hooked.folder / ORDER).exists()
    finally:
        hooked.process.send_signal(signal.SIGCONT)


def test_grpc_keeps_the_kernels_clock() -> None:
    """A deadline is computed from one clock and waited for by another: with one of them wrong every call would fail, or none."""
    script = (
        "import time; from inference_runtime.testing.hooked import Clocks; clocks = Clocks();"
        "clocks.patch(); clocks.wall_s = 3600;"
        "import grpc.aio; from grpc._cython import cygrpc; from grpc.aio import _utils;"
        "real = clocks.real.time; assert time.time() - real() > 3599;"
        "assert abs(_utils.time.time() - real()) < 5; assert abs(cygrpc.time.time() - real()) < 5"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
