"""Values of etcd's key space: what is stored, what a transaction compares and does, what it answers. No I/O here."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Compare",
    "CompareOp",
    "CompareTarget",
    "Event",
    "KeyValue",
    "Op",
    "OpKind",
    "OpResult",
    "TxnResult",
    "WatchUpdate",
    "collapse",
    "difference",
    "prefix_end",
]

CompareOp = Literal["==", "!=", "<", ">"]


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as it was at one revision. `lease_id` is 0 for a key without a lease."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease_id: int


@dataclass(frozen=True, slots=True)
class Event:
    """One change: a put when `deleted` is False. A deletion carries the revision that deleted it and no value."""

    kv: KeyValue
    deleted: bool


@dataclass(frozen=True, slots=True)
class WatchUpdate:
    """One answer on a watch stream. `revision` is the store's revision at that time; `events` never split a revision."""

    revision: int
    cluster_id: int
    events: tuple[Event, ...]


class CompareTarget(enum.Enum):
    """The property of a key that a guard looks at. All are 0 for a key that does not exist."""

    CREATE_REVISION = "create_revision"
    MOD_REVISION = "mod_revision"
    VERSION = "version"


@dataclass(frozen=True, slots=True)
class Compare:
    """One guard of a transaction: `Compare.create_revision(key, "==", 0)` reads "the key does not exist"."""

    key: str
    target: CompareTarget
    op: CompareOp
    number: int

    @staticmethod
    def create_revision(key: str, op: CompareOp, revision: int) -> Compare:
        """Compares the revision at which the key was created; 0 when it does not exist."""
        return Compare(key, CompareTarget.CREATE_REVISION, op, revision)

    @staticmethod
    def mod_revision(key: str, op: CompareOp, revision: int) -> Compare:
        """Compares the revision of the last write to the key; 0 when it does not exist."""
        return Compare(key, CompareTarget.MOD_REVISION, op, revision)

    @staticmethod
    def version(key: str, op: CompareOp, version: int) -> Compare:
        """Compares the number of writes since the key was created; 0 when it does not exist."""
        return Compare(key, CompareTarget.VERSION, op, version)


class OpKind(enum.Enum):
    """What one operation of a transaction does."""

    PUT = "put"
    DELETE = "delete"
    GET = "get"


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of a transaction. etcd refuses two writes to the same key, and more than 128 operations, in one."""

    kind: OpKind
    key: str
    value: bytes = b""
    lease_id: int = 0
    prefix: bool = False

    @staticmethod
    def put(key: str, value: bytes, lease_id: int = 0) -> Op:
        """Writes a key, under a lease when `lease_id` is not 0."""
        return Op(OpKind.PUT, key, value, lease_id)

    @staticmethod
    def delete(key: str, *, prefix: bool = False) -> Op:
        """Deletes a key, or all keys with this prefix."""
        return Op(OpKind.DELETE, key, prefix=prefix)

    @staticmethod
    def get(key: str, *, prefix: bool = False) -> Op:
        """Reads a key, or all keys with this prefix."""
        return Op(OpKind.GET, key, prefix=prefix)


@dataclass(frozen=True, slots=True)
class OpResult:
    """The answer to one operation: what a get found, how many keys a delete removed."""

    kvs: tuple[KeyValue, ...] = ()
    deleted: int = 0


@dataclass(frozen=True, slots=True)
class TxnResult:
    """The answer to a transaction. `results` belong to the branch that ran: success when `succeeded`, else failure."""

    succeeded: bool
    revision: int
    cluster_id: int
    results: tuple[OpResult, ...] = field(default=())


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range that holds exactly the keys with this prefix; `\\0` (no end) when there is none."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b"\0"


def collapse(events: list[Event], after: int) -> tuple[list[KeyValue], list[str]]:
    """The net effect of events in revision order: each key once, as a put or as a deletion. Events up to revision `after` are old
    (etcd has had bugs that repeat them) and are dropped."""
    last = {event.kv.key: event for event in events if event.kv.mod_revision > after}
    return [e.kv for e in last.values() if not e.deleted], [key for key, e in last.items() if e.deleted]


def difference(known: Mapping[str, int], listed: list[KeyValue]) -> tuple[list[KeyValue], list[str]]:
    """What changed between what is `known` (key → mod revision) and what was `listed`: the puts and the deletions."""
    present = {kv.key for kv in listed}
    return [kv for kv in listed if known.get(kv.key) != kv.mod_revision], [key for key in known if key not in present]
