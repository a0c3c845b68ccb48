"""Fault injectors: each fault is injected, seen to be there, healed, and seen to be gone.

    async with injected(Kill(cluster, "engine")):
        ...                     # the engine is dead here, for certain
    # it serves again here, for certain

An experiment whose fault did not happen proves nothing, so a fault that cannot be verified raises.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from inference_runtime.testing.cluster import Cluster

__all__ = ["Fault", "FaultNotVerified", "Freeze", "Kill", "KillContext", "contexts_of", "injected", "process_state"]

#: Seconds that a fault gets to show, and a cure to work.
VERIFY_S = 30.0
#: Pause between two looks.
POLL_S = 0.02


class FaultNotVerified(AssertionError):
    """A fault was injected and cannot be seen, or was healed and is still there."""


class Fault(Protocol):
    """One fault that can be put in and taken out."""

    @property
    def name(self) -> str:
        """What it is, for messages."""
        ...

    def inject(self) -> None:
        """Put it in."""
        ...

    def is_injected(self) -> bool:
        """Whether it can be seen."""
        ...

    async def heal(self) -> None:
        """Take it out, and return once what it broke works again."""
        ...

    def is_healed(self) -> bool:
        """Whether nothing of it can be seen."""
        ...


@asynccontextmanager
async def injected(fault: Fault) -> AsyncIterator[None]:
    """The body runs under the fault.

    Raises:
        FaultNotVerified: It did not take effect, or did not go away.
    """
    fault.inject()
    try:
        await _verified(fault.is_injected, f"{fault.name} did not take effect")
        yield
    finally:
        await fault.heal()
    await _verified(fault.is_healed, f"{fault.name} is not healed")


async def _verified(holds: Callable[[], bool], complaint: str) -> None:
    try:
        async with asyncio.timeout(VERIFY_S):
            while not holds():  # noqa: ASYNC110 - the kernel's process table sends no event
                await asyncio.sleep(POLL_S)
    except TimeoutError as err:
        raise FaultNotVerified(f"{complaint} within {VERIFY_S:g} s") from err


def process_state(pid: int) -> str:
    """State letter of a process as the kernel tells it (R, S, D, T, Z …); "" when there is none.

    Raises:
        FaultNotVerified: This system has no /proc, so nothing can be verified.
    """
    if not Path("/proc/self/stat").exists():
        raise FaultNotVerified(f"process states cannot be read on {sys.platform}")
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Kill:
    """SIGKILL for one process of a cluster; healed by starting it again."""

    def __init__(self, cluster: Cluster, process: str) -> None:
        self._cluster, self._process = cluster, process
        self.pid = cluster.pids()[process]

    @property
    def name(self) -> str:
        """What it is."""
        return f"killing {self._process} (pid {self.pid})"

    def inject(self) -> None:
        """Kill it."""
        self._cluster.kill(self._process)

    def is_injected(self) -> bool:
        """Gone from the process table."""
        return process_state(self.pid) == ""

    async def heal(self) -> None:
        """Start it again, unless somebody did, and wait until it does its work."""
        await self._cluster.restart(self._process)

    def is_healed(self) -> bool:
        """Another process runs in its place."""
        pid = self._cluster.pids()[self._process]
        return pid != self.pid and process_state(pid) not in {"", "Z", "T"}


class Freeze:
    """SIGSTOP for one process: connections stay open and nothing answers. Healed by SIGCONT."""

    def __init__(self, cluster: Cluster, process: str) -> None:
        self._cluster, self._process = cluster, process
        self.pid = cluster.pids()[process]

    @property
    def name(self) -> str:
        """What it is."""
        return f"freezing {self._process} (pid {self.pid})"

    def inject(self) -> None:
        """Stop it."""
        os.kill(self.pid, signal.SIGSTOP)

    def is_injected(self) -> bool:
        """The kernel says that it is stopped."""
        return process_state(self.pid) == "T"

    async def heal(self) -> None:
        """Let it go on, and wait until the cluster is well: a frozen process may have lost its lease."""
        self._cluster.resume(self._process)
        await self._cluster.wait_ready()

    def is_healed(self) -> bool:
        """It runs."""
        return process_state(self.pid) not in {"", "T", "Z"}


def contexts_of(engine: int) -> list[int]:
    """Process ids of an engine's contexts, where they are processes of their own. Zombies do not count.

    Raises:
        FaultNotVerified: This system has no /proc.
    """
    process_state(engine)
    found = []
    for tasks in Path(f"/proc/{engine}/task").glob("*/children"):
        try:
            found += [int(pid) for pid in tasks.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread ended
    return [pid for pid in found if process_state(pid) not in {"", "Z"} and _is_context(pid)]


def _is_context(pid: int) -> bool:
    try:
        return b"services.engine.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


class KillContext:
    """SIGKILL for the one context process of an engine, which heals itself: another context takes its place.

    Raises:
        FaultNotVerified: The engine has none, or several.
    """

    def __init__(self, cluster: Cluster, engine: str) -> None:
        self._engine, self._process = cluster.pids()[engine], engine
        contexts = contexts_of(self._engine)
        if len(contexts) != 1:
            raise FaultNotVerified(f"{engine} (pid {self._engine}) has {len(contexts)} context processes, not one to kill")
        self.pid = contexts[0]

    @property
    def name(self) -> str:
        """What it is."""
        return f"killing the context of {self._process} (pid {self.pid})"

    def inject(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)

    def is_injected(self) -> bool:
        """It does not run, and its engine does."""
        return process_state(self.pid) in {"", "Z"} and process_state(self._engine) not in {"", "Z"}

    async def heal(self) -> None:
        """Nothing to do: that is the engine's work."""

    def is_healed(self) -> bool:
        """Another context runs."""
        return any(pid != self.pid for pid in contexts_of(self._engine))
