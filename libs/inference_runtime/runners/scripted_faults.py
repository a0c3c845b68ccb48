"""Faults that somebody outside tells a scripted runner to have, while it runs: one process of many, at a moment of one's choice.

A file says what goes wrong, a line for each process: "PID hang" (its steps do not end) or "PID slow FACTOR" (they take that many
times as long). A line holds for as long as it stands there. The process confirms in a file beside it, PATH.PID, from the step on
in which the fault takes effect until it is over.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["HANG", "StepFaults", "confirmed", "slow", "write_orders"]

HANG = "hang"
#: Time between two looks at the file while a step hangs, seconds.
LOOK_S = 0.02


def slow(factor: float) -> str:
    """The order to take this many times as long."""
    return f"slow {factor:g}"


def write_orders(path: Path, orders: Mapping[int, str]) -> None:
    """Say which process has which fault from now on: those that are not named have none."""
    draft = path.with_suffix(".draft")
    draft.write_text("".join(f"{pid} {order}\n" for pid, order in orders.items()), encoding="ascii")
    draft.replace(path)  # readers see the old lines or the new ones


def confirmed(path: Path, pid: int) -> str:
    """The fault that a process says it has, "" for none."""
    try:
        return _beside(path, pid).read_text(encoding="ascii")
    except FileNotFoundError:
        return ""


class StepFaults:
    """What a file says about this process.

    Args:
        path: The file. While there is none, nothing is wrong.
    """

    def __init__(self, path: str) -> None:
        self._path, self._pid = Path(path), os.getpid()
        self._seen = (0, 0)
        self._order = ""

    def factor(self) -> float:
        """How many times as long the next step takes. Does not return while it is to hang."""
        order = self._look()
        while order == HANG:
            time.sleep(LOOK_S)
            order = self._look()
        return float(order.removeprefix("slow ")) if order else 1.0

    def _look(self) -> str:
        """The order in force, confirmed."""
        try:
            stat = os.stat(self._path)
            seen = stat.st_ino, stat.st_mtime_ns
        except FileNotFoundError:
            seen = 0, 0
        if seen != self._seen:
            self._seen = seen
            before, self._order = self._order, self._read()
            if self._order != before:
                self._confirm()
        return self._order

    def _read(self) -> str:
        try:
            lines = self._path.read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return ""
        return next((order for pid, _, order in (line.partition(" ") for line in lines) if pid == str(self._pid)), "")

    def _confirm(self) -> None:
        beside = _beside(self._path, self._pid)
        if self._order:
            beside.write_text(self._order, encoding="ascii")
        else:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()


def _beside(path: Path, pid: int) -> Path:
    return path.with_name(f"{path.name}.{pid}")
