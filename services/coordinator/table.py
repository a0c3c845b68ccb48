"""The live table of one term: follows etcd, and tells each watcher what changed.

A watcher that is slow holds the names of what changed, never a queue of messages: what it is told is as new as the moment it
listens. When too much has changed it gets the whole table again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.message import DecodeError, Message

from inference_runtime.coordination import EtcdClient, KeyValue, WatchBatch, keys, watch_prefix
from inference_runtime.coordination.loss import LossGuard, is_crowd
from inference_runtime.telemetry import MetricSet, get_logger
from inference_runtime.v1 import common_pb2, coordinator_service_pb2, deployment_pb2
from services.coordinator.attendance import Attendance, Condition
from services.coordinator.load import LoadBook
from services.coordinator.routing import RouteTable, build_table, diff_tables
from services.coordinator.settings import CoordinatorSettings

__all__ = ["Subscription", "Table", "TableGauges"]

log = get_logger(__name__)

#: After a change, others are gathered for this long before they are told: a burst makes one message, one change makes no delay.
GATHER_S = 0.02
#: Names that a watcher may owe before it is sent the whole table instead.
MAX_OWED = 2000


_KINDS: dict[str, type[Message]] = {
    keys.DEPLOYMENTS: deployment_pb2.Deployment,
    keys.ENGINES: common_pb2.Engine,
    keys.REPLICAS: common_pb2.Replica,
}


class TableGauges:
    """What is published of a table."""

    def __init__(self, metrics: MetricSet) -> None:
        self._revision = metrics.gauge("inference_route_table_revision")
        self._replicas = metrics.gauge("inference_replicas", "deployment", "state")

    def show(self, revision: int, replicas: Iterable[common_pb2.Replica]) -> None:
        """Publish the present."""
        counts = Counter(
            (r.deployment, common_pb2.ReplicaState.Name(r.state).removeprefix("REPLICA_STATE_").lower()) for r in replicas
        )
        self.clear()
        self._revision.set(revision)
        for labels, count in counts.items():
            self._replicas.set(count, *labels)

    def clear(self) -> None:
        """Publish nothing: who does not lead knows nothing."""
        self._revision.clear()
        self._replicas.clear()


class Table:
    """The table while this process leads.

    Args:
        client: etcd.
        settings: Intervals.
        token: The term, sent along with every message.
        gauges: Where its size is published.
        valid: Whether the term still holds. Asked before each message: a leader that was suspended says nothing more.
    """

    def __init__(
        self,
        client: EtcdClient,
        settings: CoordinatorSettings,
        token: common_pb2.FencingToken,
        gauges: TableGauges,
        valid: Callable[[], bool] = lambda: True,
    ) -> None:
        self.settings, self.token, self.valid = settings, token, valid
        self.table = RouteTable()
        self.loads = LoadBook(settings.load_ttl_s)
        self._client, self._gauges = client, gauges
        self._revision = 0
        self._deployments: dict[str, deployment_pb2.Deployment] = {}
        self._engines: dict[str, common_pb2.Engine] = {}
        self._replicas: dict[str, common_pb2.Replica] = {}
        #: Replicas by engine and id: those that are registered, with their key, and those in the table. Each engine reports every
        #: second, and must not cost a walk over all of them.
        self._registered: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self._routed: defaultdict[str, set[str]] = defaultdict(set)
        #: engine and replica of each assignment, by key
        self._assigned: dict[str, tuple[str, str]] = {}
        self._guard = LossGuard(2 * settings.etcd.lease_ttl_s, settings.freeze_s)
        self._attendance = Attendance(settings.load_ttl_s)
        self._hold_until_s = 0.0
        self._leaving: set[str] = set()
        #: replicas in the table whose engines have vanished in a crowd
        self.believed = 0
        self._removed: dict[str, tuple[float, common_pb2.Replica]] = {}
        #: boot id of each engine when it vanished
        self._boots: dict[str, str] = {}
        self._dirty = asyncio.Event()
        self._ready = asyncio.Event()
        self._settled = asyncio.Event()
        self._watchers: set[Subscription] = set()
        self.ended = False

    async def run(self) -> None:
        """Follow etcd until cancelled. Watchers learn that it is over."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow())
                tasks.create_task(self._publish())
        finally:
            self.ended = True
            self._gauges.clear()
            self._ready.set()
            self._settled.set()
            for watcher in self._watchers:
                watcher.wake.set()

    async def ready(self) -> None:
        """Wait until everything was read once, or the term has ended."""
        await self._ready.wait()

    async def settled(self) -> None:
        """Wait until the table may be told, or the term has ended: at the start of a term, a crowd of missing engines gets a
        while to come back, and gateways keep the routes they have."""
        await self._settled.wait()

    @property
    def held(self) -> bool:
        """Whether the table is held back."""
        return self._ready.is_set() and not self._settled.is_set()

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """A watcher of the table, for as long as the context lasts."""
        watcher = Subscription(self)
        self._watchers.add(watcher)
        self._attendance.gateways(len(self._watchers), time.monotonic())
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            self._attendance.gateways(len(self._watchers), time.monotonic())

    def engine_known(self, engine_id: str) -> bool:
        """Whether this engine is registered, or believed to be."""
        return keys.ENGINES + engine_id in self._engines or engine_id in self._routed

    def replicas(self, deployment: str = "") -> list[common_pb2.Replica]:
        """All replicas that are registered, in any state, by deployment and id."""
        chosen = (r for r in self._replicas.values() if not deployment or r.deployment == deployment)
        return sorted(chosen, key=lambda replica: (replica.deployment, replica.id))

    def leaves(self, engine_id: str) -> None:
        """An engine says that it goes: its removal is no loss."""
        self._leaving.add(engine_id)

    def condition(self) -> Condition:
        """How this coordinator is doing."""
        now_s = time.monotonic()
        engines = [e.id for e in self._engines.values() if e.state != common_pb2.ENGINE_STATE_DRAINING]
        silent, lacks = self._attendance.look(engines, now_s)
        if self.held:
            missing = len(self._missing())
            lacks["routes_held"] = f"{missing} replicas that are assigned are not registered; gateways keep the routes they have"
        elif self.believed:
            lacks["routes_frozen"] = f"{self.believed} replicas are kept in the routes although their engines vanished from etcd"
        return Condition(len(engines), silent, len(self._watchers), self.table.revision, self.held or self.believed > 0, lacks)

    def report(self, engine_id: str, loads: Iterable[common_pb2.ReplicaLoad]) -> None:
        """Take load reports of an engine's replicas. Each call renews what it said before; unknown replicas are ignored."""
        now_s = time.monotonic()
        self._attendance.heard(engine_id, now_s)
        own = self._registered.get(engine_id, {}).keys() | self._routed.get(engine_id, set())
        said = {load.replica_id: load for load in loads if load.replica_id in own}
        silent = {i: load for i in own - said.keys() if (load := self.loads.get(i, now_s)) is not None}
        news = {i for i, load in {**silent, **said}.items() if self.loads.report(load, now_s)}
        if news:
            for watcher in self._watchers:
                watcher.owe_loads(news)

    async def _follow(self) -> None:
        # One watch over all keys, so that a table stands for one revision and a lease that ends takes its keys at one moment.
        async with watch_prefix(self._client, keys.ROOT) as watch:
            async for batch in watch:
                self._apply(batch)
                self._dirty.set()

    def _apply(self, batch: WatchBatch) -> None:
        gone: Iterable[str] = batch.deletes
        if batch.snapshot:
            listed = {kv.key for kv in batch.puts}
            gone = [key for records in self._records() for key in records if key not in listed]
        for key in gone:
            self._remove(key)
        for kv in batch.puts:
            self._put(kv)
        self._revision = batch.revision

    def _records(self) -> tuple[dict[str, Any], ...]:
        return self._deployments, self._engines, self._replicas

    def _missing(self) -> list[str]:
        """The engine of each assigned replica that is not registered."""
        known = {replica.id for replica in self._replicas.values()}
        return [engine_id for engine_id, replica_id in self._assigned.values() if replica_id not in known]

    def _put(self, kv: KeyValue) -> None:
        if kv.key.startswith(keys.ASSIGNMENTS):
            engine_id, _, replica_id = kv.key.removeprefix(keys.ASSIGNMENTS).partition("/")
            self._assigned[kv.key] = engine_id, replica_id
        for (prefix, message), records in zip(_KINDS.items(), self._records(), strict=True):
            if kv.key.startswith(prefix):
                self._removed.pop(kv.key, None)
                self._note_replica(kv.key, False)
                try:
                    records[kv.key] = message.FromString(kv.value)
                    self._note_replica(kv.key, True)
                except DecodeError as err:
                    log.error("record is not readable", key=kv.key, exc_info=err)
                    records.pop(kv.key, None)

    def _remove(self, key: str) -> None:
        now_s = time.monotonic()
        self._assigned.pop(key, None)
        self._deployments.pop(key, None)
        self._note_replica(key, False)
        replica = self._replicas.pop(key, None)
        if replica is not None and replica.state == common_pb2.REPLICA_STATE_SERVING:
            self._removed[key] = (now_s, replica)
        engine = self._engines.pop(key, None)
        if engine is None or engine.state == common_pb2.ENGINE_STATE_DRAINING:
            return
        if engine.id in self._leaving:
            self._leaving.discard(engine.id)
            return
        self._boots[engine.id] = engine.boot_id
        if self._guard.lost([engine.id], {e.id for e in self._engines.values()}, now_s):
            log.error(
                "many engines lost their leases at once; their routes are kept for a while",
                alive=len(self._engines),
                for_s=self.settings.freeze_s,
            )

    def _note_replica(self, key: str, present: bool) -> None:
        """Keep the replicas of each engine: `key` is there, or about to go."""
        replica = self._replicas.get(key)
        if replica is None:
            return
        if present:
            self._registered[replica.engine_id][replica.id] = key
            return
        self._registered[replica.engine_id].pop(replica.id, None)
        if not self._registered[replica.engine_id]:
            del self._registered[replica.engine_id]

    async def _publish(self) -> None:
        while True:
            until_s = self._hold_until_s if self.held else self._guard.next_change_s()
            try:
                async with asyncio.timeout(max(0.0, until_s - time.monotonic()) if until_s is not None else None):
                    await self._dirty.wait()
            except TimeoutError:
                pass
            self._dirty.clear()
            self._rebuild()
            if not self._settled.is_set():
                self._settle()
            await asyncio.sleep(GATHER_S)

    def _settle(self) -> None:
        """Lets the table out: at once, or when a crowd of engines that was missing at the start is back or did not come."""
        now_s, missing = time.monotonic(), self._missing()
        if not self._ready.is_set():
            self._ready.set()
            alive = {engine.id for engine in self._engines.values()}
            absent = set(missing) - alive
            if is_crowd(len(absent), len(alive)) and self.settings.settle_s:
                self._hold_until_s = now_s + self.settings.settle_s
                log.error(
                    "many engines are missing at the start of the term; gateways keep their routes until they are back",
                    missing=len(absent),
                    alive=len(alive),
                    for_s=self.settings.settle_s,
                )
        if not missing or now_s >= self._hold_until_s:
            self._settled.set()

    def _rebuild(self) -> None:
        now_s = time.monotonic()
        self._guard.calm_down(now_s)
        window_s = max(self.settings.freeze_s, 2 * self.settings.etcd.lease_ttl_s)
        self._removed = {k: (at_s, r) for k, (at_s, r) in self._removed.items() if now_s - at_s <= window_s}
        # What an engine hosts that is back as another process, it says itself.
        new = {e.id for e in self._engines.values() if e.id in self._boots and e.boot_id != self._boots[e.id]}
        believed = [
            r for at_s, r in self._removed.values() if r.engine_id not in new and self._guard.believed(r.engine_id, at_s, now_s)
        ]
        self.believed = len(believed)
        table = build_table(
            self._revision,
            self._deployments.values(),
            [*self._replicas.values(), *believed],
            {engine.id: engine for engine in self._engines.values()},
        )
        change = diff_tables(self.table, table)
        self.table = RouteTable(change.revision, table.lines)
        if change:
            self._routed.clear()
            for line in table.lines.values():
                for replica in line.replicas:
                    self._routed[replica.engine_id].add(replica.id)
        self._gauges.show(change.revision, self._replicas.values())
        self.loads.keep({r.id for r in self._replicas.values()} | self.table.replica_ids(), now_s)
        if change:
            for watcher in self._watchers:
                watcher.owe_lines(change.changed.keys() | change.removed)


