"""Sinks of streams whose client may be away: one that keeps what it is given, one that passes over what was shown before."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from inference_runtime.errors import InferenceError
from inference_runtime.v1 import engine_service_pb2
from services.gateway.records import NotResumable
from services.gateway.request import Request
from services.gateway.sink import NOBODY, Sink

__all__ = ["KeptSink", "SkippingSink"]

ChunkDetail = engine_service_pb2.ChunkDetail

#: Text that is kept of one stream, bytes, as `size_bytes` counts: a thousand tokens. What is older is made again when it is asked
#: for.
KEPT_BYTES = 256 << 10
#: What a chunk weighs besides its text.
CHUNK_BYTES = 200

_Chunk = tuple[int, Sequence[int], str, ChunkDetail | None, bool]


class KeptSink:
    """Passes everything on, and keeps it, so that it can be told again to a client that comes back.

    Args:
        request: Whose answer it is.
        inner: Where it goes at first.
    """

    __slots__ = ("_chunks", "_inner", "request", "size_bytes")

    def __init__(self, request: Request, inner: Sink) -> None:
        self.request, self._inner = request, inner
        self._chunks: collections.deque[_Chunk] = collections.deque()
        #: What it weighs.
        self.size_bytes = 0

    @property
    def first(self) -> int:
        """Index of the oldest token that is kept."""
        return self._chunks[0][0] if self._chunks else 0

    def detach(self) -> None:
        """Its client has left."""
        self._inner = NOBODY

    def covers(self, index: int) -> bool:
        """Whether everything behind this token is kept, and a piece begins there."""
        index = max(index, -1)
        behind = self._behind(index)
        return self.first <= index + 1 and (not behind or behind[0][0] > index)

    def attach(self, sink: Sink, index: int) -> None:
        """Tell a client everything behind this token, then go on with it."""
        self._inner = sink
        sink.hold()
        for chunk in self._behind(index):
            sink.chunk(*chunk)
        sink.release()

    def _behind(self, index: int) -> list[_Chunk]:
        return [chunk for chunk in self._chunks if chunk[0] + len(chunk[1]) > index + 1 or chunk[4]]

    def _keep(self, chunk: _Chunk) -> None:
        self._chunks.append(chunk)
        self.size_bytes += CHUNK_BYTES + len(chunk[2])
        while self.size_bytes > KEPT_BYTES:
            self.size_bytes -= CHUNK_BYTES + len(self._chunks.popleft()[2])

    def token(self, index: int, token: int, text: str) -> None:
        """See `Sink`."""
        self._keep((index, (token,), text, None, False))
        self._inner.token(index, token, text)

    def chunk(self, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None, done: bool) -> None:
        """See `Sink`."""
        self._keep((index, tuple(tokens), text, detail, done))
        self._inner.chunk(index, tokens, text, detail, done)

    def fail(self, error: InferenceError) -> None:
        """See `Sink`."""
        self._inner.fail(error)

    def hold(self) -> None:
        """See `Sink`."""
        self._inner.hold()

    def release(self) -> None:
        """See `Sink`."""
        self._inner.release()

    def keep_alive(self) -> None:
        """See `Sink`."""
        self._inner.keep_alive()

    def resumed(self, count: int) -> None:
        """See `Sink`."""
        self._inner.resumed(count)


class SkippingSink:
    """Passes over what the client has, while a runtime makes it again, and then passes everything on.

    Args:
        inner: Where the rest goes.
        last: Index of the last token that the client has.
        request: Whose answer it is; set before anything is delivered.
    """

    __slots__ = ("_inner", "_last", "request")

    def __init__(self, inner: Sink, last: int) -> None:
        self._inner, self._last = inner, last
        self.request: Request

    def token(self, index: int, token: int, text: str) -> None:
        """See `Sink`."""
        if index > self._last:
            self._inner.token(index, token, text)

    def chunk(self, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None, done: bool) -> None:
        """See `Sink`. A piece of text that the client has half of cannot be cut."""
        end = index + len(tokens) - 1
        if index > self._last:
            self._inner.chunk(index, tokens, text, detail, done)
        elif end <= self._last:
            if done:
                self._inner.chunk(index, tokens, "", detail, done)
        else:
            self.request.abandon(NotResumable("this runtime makes several tokens at once and cannot go on in the middle of them"))

    def fail(self, error: InferenceError) -> None:
        """See `Sink`."""
        self._inner.fail(error)

    def hold(self) -> None:
        """See `Sink`."""
        self._inner.hold()

    def release(self) -> None:
        """See `Sink`."""
        self._inner.release()

    def keep_alive(self) -> None:
        """See `Sink`."""
        self._inner.keep_alive()

    def resumed(self, count: int) -> None:
        """See `Sink`."""
        self._inner.resumed(count)
