"""One lease of etcd: granted, kept alive, and known to be lost a safe while before etcd lets it expire."""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Self

from inference_runtime.coordination.clock import boottime
from inference_runtime.coordination.errors import EtcdError, EtcdUnavailable, LeaseLost
from inference_runtime.coordination.etcd import EtcdClient, KeepAliveStream
from inference_runtime.telemetry import get_logger

__all__ = ["DEFAULT_TTL_S", "Lease", "margin_s", "valid_until"]

log = get_logger(__name__)

#: A lease of 5 s does not survive a frozen etcd leader, one of 10 s does.
DEFAULT_TTL_S = 10.0
#: Deadline of one renewal, seconds.
RENEWAL_TIMEOUT_S = 1.0
#: Pause after a renewal that failed, seconds.
RENEWAL_RETRY_S = 0.2
#: How long leaving may take to give a lease back, seconds.
REVOKE_TIMEOUT_S = 1.0


def margin_s(ttl_s: float) -> float:
    """How long before its expiry in etcd we stop trusting a lease: max(2 s, 20 %). Half of a lease shorter than 4 s (only tests
    have those)."""
    return min(max(2.0, 0.2 * ttl_s), ttl_s / 2)


def valid_until(sent_at: float, ttl_s: float) -> float:
    """Until when a lease may be relied on, given when the request that was answered had been *sent*: etcd counts from later."""
    return sent_at + ttl_s - margin_s(ttl_s)


class Lease:
    """One lease, from grant to loss. It never comes back; who needs to go on takes another.

    Either `async with Lease(client) as lease:`, which keeps it alive in the background and revokes it at the end, or `grant`,
    `run` in a task of yours, and `revoke`.

    It is valid until `valid_until`: TTL − margin after the last successful renewal was *sent*, on a clock that counts suspends. A
    process that stops acting when it ends acts on no lease that etcd gave to another. What is not promised: that a check made
    just before a pause still holds after it; only a guarded transaction proves that.
    """

    def __init__(self, client: EtcdClient, *, ttl_s: float = DEFAULT_TTL_S) -> None:
        self._client = client
        self._wanted_ttl_s = ttl_s
        self._id = 0
        self._ttl_s = ttl_s
        self._valid_until = -math.inf
        self._stream: KeepAliveStream | None = None
        self._lost = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def id(self) -> int:
        """etcd's number of the lease; 0 before the grant. Not ordered: never a fencing token."""
        return self._id

    @property
    def ttl_s(self) -> float:
        """The time to live that etcd granted, seconds."""
        return self._ttl_s

    @property
    def valid_until(self) -> float:
        """The moment, in `boottime()` seconds, after which this lease must not be relied on. Readable from any thread."""
        return self._valid_until

    def valid(self) -> bool:
        """Whether the lease may be relied on now. Ask immediately before each effect."""
        return boottime() < self._valid_until

    async def lost(self) -> None:
        """Returns once the lease is lost or given back."""
        await self._lost.wait()

    async def grant(self) -> None:
        """Takes the lease.

        Raises:
            EtcdUnavailable: etcd did not answer; call again.
        """
        sent_at = boottime()
        granted = await self._client.grant(self._wanted_ttl_s)
        self._id, self._ttl_s = granted.lease_id, granted.ttl_s
        self._valid_until = valid_until(sent_at, granted.ttl_s)
        self._stream = self._client.keep_alive(self._id)

    async def run(self) -> None:
        """Renews every third of the TTL and returns when the lease is lost: expired, revoked, or not renewed while valid.

        On cancel: stops renewing; the lease stays valid for as long as it was, and lives on in etcd until revoked or expired.
        """
        if self._stream is None:
            raise LeaseLost("A lease must be granted before it is kept alive.")
        pause_s = self._ttl_s / 3
        try:
            while not self._lost.is_set() and (left_s := self._valid_until - boottime()) > 0:
                await asyncio.sleep(min(pause_s, left_s))
                sent_at = boottime()
                left_s = self._valid_until - sent_at
                if left_s <= 0:
                    break
                try:
                    ttl_s = await self._stream.renew(min(RENEWAL_TIMEOUT_S, left_s))
                except EtcdUnavailable:
                    pause_s = RENEWAL_RETRY_S
                    continue
                pause_s = ttl_s / 3
                self._valid_until = valid_until(sent_at, ttl_s)
            log.info("lease not renewed in time", lease=self._id)
        except EtcdError as err:
            log.info("lease lost", lease=self._id, cause=err.message)
        finally:
            self._stream.close()
        self.end()

    def end(self) -> None:
        """Declares the lease lost, now: for whoever learns it first, for example from a write that was refused."""
        self._valid_until = min(self._valid_until, boottime())
        self._lost.set()

    async def revoke(self) -> None:
        """Gives the lease back: its keys are deleted now. Waits at most a second; without an answer the lease just expires.

        On cancel: the lease just expires.
        """
        self.end()
        if self._stream is not None:
            self._stream.close()
        if not self._id:
            return
        try:
            async with asyncio.timeout(REVOKE_TIMEOUT_S):
                await self._client.revoke(self._id)
        except (EtcdError, TimeoutError) as err:
            log.info("lease left to expire", lease=self._id, cause=str(err))

    async def __aenter__(self) -> Self:
        await self.grant()
        self._group = await asyncio.TaskGroup().__aenter__()
        self._keeper = self._group.create_task(self.run(), name="lease")
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        assert self._group is not None
        assert self._keeper is not None
        self._keeper.cancel()
        try:
            await self._group.__aexit__(None, None, None)
        finally:
            await self.revoke()
