"""What the leader knows: one consistent view of etcd, and who waits for it to change.

One watch over all keys, not one for each kind: a transaction that touched several is then seen whole or not at all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from google.protobuf.message import DecodeError, Message

from inference_runtime.coordination import DEFAULT_TTL_S, EtcdClient, KeyValue, WatchBatch, keys, watch_prefix
from inference_runtime.coordination.loss import LossGuard
from inference_runtime.errors import BadRequest
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import common_pb2, deployment_pb2
from services.deployment_manager.placement import Booking, host_of
from services.deployment_manager.rollout import World

__all__ = ["View", "Watcher"]

log = get_logger(__name__)

_KINDS: dict[str, type[Message]] = {
    keys.DEPLOYMENTS: deployment_pb2.Deployment,
    keys.ENGINES: common_pb2.Engine,
    keys.ASSIGNMENTS: common_pb2.Assignment,
    keys.REPLICAS: common_pb2.Replica,
}


class View:
    """The records as last seen; the last known ones while etcd is away.

    Args:
        client: etcd.
        lease_ttl_s: Time to live of engines' leases, seconds.
        mass_loss_s: How long engines that vanished in a crowd get to come back before they count as gone, seconds.
    """

    def __init__(self, client: EtcdClient, lease_ttl_s: float = DEFAULT_TTL_S, mass_loss_s: float = 0.0) -> None:
        self._client = client
        # One engine that was alone is no crowd: nothing could be placed elsewhere too early, and a successor should not wait.
        self._guard = LossGuard(2 * lease_ttl_s, mass_loss_s, least=2)
        self._vanished: set[str] = set()
        #: the catalogue, by name
        self.deployments: dict[str, deployment_pb2.Deployment] = {}
        #: registered engines, by id
        self.engines: dict[str, common_pb2.Engine] = {}
        self._assignments: dict[str, common_pb2.Assignment] = {}
        self._by_deployment: dict[str, dict[str, common_pb2.Assignment]] = {}
        self._booked: dict[str, Booking] = {}
        self._replicas: dict[str, common_pb2.Replica] = {}
        #: which record each key holds: its kind, and its name or id
        self._keys: dict[str, tuple[str, str]] = {}
        self._leaving: dict[str, common_pb2.Assignment] = {}
        self._hosts: dict[str, str] = {}
        self._touched: set[str] = set()
        self._engines_touched = False
        self._changed = asyncio.Event()
        self._watchers: set[Watcher] = set()
        #: mod revision of each deployment's record, by name
        self.mod_revisions: dict[str, int] = {}
        #: when each engine that assignments name was first missed, monotonic seconds
        self.missing_since: dict[str, float] = {}
        self.revision = 0

    async def run(self) -> None:
        """Follow etcd until cancelled."""
        async with watch_prefix(self._client, keys.ROOT) as watch:
            async for batch in watch:
                self._apply(batch)

    def _apply(self, batch: WatchBatch) -> None:
        if batch.snapshot:
            listed = {kv.key for kv in batch.puts}
            gone = [key for key in self._keys if key not in listed]
        else:
            gone = batch.deletes
        for key in gone:
            self._remove(key)
        for kv in batch.puts:
            self._put(kv)
        self._note_missing(first=not self.revision)
        self.revision = batch.revision
        self._changed.set()
        for watcher in self._watchers:
            watcher.wake.set()

    async def changed(self, timeout_s: float | None = None) -> None:
        """Wait for a change since the last call, or until the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
        finally:
            self._changed.clear()

    def take_touched(self) -> set[str]:
        """Deployments that something changed for since the last call: their record, a replica, an assignment; all of them when an
        engine came, changed or went."""
        touched, self._touched = self._touched, set()
        if self._engines_touched:
            self._engines_touched = False
            touched |= self.deployments.keys()
        return touched

    async def reach(self, revision: int) -> None:
        """Wait until a write of ours, made at this revision, is seen."""
        while self.revision < revision:
            await self.changed()
        self._changed.set()

    def world(self, engine_gone_s: float) -> World:
        """The view as the planner takes it. Engines that are missing for longer than that count as gone."""
        now_s = time.monotonic()
        return World(
            engines=self.engines,
            gone=frozenset(e for e, gone_s in self.gone_at(engine_gone_s).items() if now_s >= gone_s),
            assignments=self._assignments,
            replicas=self._replicas,
            leaving=[a for a in self._leaving.values() if a.replica_id in self._replicas],
            hosts=self._hosts,
            by_deployment=self._by_deployment,
            booked=self._booked,
        )

    def gone_at(self, engine_gone_s: float) -> dict[str, float]:
        """When each missing engine counts as gone, monotonic seconds."""
        return {e: max(since_s + engine_gone_s, self._guard.believed_until(e)) for e, since_s in self.missing_since.items()}

    def end(self) -> None:
        """The term is over: watchers are told."""
        for watcher in self._watchers:
            watcher.ended = True
            watcher.wake.set()

    @contextmanager
    def subscribe(self) -> Iterator[Watcher]:
        """A watcher of the catalogue, for as long as the context lasts."""
        watcher = Watcher(self)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def _put(self, kv: KeyValue) -> None:
        prefix = next((prefix for prefix in _KINDS if kv.key.startswith(prefix)), "")
        if not prefix:
            return
        try:
            record = _KINDS[prefix].FromString(kv.value)
        except DecodeError as err:
            log.error("record is not readable", key=kv.key, exc_info=err)
            self._remove(kv.key)
            return
        if kv.key != _key_of(record):  # whoever follows the id in it would write elsewhere
            log.error("record does not belong to its key", key=kv.key)
            self._remove(kv.key)
            return
        match record:
            case deployment_pb2.Deployment():
                self._keys[kv.key] = prefix, record.spec.name
                self.deployments[record.spec.name] = record
                self._catalogue_changed(record.spec.name, kv.mod_revision)
            case common_pb2.Engine():
                self._keys[kv.key] = prefix, record.id
                self.engines[record.id] = record
                self._engines_touched = True
                if self._hosts.get(record.id) != host_of(record):
                    self._hosts[record.id] = host_of(record)
                    self._booked.clear()
            case common_pb2.Assignment():
                self._keys[kv.key] = prefix, record.replica_id
                self._drop_assignment(record.replica_id)
                self._touched.add(record.deployment)
                self._assignments[record.replica_id] = record
                self._by_deployment.setdefault(record.deployment, {})[record.replica_id] = record
                self._leaving.pop(record.replica_id, None)
            case common_pb2.Replica():
                self._keys[kv.key] = prefix, record.id
                self._replicas[record.id] = record
                self._touched.add(record.deployment)

    def _remove(self, key: str) -> None:
        match self._keys.pop(key, ("", "")):
            case keys.DEPLOYMENTS, name:
                del self.deployments[name]
                self._catalogue_changed(name, 0)
            case keys.ENGINES, engine_id:
                if self.engines.pop(engine_id).state != common_pb2.ENGINE_STATE_DRAINING:
                    self._vanished.add(engine_id)
                self._engines_touched = True
            case keys.ASSIGNMENTS, replica_id:
                if (assignment := self._drop_assignment(replica_id)) is not None:
                    self._leaving[replica_id] = assignment
            case keys.REPLICAS, replica_id:
                if (replica := self._replicas.pop(replica_id, None)) is not None:
                    self._touched.add(replica.deployment)
                self._leaving.pop(replica_id, None)
                self._booked.pop(replica_id, None)

    def _drop_assignment(self, replica_id: str) -> common_pb2.Assignment | None:
        self._booked.pop(replica_id, None)
        assignment = self._assignments.pop(replica_id, None)
        if assignment is not None:
            self._touched.add(assignment.deployment)
            others = self._by_deployment[assignment.deployment]
            del others[replica_id]
            if not others:
                del self._by_deployment[assignment.deployment]
        return assignment

    def _catalogue_changed(self, name: str, mod_revision: int) -> None:
        self._touched.add(name)
        if mod_revision:
            self.mod_revisions[name] = mod_revision
        else:
            self.mod_revisions.pop(name, None)
        for watcher in self._watchers:
            watcher.owed.add(name)

    def _note_missing(self, *, first: bool) -> None:
        now_s = time.monotonic()
        self._leaving = {i: a for i, a in self._leaving.items() if i in self._replicas}
        named = {a.engine_id for a in (*self._assignments.values(), *self._leaving.values())}
        self.missing_since = {e: self.missing_since.get(e, now_s) for e in named - self.engines.keys()}
        lost = (self._vanished | (self.missing_since.keys() if first else set())) - self.engines.keys()
        self._vanished.clear()
        if lost and self._guard.lost(lost, self.engines, now_s):
            log.error("many engines vanished at once; their replicas keep their places for a while", alive=len(self.engines))
        self._hosts = {e: host for e, host in self._hosts.items() if e in named or e in self.engines}


def _key_of(record: Message) -> str:
    """The key under which a record belongs; "" when its own ids make no key."""
    try:
        match record:
            case deployment_pb2.Deployment():
                return keys.deployment(record.spec.name)
            case common_pb2.Engine():
                return keys.engine(record.id)
            case common_pb2.Assignment():
                return keys.assignment(record.engine_id, record.replica_id)
            case common_pb2.Replica():
                return keys.replica(record.deployment, record.id)
    except BadRequest:
        pass
    return ""


class Watcher:
    """One watcher of the catalogue: it is owed names, never a queue of records."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.owed: set[str] = set(view.deployments)
        self.wake = asyncio.Event()
        self.ended = False

    async def next(self) -> list[tuple[str, deployment_pb2.Deployment | None]] | None:
        """What changed since the last call: names with their record, or None for one that is gone. Waits for the first. None when
        the term is over."""
        while not self.owed or self.ended:
            if self.ended:
                return None
            self.wake.clear()
            await self.wake.wait()
        owed, self.owed = sorted(self.owed), set()
        records = self._view.deployments
        return [(name, records.get(name)) for name in owed]
