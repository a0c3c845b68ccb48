"""Answers in OpenAI's shape: streamed as server-sent events, or whole.

Each event has an id that says how much of the answer a client has with it (see `position`).
The parts of an event that do not change are put together once for each request; a token then costs one JSON string, one
concatenation and one write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from inference_runtime.errors import InferenceError
from inference_runtime.v1 import engine_service_pb2, generation_pb2
from services.gateway.http.errors import error_body, error_headers
from services.gateway.http.openai import Asked

if TYPE_CHECKING:
    from services.gateway.choices import Choices
    from services.gateway.http.server import Connection
    from services.gateway.request import Request

__all__ = ["CHAT", "COMPLETION", "Shape", "StreamSink", "UnarySink"]

ChunkDetail = engine_service_pb2.ChunkDetail

_encode = msgspec.json.encode

FINISH = {
    generation_pb2.FINISH_REASON_STOP: b'"stop"',
    generation_pb2.FINISH_REASON_LENGTH: b'"length"',
    generation_pb2.FINISH_REASON_TOOL_CALLS: b'"tool_calls"',
    generation_pb2.FINISH_REASON_CONTENT_FILTER: b'"content_filter"',
    generation_pb2.FINISH_REASON_BUDGET: b'"length"',
}
#: Comments are lines without an empty one behind them: after an event with an id, OpenAI's SDK takes an empty line for the end of
#: another event, and fails on one without data.
KEEP_ALIVE = b": waiting\n"
#: Header of a whole answer and trailer of a stream: how often it went on from another attempt. Absent for never.
RESUMED = b"x-inference-resumed: %d\r\n"
TRAILER = b"trailer: x-inference-resumed\r\n"


class Shape:
    """The bytes in which chat completions and text completions differ."""

    def __init__(
        self, *, prefix: bytes, unary_object: bytes, event_object: bytes, first: bytes, delta: bytes, end: bytes, empty: bytes,
        answer: bytes, answer_end: bytes,
    ) -> None:  # fmt: skip
        #: Of an id.
        self.prefix = prefix
        self.unary_object, self.event_object = unary_object, event_object
        #: Opening event's choice, if it has one of its own; text before and after a delta; a choice without text.
        self.first, self.delta, self.end, self.empty = first, delta, end, empty
        #: Before and after the whole text.
        self.answer, self.answer_end = answer, answer_end


CHAT = Shape(
    prefix=b"chatcmpl-", unary_object=b"chat.completion", event_object=b"chat.completion.chunk",
    first=b'"delta":{"role":"assistant","content":"","refusal":null}',
    delta=b'"delta":{"content":', end=b"}", empty=b'"delta":{}',
    answer=b'"message":{"role":"assistant","content":', answer_end=b',"refusal":null}',
)  # fmt: skip
COMPLETION = Shape(
    prefix=b"cmpl-", unary_object=b"text_completion", event_object=b"text_completion",
    first=b"", delta=b'"text":', end=b"", empty=b'"text":""', answer=b'"text":', answer_end=b"",
)  # fmt: skip


def _fingerprint(request: Request | Choices) -> bytes:
    revision = request.revision
    return b'"fp_%b"' % revision.encode() if revision.isalnum() else b"null"


def _usage_json(request: Request | Choices) -> bytes:
    prompt, output = request.input_tokens, request.output_tokens
    return (
        b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d},'
        b'"completion_tokens_details":{"reasoning_tokens":%d}}'
        % (prompt, output, prompt + output, request.cached_input_tokens, request.reasoning_tokens)
    )


def _logprobs(detail: ChunkDetail) -> list[dict[str, object]]:
    """OpenAI's entries for the tokens of a chunk."""

    def entry(x: generation_pb2.TokenLogprob | generation_pb2.TopLogprob) -> dict[str, object]:
        return {"token": x.token.decode(errors="replace"), "logprob": x.logprob, "bytes": list(x.token)}

    return [{**entry(x), "top_logprobs": [entry(t) for t in x.top]} for x in detail.logprobs]


