"""Engines that do not reach etcd: the leader keeps their records for them, under a lease that their reports renew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from inference_runtime.coordination import EtcdClient, LeaseLost, Op, Term, keys
from inference_runtime.coordination.etcd import KeepAliveStream
from inference_runtime.errors import BadRequest
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import common_pb2

__all__ = ["Registrar"]

log = get_logger(__name__)

#: Replicas of one engine; a transaction takes 128 operations, and a registration may replace all of them.
MAX_REPLICAS = 60
#: Deadline of one renewal, seconds.
RENEWAL_TIMEOUT_S = 1.0


@dataclass(slots=True)
class _Entry:
    """One engine that registered by call."""

    lease_id: int
    stream: KeepAliveStream
    renewed_s: float
    keys: set[str] = field(default_factory=set)


class Registrar:
    """The registrations of one term. A new leader knows none of them: an engine that hears NotLeader registers again there, and
    until then the old lease keeps its routes.

    Args:
        client: etcd.
        term: The term; every write is guarded by it.
        ttl_s: How long a registration holds without a report, seconds.
    """

    def __init__(self, client: EtcdClient, term: Term, ttl_s: float) -> None:
        self._client, self._term, self._ttl_s = client, term, ttl_s
        self._entries: dict[str, _Entry] = {}

    async def register(self, engine: common_pb2.Engine, replicas: Sequence[common_pb2.Replica]) -> float:
        """Announce an engine and all of its replicas. Returns the seconds for which this holds.

        Raises:
            BadRequest: An id, address or deployment is missing, or a replica belongs to another engine.
            StaleLeader: Another process leads by now. Nothing was changed.
        """
        _check(engine, replicas)
        entry = self._entries.get(engine.id)
        if entry is None or not await self._renew(engine.id, entry):
            grant = await self._client.grant(self._ttl_s)
            entry = _Entry(grant.lease_id, self._client.keep_alive(grant.lease_id), time.monotonic())
            self._entries[engine.id] = entry
        records = {keys.engine(engine.id): engine.SerializeToString()}
        records |= {keys.replica(r.deployment, r.id): r.SerializeToString() for r in replicas}
        ops = [Op.delete(key) for key in sorted(entry.keys - records.keys())]
        ops += [Op.put(key, value, entry.lease_id) for key, value in records.items()]
        await self._term.txn(ops)
        entry.keys = set(records)
        log.info("engine registered by call", engine=engine.id, replicas=len(replicas))
        return self._ttl_s

    async def renew(self, engine_id: str) -> bool:
        """An engine reported. False when it is not registered here, or not any more."""
        entry = self._entries.get(engine_id)
        if entry is None:
            return False
        return time.monotonic() - entry.renewed_s < self._ttl_s / 3 or await self._renew(engine_id, entry)

    def knows(self, engine_id: str) -> bool:
        """Whether this engine is registered here."""
        return engine_id in self._entries

    async def deregister(self, engine_id: str) -> bool:
        """Take an engine and its replicas back. False when it is not registered here."""
        entry = self._entries.pop(engine_id, None)
        if entry is None:
            return False
        entry.stream.close()
        await self._client.revoke(entry.lease_id)
        log.info("engine deregistered by call", engine=engine_id)
        return True

    def close(self) -> None:
        """Stop renewing. The leases live on for as long as they have left, so that a hand-over loses no route."""
        for entry in self._entries.values():
            entry.stream.close()
        self._entries.clear()

    async def _renew(self, engine_id: str, entry: _Entry) -> bool:
        try:
            await entry.stream.renew(RENEWAL_TIMEOUT_S)
        except LeaseLost:
            entry.stream.close()
            self._entries.pop(engine_id, None)
            return False
        entry.renewed_s = time.monotonic()
        return True


def _check(engine: common_pb2.Engine, replicas: Sequence[common_pb2.Replica]) -> None:
    if not engine.id or not engine.address:
        raise BadRequest("an engine needs an id and an address", param="engine")
    if len(replicas) > MAX_REPLICAS:
        raise BadRequest(f"{len(replicas)} replicas on one engine; at most {MAX_REPLICAS} can be registered", param="replicas")
    for i, replica in enumerate(replicas):
        if not (replica.id and replica.deployment and replica.address):
            raise BadRequest(f"replica {i} lacks its id, deployment or address", param=f"replicas[{i}]")
        if replica.engine_id != engine.id:
            raise BadRequest(f"replica {replica.id!r} belongs to engine {replica.engine_id!r}", param=f"replicas[{i}].engine_id")
