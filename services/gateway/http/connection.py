"""One client connection: parsing, limits, writing. Knows nothing of models; an `App` answers.

One request at a time: bytes that come early wait, bounded. A response that a client does not read is bounded in bytes and in
time. A client that leaves ends its request at once. One that only sends nothing more looks the same: it is written to, and is
answered when that goes well.
"""

from __future__ import annotations

import asyncio
import collections
import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import httptools

from inference_runtime.telemetry import get_logger
from services.gateway.http.message import STATUS_LINES, HttpRequest, path_of

if TYPE_CHECKING:
    from services.gateway.http.server import HttpServer

__all__ = ["App", "Connection"]

log = get_logger(__name__)

#: Bytes of later requests that wait before reading is paused.
PARKED_BYTES = 64 << 10
#: With more than this unread, the client's next request is not begun.
FULL_BYTES = 64 << 10
#: Requests of one connection that are begun in one turn of the loop.
TURN_REQUESTS = 64
#: A connection that was refused mid-body is read (and ignored) this long, so that the client sees the answer and not a reset.
LINGER_S = 2.0
#: A client that has connected and not asked anything yet gets this long to ask once the server closes.
FRESH_S = 1.0
NEVER = float("inf")
#: What a client that may have left is written where its answer has not begun. Any HTTP/1.1 client reads past it.
INTERIM = b"HTTP/1.1 102 Processing\r\n\r\n"
#: Seconds to the next such sign of life; each time twice as long.
FIRST_PROBE_S = 1.0
#: When a reset is looked for after that, seconds: on one machine it is there at once, within a data centre soon. Later ones the
#: sweeper sees.
PROBE_ANSWERS_S = (0.0, 0.005, 0.05)
#: What the kernel says of a connection whose other side is gone, though nobody reads it.
GONE = select.POLLHUP | select.POLLERR
#: Header lines of errors that the server itself finds.
EXTRA = {415: b"accept-encoding: identity\r\n"}


class App(Protocol):
    """What answers requests."""

    def handle(self, connection: Connection, request: HttpRequest) -> None:
        """Answer now, or later through the connection. Must not block."""
        ...

    def error_body(self, status: int, message: str) -> bytes:
        """Body of an error that the server itself found."""
        ...


