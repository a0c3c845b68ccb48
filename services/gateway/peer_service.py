"""GatewayPeerService: keeps copies of other gateways' streams, and hands over what is known here. Translates and delegates."""

from __future__ import annotations

import collections
import hmac
import time
from typing import TYPE_CHECKING

from inference_runtime.errors import Unauthorized
from inference_runtime.v1 import gateway_peer_service_pb2, gateway_peer_service_pb2_grpc
from services.gateway.peers import PEER_KEY
from services.gateway.records import Record, RecordStore

if TYPE_CHECKING:
    import grpc

    from services.gateway.resume import Resumer

    Context = grpc.aio.ServicerContext[object, object]

__all__ = ["Copies", "GatewayPeerService"]

ReplicateRequest = gateway_peer_service_pb2.ReplicateRequest
ReplicateResponse = gateway_peer_service_pb2.ReplicateResponse

#: Gateways whose copies are told apart. One more, and those of the one that was silent for longest are no longer added to.
MAX_SENDERS = 256


class Copies:
    """The copies that others sent, by sender and handle. The records themselves are the store's: it bounds them."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._senders: collections.OrderedDict[str, dict[int, Record]] = collections.OrderedDict()

    def take(self, request: ReplicateRequest, now: float) -> list[int]:
        """Add what came. Returns the handles of which no copy is kept."""
        known = self._senders.setdefault(request.gateway_id, {})
        self._senders.move_to_end(request.gateway_id)
        while len(self._senders) > MAX_SENDERS:
            self._senders.popitem(last=False)
        refused: list[int] = []
        for begun in request.begun:
            record = Record(begun.header, now)
            old = self._store.get(record.request_id, now)
            if old is not None and old.attachment == record.attachment:  # its gateway was away for a moment and begins anew
                known[begun.handle] = old
            elif self._store.put(record, now):
                known[begun.handle] = record
            else:
                refused.append(begun.handle)
        for progress in request.progress:
            if not self._add(known.get(progress.handle), progress, now):
                known.pop(progress.handle, None)
                refused.append(progress.handle)
            elif progress.HasField("end"):
                del known[progress.handle]
        for handle in request.dropped:
            dropped = known.pop(handle, None)
            if dropped is not None and dropped in self._store:
                self._store.drop(dropped.request_id)
        if len(known) > len(self._store):  # what the store has dropped, unasked
            self._senders[request.gateway_id] = {h: r for h, r in known.items() if r in self._store}
        return refused

    def _add(self, record: Record | None, progress: gateway_peer_service_pb2.StreamProgress, now: float) -> bool:
        if record is None or record not in self._store or progress.offset > len(record.tokens):
            return False
        if progress.revision:
            record.revision = progress.revision
        new = progress.token_ids[len(record.tokens) - progress.offset :]
        if not self._store.grow(record, new, now):
            return False
        if progress.HasField("end"):
            record.end = progress.end
        return True


class GatewayPeerService(gateway_peer_service_pb2_grpc.GatewayPeerServiceServicer):
    """The servicer.

    Args:
        peer_key: What callers must show.
        copies: Where copies go.
        resumer: Knows the streams of this worker.
    """

    def __init__(self, peer_key: str, copies: Copies, resumer: Resumer) -> None:
        self._peer_key, self._copies, self._resumer = peer_key.encode(), copies, resumer

    async def Replicate(self, request: ReplicateRequest, context: Context) -> ReplicateResponse:
        """Keep copies."""
        self._authenticate(context)
        return ReplicateResponse(refused=self._copies.take(request, time.monotonic()))

    async def TakeStream(
        self, request: gateway_peer_service_pb2.TakeStreamRequest, context: Context
    ) -> gateway_peer_service_pb2.TakeStreamResponse:
        """Hand a stream over."""
        self._authenticate(context)
        now = time.monotonic()
        record = self._resumer.give_up(request.request_id, request.tenant, now)
        return gateway_peer_service_pb2.TakeStreamResponse(record=record.to_proto(now) if record is not None else None)

    def _authenticate(self, context: Context) -> None:
        """Whether it is a gateway that speaks. The public door may have the same port. Raises Unauthorized."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        if not hmac.compare_digest(metadata.get(PEER_KEY, "").encode(), self._peer_key):
            raise Unauthorized("only gateways of this cluster may call this")
