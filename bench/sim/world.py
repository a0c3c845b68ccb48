"""Virtual time, and an etcd in memory: what the simulation puts under the services' own code.

Time passes only when everybody waits. The store keeps what etcd promises and the services rely on: one revision for all keys,
transactions whole or not at all, leases that take their keys with them, watches that see every revision in order.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from inference_runtime.coordination import Compare, KeyValue, Op, TxnResult
from inference_runtime.coordination.kv import CompareTarget, Event, OpKind, OpResult, WatchUpdate

__all__ = ["MemoryEtcd", "run_in_virtual_time"]

T = TypeVar("T")

#: What a write and the news of it take, seconds.
WRITE_S = 0.002
NEWS_S = 0.001
#: Where virtual time begins: nothing may rely on 0.
EPOCH_S = 1_000.0


class _Jump(selectors.SelectSelector):
    """Waits for nothing: the time that should be waited for has passed at once."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everybody waits and nobody will ever act")
        self._clock.now_s += max(0.0, timeout)
        return super().select(0)


class _Clock:
    now_s = EPOCH_S


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Clock()
        super().__init__(_Jump(self.clock))

    def time(self) -> float:
        return self.clock.now_s


def run_in_virtual_time(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end. `time.monotonic` is virtual meanwhile; `time.perf_counter` and the CPU's clocks are not."""
    real = time.monotonic
    loop = _VirtualLoop()
    time.monotonic = loop.time
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(make())
    finally:
        time.monotonic = real


class _Watch:
    """One watch stream."""

    def __init__(self, etcd: MemoryEtcd, prefix: str, start: int) -> None:
        self._etcd, self._prefix, self._next = etcd, prefix, start

    async def open(self) -> WatchUpdate:
        await asyncio.sleep(NEWS_S)
        return WatchUpdate(cluster_id=self._etcd.cluster_id, revision=self._etcd.revision, events=())

    async def read(self, timeout_s: float) -> WatchUpdate | None:
        try:
            async with asyncio.timeout(timeout_s):
                while self._etcd.revision < self._next:
                    await self._etcd.moved()
        except TimeoutError:
            return None
        await asyncio.sleep(NEWS_S)
        events = [e for e in self._etcd.events_from(self._next) if e.kv.key.startswith(self._prefix)]
        self._next = self._etcd.revision + 1
        return WatchUpdate(cluster_id=self._etcd.cluster_id, revision=self._etcd.revision, events=tuple(events))

    def close(self) -> None:
        """Nothing to close."""


class MemoryEtcd:
    """As much of `EtcdClient` as watches and leaders use. All clients share it."""

    cluster_id = lineage = 7

    def __init__(self) -> None:
        self.revision = 1
        self._records: dict[str, KeyValue] = {}
        self._log: list[Event] = []
        #: Position in the log of the first event of each revision.
        self._begin: dict[int, int] = {}
        self._moved = asyncio.Event()
        self.writes = 0

    async def moved(self) -> None:
        """Wait for the next revision."""
        await self._moved.wait()

    def events_from(self, revision: int) -> Sequence[Event]:
        """Everything since this revision, in order."""
        return self._log[self._begin.get(revision, len(self._log)) :]

    async def verify(self) -> None:
        """It is always the same store."""

    async def list(self, prefix: str) -> tuple[list[KeyValue], int]:
        """All keys with a prefix, and the revision they stand for."""
        await asyncio.sleep(NEWS_S)
        return [kv for key, kv in sorted(self._records.items()) if key.startswith(prefix)], self.revision

    def watch(self, key: str, start_revision: int, *, prefix: bool = True) -> _Watch:
        """A watch from a revision on."""
        assert prefix
        return _Watch(self, key, start_revision)

    async def txn(self, *, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """A transaction."""
        await asyncio.sleep(WRITE_S)
        held = all(self._holds(c) for c in compare)
        ops = success if held else failure
        puts = {op.key: op.value for op in ops if op.kind is OpKind.PUT}
        deletes = [op.key for op in ops if op.kind is OpKind.DELETE]
        results = tuple(
            OpResult(kvs=(self._records[op.key],) if op.kind is OpKind.GET and op.key in self._records else ()) for op in ops
        )
        if puts or deletes:
            self.apply(puts, deletes)
        return TxnResult(held, self.revision, self.cluster_id, results)

    def apply(self, puts: Mapping[str, bytes], deletes: Sequence[str] = ()) -> int:
        """Write at once, as one revision. Returns it."""
        self.revision += 1
        self.writes += 1
        self._begin[self.revision] = len(self._log)
        for key, value in puts.items():
            before = self._records.get(key)
            created, version = (before.create_revision, before.version + 1) if before else (self.revision, 1)
            kv = KeyValue(key, value, created, self.revision, version, 0)
            self._records[key] = kv
            self._log.append(Event(kv, deleted=False))
        for key in deletes:
            if self._records.pop(key, None) is not None:
                self._log.append(Event(KeyValue(key, b"", 0, self.revision, 0, 0), deleted=True))
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        return self.revision

    def _holds(self, c: Compare) -> bool:
        kv = self._records.get(c.key)
        found = {
            CompareTarget.CREATE_REVISION: kv.create_revision if kv else 0,
            CompareTarget.MOD_REVISION: kv.mod_revision if kv else 0,
            CompareTarget.VERSION: kv.version if kv else 0,
        }[c.target]
        return {"==": found == c.number, "!=": found != c.number, "<": found < c.number, ">": found > c.number}[c.op]
