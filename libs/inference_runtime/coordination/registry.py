"""The keys a process shows to the others, kept in etcd under its lease through every outage."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import Self

from inference_runtime.coordination.clock import Backoff
from inference_runtime.coordination.errors import EtcdError, LeaseLost
from inference_runtime.coordination.etcd import EtcdClient
from inference_runtime.coordination.lease import DEFAULT_TTL_S, Lease
from inference_runtime.telemetry import get_logger

__all__ = ["Registration"]

log = get_logger(__name__)

#: After a lost lease everybody comes back at a random moment within this time, seconds, so that etcd is not overrun.
REREGISTER_JITTER_S = 2.0


class Registration:
    """A set of keys under one lease. When the lease is lost it takes another and writes all of them again.

    `set` and `remove` say what should be there and never fail for etcd's sake: while etcd is away they are remembered. Nobody
    else may write these keys. Use `async with Registration(client) as registration:`, or give `run` a task of yours and call
    `close`.
    """

    def __init__(self, client: EtcdClient, *, ttl_s: float = DEFAULT_TTL_S, jitter_s: float = REREGISTER_JITTER_S) -> None:
        self._client = client
        self._ttl_s = ttl_s
        self._jitter_s = jitter_s
        self._wanted: dict[str, bytes] = {}
        self._written: dict[str, bytes] = {}
        self._unwanted: set[str] = set()
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._stopped.set()
        self._lease: Lease | None = None
        self._group: asyncio.TaskGroup | None = None

    @property
    def lease_id(self) -> int:
        """The lease the keys are under; 0 while there is none."""
        return self._lease.id if self._lease is not None and self._lease.valid() else 0

    async def set(self, key: str, value: bytes) -> None:
        """From now on the key shall hold this value. Returns at once; see `flush`."""
        self._unwanted.discard(key)
        self._wanted[key] = value
        self._wake()

    async def remove(self, key: str) -> None:
        """From now on the key shall not be there. Returns at once; see `flush`."""
        if self._wanted.pop(key, None) is not None:
            self._unwanted.add(key)
            self._wake()

    async def flush(self, timeout_s: float) -> bool:
        """Waits until etcd holds everything that was set; False when it does not after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Keeps the keys registered until `close` is called.

        On cancel: as `close`: revokes the lease, which deletes the keys, waiting at most a second for etcd.
        """
        self._stopped.clear()
        try:
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(self._keep(), name="registration")
                await self._stopping.wait()
                keeper.cancel()
        finally:
            self._stopping.clear()
            self._stopped.set()

    async def close(self) -> None:
        """Ends `run` and revokes the lease: the keys are gone when this returns (if etcd answers within a second)."""
        if not self._stopped.is_set():
            self._stopping.set()
            await self._stopped.wait()

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        self._stopped.clear()  # so that a close that comes before the task's first step is not missed
        self._group.create_task(self.run(), name="registration.run")
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        assert self._group is not None
        self._stopping.set()
        await self._group.__aexit__(None, None, None)

    async def _keep(self) -> None:
        backoff = Backoff()
        while True:
            lease = Lease(self._client, ttl_s=self._ttl_s)
            try:
                await lease.grant()
            except EtcdError as err:
                log.debug("no lease for the registration yet", cause=err.message)
                await asyncio.sleep(backoff.next_s())
                continue
            backoff.reset()
            self._lease = lease
            self._written.clear()
            self._wake()
            lost = False
            try:
                await self._hold(lease)
                lost = True
            finally:
                if not lost:
                    await lease.revoke()
            # Not revoked: the next lease takes the keys over while the old one, if it lives, runs out empty.
            log.warning("registration lost its lease and registers again", keys=len(self._wanted))
            self._settled.clear()
            await asyncio.sleep(random.uniform(0, self._jitter_s))

    async def _hold(self, lease: Lease) -> None:
        """Keeps one lease alive and the keys under it up to date; returns when the lease is lost."""
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(lease.run(), name="registration.lease")
            writer = group.create_task(self._write(lease), name="registration.writer")
            await lease.lost()
            keeper.cancel()
            writer.cancel()

    async def _write(self, lease: Lease) -> None:
        """Writes what differs from what is wanted, now and whenever that changes."""
        backoff = Backoff()
        while True:
            self._changed.clear()
            try:
                for key in [k for k, v in self._wanted.items() if self._written.get(k) != v]:
                    await self._put(key, lease)
                for key in list(self._unwanted):
                    await self._delete(key)
            except LeaseLost:
                lease.end()
                return
            except EtcdError as err:
                log.debug("registration waits for etcd", cause=err.message)
                await asyncio.sleep(backoff.next_s())
                continue
            backoff.reset()
            if not self._changed.is_set():
                self._settled.set()
            await self._changed.wait()

    async def _put(self, key: str, lease: Lease) -> None:
        if (value := self._wanted.get(key)) is not None:
            await self._client.put(key, value, lease.id)
            self._written[key] = value

    async def _delete(self, key: str) -> None:
        self._written.pop(key, None)
        await self._client.delete(key)
        if key in self._wanted:  # wanted again while the deletion was on its way
            self._wake()
        self._unwanted.discard(key)

    def _wake(self) -> None:
        self._settled.clear()
        self._changed.set()
