"""Copies of this worker's streams, kept by one other gateway, a few milliseconds behind.

Everything that came up leaves as one message, one message at a time: what does not fit into it, or comes up meanwhile, is in the
next. Nothing is queued: what is still to be sent is read off the journals. A chunk costs nothing when it comes; a message costs a
microsecond or two for each stream that moved.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import time

from inference_runtime.errors import InferenceError
from inference_runtime.telemetry import MetricSet, get_logger
from inference_runtime.v1 import gateway_peer_service_pb2
from services.gateway.peers import Peer, PeerTable
from services.gateway.request import Request

__all__ = ["Copied", "Replicator"]

log = get_logger(__name__)

StreamEnd = gateway_peer_service_pb2.StreamEnd
StreamHeader = gateway_peer_service_pb2.StreamHeader
ReplicateRequest = gateway_peer_service_pb2.ReplicateRequest

#: Tokens wait for this long at most before they leave, seconds. New streams do not wait.
INTERVAL_S = 0.05
#: Least time between two messages, seconds: new streams that come in a burst share one.
SPACING_S = 0.01
#: Requests and tokens of one message, bytes, more or less. A message may have 16 MiB.
MESSAGE_BYTES = 1 << 20
#: A stream without news is named this often, so that its copy is not forgotten, seconds.
TOUCH_S = 15.0
#: What the last message gets when this worker ends, seconds.
FLUSH_S = 1.0


class Copied(abc.ABC):
    """A stream that is copied. Whoever serves it says what it is (`header`) and hears when it is safe (`on_safe`).

    Args:
        request: Its request.
    """

    __slots__ = ("end", "handle", "request", "sent", "touched", "waits")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.handle = 0
        #: It was not begun there yet.
        self.waits = True
        #: Tokens that are there.
        self.sent = 0
        self.touched = 0.0
        self.end: StreamEnd | None = None

    @abc.abstractmethod
    def header(self) -> StreamHeader:
        """What is told of it at first."""

    @abc.abstractmethod
    def on_safe(self) -> None:
        """Another gateway has it, or none can have it. Called more than once, perhaps."""


class Replicator:
    """Sends them.

    Args:
        table: The other gateways.
        max_request_bytes: Streams with a larger request stay where they are.
        metrics: Where their number is published.
    """

    def __init__(self, table: PeerTable, max_request_bytes: int, metrics: MetricSet) -> None:
        self._table, self._max_request_bytes = table, max_request_bytes
        self._streams: dict[int, Copied] = {}
        self._dropped: list[int] = []
        self._handles = itertools.count(1)
        self._urgent = asyncio.Event()
        #: Who keeps the copies.
        self.keeper: Peer | None = None
        self._copies = metrics.gauge("inference_stream_copies")

    def add(self, stream: Copied) -> None:
        """Copy a stream from now on."""
        stream.handle = next(self._handles)
        if self.keeper is None and not self._table.peers:
            stream.on_safe()
        else:
            stream.request.copied = 0
        self._streams[stream.handle] = stream
        self._urgent.set()

    def ended(self, stream: Copied, end: StreamEnd | None) -> None:
        """A stream has ended like this; None: nobody can come back to it, its copy goes."""
        if end is None:
            if self._streams.pop(stream.handle, None) is not None and not stream.waits:
                self._dropped.append(stream.handle)
        else:
            stream.end = end
        self._urgent.set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            try:
                # Streams that nobody takes cost nothing: the next look is when a gateway comes.
                waits_s = INTERVAL_S if self.keeper is not None and self._streams else None
                async with asyncio.timeout(waits_s):
                    await self._urgent.wait()
            except TimeoutError:
                pass
            await self._round()
            await asyncio.sleep(SPACING_S)

    def wake(self) -> None:
        """The table of gateways changed."""
        self._urgent.set()

    async def flush(self) -> None:
        """Send what is left, for a moment. The last thing."""
        try:
            async with asyncio.timeout(FLUSH_S):
                while self.keeper is not None and (self._dropped or any(map(_has_news, self._streams.values()))):
                    await self._round()
        except TimeoutError:
            log.info("copies of streams left behind", streams=len(self._streams))

    async def _round(self) -> None:
        self._urgent.clear()
        now = time.monotonic()
        keeper = self._table.keeper(self.keeper, now)
        if keeper is not self.keeper:
            self._move(keeper)
        if keeper is None:
            for stream in [s for s in self._streams.values() if s.end is not None]:
                del self._streams[stream.handle]
            return
        message, ends = self._collect(now)
        if message is None:
            return
        try:
            response = await keeper.replicate(message)
        except InferenceError as err:
            log.info("gateway does not keep copies", peer=keeper.gateway.id, reason=err.reason, message=err.message)
            self._urgent.set()  # another one, at once
            return
        self._took(message, ends, set(response.refused))

    def _move(self, keeper: Peer | None) -> None:
        """Begin anew with another gateway, or with none."""
        log.info(
            "copies of streams go elsewhere", peer=keeper.gateway.id if keeper is not None else "", streams=len(self._streams)
        )
        self.keeper = keeper
        self._dropped.clear()
        for stream in self._streams.values():
            # Until the new one has them, what the old one has counts: it may well live.
            stream.waits, stream.sent = True, 0
            if keeper is None:
                stream.on_safe()
            elif stream.request.copied < 0:
                stream.request.copied = 0

    def _collect(self, now: float) -> tuple[ReplicateRequest | None, set[int]]:
        """What came up, as far as it fits, and which of it ends with that."""
        message = ReplicateRequest(gateway_id=self._table.own.id, dropped=self._dropped)
        ends: set[int] = set()
        room = MESSAGE_BYTES
        for stream in list(self._streams.values()):
            if stream.waits:
                header = stream.header()
                size = header.ByteSize()
                if size > self._max_request_bytes:
                    self._leave(stream)
                    continue
                message.begun.add(handle=stream.handle, header=header)
                room -= size
            tokens = stream.request.journal.tokens
            count = len(tokens)
            if count > stream.sent or stream.end is not None or now - stream.touched > TOUCH_S:
                stream.touched = now
                progress = message.progress.add(handle=stream.handle, offset=stream.sent, token_ids=tokens[stream.sent : count])
                if not stream.sent:
                    progress.revision = stream.request.revision
                if stream.end is not None:
                    progress.end.CopyFrom(stream.end)
                    ends.add(stream.handle)
                room -= 4 * (count - stream.sent)
            if room <= 0:
                self._urgent.set()
                break
        return (message, ends) if message.begun or message.progress or message.dropped else (None, ends)

    def _took(self, message: ReplicateRequest, ends: set[int], refused: set[int]) -> None:
        """The keeper has what was sent, except what it refused."""
        del self._dropped[: len(message.dropped)]
        for begun in message.begun:
            stream = self._streams.get(begun.handle)
            if stream is not None:
                stream.waits = False
        for progress in message.progress:
            stream = self._streams.get(progress.handle)
            if stream is not None:
                stream.sent = stream.request.copied = progress.offset + len(progress.token_ids)
        for begun in message.begun:
            stream = self._streams.get(begun.handle)
            if stream is not None:
                stream.on_safe()
        for handle in refused:
            stream = self._streams.get(handle)
            if stream is not None:
                self._leave(stream)
        for handle in ends - refused:
            self._streams.pop(handle, None)
        self._copies.set(len(self._streams))

    def _leave(self, stream: Copied) -> None:
        """No other gateway has room for it."""
        self._streams.pop(stream.handle, None)
        stream.request.copied = -1
        stream.on_safe()


def _has_news(stream: Copied) -> bool:
    return stream.waits or stream.end is not None or len(stream.request.journal.tokens) > stream.sent
