"""The latest load of each replica, for as long as it is worth something. Pure: the caller gives the time."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from inference_runtime.v1 import common_pb2

__all__ = ["LoadBook", "better_of_two"]


class LoadBook:
    """Load by replica. A report older than `ttl_s` is forgotten: a silent engine's last word says nothing about now.

    Args:
        ttl_s: Seconds for which a report holds.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._loads: dict[str, tuple[float, common_pb2.ReplicaLoad]] = {}

    def __len__(self) -> int:
        return len(self._loads)

    def report(self, load: common_pb2.ReplicaLoad, now_s: float) -> bool:
        """Take a report. True when it says something new."""
        before = self.get(load.replica_id, now_s)
        self._loads[load.replica_id] = (now_s, load)
        return before != load

    def get(self, replica_id: str, now_s: float) -> common_pb2.ReplicaLoad | None:
        """The load of a replica; None when nothing recent is known."""
        entry = self._loads.get(replica_id)
        return entry[1] if entry and now_s - entry[0] <= self._ttl_s else None

    def all(self, now_s: float) -> list[common_pb2.ReplicaLoad]:
        """Every load that holds, by replica id."""
        return [load for _, (at_s, load) in sorted(self._loads.items()) if now_s - at_s <= self._ttl_s]

    def keep(self, replica_ids: Collection[str], now_s: float) -> None:
        """Forget what is too old, and replicas that are not among these: the book never outgrows the table."""
        self._loads = {
            replica_id: (at_s, load)
            for replica_id, (at_s, load) in self._loads.items()
            if replica_id in replica_ids and now_s - at_s <= self._ttl_s
        }


def better_of_two(
    replicas: Sequence[common_pb2.Replica], book: LoadBook, now_s: float, draw: random.Random
) -> common_pb2.Replica:
    """One of two replicas drawn at random, the less loaded: nearly as even as looking at all, and no herd runs to one.

    A replica without a recent report counts as idle, so that a new one gets work.

    Args:
        replicas: At least one.
    """
    pair = draw.sample(list(replicas), k=min(2, len(replicas)))
    return min(pair, key=lambda replica: _busy(book.get(replica.id, now_s), replica))


def _busy(load: common_pb2.ReplicaLoad | None, replica: common_pb2.Replica) -> float:
    """Share of its places that a replica has given away; above 1 when requests wait."""
    return 0.0 if load is None else (load.running + load.queued) / max(1, replica.max_concurrent)
