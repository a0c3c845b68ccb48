"""What keep-alive and watch share: long-lived calls to etcd. `EtcdClient` opens them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from inference_runtime.coordination.errors import Compacted, EtcdDenied, EtcdError, EtcdUnavailable, LeaseLost
from inference_runtime.coordination.etcd_api import rpc_pb2
from inference_runtime.coordination.etcd_codec import watch_update
from inference_runtime.coordination.kv import WatchUpdate, prefix_end

if TYPE_CHECKING:
    from inference_runtime.coordination.etcd import EtcdClient

__all__ = ["KeepAliveStream", "WatchStream"]

_EOF = grpc.aio.EOF  # type: ignore[attr-defined]


class _Stream:
    """What keep-alive and watch share: one bidirectional call, dropped whole after any failure."""

    def __init__(self, client: EtcdClient) -> None:
        self._client = client
        self._call: Any = None
        self._index = 0

    async def _open(self, path: str, request: Any, response: Any) -> None:
        self._index, self._call = await self._client._open_stream(path, request, response)

    async def _exchange(self, request: Any | None) -> Any:
        """Writes the request, if any, and reads one answer. The stream is closed when this raises.

        Raises:
            EtcdError: Typed as for any call; EtcdUnavailable also when etcd ended the stream.
        """
        client, call = self._client, self._call
        try:
            if request is not None:
                await client._own(call.write(request))
            answer = await client._own(call.read())
            if answer is _EOF:
                self._failed()
                raise EtcdUnavailable("etcd ended the stream.")
        except grpc.aio.AioRpcError as err:
            self._failed()
            if client._token_is_stale(err.details()):
                raise EtcdUnavailable("etcd wants a fresh token; the next attempt brings one.") from err
            client._raise(err)
        except asyncio.InvalidStateError as err:  # written to after etcd had ended the call
            self._failed()
            raise EtcdUnavailable("etcd ended the stream.") from err
        except BaseException:
            self._failed()
            raise
        client._cluster_id = answer.header.cluster_id or client._cluster_id
        if client.guard is not None:
            client.guard.saw(answer.header.cluster_id, answer.header.revision)
        return answer

    def _failed(self) -> None:
        """Drops the call and prefers another endpoint for the next."""
        if self._call is not None:
            self._client._demote(self._index)
        self.close()

    def close(self) -> None:
        """Ends the stream; the next use opens another."""
        if self._call is not None:
            self._call.cancel()
            self._call = None


class KeepAliveStream(_Stream):
    """Renews one lease over one long-lived stream. For one task at a time."""

    def __init__(self, client: EtcdClient, lease_id: int) -> None:
        super().__init__(client)
        self._lease_id = lease_id

    async def renew(self, timeout_s: float) -> float:
        """Renews the lease and returns its full time to live, seconds, counted by etcd from some moment after this call began.

        Raises:
            LeaseLost: The lease expired or was revoked.
            EtcdUnavailable: No answer within `timeout_s`; the lease may or may not have been renewed.

        On cancel: the stream is closed; the next renewal opens another.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if self._call is None:
                    await self._open(
                        "/etcdserverpb.Lease/LeaseKeepAlive", rpc_pb2.LeaseKeepAliveRequest, rpc_pb2.LeaseKeepAliveResponse
                    )
                answer = await self._exchange(rpc_pb2.LeaseKeepAliveRequest(ID=self._lease_id))
        except TimeoutError as err:
            raise EtcdUnavailable(f"etcd did not renew a lease within {timeout_s:g} s.") from err
        if answer.TTL <= 0:
            raise LeaseLost("etcd does not know this lease: it expired or was revoked.")
        return float(answer.TTL)


class WatchStream(_Stream):
    """Changes to one prefix or key from one revision on. For one task at a time; it does not reopen itself."""

    def __init__(self, client: EtcdClient, key: str, start_revision: int, *, prefix: bool) -> None:
        super().__init__(client)
        self._request = rpc_pb2.WatchRequest(
            create_request=rpc_pb2.WatchCreateRequest(
                key=key.encode(), range_end=prefix_end(key.encode()) if prefix else b"", start_revision=start_revision
            )
        )

    async def open(self) -> WatchUpdate:
        """Starts the watch. The answer holds the store's current revision and no events.

        Raises:
            Compacted: The start revision is gone.
            EtcdUnavailable: Not started within one deadline.
        """
        timeout_s = self._client._timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._open("/etcdserverpb.Watch/Watch", rpc_pb2.WatchRequest, rpc_pb2.WatchResponse)
                answer = self._checked(await self._exchange(self._request))
        except TimeoutError as err:
            raise EtcdUnavailable(f"etcd did not start a watch within {timeout_s:g} s.") from err
        if not answer.created:
            self._failed()
            raise EtcdError("etcd answered a watch request with something else.")
        return watch_update(answer)

    async def read(self, timeout_s: float) -> WatchUpdate | None:
        """The next update, or None, and a closed stream, when nothing came for `timeout_s`.

        Raises:
            Compacted: The watch fell behind what etcd keeps.
            EtcdUnavailable: The stream ended.

        On cancel: the stream is closed. Open another from the last revision seen + 1; nothing is lost.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return watch_update(self._checked(await self._exchange(None)))
        except TimeoutError:
            return None

    def _checked(self, answer: Any) -> Any:
        if not answer.canceled:
            return answer
        self.close()
        if answer.compact_revision:
            raise Compacted(f"etcd compacted this watch's history up to revision {answer.compact_revision}.")
        if self._client._token_is_stale(answer.cancel_reason):
            raise EtcdUnavailable("etcd wants a fresh token; the next attempt brings one.")
        if "denied" in answer.cancel_reason:
            raise EtcdDenied(f"etcd refused a watch: {answer.cancel_reason}.")
        raise EtcdUnavailable(f"etcd cancelled a watch: {answer.cancel_reason or 'no reason given'}.")
