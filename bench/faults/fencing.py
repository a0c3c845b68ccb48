"""Effects of a second leader, read out of etcd's own history after a run: no observer can miss a write.

Each assignment carries the token of the term under which it was written. Along etcd's revisions tokens of a role never fall, and
each is the token of whoever led at that revision: the oldest candidate's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.coordination.kv import Event, KeyValue
from inference_runtime.errors import ServerError
from inference_runtime.v1 import common_pb2

__all__ = ["Writes", "leader_writes", "read_history"]

#: Seconds in which etcd has to send the next part of its history.
READ_S = 10.0


@dataclass(frozen=True, slots=True)
class Writes:
    """What the leaders wrote: how many assignments, in how many terms, and which of them nobody was entitled to write."""

    assignments: int
    terms: int
    effects: tuple[str, ...]


async def read_history(endpoints: Sequence[str], since: int = 1) -> list[Event]:
    """Every change of elections and assignments from a revision on, in order.

    Raises:
        ServerError: etcd did not send all of it.
        Compacted: It does not keep that revision any more.
    """
    events: list[Event] = []
    async with EtcdClient(list(endpoints)) as client:
        marker = await client.put(keys.ROOT + "faults/end", b"")
        stream = client.watch(keys.ROOT, since)
        await stream.open()
        try:
            while not events or events[-1].kv.mod_revision < marker:
                update = await stream.read(READ_S)
                if update is None:
                    raise ServerError(f"etcd sent its history up to revision {events[-1].kv.mod_revision if events else 0} only")
                events += update.events
        finally:
            stream.close()
    return events


def leader_writes(events: Sequence[Event], standing: Sequence[KeyValue] = ()) -> Writes:
    """Judge a history. Pure.

    Args:
        events: Changes in the order of etcd's revisions.
        standing: Candidates that stood before the first of them.
    """
    candidates: dict[str, dict[str, int]] = {}
    for kv in standing:
        candidates.setdefault(keys.segments(kv.key, keys.ELECTIONS)[0], {})[kv.key] = kv.create_revision
    highest: dict[str, int] = {}
    terms: set[tuple[str, int]] = set()
    effects: list[str] = []
    count = 0
    for event in _ordered(events):
        key = event.kv.key
        if key.startswith(keys.ELECTIONS):
            candidacies = candidates.setdefault(keys.segments(key, keys.ELECTIONS)[0], {})
            if event.deleted:
                candidacies.pop(key, None)
            else:
                candidacies[key] = event.kv.create_revision
        elif key.startswith(keys.ASSIGNMENTS) and not event.deleted:
            token = common_pb2.Assignment.FromString(event.kv.value).fencing_token
            count += 1
            terms.add((token.role, token.revision))
            leading = min(candidates.get(token.role, {}).values(), default=0)
            where = f"revision {event.kv.mod_revision}: {key} carries token {token.revision} of {token.role}"
            if token.revision < highest.get(token.role, 0):
                effects.append(f"{where} after {highest[token.role]}")
            elif token.revision != leading:
                effects.append(f"{where} while {leading or 'nobody'} led")
            highest[token.role] = max(highest.get(token.role, 0), token.revision)
    return Writes(count, len(terms), tuple(effects))


def _ordered(events: Sequence[Event]) -> list[Event]:
    # Within one transaction a write is judged by who led before it.
    return sorted(events, key=lambda e: (e.kv.mod_revision, e.kv.key.startswith(keys.ELECTIONS)))