class Connection(asyncio.Protocol):
    """One client connection. The app calls `respond`, or `begin_stream`, `send` … `finish`."""

    __slots__ = (
        "_at_end", "_body", "_body_bytes", "_chunked_ok", "_close_after", "_closed", "_continue", "_fd", "_full",
        "_gated", "_head_bytes", "_headers", "_held", "_in_head", "_lingering", "_parked", "_parser", "_paused",
        "_probe_at", "_probe_s", "_progress", "_pumping", "_queue", "_queued", "_refusal", "_server", "_settings",
        "_stalled_since", "_transport", "_url", "backlog", "busy", "deadline", "fresh",
        "half_closed", "on_disconnect", "probe",
        "timed_out_status",
    )  # fmt: skip

    def __init__(self, server: HttpServer) -> None:
        self._server, self._settings = server, server.settings
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._fd = -1
        self._closed = True
        self._parser = httptools.HttpRequestParser(self)
        self._queue: collections.deque[HttpRequest] = collections.deque()
        self._parked = b""
        self._paused = self._pumping = self._close_after = self._lingering = self._continue = self._full = False
        self._refusal: tuple[int, str] | None = None
        self._held: list[bytes] | None = None
        self._gated = False
        self._queued = self._progress = self._head_bytes = 0
        self._stalled_since = NEVER
        self.backlog = False
        self.busy = False
        #: It has not asked anything yet.
        self.fresh = True
        #: The client sends nothing more. Whether it still reads is not known. `_at_end`: and all that it sent was read.
        self.half_closed = self._at_end = False
        self._probe_at, self._probe_s = NEVER, FIRST_PROBE_S
        #: Writes something harmless into an answer that is a stream. None for one that is sent whole.
        self.probe: Callable[[], None] | None = None
        #: Called once when the client leaves while its request is being answered.
        self.on_disconnect: Callable[[], None] | None = None
        self.deadline, self.timed_out_status = NEVER, 0
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._in_head = True

    # --- asyncio ---------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._fd = transport.get_extra_info("socket").fileno()
        self._transport.set_write_buffer_limits(FULL_BYTES, 0)
        self._closed = False
        self.deadline = self._server.now + self._settings.idle_timeout_s
        self._server.connections.add(self)
        if len(self._server.connections) > self._settings.max_connections:
            self._refuse(503, "this gateway has too many connections; try again later")

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._fd = -1
        self._server.connections.discard(self)
        self._queue.clear()
        self._parked = b""
        self.probe = None
        callback, self.on_disconnect = self.on_disconnect, None
        if callback is not None:
            callback()

    def eof_received(self) -> bool:
        """Whether there is something to go on for: requests that are not answered yet, of a client that may still read."""
        self._at_end = True
        if self._lingering or self._closed or not (self.busy or self._queue or self._parked):
            return False
        self._half_close()
        return True

    def _half_close(self) -> None:
        self.half_closed = True
        if self.busy:
            self._write_probe()

    def _write_probe(self) -> None:
        """Write something: the kernel of a client that has left answers it with a reset."""
        self._probe_at, self._probe_s = self._server.now + self._probe_s, self._probe_s * 2
        if self.probe is not None:
            self.probe()
        elif self._chunked_ok:  # HTTP/1.0 knows no interim answers
            self.send(INTERIM)
        for delay_s in PROBE_ANSWERS_S:
            asyncio.get_running_loop().call_later(delay_s, self._end_if_gone)

    def _end_if_gone(self) -> None:
        if self.busy and not self._closed and _polled(self._fd) & GONE:
            self.abort()

    def pause_writing(self) -> None:
        """The client reads more slowly than it asks."""
        self._full = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._full = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        if self.busy or self._queue or self._full:
            self._parked += data
            if len(self._parked) > PARKED_BYTES and not self._paused:
                self._paused = True
                self._transport.pause_reading()
            return
        self._feed(data)
        self._pump()

    # --- parsing ---------------------------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._close_after = True  # nothing we speak; the request itself is answered
        except httptools.HttpParserError as err:
            if not self._queue:
                self._refusal = self._refusal or (400, f"the request is not valid HTTP/1.1: {err}")
            self._close_after = True
        if self._in_head and self._head_bytes > self._settings.max_header_bytes and not self._queue:
            self._refusal = self._refusal or (431, f"the request's head is larger than {self._settings.max_header_bytes} bytes")

    def on_message_begin(self) -> None:
        self._reset()
        self.deadline, self.timed_out_status = self._server.now + self._settings.header_timeout_s, 408

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_bytes > self._settings.max_header_bytes and self._head_size() > self._settings.max_header_bytes:
            self._refusal = self._refusal or (431, f"the request's head is larger than {self._settings.max_header_bytes} bytes")
            return
        declared = self._headers.get(b"content-length")
        if declared is not None and int(declared) > self._settings.max_body_bytes:
            self._too_large()
        elif self._headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            self._refusal = self._refusal or (415, "the request's body is compressed; send it uncompressed")
        elif self._headers.get(b"expect", b"").lower() == b"100-continue":
            self._continue = True
        self.deadline = self._server.now + self._settings.body_timeout_s

    def _head_size(self) -> int:
        """Of a whole head; `_head_bytes` may count a body that came along."""
        return len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers.items())

    def on_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > self._settings.max_body_bytes:
            self._too_large()
        elif self._refusal is None:
            self._body.append(data)

    def on_message_complete(self) -> None:
        self._continue = False
        self._in_head, self._head_bytes = True, 0
        if self._refusal is not None:
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        parser = self._parser
        keep_alive = parser.should_keep_alive()
        self._queue.append(
            HttpRequest(
                parser.get_method(), path_of(self._url), self._headers, body, keep_alive, parser.get_http_version() != "1.0"
            )
        )
        self.deadline, self.timed_out_status = NEVER, 0

    def _too_large(self) -> None:
        self._body.clear()
        limit = self._settings.max_body_bytes
        self._refusal = self._refusal or (
            413,
            f"the request body is larger than {limit} bytes; send less, or raise http.max_body_bytes",
        )

    def _pump(self) -> None:
        """Answer what is parsed, then parse what is parked, one request at a time."""
        if self._pumping:
            return
        self._pumping = True
        turn = TURN_REQUESTS
        try:
            while not self.busy and not self._closed and not self._lingering and not self._full:
                if self._queue:
                    if not turn:  # others have a turn too
                        asyncio.get_running_loop().call_soon(self._pump)
                        return
                    turn -= 1
                    self._begin(self._queue.popleft())
                elif self._refusal is not None:
                    self._refuse(*self._refusal)
                elif self._close_after:
                    self.close()
                elif self._parked:
                    data, self._parked = self._parked, b""
                    if self._paused:
                        self._paused = False
                        self._transport.resume_reading()
                    self._feed(data)
                elif self._at_end:
                    self.close()
                else:
                    if self._continue:
                        self._continue = False
                        self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                    return
        finally:
            self._pumping = False

    def _begin(self, request: HttpRequest) -> None:
        self.busy, self.fresh = True, False
        self.deadline = NEVER
        self._chunked_ok = request.chunked_ok
        if not request.keep_alive or self._server.draining:
            self._close_after = True
        self._server.app.handle(self, request)
        if self.half_closed and self.busy:
            self._write_probe()

    # --- answering -------------------------------------------------------------------------------------------------------

    def respond(
        self, status: int, body: bytes, content_type: bytes = b"application/json", extra: bytes = b"", *, head_only: bool = False
    ) -> None:
        """Answer as a whole. `extra` holds further header lines, each ended by CRLF. Ends the request."""
        self.send(
            b"%b%bcontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b"
            % (
                STATUS_LINES[status],
                self._server.date_line,
                content_type,
                len(body),
                extra,
                b"connection: close\r\n" if self._close_after else b"",
                b"" if head_only else body,
            )
        )
        self.finish()

    def stream_head(self, extra: bytes) -> bytes:
        """The head of a streamed answer; goes out with its first bytes."""
        if self._chunked_ok:
            framing = (
                b"transfer-encoding: chunked\r\nconnection: close\r\n" if self._close_after else b"transfer-encoding: chunked\r\n"
            )
        else:  # HTTP/1.0 knows no chunks: the end of the connection is the end of the answer
            self._close_after = True
            framing = b"connection: close\r\n"
        return (
            b"HTTP/1.1 200 OK\r\n%bcontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
            b"x-accel-buffering: no\r\n%b%b\r\n"
            % (
                self._server.date_line,
                framing,
                extra,
            )
        )

    @property
    def chunked(self) -> bool:
        """A streamed answer goes in chunks (HTTP/1.1)."""
        return self._chunked_ok

    def send(self, data: bytes) -> None:
        """Write bytes: straight into the socket, and through the transport what it does not take."""
        if self._held is not None:
            self._held.append(data)
            return
        if self._closed:
            return
        if self.backlog and self._transport.get_write_buffer_size() == 0:
            self.backlog = False
        if not self.backlog:
            try:
                count = os.write(self._fd, data)
            except BlockingIOError:
                count = 0
            except OSError:
                self.abort()
                return
            if count == len(data):
                return
            data = data[count:]
        self._queued += len(data)
        self._transport.write(data)
        size = self._transport.get_write_buffer_size()
        if size:
            self.backlog = True
            if size > self._settings.max_unread_bytes:
                log.debug("client cut off: it does not read", unread_bytes=size)
                self.abort()

    @property
    def unsent(self) -> bool:
        """Something is being answered, or waits for the client to read it."""
        return self.busy or self._transport.get_write_buffer_size() > 0

    def hold(self) -> None:
        """Collect what is sent until `release`: several pieces of one frame leave in one write."""
        if self._held is None:
            self._held = []

    def gate(self) -> None:
        """Collect what is sent until `open_gate`, or until the answer is complete."""
        self._gated = True
        self.hold()

    def open_gate(self) -> None:
        """Send what was collected. Harmless without a gate."""
        if self._gated:
            self._gated = False
            self.release()

    def release(self) -> None:
        """Send what was collected."""
        if self._gated:
            return
        held, self._held = self._held, None
        if held:
            self.send(held[0] if len(held) == 1 else b"".join(held))

    def finish(self) -> None:
        """The answer is complete."""
        self.on_disconnect = self.probe = None
        if self._held is not None:
            self._gated = False
            self.release()
        self.busy = False
        if self._closed:
            return
        self.deadline = self._server.now + self._settings.idle_timeout_s
        if not self._pumping and (self._queue or self._parked or self._close_after or self._at_end):
            self._pump()

    def close(self) -> None:
        """Close once everything written has left."""
        if not self._closed:
            self._closed = True
            self._transport.close()

    def abort(self) -> None:
        """Close now. The client learns that the answer is torn."""
        if not self._closed:
            self._closed = True
        self._transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error that the server found, then close without a reset."""
        self._refusal, self._close_after, self._lingering = None, True, True
        body = self._server.app.error_body(status, message)
        self.send(
            b"%b%b%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (STATUS_LINES[status], self._server.date_line, EXTRA.get(status, b""), len(body), body)
        )
        if not self._closed:
            self.deadline, self.timed_out_status = self._server.now + LINGER_S, 0
            self._transport.write_eof()

    # --- the sweeper's view ------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Enforce what depends on time."""
        if self._transport.get_write_buffer_size():
            self._check_stall(now)
        elif self._stalled_since != NEVER:
            self._stalled_since = NEVER
        if self.half_closed and self.busy:
            self._end_if_gone()
            if now >= self._probe_at and not self._closed:
                self._write_probe()
        elif self._paused and self.busy and _polled(self._fd) & (GONE | select.POLLRDHUP):
            self._half_close()
        elif now > self.deadline and not self.busy:
            if self._lingering or not self.timed_out_status:
                self.abort() if self._lingering else self.close()
            else:
                self._refuse(self.timed_out_status, "the request did not arrive in time")

    def leave(self, now: float) -> None:
        """The server closes: go, unless something is asked here. Who has just connected gets a moment to ask."""
        if self.busy or self._queue:
            self._close_after = True
        elif self.fresh:
            self.deadline = min(self.deadline, now + FRESH_S)
        elif self._in_head and not self._head_bytes:
            self.close()

    def _check_stall(self, now: float) -> None:
        """End a client that reads nothing, or that stays far behind, for too long."""
        size = self._transport.get_write_buffer_size()
        moved = self._queued - size
        keeps_up = moved != self._progress and size <= self._settings.max_unread_bytes // 4
        if keeps_up or self._stalled_since == NEVER:
            self._stalled_since = now
        elif now - self._stalled_since > self._settings.stall_timeout_s:
            log.debug("client cut off: it does not read", unread_bytes=size)
            self.abort()
        self._progress = moved


def _polled(fd: int) -> int:
    """What the kernel knows of the other side. For connections that are not read; any other learns it from its transport."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return next((event for _, event in poll.poll(0)), 0)
