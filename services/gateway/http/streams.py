"""Clients that come back to a stream: `Last-Event-ID` on the request they had sent, or GET /v1/streams/{id}.

What they send is checked, whoever serves the stream stops, and the rest is written as if nothing had happened: the same ids, the
same objects, no event twice.
"""

from __future__ import annotations

import urllib.parse
from typing import TYPE_CHECKING

from inference_runtime.errors import BadRequest, Forbidden, InferenceError, Internal
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import engine_service_pb2, gateway_peer_service_pb2, generation_pb2
from services.gateway.http.errors import error_body, error_headers
from services.gateway.http.openai import Asked
from services.gateway.http.sse import CHAT, COMPLETION, Shape, StreamSink
from services.gateway.position import Position, Seen, parse_position
from services.gateway.records import choose
from services.gateway.resume import Resumer, Terms

if TYPE_CHECKING:
    from services.gateway.http.server import Connection, HttpRequest
    from services.gateway.request import Request

__all__ = ["LAST_EVENT_ID", "STREAMS", "StreamDoor"]

log = get_logger(__name__)

STREAMS = b"/v1/streams/"
LAST_EVENT_ID = b"last-event-id"

StreamHeader = gateway_peer_service_pb2.StreamHeader

_FORMATS = {
    id(CHAT): gateway_peer_service_pb2.STREAM_FORMAT_CHAT,
    id(COMPLETION): gateway_peer_service_pb2.STREAM_FORMAT_COMPLETION,
}
_SHAPES = {
    gateway_peer_service_pb2.STREAM_FORMAT_CHAT: CHAT,
    gateway_peer_service_pb2.STREAM_FORMAT_COMPLETION: COMPLETION,
}


class RestSink(StreamSink):
    """Writes the rest of an answer whose opening the client has."""

    __slots__ = ()

    def _role(self) -> bytes:
        return b""

    def end(self, seen: Seen, last: int, finish_reason: generation_pb2.FinishReason) -> None:
        """Write what follows the text."""
        self._last = last
        opening = self._open()
        if seen is Seen.DONE:
            self._send(opening + self._frame(b"%b%d:done\ndata: [DONE]\n\n" % (self._id, last)) + self._end())
        else:
            self._send(opening + (b"" if seen is Seen.END else self._finish(finish_reason)) + self._ending())
        self._connection.finish()


class _UsageSink(RestSink):
    """Writes what follows the reason of the end."""

    __slots__ = ()

    def _finish(self, finish_reason: generation_pb2.FinishReason) -> bytes:
        return b""


class _Return:
    """One client that has come back."""

    __slots__ = ("connection", "left", "position", "sent", "shape", "tenant", "traceparent")

    def __init__(
        self, connection: Connection, tenant: str, position: Position, traceparent: str, sent: Asked | None, shape: Shape
    ) -> None:
        self.connection, self.tenant, self.position, self.traceparent = connection, tenant, position, traceparent
        #: What it sent along, where it did.
        self.sent, self.shape = sent, shape
        #: It has left again.
        self.left = False
        connection.on_disconnect = self.leave

    def leave(self) -> None:
        """It has left again."""
        self.left = True


