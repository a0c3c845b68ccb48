"""One leader per role: candidates that campaign, and observers that know who won.

A candidate is a key under `elections/<role>/` with the candidate's own lease. The oldest key leads. Every other candidate waits
for the key just before its own, so a change wakes one process and not all. A term is fenced by the revision that created its key.

Not promised: that only one process *believes* to lead at every instant. Promised: a process stops believing before etcd lets
another begin, unless its clock runs a quarter slower than etcd's; and a guarded write of a former leader always fails, whatever
it believes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from inference_runtime.coordination import keys
from inference_runtime.coordination.clock import Backoff, boottime
from inference_runtime.coordination.errors import EtcdError, EtcdOutcomeUnknown, EtcdUnavailable, LeaseLost
from inference_runtime.coordination.etcd import EtcdClient
from inference_runtime.coordination.fencing import FencingToken, LeaderInfo, oldest
from inference_runtime.coordination.kv import Compare, KeyValue, Op, TxnResult
from inference_runtime.coordination.lease import DEFAULT_TTL_S, Lease
from inference_runtime.coordination.watch import PrefixWatch
from inference_runtime.coordination.watchdog import guarded
from inference_runtime.errors import NotLeader, StaleLeader
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import common_pb2

__all__ = ["Candidate", "Election", "LeaderObserver", "Term"]

log = get_logger(__name__)

_Coroutine = Coroutine[Any, Any, None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """Who stands for election: an id of its own for each process start, and host:port of its gRPC server."""

    candidate_id: str
    address: str
    pid: int

    @classmethod
    def here(cls, address: str) -> Self:
        """This process, with a fresh id."""
        return cls(uuid.uuid4().hex, address, os.getpid())


@dataclass(frozen=True)
class Term:
    """One time in office, given to the body of `Election.run`. Over when the body is cancelled; no term ever resumes."""

    token: FencingToken
    leader_key: str
    candidate: Candidate
    _client: EtcdClient = field(repr=False)
    _lease: Lease = field(repr=False)

    def valid(self) -> bool:
        """Whether this process may still act as the leader. Ask immediately before each effect."""
        return self._lease.valid()

    async def lost(self) -> None:
        """Returns once this term is over. Only for code that outlives the body, which is cancelled by then."""
        await self._lease.lost()

    async def txn(self, success: Sequence[Op], *, compare: Sequence[Compare] = (), failure: Sequence[Op] = ()) -> TxnResult:
        """A leader's write: runs only while our key is the one of this term. Every leader writes to etcd this way and no other.

        Returns: `succeeded` False means that we lead and one of `compare` did not hold; `failure` ran then.

        Raises:
            StaleLeader: This term is over. Nothing was written.
            EtcdUnavailable: Not sent.
            EtcdOutcomeUnknown: Sent, and no answer came: it may have happened. Read back, then decide; make effects repeatable.
        """
        if not self.valid():
            raise self._stale()
        result = await self._client.txn(
            compare=[Compare.create_revision(self.leader_key, "==", self.token.revision), *compare],
            success=success,
            failure=[*failure, Op.get(self.leader_key)],
        )
        if result.succeeded:
            return result
        *others, mine = result.results
        if not mine.kvs or mine.kvs[0].create_revision != self.token.revision:
            self._lease.end()
            raise self._stale()
        return TxnResult(False, result.revision, result.cluster_id, tuple(others))

    def _stale(self) -> StaleLeader:
        return StaleLeader(
            f"Term {self.token.revision} of the {self.token.role} is over; nothing was written.", role=self.token.role
        )


class Election:
    """One candidate of one role.

    Args:
        client: The client to use; not closed here.
        role: The role, for example "coordinator".
        candidate: Who stands, and where it answers.
        ttl_s: Time to live of the lease, seconds: a dead leader is replaced after at most this long, plus one.
        on_lost: Called when a term ends against our will, after its body has ended.
    """

    def __init__(
        self,
        client: EtcdClient,
        role: str,
        candidate: Candidate,
        *,
        ttl_s: float = DEFAULT_TTL_S,
        on_lost: Callable[[Term], None] | None = None,
    ) -> None:
        self._client = client
        self._role = role
        self._candidate = candidate
        self._ttl_s = ttl_s
        self._on_lost = on_lost
        self._key = keys.election(role, candidate.candidate_id)
        self._term: Term | None = None

    @property
    def term(self) -> Term | None:
        """The term this candidate is in, while it leads."""
        return self._term if self._term is not None and self._term.valid() else None

    async def run(self, lead: Callable[[Term], Awaitable[None]]) -> None:
        """Campaigns for ever, calling `lead` for each term.

        `lead` is cancelled when the term is lost; it then has a second to end before the watchdog ends the process. When it
        returns, raises StaleLeader or raises an EtcdError, this candidate resigns and stands again. Outages are waited out.

        Raises: any other error of `lead`, after resigning, in an ExceptionGroup as every task group does.

        On cancel: lets `lead` end (the lease stays alive for that), then resigns: the next leader begins within a second.
        """
        backoff = Backoff()
        while True:
            lease = Lease(self._client, ttl_s=self._ttl_s)
            began_at = boottime()
            try:
                await lease.grant()
                await self._one_term(lease, lead)
            except* EtcdError as group:
                self._interrupted(group.exceptions[0])
            finally:
                await lease.revoke()  # resigns: our key goes with it
            if boottime() - began_at > self._ttl_s:  # else it fails as soon as it begins; then ever more slowly
                backoff.reset()
            await asyncio.sleep(backoff.next_s())

    def _interrupted(self, cause: BaseException) -> None:
        say = log.debug if isinstance(cause, EtcdUnavailable | LeaseLost) else log.warning
        say("campaign interrupted", role=self._role, cause=str(cause))

    async def _one_term(self, lease: Lease, lead: Callable[[Term], Awaitable[None]]) -> None:
        """Campaigns and leads under one lease; returns when the lease or the leadership is lost, or `lead` returned."""
        async with asyncio.TaskGroup() as outer:
            # In the outer group, so that a cancelled body still has a lease while it ends.
            keeper = outer.create_task(lease.run(), name=f"election.{self._role}.lease")
            try:
                await _until_lost(lease, self._campaign_and_lead(lease, lead), name=f"election.{self._role}")
            finally:
                keeper.cancel()

    async def _campaign_and_lead(self, lease: Lease, lead: Callable[[Term], Awaitable[None]]) -> None:
        try:
            term = await self._campaign(lease)
        except EtcdError as err:
            self._interrupted(err)
            return
        log.info("elected", role=self._role, term=term.token.revision)
        with guarded(self._role, lease):
            self._term = term
            try:
                beside = self._deposed(term, lease), self._moved(term, lease)
                await _until_lost(lease, self._lead(term, lead), *beside, name=f"term.{self._role}")
            finally:
                self._term = None
                log.info("term ended", role=self._role, term=term.token.revision, lost=not lease.valid())
                if not lease.valid() and self._on_lost is not None:
                    self._on_lost(term)

    async def _lead(self, term: Term, lead: Callable[[Term], Awaitable[None]]) -> None:
        try:
            await lead(term)
        except* (StaleLeader, EtcdError) as group:
            log.info("leader stood down", role=self._role, cause=str(group.exceptions[0]))

    async def _campaign(self, lease: Lease) -> Term:
        """Stands, and returns when no older candidate is left."""
        mine = await self._stand(lease)
        while True:
            candidates, _ = await self._client.list(keys.election_prefix(self._role))
            own = next((kv for kv in candidates if kv.key == self._key), None)
            if own is None or own.create_revision != mine:
                raise LeaseLost("Somebody deleted the candidate's key; it stands again with another.")
            older = [kv for kv in candidates if kv.create_revision < mine]
            if not older and not lease.valid():
                raise LeaseLost("The lease ran out on the way into office.")
            if not older:
                token = FencingToken(self._role, self._client.lineage, mine)
                return Term(token, self._key, self._candidate, self._client, lease)
            await self._gone(max(older, key=lambda kv: kv.create_revision))

    async def _stand(self, lease: Lease) -> int:
        """Puts our key under the lease, and returns the revision that created it."""
        value = common_pb2.Leader(
            role=self._role, candidate_id=self._candidate.candidate_id, address=self._candidate.address, pid=self._candidate.pid
        )
        while True:
            try:
                result = await self._client.txn(
                    compare=[Compare.create_revision(self._key, "==", 0)],
                    success=[Op.put(self._key, value.SerializeToString(deterministic=True), lease.id)],
                    failure=[Op.get(self._key)],
                )
            except EtcdOutcomeUnknown:
                continue  # create-if-absent: asking again tells what happened
            if result.succeeded:
                return result.revision
            existing = result.results[0].kvs[0]
            if existing.lease_id == lease.id:
                return existing.create_revision
            # Ours, of an earlier lease that has not run out yet.
            await self._client.txn(
                compare=[Compare.create_revision(self._key, "==", existing.create_revision)], success=[Op.delete(self._key)]
            )

    async def _gone(self, kv: KeyValue) -> None:
        """Returns when this very key was deleted (or deleted and made again)."""
        async with PrefixWatch(self._client, kv.key, exact=True) as watch:
            async for batch in watch:
                if batch.deletes or not any(put.create_revision == kv.create_revision for put in batch.puts):
                    return

    async def _deposed(self, term: Term, lease: Lease) -> None:
        """Ends the lease when our key goes although the lease lives: an operator asked for another leader."""
        async with PrefixWatch(self._client, term.leader_key, exact=True) as watch:
            async for batch in watch:
                if batch.deletes or not any(put.create_revision == term.token.revision for put in batch.puts):
                    lease.end()
                    return

    async def _moved(self, term: Term, lease: Lease) -> None:
        """Ends the lease when an operator acknowledged the store anew: tokens of before and after cannot be compared."""
        if self._client.guard is None or self._client.guard.mark is None:
            return
        async with PrefixWatch(self._client, keys.STORE, exact=True) as watch:
            async for _ in watch:
                with contextlib.suppress(EtcdUnavailable):  # of a refused store nothing can be written anyway
                    await self._client.verify()
                if self._client.lineage != term.token.cluster_id:
                    lease.end()
                    return


class LeaderObserver:
    """Knows who leads a role. Give `run` a task. While etcd is away the last known leader stays."""

    def __init__(self, client: EtcdClient, role: str) -> None:
        self._client = client
        self._role = role
        self._candidates: dict[str, KeyValue] = {}
        self._current: LeaderInfo | None = None
        self._changed = asyncio.Event()

    @property
    def role(self) -> str:
        """The role that is observed."""
        return self._role

    @property
    def current(self) -> LeaderInfo | None:
        """The leader; None when there is none, or before the first answer."""
        return self._current

    async def run(self) -> None:
        """Follows the election until cancelled."""
        async with PrefixWatch(self._client, keys.election_prefix(self._role)) as watch:
            async for batch in watch:
                if batch.snapshot:
                    self._candidates.clear()
                self._candidates.update((kv.key, kv) for kv in batch.puts)
                for key in batch.deletes:
                    self._candidates.pop(key, None)
                leader = oldest(self._candidates.values())
                self._set(LeaderInfo.from_key(self._role, leader, batch.cluster_id) if leader else None)

    async def changed(self, seen: LeaderInfo | None) -> LeaderInfo | None:
        """Waits until the leader is another than `seen`, and returns it."""
        while self._current == seen:
            await self._changed.wait()
        return self._current

    async def wait(self, timeout_s: float | None = None) -> LeaderInfo:
        """The leader, waiting for one if there is none; for ever without a timeout.

        Raises:
            NotLeader: Nobody led within `timeout_s`; its address is empty.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self._current is None:
                    await self._changed.wait()
                return self._current
        except TimeoutError as err:
            raise NotLeader(f"Nobody leads the role {self._role} yet.", role=self._role, address="") from err

    def _set(self, leader: LeaderInfo | None) -> None:
        if leader != self._current:
            self._current = leader
            self._changed.set()
            self._changed = asyncio.Event()


async def _until_lost(lease: Lease, work: _Coroutine, *beside: _Coroutine, name: str) -> None:
    """Runs `work`, with `beside` next to it, until `work` ends or the lease is lost; nothing of it runs any more on return."""
    async with asyncio.TaskGroup() as group:
        worker = group.create_task(work, name=name)
        helpers = [group.create_task(b, name=f"{name}.beside") for b in (lease.lost(), *beside)]
        try:
            await asyncio.wait([worker, helpers[0]], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (worker, *helpers):
                task.cancel()
