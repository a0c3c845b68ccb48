"""The other gateways: who they are, what they are asked, and which of them keeps the copies of our streams.

Gateways find each other through etcd, each by a key under its own lease. While etcd is away, those that were known stay known;
the one that keeps our copies is used as long as it answers, registered or not.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import socket
import time
from collections.abc import Iterable, Sequence

import grpc

from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import gateway_peer_service_pb2, gateway_peer_service_pb2_grpc

__all__ = ["PEER_KEY", "Peer", "PeerTable", "nearest", "own_record"]

log = get_logger(__name__)

Gateway = gateway_peer_service_pb2.Gateway

#: Metadata with the key of the gateway that is called.
PEER_KEY = "x-peer-key"
#: A gateway that does not take a batch within this time is not there, seconds.
REPLICATE_TIMEOUT_S = 2.0
#: What others get to say that they know a stream, seconds. One that was killed refuses at once; one that hangs costs this.
TAKE_TIMEOUT_S = 1.0
#: One that failed is not chosen again for this long, seconds.
FAILED_S = 2.0


def own_record(gateway_id: str) -> Gateway:
    """What this process shows of itself. The address is filled in once it is bound."""
    return Gateway(id=gateway_id, hostname=socket.gethostname(), peer_key=secrets.token_hex(16), pid=os.getpid())


def nearest(own: Gateway, others: Iterable[Gateway]) -> list[Gateway]:
    """In which order others are asked to keep our copies: those on other machines first, else at random, but always the same."""

    def key(other: Gateway) -> tuple[bool, bytes]:
        draw = hashlib.blake2b(f"{own.id} {other.id}".encode(), digest_size=8).digest()
        return other.hostname == own.hostname, draw

    return sorted(others, key=key)


class Peer:
    """One other gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.failed_at = float("-inf")
        self._channel: grpc.aio.Channel | None = None

    def _stub(self) -> gateway_peer_service_pb2_grpc.GatewayPeerServiceStub:
        if self._channel is None:
            self._channel = open_channel(self.gateway.address)
        return gateway_peer_service_pb2_grpc.GatewayPeerServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def replicate(self, request: gateway_peer_service_pb2.ReplicateRequest) -> gateway_peer_service_pb2.ReplicateResponse:
        """Hand it a batch. Raises InferenceError when it did not take it; then it counts as failed for a while."""
        try:
            response: gateway_peer_service_pb2.ReplicateResponse = await self._stub().Replicate(
                request, timeout=REPLICATE_TIMEOUT_S, metadata=((PEER_KEY, self.gateway.peer_key),)
            )
        except grpc.aio.AioRpcError as err:
            self.failed_at = time.monotonic()
            raise error_from_rpc(err) from err
        return response

    async def take(self, request_id: str, tenant: str) -> gateway_peer_service_pb2.StreamRecord | None:
        """What it knows of a stream; it serves it no longer. None when it knows nothing, or does not answer in time."""
        request = gateway_peer_service_pb2.TakeStreamRequest(request_id=request_id, tenant=tenant)
        try:
            response: gateway_peer_service_pb2.TakeStreamResponse = await self._stub().TakeStream(
                request, timeout=TAKE_TIMEOUT_S, metadata=((PEER_KEY, self.gateway.peer_key),)
            )
        except grpc.aio.AioRpcError as err:
            error = error_from_rpc(err)
            log.debug("gateway not reached", peer=self.gateway.id, reason=error.reason, message=error.message)
            return None
        return response.record if response.HasField("record") else None

    async def close(self) -> None:
        """Close the connection."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)


class PeerTable:
    """The gateways that are known.

    Args:
        own: This one. It is no peer of its own.
    """

    def __init__(self, own: Gateway) -> None:
        self.own = own
        #: Whether it is known who there is. A gateway that started while etcd is away cannot say that nobody has a stream.
        self.complete = True
        self.changed = asyncio.Event()
        self._peers: dict[str, Peer] = {}
        self._gone: list[Peer] = []

    @property
    def peers(self) -> Sequence[Peer]:
        """All others."""
        return list(self._peers.values())

    def apply(self, gateways: Iterable[Gateway]) -> None:
        """Take over who is registered."""
        self.complete = True
        seen = {gateway.id: gateway for gateway in gateways if gateway.id != self.own.id}
        for gone in self._peers.keys() - seen.keys():
            self._gone.append(self._peers.pop(gone))
        for name, gateway in seen.items():
            if name not in self._peers:
                self._peers[name] = Peer(gateway)
        self.changed.set()

    def keeper(self, present: Peer | None, now: float) -> Peer | None:
        """Who is to keep our copies: the present one as long as it is well, registered or not; None when nobody is there."""
        if present is not None and present.failed_at + FAILED_S < now:
            return present
        order = nearest(self.own, (peer.gateway for peer in self._peers.values()))
        well = (self._peers[g.id] for g in order if self._peers[g.id].failed_at + FAILED_S < now)
        return next(well, None)

    async def take(self, request_id: str, tenant: str) -> list[gateway_peer_service_pb2.StreamRecord]:
        """What the others know of a stream. None of them serves it any more, as far as they could be reached."""
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(peer.take(request_id, tenant)) for peer in self._peers.values()]
        return [record for task in asked if (record := task.result()) is not None]

    async def close_gone(self, keep: Peer | None) -> None:
        """Close connections to those that left, except to one that is still in use."""
        gone, self._gone = self._gone, [peer for peer in self._gone if peer is keep]
        for peer in gone:
            if peer is not keep:
                await peer.close()

    async def close(self) -> None:
        """Close every connection."""
        for peer in (*self._peers.values(), *self._gone):
            await peer.close()