class _HttpSink:
    """What both kinds of answer share."""

    __slots__ = ("_asked", "_connection", "_shape", "request")

    #: How a choice begins: with its number.
    _label = b'{"index":0,'

    def __init__(self, connection: Connection, asked: Asked, shape: Shape) -> None:
        self._connection, self._asked, self._shape = connection, asked, shape
        self.request: Request | Choices  # set by the app before anything is delivered

    def _head(self, what: bytes) -> bytes:
        """Up to the choices, the same for every object of an answer."""
        request = self.request
        return b'{"id":"%b%b","object":"%b","created":%d,"model":%b,"system_fingerprint":%b,"choices":[' % (
            self._shape.prefix, request.request_id.encode(), what, request.accepted_ns // 1_000_000_000,
            _encode(self._asked.model), _fingerprint(request),
        )  # fmt: skip

    def _id_line(self) -> bytes:
        return b"x-request-id: %b\r\n" % self.request.request_id.encode()

    def _resumed_line(self) -> bytes:
        count = self.request.resumptions
        return RESUMED % count if count else b""

    def _respond_error(self, error: InferenceError) -> None:
        self._connection.respond(error.http_status, error_body(error), extra=self._id_line() + error_headers(error))


class UnarySink(_HttpSink):
    """Gathers an answer and sends it whole."""

    __slots__ = ("_logprobs", "_texts")

    def __init__(self, connection: Connection, asked: Asked, shape: Shape) -> None:
        self._connection, self._asked, self._shape = connection, asked, shape
        self._texts: list[str] = []
        self._logprobs: list[dict[str, object]] = []

    def token(self, index: int, token: int, text: str) -> None:
        """See `Sink`."""
        if index == 0 and self._texts:
            self._texts.clear()  # started over
        self._texts.append(text)

    def chunk(self, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None, done: bool) -> None:
        """See `Sink`."""
        if index == 0 and self._texts:
            self._texts.clear()
            self._logprobs.clear()
        self._texts.append(text)
        if detail is not None and self._asked.logprobs:
            self._logprobs += _logprobs(detail)
        if not done:
            return
        assert detail is not None
        shape = self._shape
        logprobs = _encode({"content": self._logprobs, "refusal": None}) if self._asked.logprobs else b"null"
        choice = b'%b%b%b%b,"logprobs":%b,"finish_reason":%b}' % (
            self._label, shape.answer, _encode("".join(self._texts)), shape.answer_end, logprobs,
            FINISH.get(detail.finish_reason, b'"stop"'),
        )  # fmt: skip
        self._complete(choice)

    def _complete(self, choice: bytes) -> None:
        """Send the answer, with this as its choices."""
        body = b'%b%b],"usage":%b}' % (self._head(self._shape.unary_object), choice, _usage_json(self.request))
        self._connection.respond(200, body, extra=self._id_line() + self._resumed_line())

    def fail(self, error: InferenceError) -> None:
        """See `Sink`."""
        self._respond_error(error)

    def hold(self) -> None:
        """Nothing leaves before the end."""

    def release(self) -> None:
        """Nothing leaves before the end."""

    def keep_alive(self) -> None:
        """A whole answer has no room for a sign of life."""

    def resumed(self, count: int) -> None:
        """Its header tells, at the end."""