class Subscription:
    """One watcher of the table. `next` gives what it has not been told."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._lines: set[str] | None = None  # None: it is owed the whole table
        self._loads: set[str] = set()
        self._load_due_s = 0.0
        self.wake = asyncio.Event()

    def owe_lines(self, names: Iterable[str]) -> None:
        """These lines changed."""
        if self._lines is not None:
            self._lines |= set(names)
            if len(self._lines) > MAX_OWED:
                self._lines = None
        self.wake.set()

    def owe_loads(self, replica_ids: set[str]) -> None:
        """The load of these replicas changed."""
        self._loads |= replica_ids & self._table.table.replica_ids()
        if len(self._loads) > MAX_OWED:
            self._lines = None
        self.wake.set()

    async def next(self) -> coordinator_service_pb2.WatchRoutesResponse | None:
        """What is new, as soon as there is something; nothing but the revision when there is nothing for a while; None when the
        term has ended."""
        await self._table.settled()
        heard_s = time.monotonic()
        while not self._table.ended and self._table.valid():
            now_s = time.monotonic()
            self.wake.clear()
            if self._lines is None:
                return self._snapshot(now_s)
            if self._lines or (self._loads and now_s >= self._load_due_s):
                return self._change(now_s)
            silent_s = heard_s + self._table.settings.keep_alive_s
            if now_s >= silent_s:
                return self._message()
            due_s = min(silent_s, self._load_due_s) if self._loads else silent_s
            try:
                async with asyncio.timeout(due_s - now_s):
                    await self.wake.wait()
            except TimeoutError:
                continue
        return None

    def _message(self) -> coordinator_service_pb2.WatchRoutesResponse:
        return coordinator_service_pb2.WatchRoutesResponse(revision=self._table.table.revision, fencing_token=self._table.token)

    def _snapshot(self, now_s: float) -> coordinator_service_pb2.WatchRoutesResponse:
        message = self._message()
        message.snapshot = True
        message.deployments.extend(line for _, line in sorted(self._table.table.lines.items()))
        message.loads.extend(self._table.loads.all(now_s))
        self._lines, self._loads = set(), set()
        self._load_due_s = now_s + self._table.settings.load_interval_s
        return message

    def _change(self, now_s: float) -> coordinator_service_pb2.WatchRoutesResponse:
        message, lines = self._message(), self._table.table.lines
        for name in sorted(self._lines or ()):
            if name in lines:
                message.deployments.append(lines[name])
            else:
                message.removed.append(name)
        message.loads.extend(load for i in sorted(self._loads) if (load := self._table.loads.get(i, now_s)) is not None)
        self._lines, self._loads = set(), set()
        self._load_due_s = now_s + self._table.settings.load_interval_s
        return message
