"""Starts a service as `python -m` does, with hooks for faults that must be put in from inside. For tests: no service knows it.

    python -m inference_runtime.testing.hooked FOLDER services.coordinator

On SIGUSR2 the process reads `FOLDER/order`, does it, and answers in `FOLDER/reply`; `testing.inside` gives the orders:

- `block_s`: the main thread, and with it the event loop, stands still for so many seconds.
- `wall_s`: the wall clock is so many seconds off from now on.
- `suspend_s`: boot time and the wall clock jump ahead by so many seconds, the monotonic clock does not: what a suspended machine
  finds when it goes on.

Python's clocks are changed, and nobody else's: gRPC takes its deadlines from the kernel's, on both sides of each conversion.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import runpy
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["ORDER", "REPLY", "Clocks", "install", "main"]

ORDER, REPLY = "order", "reply"

_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clocks:
    """The clocks of this process, which can be set wrong. Made once, before anybody imports gRPC."""

    def __init__(self) -> None:
        self.real = types.ModuleType("time")
        self.real.__dict__.update(time.__dict__)
        self.wall_s = 0.0
        self.boot_s = 0.0

    def patch(self) -> None:
        """From now on `time` and `datetime.now` go by these clocks, in this process, for everybody but gRPC."""
        real: Any = self.real
        clock_gettime: Callable[[int], float] = real.clock_gettime

        def off(clock: int) -> float:
            return {time.CLOCK_REALTIME: self.wall_s, _BOOTTIME: self.boot_s}.get(clock, 0.0)

        patched: dict[str, Callable[..., Any]] = {
            "time": lambda: real.time() + self.wall_s,
            "time_ns": lambda: real.time_ns() + int(self.wall_s * 1e9),
            "clock_gettime": lambda clock: clock_gettime(clock) + off(clock),
            "clock_gettime_ns": lambda clock: real.clock_gettime_ns(clock) + int(off(clock) * 1e9),
            "localtime": lambda seconds=None: real.localtime(time.time() if seconds is None else seconds),
            "gmtime": lambda seconds=None: real.gmtime(time.time() if seconds is None else seconds),
        }
        for name, function in patched.items():
            setattr(time, name, function)
        _patch_datetime()
        self._spare_grpc()

    def _spare_grpc(self) -> None:
        # It converts time.time() to the kernel's clocks at once; with one end of that wrong, every deadline would be.
        importlib.import_module("grpc.aio")
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "grpc" and getattr(module, "time", None) is time:
                module.time = self.real  # type: ignore[attr-defined]


def _patch_datetime() -> None:
    real = datetime.datetime

    class Now(real):  # type: ignore[misc, valid-type]
        """`datetime` by these clocks."""

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls) -> datetime.datetime:
            return real.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)

        @classmethod
        def today(cls) -> datetime.datetime:
            return real.fromtimestamp(time.time())

    datetime.datetime = Now  # type: ignore[misc]


def install(folder: Path, clocks: Clocks) -> None:
    """Take orders from this folder. Call it on the main thread."""

    def reply(**said: object) -> None:
        line = {"pid": os.getpid(), "boot": clocks.real.clock_gettime(_BOOTTIME), **said}
        with (folder / REPLY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def obey(signum: int, frame: FrameType | None) -> None:
        order = json.loads((folder / ORDER).read_text(encoding="utf-8"))
        number = order["number"]
        if "block_s" in order:
            reply(number=number, phase="begun")
            time.sleep(order["block_s"])  # on the main thread, which runs the event loop
        else:
            clocks.wall_s = order.get("wall_s", clocks.wall_s)
            clocks.boot_s += order.get("suspend_s", 0.0)
            clocks.wall_s += order.get("suspend_s", 0.0)
        shown = {
            "wall": time.time(),
            "true_wall": clocks.real.time(),
            "boottime": time.clock_gettime(_BOOTTIME),
            "monotonic": time.monotonic(),
        }
        reply(number=number, phase="done", **shown)

    signal.signal(signal.SIGUSR2, obey)


def main() -> None:
    """Patch, take orders, run the module as the main program."""
    folder, module = Path(sys.argv[1]), sys.argv[2]
    clocks = Clocks()
    clocks.patch()
    install(folder, clocks)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
