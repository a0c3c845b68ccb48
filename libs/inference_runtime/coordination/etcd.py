"""The asyncio client of etcd. Its parts, `etcd_*.py`, are the only importers of etcd's messages, and know gRPC; nobody else does.

Callers are the other modules of this package and the services' stores. It promises: finite deadlines on every call, typed errors,
fail-over between endpoints, that only calls which may safely be repeated are repeated, and, with a guard, that nothing is read
from or written to a store other than the one that is followed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import grpc

from inference_runtime.coordination.errors import (
    Compacted,
    EtcdDenied,
    EtcdError,
    EtcdOutcomeUnknown,
    EtcdUnavailable,
    LeaseLost,
)
from inference_runtime.coordination.etcd_api import rpc_pb2
from inference_runtime.coordination.etcd_codec import address_of, compare_proto, key_value, op_proto, op_result
from inference_runtime.coordination.etcd_streams import KeepAliveStream, WatchStream
from inference_runtime.coordination.etcd_verifier import Verifier
from inference_runtime.coordination.identity import StoreGuard
from inference_runtime.coordination.kv import Compare, KeyValue, Op, OpKind, TxnResult, WatchUpdate, prefix_end
from inference_runtime.errors import BadRequest
from inference_runtime.secret import SecretStr

__all__ = ["EtcdClient", "Grant", "KeepAliveStream", "WatchStream", "WatchUpdate"]

#: Keys per page of a listing; with ordinary values a page stays far below a second.
PAGE_KEYS = 500
#: Pause before a read is tried again, so that a refused connection is not hammered.
RETRY_PAUSE_S = 0.05

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also bounds one connection attempt to a frozen member
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    # etcd ends connections that ping more often than every 5 s (--grpc-keepalive-min-time) or while no call is open.
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_receive_message_length", -1),  # a watch that catches up may answer with many revisions at once
]

_T = TypeVar("_T")

_AUTH_STALE = ("invalid auth token", "revision of auth store is old")
_TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True, slots=True)
class Grant:
    """A granted lease. `ttl_s` is what etcd granted, which can be more than was asked for."""

    lease_id: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class _Unary:
    """One unary method of etcd: how it is called and what it answers."""

    path: str
    response: Any


_RANGE = _Unary("/etcdserverpb.KV/Range", rpc_pb2.RangeResponse)
_PUT = _Unary("/etcdserverpb.KV/Put", rpc_pb2.PutResponse)
_DELETE = _Unary("/etcdserverpb.KV/DeleteRange", rpc_pb2.DeleteRangeResponse)
_TXN = _Unary("/etcdserverpb.KV/Txn", rpc_pb2.TxnResponse)
_COMPACT = _Unary("/etcdserverpb.KV/Compact", rpc_pb2.CompactionResponse)
_GRANT = _Unary("/etcdserverpb.Lease/LeaseGrant", rpc_pb2.LeaseGrantResponse)
_REVOKE = _Unary("/etcdserverpb.Lease/LeaseRevoke", rpc_pb2.LeaseRevokeResponse)
_TIME_TO_LIVE = _Unary("/etcdserverpb.Lease/LeaseTimeToLive", rpc_pb2.LeaseTimeToLiveResponse)
_STATUS = _Unary("/etcdserverpb.Maintenance/Status", rpc_pb2.StatusResponse)
_AUTHENTICATE = _Unary("/etcdserverpb.Auth/Authenticate", rpc_pb2.AuthenticateResponse)

#: Calls that etcd answers as of the present, whichever member is asked: their revisions never fall.
_LINEARIZABLE = frozenset((_RANGE, _PUT, _DELETE, _TXN))
#: Calls that say nothing about the store's content.
_UNGUARDED = frozenset((_STATUS, _AUTHENTICATE))


class EtcdClient:
    """A client of one etcd cluster, for one event loop. Safe for any number of tasks; connects lazily; close it when done.

    Args:
        endpoints: host:port of each member, with or without http:// or https://. The first that can be reached is used, and kept
            until it fails.
        username: User for etcd's own authentication; empty for none.
        password: Password of that user.
        ca_file: PEM file that signs the members' certificates. Any of the three files switches TLS on.
        cert_file: PEM file of our own certificate, for mutual TLS.
        key_file: PEM file of our own key.
        timeout_s: Deadline of one attempt, seconds. Reads try at least twice, and each endpoint once.
        guard: Knows which store is followed; every other is refused with StoreReplaced. None follows whatever answers: for tools.
        on_store: Called with `guard.refusal` when that has changed.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        username: str = "",
        password: SecretStr | str = "",
        ca_file: str = "",
        cert_file: str = "",
        key_file: str = "",
        timeout_s: float = 1.0,
        guard: StoreGuard | None = None,
        on_store: Callable[[str], None] = lambda refusal: None,
    ) -> None:
        if not endpoints:
            raise BadRequest("etcd needs at least one endpoint, for example 127.0.0.1:2379.", param="endpoints")
        self._addresses = [address_of(e) for e in endpoints]
        self._tls = bool(ca_file or cert_file or key_file) or any(e.startswith("https://") for e in endpoints)
        self._tls_files = (ca_file, cert_file, key_file)
        self._username = username
        self._password = password if isinstance(password, SecretStr) else SecretStr(password)
        self._timeout_s = timeout_s
        self._token = ""
        self._token_lock = asyncio.Lock()
        self._cluster_id = 0
        self._verifier = Verifier(self, guard, on_store) if guard is not None else None
        self._closed = False
        self._channels: list[grpc.aio.Channel] = []
        self._order: list[int] = list(range(len(endpoints)))

    # Connection

    async def connect(self) -> None:
        """Proves that etcd answers, and learns the cluster's id.

        Raises:
            EtcdUnavailable: No endpoint answered within the deadline; one sentence that names them.
            StoreReplaced: It is not the store that the guard follows.
            EtcdDenied: The user, password or certificate was refused.
        """
        await self._unary(_STATUS, rpc_pb2.StatusRequest(), idempotent=True)
        await self.verify()

    @property
    def cluster_id(self) -> int:
        """The cluster's id as of the latest answer (uint64); 0 before the first."""
        return self._cluster_id

    @property
    def guard(self) -> StoreGuard | None:
        """Knows which store is followed; None for a client that follows any."""
        return self._verifier.guard if self._verifier is not None else None

    @property
    def lineage(self) -> int:
        """The number of the store that is followed, for fencing tokens: one number, one history of revisions. Without a guard, or
        in a store without an id, etcd's cluster id."""
        return (self.guard.lineage if self.guard else 0) or self._cluster_id

    @property
    def endpoints(self) -> tuple[str, ...]:
        """host:port of each configured member."""
        return tuple(self._addresses)

    async def close(self) -> None:
        """Ends all calls and streams, which then raise EtcdUnavailable. Leases stay: revoke them first."""
        self._closed = True
        for channel in self._channels:
            await channel.close(None)

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        await self.close()

    # Keys

    async def get(self, key: str) -> KeyValue | None:
        """The key as it is now (linearizable), or None."""
        return (await self.get_at(key))[0]

    async def get_at(self, key: str) -> tuple[KeyValue | None, int]:
        """As `get`, with the store's revision at that moment: watch from the revision + 1 to miss nothing."""
        response = await self._unary(_RANGE, rpc_pb2.RangeRequest(key=key.encode()), idempotent=True)
        return (key_value(response.kvs[0]) if response.kvs else None), response.header.revision

    async def list(self, prefix: str) -> tuple[list[KeyValue], int]:
        """All keys with this prefix, in key order, as they were together at one revision; and that revision.

        Watch from the revision + 1 to miss nothing.
        """
        key, end, revision = prefix.encode(), prefix_end(prefix.encode()), 0
        found: list[KeyValue] = []
        while True:
            request = rpc_pb2.RangeRequest(key=key, range_end=end, revision=revision, limit=PAGE_KEYS)
            response = await self._unary(_RANGE, request, idempotent=True)
            found += [key_value(kv) for kv in response.kvs]
            revision = revision or response.header.revision
            if not response.more:
                return found, revision
            key = response.kvs[-1].key + b"\0"

    async def put(self, key: str, value: bytes, lease_id: int = 0) -> int:
        """Writes the key and returns the revision of the write.

        Raises:
            EtcdUnavailable: Not sent.
            EtcdOutcomeUnknown: Sent, and no answer came. Writing the same value again is safe if nobody else writes this key.
            LeaseLost: The lease is gone.
        """
        request = rpc_pb2.PutRequest(key=key.encode(), value=value, lease=lease_id)
        return int((await self._unary(_PUT, request)).header.revision)

    async def delete(self, key: str) -> bool:
        """Deletes the key; whether it existed. Raises as `put` does."""
        return bool((await self._unary(_DELETE, rpc_pb2.DeleteRangeRequest(key=key.encode()))).deleted)

    async def delete_prefix(self, prefix: str) -> int:
        """Deletes all keys with this prefix; how many there were. Raises as `put` does."""
        if not prefix:
            raise BadRequest("An empty prefix would delete everything in etcd; name one.", param="prefix")
        request = rpc_pb2.DeleteRangeRequest(key=prefix.encode(), range_end=prefix_end(prefix.encode()))
        return int((await self._unary(_DELETE, request)).deleted)

    async def txn(self, *, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """Runs `success` if every comparison holds, else `failure`, atomically.

        Raises:
            EtcdUnavailable: Not sent.
            EtcdOutcomeUnknown: Sent, and no answer came: read before deciding to send it again.
            LeaseLost: A put names a lease that is gone.
        """
        request = rpc_pb2.TxnRequest(
            compare=[compare_proto(c) for c in compare],
            success=[op_proto(o) for o in success],
            failure=[op_proto(o) for o in failure],
        )
        # A transaction without writes changes nothing and may be repeated.
        idempotent = all(o.kind is OpKind.GET for o in (*success, *failure))
        response = await self._unary(_TXN, request, idempotent=idempotent)
        return TxnResult(
            succeeded=response.succeeded,
            revision=response.header.revision,
            cluster_id=response.header.cluster_id,
            results=tuple(op_result(r) for r in response.responses),
        )

    async def compact(self, revision: int) -> None:
        """Drops the history before `revision`. Operators and tests call this; services leave it to etcd's auto-compaction."""
        await self._unary(_COMPACT, rpc_pb2.CompactionRequest(revision=revision, physical=True), idempotent=True)

    # Leases

    async def grant(self, ttl_s: float) -> Grant:
        """A new lease of at least `ttl_s` (rounded up to seconds). An unanswered attempt may leave a lease that just expires."""
        request = rpc_pb2.LeaseGrantRequest(TTL=max(1, -int(-ttl_s // 1)))
        response = await self._unary(_GRANT, request, idempotent=True)
        return Grant(response.ID, float(response.TTL))

    async def revoke(self, lease_id: int) -> None:
        """Ends the lease and deletes its keys, now. Content when the lease is gone already."""
        try:
            await self._unary(_REVOKE, rpc_pb2.LeaseRevokeRequest(ID=lease_id), idempotent=True)
        except LeaseLost:
            return

    async def time_to_live(self, lease_id: int) -> float | None:
        """Seconds the lease has left, or None when it is gone."""
        try:
            response = await self._unary(_TIME_TO_LIVE, rpc_pb2.LeaseTimeToLiveRequest(ID=lease_id), idempotent=True)
        except LeaseLost:
            return None
        return float(response.TTL) if response.TTL >= 0 else None

    def keep_alive(self, lease_id: int) -> KeepAliveStream:
        """A stream that renews one lease. One task uses it; it reopens itself after a failure."""
        return KeepAliveStream(self, lease_id)

    # Watches

    def watch(self, key: str, start_revision: int, *, prefix: bool = True) -> WatchStream:
        """A stream of changes to the prefix (or just the key) from `start_revision` on. `PrefixWatch` builds on it."""
        return WatchStream(self, key, start_revision, prefix=prefix)

    async def verify(self) -> None:
        """Looks whether this is the store that the guard follows. Does nothing without a guard.

        Raises:
            StoreReplaced: It is not.
            EtcdUnavailable: Nobody said.
        """
        if self._verifier is not None:
            await self._verifier.verify()

    # Calls

    async def _unary(self, method: _Unary, request: Any, *, idempotent: bool = False) -> Any:
        """One call with fail-over, kept away from a store that is not followed. Repeats it only if `idempotent`, or if etcd
        refused it for a stale token before running it."""
        verifier = self._verifier if method not in _UNGUARDED else None
        if verifier is None:
            return await self._call(method, request, idempotent=idempotent)
        await verifier.admit()
        before = verifier.guard.era, verifier.guard.revision
        response = await self._call(method, request, idempotent=idempotent)
        if method in _LINEARIZABLE:
            await verifier.check(response.header.cluster_id, response.header.revision, before, written=not idempotent)
        return response

    async def _ask_unguarded(self, request: rpc_pb2.RangeRequest | rpc_pb2.TxnRequest) -> Any:
        """For the verifier: a call that may be repeated, whatever store answers."""
        return await self._call(_RANGE if isinstance(request, rpc_pb2.RangeRequest) else _TXN, request, idempotent=True)

    async def _call(self, method: _Unary, request: Any, *, idempotent: bool) -> Any:
        attempts = max(2, len(self._addresses)) if idempotent else 1
        reauthenticated = False
        while True:
            attempts -= 1
            index, channel = await self._connected()
            try:
                metadata = await self._metadata() if method is not _AUTHENTICATE else None
                call = channel.unary_unary(
                    method.path,
                    request_serializer=type(request).SerializeToString,
                    response_deserializer=method.response.FromString,
                )
                response = await self._own(call(request, timeout=self._timeout_s, metadata=metadata, wait_for_ready=True))
            except grpc.aio.AioRpcError as err:
                if self._token_is_stale(err.details()) and not reauthenticated:
                    reauthenticated, attempts = True, attempts + 1
                    continue
                if err.code() not in _TRANSIENT:
                    self._raise(err)
                self._demote(index)
                if attempts <= 0:
                    self._raise(err, sent=not idempotent)
                await asyncio.sleep(RETRY_PAUSE_S * (0.5 + random.random()))
                continue
            except asyncio.CancelledError:
                self._demote(index)  # the caller's deadline came before ours: who did not answer in it is asked last
                raise
            self._cluster_id = response.header.cluster_id or self._cluster_id
            return response

    async def _open_stream(self, path: str, request: Any, response: Any) -> tuple[int, Any]:
        """A bidirectional stream on a connected endpoint, and that endpoint's index. The member must have a leader, so that a
        stream on a partitioned member ends instead of hanging. Each new stream may have met another store."""
        await self.verify()
        index, channel = await self._connected()
        metadata = (("hasleader", "true"), *await self._metadata())
        method: Any = channel.stream_stream(
            path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        return index, method(metadata=metadata, wait_for_ready=True)

    async def _connected(self) -> tuple[int, grpc.aio.Channel]:
        """The most trusted endpoint that has a connection, waiting at most one deadline for the first to get one.

        A call is made only on a connection, which is why EtcdUnavailable from here means that nothing was sent.
        """
        if self._closed:
            raise EtcdUnavailable("The etcd client is closed.")
        if not self._channels:
            credentials = await asyncio.to_thread(self._credentials) if self._tls else None
            if not self._channels:
                self._channels = [self._open_channel(address, credentials) for address in self._addresses]
        for index in self._order:
            if self._channels[index].get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
                return index, self._channels[index]
        async with asyncio.TaskGroup() as group:
            tasks = {group.create_task(self._ready(c)): i for i, c in enumerate(self._channels)}
            try:
                done, _ = await asyncio.wait(tasks, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
        if self._closed:
            raise EtcdUnavailable("The etcd client is closed.")
        if not done:
            hint = "are the endpoints and the TLS files right?" if self._tls else "are the endpoints right?"
            raise EtcdUnavailable(f"{self._where()} within {self._timeout_s:g} s; is it running, and {hint}")
        index = min((tasks[t] for t in done), key=self._order.index)
        return index, self._channels[index]

    async def _ready(self, channel: grpc.aio.Channel) -> None:
        """Returns once the channel has a connection, or is closed."""
        try:
            await self._own(channel.channel_ready())
        except EtcdUnavailable:
            return

    def _open_channel(self, address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=_OPTIONS)
        return grpc.aio.secure_channel(address, credentials, options=_OPTIONS)

    def _credentials(self) -> grpc.ChannelCredentials:
        def read(path: str) -> bytes | None:
            try:
                return Path(path).read_bytes() if path else None
            except OSError as err:
                raise EtcdDenied(f"The TLS file {path} for etcd cannot be read: {err.strerror}.") from err

        ca, cert, key = (read(path) for path in self._tls_files)
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)

    async def _metadata(self) -> tuple[tuple[str, str], ...]:
        if not self._username:
            return ()
        async with self._token_lock:
            if not self._token:
                request = rpc_pb2.AuthenticateRequest(name=self._username, password=self._password.reveal())
                self._token = (await self._call(_AUTHENTICATE, request, idempotent=True)).token
            return (("token", self._token),)

    def _token_is_stale(self, details: str | None) -> bool:
        """Whether etcd refused our token; then forgets it, so that the next call fetches another."""
        stale = bool(self._username) and any(text in (details or "") for text in _AUTH_STALE)
        if stale:
            self._token = ""
        return stale

    def _demote(self, index: int) -> None:
        """Trust this endpoint last from now on."""
        self._order.remove(index)
        self._order.append(index)

    def _where(self) -> str:
        return f"etcd at {', '.join(self._addresses)} cannot be reached"

    async def _own(self, awaitable: Awaitable[_T]) -> _T:
        """Awaits a gRPC call. A call that ends because the channel was closed reports itself as cancelled; only a cancellation of
        the calling task may look like one."""
        try:
            return await awaitable
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise EtcdUnavailable("The etcd client is closed.") from None
            raise
        except grpc.aio.UsageError as err:
            raise EtcdUnavailable("The etcd client is closed.") from err

    def _raise(self, err: grpc.aio.AioRpcError, *, sent: bool = False) -> NoReturn:
        """Translates gRPC's error into ours. `sent` says that the failed call may have changed something."""
        code, details = err.code(), (err.details() or "").removeprefix("etcdserver: ")
        if code in _TRANSIENT and sent:
            raise EtcdOutcomeUnknown(f"etcd did not answer a write ({details}); it may have happened.") from err
        if code in _TRANSIENT:
            raise EtcdUnavailable(f"{self._where()}: {details}.") from err
        if "lease not found" in details:
            raise LeaseLost("etcd does not know this lease: it expired or was revoked.") from err
        if "compacted" in details:
            raise Compacted(f"etcd: {details}.") from err
        if (
            code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
            or "authentication" in details
            or "user name" in details
        ):
            who = f"user {self._username!r}" if self._username else "an anonymous client"
            raise EtcdDenied(f"etcd refused {who}: {details}.") from err
        raise EtcdError(f"etcd: {details or code.name}.") from err