class StreamSink(_HttpSink):
    """Writes an answer as server-sent events."""

    __slots__ = ("_after", "_before", "_chunked", "_fixed", "_id", "_last", "_opened", "_send", "_started", "_tail")

    def __init__(self, connection: Connection, asked: Asked, shape: Shape) -> None:
        super().__init__(connection, asked, shape)
        self._send = connection.send
        self._chunked = connection.chunked
        self._started = self._opened = False
        self._before = self._after = self._id = self._tail = b""
        self._fixed = 0
        #: Index of the last token.
        self._last = -1
        connection.probe = self.keep_alive

    def _frame(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _event(self, choice: bytes, at: bytes) -> bytes:
        """An event with this choice, framed. `at`: what a client has with it."""
        return self._frame(b"%b%b\ndata: %b%b%b" % (self._id, at, self._head(self._shape.event_object), choice, self._tail))

    def _open(self) -> bytes:
        """Everything that comes before the first text, and the parts that will not change."""
        shape = self._shape
        self._opened = True
        self._id = self._position()
        self._tail = b'],"usage":null}\n\n' if self._asked.include_usage else b"]}\n\n"
        self._before = b"\ndata: %b%b%b" % (self._head(shape.event_object), self._label, shape.delta)
        after = b'%b,"logprobs":null,"finish_reason":null}%b' % (shape.end, self._tail)
        self._fixed = len(self._id) + len(self._before) + len(after)
        self._after = after + b"\r\n" if self._chunked else after
        return self._start() + self._role()

    def _position(self) -> bytes:
        """What begins the line with an event's id."""
        return b"id: %b:" % self.request.request_id.encode()

    def _role(self) -> bytes:
        """The event before all text."""
        first = self._shape.first
        return self._event(b'%b%b,"logprobs":null,"finish_reason":null}' % (self._label, first), b"-1") if first else b""

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        return self._connection.stream_head(self._id_line() + TRAILER if self._chunked else self._id_line())

    def _ending(self) -> bytes:
        """What follows the last choice. b"" while another one goes on."""
        usage, at = b"", b"%b%d:done\n" % (self._id, self._last)
        if self._asked.include_usage:
            head = self._head(self._shape.event_object)
            usage = self._frame(b'%bdata: %b],"usage":%b}\n\n' % (at, head, _usage_json(self.request)))
        return usage + self._frame(b"%bdata: [DONE]\n\n" % at) + self._end()

    def _finish(self, finish_reason: generation_pb2.FinishReason) -> bytes:
        """The event that says why the choice ended."""
        choice = b'%b%b,"logprobs":null,"finish_reason":%b}'
        return self._event(
            choice % (self._label, self._shape.empty, FINISH.get(finish_reason, b'"stop"')), b"%d:end" % self._last
        )

    def _end(self) -> bytes:
        """What ends the body, the trailer included."""
        return b"0\r\n%b\r\n" % self._resumed_line() if self._chunked else b""

    def token(self, index: int, token: int, text: str) -> None:
        """See `Sink`. Text that is not certain yet makes no event."""
        if text:
            at = self.request.place(index)
            data = _encode(text)
            if self._chunked:
                size = self._fixed + len(at) + len(data)
                data = b"%x\r\n%b%b%b%b%b" % (size, self._id, at, self._before, data, self._after)
            else:
                data = self._id + at + self._before + data + self._after
            if self._opened:
                self._send(data)
                return
            self._first(index, text)
        elif not self._opened:
            self._send(self._open())

    def _first(self, index: int, text: str) -> None:
        opening = self._open()
        self._connection.hold()
        self._send(opening)
        self.token(index, 0, text)
        self._connection.release()

    def chunk(self, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None, done: bool) -> None:
        """See `Sink`."""
        pieces: list[bytes] = [] if self._opened else [self._open()]
        shape = self._shape
        entries = _logprobs(detail) if detail is not None and self._asked.logprobs else []
        last = self._last = index + len(tokens) - 1
        if text or entries:
            at = b"%d:last" % last if done else self.request.place(last)
            logprobs = _encode({"content": entries, "refusal": None}) if entries else b"null"
            delta = b"%b%b%b%b" % (self._label, shape.delta, _encode(text), shape.end)
            pieces.append(self._event(b'%b,"logprobs":%b,"finish_reason":null}' % (delta, logprobs), at))
        ending = b""
        if done:
            assert detail is not None
            pieces.append(self._finish(detail.finish_reason))
            ending = self._ending()
            pieces.append(ending)
        if pieces:
            self._send(b"".join(pieces))
        if ending:
            self._connection.finish()

    def fail(self, error: InferenceError) -> None:
        """See `Sink`. Once the stream has begun, the error is its last event and `[DONE]` never comes."""
        if not self._started:
            self._respond_error(error)
            return
        last = self._frame(b"data: %b\n\n" % error_body(error))
        self._send(last + self._end())
        self._connection.finish()

    def hold(self) -> None:
        """See `Sink`."""
        self._connection.hold()

    def release(self) -> None:
        """See `Sink`."""
        self._connection.release()

    def keep_alive(self) -> None:
        """See `Sink`. From here on an error can only be an event."""
        self._send(self._start() + self._frame(KEEP_ALIVE))

    def resumed(self, count: int) -> None:
        """See `Sink`. The head has gone, so a comment tells, where it happened."""
        self._send(self._start() + self._frame(b": resumed %d\n" % count))
