"""A prefix of etcd, followed for ever: one full snapshot, then every change, whatever happens to etcd meanwhile."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from inference_runtime.coordination.clock import Backoff
from inference_runtime.coordination.errors import Compacted, EtcdError, EtcdUnavailable
from inference_runtime.coordination.etcd import EtcdClient, WatchStream
from inference_runtime.coordination.kv import KeyValue, collapse, difference
from inference_runtime.telemetry import get_logger

__all__ = ["PrefixWatch", "WatchBatch", "watch_prefix"]

log = get_logger(__name__)

#: Silence after which the stream is reopened, which proves that somebody still answers, seconds.
SILENCE_S = 30.0
#: A full listing is compared this often, seconds: a net under bugs of etcd that lose events.
RELIST_S = 300.0


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """What changed since the last batch.

    A snapshot replaces everything the reader knows; otherwise `puts` and `deletes` are applied to it. Each key is named at most
    once, and deletions only name keys that earlier batches put. A key that was deleted and written again is a put with a new
    `create_revision`. `cluster_id` is `EtcdClient.lineage`, the number of the store that was read; within one no revision falls.
    """

    snapshot: bool
    revision: int
    cluster_id: int
    puts: list[KeyValue]
    deletes: list[str]


class PrefixWatch:
    """Iterates over batches. The first is a snapshot; a later one comes only when the cluster itself was replaced or restored.

    Outages, restarts and compaction are never raised: it goes on trying with jitter, and after a compaction it lists again and
    yields the difference. Only what the very first listing refuses (no such user, no permission) is raised.

    For one task. On cancel of `__anext__` nothing is lost: the next call goes on from the last batch that was returned.
    """

    def __init__(self, client: EtcdClient, prefix: str, *, exact: bool = False, silence_s: float = SILENCE_S) -> None:
        """Args:
        client: The client to use; not closed here.
        prefix: The prefix to follow, or the key if `exact`.
        exact: Follow one key instead of a prefix.
        silence_s: Reopen the stream after this long without an event, seconds.
        """
        self._client = client
        self._prefix = prefix
        self._exact = exact
        self._silence_s = silence_s
        self._stream: WatchStream | None = None
        self._known: dict[str, int] = {}
        self._revision = 0
        self._cluster_id = 0
        self._lineage = 0
        self._listed_at: float | None = None  # None: list before anything else
        self._relist_s = RELIST_S
        self._backoff = Backoff()

    def __aiter__(self) -> AsyncIterator[WatchBatch]:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream. Iterating again would open another."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    async def __anext__(self) -> WatchBatch:
        while True:
            try:
                batch = await self._step()
            except Compacted:
                self.close()
                self._listed_at = None
                continue
            except EtcdError as err:
                self.close()
                if not self._cluster_id and not isinstance(err, EtcdUnavailable):
                    raise
                log.debug("watch interrupted", prefix=self._prefix, cause=err.message)
                await asyncio.sleep(self._backoff.next_s())
                continue
            except BaseException:
                self.close()
                raise
            self._backoff.reset()
            if batch is not None:
                return batch

    async def _step(self) -> WatchBatch | None:
        """Does the next thing that is due: list, open the stream, or read it. None when there is nothing to tell."""
        if self._listed_at is None or time.monotonic() - self._listed_at > self._relist_s:
            self.close()
            return await self._list()
        if self._stream is None:
            stream = self._client.watch(self._prefix, self._revision + 1, prefix=not self._exact)
            opened = await stream.open()
            if self._replaced(opened.cluster_id, opened.revision):
                stream.close()
                self._listed_at = None
                return None
            self._stream = stream
        update = await self._stream.read(self._silence_s)
        if update is None:
            self._stream = None
            return None
        puts, gone = collapse(list(update.events), after=self._revision)
        self._revision = max([self._revision, *(event.kv.mod_revision for event in update.events)])
        deletes = [key for key in gone if key in self._known]  # what came and went inside one update was never told
        if not puts and not deletes:
            return None
        self._known.update((kv.key, kv.mod_revision) for kv in puts)
        for key in deletes:
            del self._known[key]
        return WatchBatch(False, self._revision, self._lineage, puts, deletes)

    async def _list(self) -> WatchBatch | None:
        await self._client.verify()
        if self._exact:
            kv, revision = await self._client.get_at(self._prefix)
            found = [kv] if kv else []
        else:
            found, revision = await self._client.list(self._prefix)
        cluster_id, lineage = self._client.cluster_id, self._client.lineage
        # A first listing, another cluster, or an older state of this one: nothing that is known can be compared.
        anew = self._replaced(cluster_id, revision) or not self._cluster_id
        puts, deletes = (found, []) if anew else difference(self._known, found)
        self._known = {kv.key: kv.mod_revision for kv in found}
        self._revision, self._cluster_id, self._lineage = revision, cluster_id, lineage
        self._listed_at = time.monotonic()
        self._relist_s = RELIST_S * random.uniform(0.8, 1.2)
        return WatchBatch(anew, revision, lineage, puts, deletes) if anew or puts or deletes else None

    def _replaced(self, cluster_id: int, revision: int) -> bool:
        """Whether what answers is not what we followed: another cluster, one restored from an older snapshot, or one that an
        operator acknowledged. Waiting there for our revision + 1 would hang until the new history had grown that long."""
        same = (cluster_id, self._client.lineage) == (self._cluster_id, self._lineage)
        return bool(self._cluster_id) and (not same or revision < self._revision)


def watch_prefix(client: EtcdClient, prefix: str) -> PrefixWatch:
    """Follows a prefix: `async with watch_prefix(client, ENGINES) as watch: async for batch in watch: …`."""
    return PrefixWatch(client, prefix)