class StreamDoor:
    """What the HTTP door does about streams that can be come back to."""

    def __init__(self, resumer: Resumer) -> None:
        self._resumer = resumer

    def follow(self, connection: Connection, request: Request, asked: Asked, shape: Shape) -> None:
        """Follow a stream that begins."""
        if self._resumer.offered:
            self._resumer.follow(request, connection, _terms(asked, shape))
        else:
            connection.on_disconnect = request.cancel

    def again(self, connection: Connection, tenant: str, request: HttpRequest, asked: Asked, shape: Shape) -> None:
        """A client sends its request again, with the last event that it has.

        Raises:
            BadRequest: It is no id of ours, or the request is none that is streamed.
        """
        if not asked.stream:
            raise BadRequest("Last-Event-ID goes with a request that is streamed; set stream to true", param="stream")
        self._begin(connection, tenant, parse_position(request.headers[LAST_EVENT_ID]), request, asked, shape)

    def show(self, connection: Connection, tenant: str, request: HttpRequest) -> None:
        """A client asks for a stream by its id. Without Last-Event-ID it has nothing of it."""
        named = parse_position(urllib.parse.unquote_to_bytes(request.path[len(STREAMS) :]))
        last = request.headers.get(LAST_EVENT_ID)
        position = parse_position(last) if last else named
        if position.request_id != named.request_id:
            raise BadRequest("Last-Event-ID is of another stream than the URL", code="invalid_event_id")
        self._begin(connection, tenant, position, request, None, CHAT)

    def _begin(
        self, connection: Connection, tenant: str, position: Position, request: HttpRequest, asked: Asked | None, shape: Shape
    ) -> None:
        if not self._resumer.offered:
            raise Forbidden("this gateway keeps no streams (resume.window_s is 0)")
        traceparent = request.headers.get(b"traceparent", b"").decode("latin-1")
        self._resumer.do(self._answer(_Return(connection, tenant, position, traceparent, asked, shape)))

    async def _answer(self, client: _Return) -> None:
        connection = client.connection
        try:
            outcome = await self._go_on(client)
        except InferenceError as err:
            outcome = err.reason.lower()
            extra = b"x-request-id: %b\r\n" % client.position.request_id.encode()
            connection.respond(err.http_status, error_body(err), extra=extra + error_headers(err))
        except Exception as err:
            log.error("stream not resumed by a fault of ours", exc_info=err, request_id=client.position.request_id)
            outcome = "internal"
            if connection.busy:
                connection.respond(500, error_body(Internal(str(err))))
        self._resumer.outcomes.inc(outcome)

    async def _go_on(self, client: _Return) -> str:
        """Serve the rest. Returns how."""
        position = client.position
        if position.seen is Seen.TOKENS and self._attach(client):
            return "kept"
        records = await self._resumer.find(position.request_id, client.tenant)
        header = StreamHeader.FromString(records[0].header)
        if client.sent is not None:
            _check_same(client.sent, client.shape, header)
        if client.left:
            return "left"
        record, way = choose(records, position, include_usage=header.include_usage, repeats=self._resumer.repeats)
        shape, asked = _SHAPES[header.format], _asked(header)
        connection = client.connection
        if way.over:
            rest = RestSink(connection, asked, shape)
            rest.request = self._resumer.over(record)
            finish_reason = generation_pb2.FINISH_REASON_STOP if record.end is None else record.end.finish_reason
            rest.end(way.seen, position.index, finish_reason)
            return "over"
        sink = _sink_class(position)(connection, asked, shape)
        request = self._resumer.go_on(record, way, sink, connection, _terms(asked, shape), traceparent=client.traceparent)
        sink.request = request
        request.begin()
        return "resumed"

    def _attach(self, client: _Return) -> bool:
        """Go on with what was kept here, where it was and where it is enough."""
        position, connection = client.position, client.connection
        found = self._resumer.kept(position.request_id, client.tenant)
        if found is None:
            return False
        kept, served, header = found
        if client.sent is not None:
            _check_same(client.sent, client.shape, header)
        if not kept.covers(position.index):
            return False
        sink = _sink_class(position)(connection, _asked(header), _SHAPES[header.format])
        sink.request = kept.request
        connection.on_disconnect = None
        if served is not None:
            served.came_back(connection)
        kept.attach(sink, position.index)
        return True


def _sink_class(position: Position) -> type[StreamSink]:
    if position.index < -1:
        return StreamSink
    return _UsageSink if position.seen is Seen.END else RestSink


def _terms(asked: Asked, shape: Shape) -> Terms:
    return Terms(_FORMATS[id(shape)], asked.include_usage, asked.logprobs)


def _asked(header: StreamHeader) -> Asked:
    """The request as its client had made it."""
    submission = engine_service_pb2.Submission(request=header.request)
    return Asked(
        header.request.deployment,
        submission,
        stream=True,
        include_usage=header.include_usage,
        logprobs=header.logprobs,
        plain=False,
    )


def _check_same(asked: Asked, shape: Shape, header: StreamHeader) -> None:
    """Whether a client means the stream that its id names. Raises BadRequest."""
    sent = asked.submission.request
    sent.request_id, sent.tenant = header.request.request_id, header.request.tenant
    if sent != header.request or _terms(asked, shape) != Terms(header.format, header.include_usage, header.logprobs):
        raise BadRequest(
            "the request is not the one that this stream answers; send it as it was, or without Last-Event-ID",
            param="Last-Event-ID",
            code="other_request",
        )
