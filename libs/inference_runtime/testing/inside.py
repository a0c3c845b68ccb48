"""Faults that are put in from inside a process that was started through `testing.hooked`: a blocked event loop, clocks that jump.

async with Cluster(hooked=("coordinator",)) as cluster:
    async with injected(ClockJump(cluster, ["coordinator"], wall_s=-86400)):
        ...
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import FaultNotVerified, process_state
from inference_runtime.testing.hooked import ORDER, REPLY

__all__ = ["BlockLoop", "ClockJump", "Suspend"]

#: How far a clock that jumped may be from where it was sent, seconds: the time between two looks at it.
CLOCK_SLACK_S = 5.0


class _Orders:
    """Orders to one process, by its folder."""

    def __init__(self, cluster: Cluster, process: str) -> None:
        self._cluster, self._process = cluster, process
        try:
            self._folder = cluster.hooks[process]
        except KeyError:
            raise FaultNotVerified(f"{process} was not started through testing.hooked") from None
        self.number = 0

    def give(self, **order: float) -> None:
        """Give an order; it is carried out as soon as the process runs Python on its main thread."""
        self.number = 1 + max((reply["number"] for reply in self._replies()), default=self.number)
        (self._folder / ORDER).write_text(json.dumps({"number": self.number, **order}), encoding="utf-8")
        os.kill(self._cluster.pids()[self._process], signal.SIGUSR2)

    def reply(self, phase: str) -> Mapping[str, Any] | None:
        """What the process said of the last order in this phase, if it has."""
        return next((r for r in self._replies() if r["number"] == self.number and r["phase"] == phase), None)

    def _replies(self) -> list[dict[str, Any]]:
        try:
            lines = (self._folder / REPLY).read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]


class BlockLoop:
    """The event loop of one process stands still for a while, and its other threads go on. Ends by itself, or with the process.

    Args:
        cluster: The process was started through `testing.hooked`.
        process: Its name.
        seconds: For how long.

    Raises:
        FaultNotVerified: It takes no orders.
    """

    def __init__(self, cluster: Cluster, process: str, seconds: float) -> None:
        self._cluster, self._process, self._seconds = cluster, process, seconds
        self._orders = _Orders(cluster, process)
        self.pid = cluster.pids()[process]
        self.began = 0.0

    @property
    def name(self) -> str:
        """What it is."""
        return f"blocking the event loop of {self._process} (pid {self.pid}) for {self._seconds:g} s"

    def inject(self) -> None:
        """Block it."""
        self.began = time.monotonic()
        self._orders.give(block_s=self._seconds)

    def is_injected(self) -> bool:
        """The blocked thread said that it begins, and has not said that it is through."""
        return self._orders.reply("begun") is not None and self._orders.reply("done") is None

    @property
    def died(self) -> bool:
        """Whether the process ended under it."""
        return process_state(self.pid) in {"", "Z"}

    async def heal(self) -> None:
        """Start the process again if it ended, and wait until the cluster is well."""
        if self.died:
            await self._cluster.restart(self._process)
        else:
            await self._cluster.wait_ready()

    def is_healed(self) -> bool:
        """Another process runs in its place, or the block is over."""
        return self._cluster.pids()[self._process] != self.pid or self._orders.reply("done") is not None


class ClockJump:
    """The wall clocks of some processes are off by so many seconds. Healed by setting them right, which is a jump, too.

    Args:
        cluster: The processes were started through `testing.hooked`.
        processes: Their names.
        wall_s: Seconds ahead; negative for behind.

    Raises:
        FaultNotVerified: One of them takes no orders, or the jump is too small to be seen.
    """

    def __init__(self, cluster: Cluster, processes: Sequence[str], wall_s: float) -> None:
        if not processes or abs(wall_s) <= 2 * CLOCK_SLACK_S:
            raise FaultNotVerified("no clock jumps that could be seen to jump")
        self._orders = {process: _Orders(cluster, process) for process in processes}
        self._wall_s = wall_s

    @property
    def name(self) -> str:
        """What it is."""
        return f"setting the wall clocks of {', '.join(self._orders)} off by {self._wall_s:g} s"

    def inject(self) -> None:
        """Set them."""
        for orders in self._orders.values():
            orders.give(wall_s=self._wall_s)

    def is_injected(self) -> bool:
        """Each process reads a clock that is off."""
        return self._off_by(self._wall_s)

    async def heal(self) -> None:
        """Set them right."""
        for orders in self._orders.values():
            orders.give(wall_s=0.0)

    def is_healed(self) -> bool:
        """Each process reads the right time."""
        return self._off_by(0.0)

    def _off_by(self, seconds: float) -> bool:
        replies = [orders.reply("done") for orders in self._orders.values()]
        return all(r is not None and abs(r["wall"] - r["true_wall"] - seconds) < CLOCK_SLACK_S for r in replies)


class Suspend:
    """One process finds that its machine was suspended: boot time and the wall clock are ahead, the monotonic clock is not.

    Args:
        cluster: The process was started through `testing.hooked`.
        process: Its name.
        seconds: For how long it was suspended.

    Raises:
        FaultNotVerified: It takes no orders, or the time is too short to be seen.
    """

    def __init__(self, cluster: Cluster, process: str, seconds: float) -> None:
        if seconds <= 2 * CLOCK_SLACK_S:
            raise FaultNotVerified(f"a suspend of {seconds:g} s could not be seen")
        self._cluster, self._process, self._seconds = cluster, process, seconds
        self._orders = _Orders(cluster, process)
        self.pid = cluster.pids()[process]

    @property
    def name(self) -> str:
        """What it is."""
        return f"suspending {self._process} (pid {self.pid}) for {self._seconds:g} s"

    def inject(self) -> None:
        """Let the time pass."""
        self._orders.give(suspend_s=self._seconds)

    def is_injected(self) -> bool:
        """The process read a boot time that is so much ahead of the kernel's."""
        said = self._orders.reply("done")
        return said is not None and abs(said["boottime"] - said["boot"] - self._seconds) < CLOCK_SLACK_S

    async def heal(self) -> None:
        """Nothing to undo: no clock of a machine goes back. A process that ended is started again."""
        if process_state(self.pid) in {"", "Z"}:
            await self._cluster.restart(self._process)
        else:
            await self._cluster.wait_ready()

    def is_healed(self) -> bool:
        """The cluster is well: see `heal`."""
        return process_state(self._cluster.pids()[self._process]) not in {"", "Z", "T"}
