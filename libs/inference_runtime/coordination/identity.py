"""Which store this is: the rule by which a process refuses an etcd that is not the one it has followed. Pure, no I/O.

A store is known by a random id under `keys.STORE`, written once by whoever uses it first, by etcd's cluster id, and by the
highest revision that was seen. An etcd that was wiped has lost the id, one that was restored from an older snapshot has an older
revision, another cluster has another id. None of them may be acted on before an operator says so, because what it holds is not
what the others were told: `inferctl acknowledge-store` gives the store a new id, marked as acknowledged.

docs/adr/0008-store-identity.md has the reasons, and what is not covered.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Self

__all__ = ["ACKNOWLEDGE", "StoreGuard", "StoreMark", "StoreRecord"]

#: What a person types to go on.
ACKNOWLEDGE = "inferctl acknowledge-store"
#: Earlier ids that are remembered. An id among them never comes back by itself.
MAX_PAST = 32

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class StoreRecord:
    """What stands under `keys.STORE`.

    Args:
        store_id: 32 hex digits, random.
        acknowledged: An operator said that this store is the one to follow, whatever was followed before.
        past: Ids that it had before, oldest first.
    """

    store_id: str
    acknowledged: bool = False
    past: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """As stored: JSON, so that a person can read it with etcdctl."""
        document = {"store_id": self.store_id, "acknowledged": self.acknowledged, "past": list(self.past)}
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, value: bytes) -> Self | None:
        """Reads a record; None for anything that is none, which then counts as a store without an id."""
        try:
            document = json.loads(value)
            store_id, acknowledged, past = document["store_id"], document["acknowledged"], document["past"]
        except (ValueError, KeyError, TypeError):
            return None
        ids = [store_id, *past] if isinstance(past, list) else []
        if not ids or not isinstance(acknowledged, bool) or not all(isinstance(i, str) and _ID.fullmatch(i) for i in ids):
            return None
        return cls(store_id, acknowledged, tuple(past[-MAX_PAST:]))

    def acknowledged_as(self, store_id: str) -> StoreRecord:
        """The record that an acknowledgement puts in place of this one."""
        return StoreRecord(store_id, True, (*self.past, self.store_id)[-MAX_PAST:])


@dataclass(frozen=True, slots=True)
class StoreMark:
    """What a process remembers of the store it follows; what it writes to disk when it keeps a table there.

    Args:
        store_id: Its id.
        cluster_id: etcd's cluster id.
        revision: The highest revision that was seen.
        past: Ids that were followed before, or that the record named as such.
    """

    store_id: str
    cluster_id: int
    revision: int
    past: tuple[str, ...] = ()


class StoreGuard:
    """Follows one store, and refuses every other. One for each process; not thread-safe.

    Args:
        mark: What an earlier life of this process followed; None to follow the first store that answers.
    """

    def __init__(self, mark: StoreMark | None = None) -> None:
        self._mark = mark
        self._cluster_id = mark.cluster_id if mark else 0
        self._revision = mark.revision if mark else 0
        self._refusal = ""
        self._went_back = False
        #: Counts the stores that were followed. An answer to a call of an earlier era says nothing.
        self.era = 0

    @property
    def refusal(self) -> str:
        """Why the store that answers is not followed, one sentence; empty while it is."""
        return self._refusal

    @property
    def mark(self) -> StoreMark | None:
        """What is followed; None before the first store was seen."""
        return replace(self._mark, revision=max(self._mark.revision, self._revision)) if self._mark else None

    @property
    def revision(self) -> int:
        """The highest revision seen. A linearizable read that began later must not answer with less."""
        return self._revision

    @property
    def lineage(self) -> int:
        """A number that stands for the followed store and no other; 0 before it is known. Part of every fencing token: tokens of
        different lineages cannot be compared."""
        if self._mark is None:
            return 0
        return int.from_bytes(hashlib.sha256(f"{self._mark.cluster_id}/{self._mark.store_id}".encode()).digest()[:8], "big")

    def plausible(self, cluster_id: int, revision: int, floor: int) -> bool:
        """Whether an answer can be one of the followed store. When not, read its id and ask `judge`.

        Args:
            cluster_id: The answer's.
            revision: The answer's; it must be of a linearizable call.
            floor: `revision` of this guard as it was before the call was sent.
        """
        if self._cluster_id and (cluster_id != self._cluster_id or revision < floor):
            return False
        self.saw(cluster_id, revision)
        return True

    def saw(self, cluster_id: int, revision: int) -> None:
        """Takes note of a revision of the followed store."""
        self._cluster_id = self._cluster_id or cluster_id
        if not self._refusal and cluster_id == self._cluster_id:
            self._revision = max(self._revision, revision)

    def judge(self, record: StoreRecord | None, cluster_id: int, revision: int, floor: int) -> bool:
        """Decides from the record that a linearizable read found under `keys.STORE`. True when the store may be used; else
        `refusal` says why not.

        Args:
            record: What was found; None when there was nothing readable.
            cluster_id: The answer's.
            revision: The answer's.
            floor: `revision` of this guard as it was before the call was sent.
        """
        mark = self._mark
        if mark is None:
            return self._first(record, cluster_id, revision, floor)
        if record is None:
            return self._refuse(f"it holds no id where {mark.store_id[:8]} was, so it was wiped or replaced")
        if record.store_id != mark.store_id:
            if record.acknowledged and record.store_id not in mark.past:
                past = dict.fromkeys((*mark.past, *record.past, mark.store_id))
                self._follow(StoreMark(record.store_id, cluster_id, revision, tuple(past)[-MAX_PAST:]))
                return True
            return self._refuse(f"its id is {record.store_id[:8]} and was {mark.store_id[:8]}")
        if cluster_id != self._cluster_id:
            return self._refuse(f"its cluster id is {cluster_id:x} and was {self._cluster_id:x}")
        if revision < floor:
            self._went_back = True
            return self._refuse(f"its revision went back from {floor} to {revision}, so it was restored from an older state")
        if self._went_back:
            return False  # a history that grew past the old revision is still another history
        self._refusal = ""
        self.saw(cluster_id, revision)
        return True

    def _first(self, record: StoreRecord | None, cluster_id: int, revision: int, floor: int) -> bool:
        """Judges while no id is followed: at the first contact, or where the etcd user may neither write nor read one. Then
        cluster id and revision are all there is."""
        self._went_back = self._went_back or revision < floor
        if record is None or not record.acknowledged:
            if self._cluster_id and cluster_id != self._cluster_id:
                return self._refuse(f"its cluster id is {cluster_id:x} and was {self._cluster_id:x}")
            if self._went_back:
                return self._refuse(
                    f"its revision went back from {floor} to {revision}, so it was wiped or restored from an older state"
                )
        if record is not None:
            self._follow(StoreMark(record.store_id, cluster_id, revision, record.past))
            return True
        self._refusal = ""
        self.saw(cluster_id, revision)
        return True

    def _follow(self, mark: StoreMark) -> None:
        self._mark, self._cluster_id, self._revision = mark, mark.cluster_id, mark.revision
        self._refusal, self._went_back = "", False
        self.era += 1

    def _refuse(self, why: str) -> bool:
        self._refusal = self._refusal or why
        return False
