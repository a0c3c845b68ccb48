"""`inferctl chat` against a real HTTP server that is scripted to behave and to misbehave."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from inference_runtime.cli.chat import ChatOptions, answer, stream_answer
from inference_runtime.errors import BadRequest, NetworkError, ServerError

WAIT_S = 10.0


def chunk(text: str) -> bytes:
    """One SSE event with a piece of text."""
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class Gateway:
    """What the server does next, and what it was asked."""

    def __init__(self) -> None:
        self.status, self.body = 200, b""
        self.asked: list[dict[str, object]] = []
        self.authorization: str | None = None
        self.stall_after = False
        self.gone = threading.Event()
        self.address = ""


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """An HTTP server on loopback."""
    state = Gateway()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            state.authorization = self.headers["authorization"]
            self.send_response(state.status)
            self.send_header("connection", "close")
            self.end_headers()
            self.wfile.write(state.body)
            if state.stall_after:
                self.connection.settimeout(WAIT_S)
                if self.connection.recv(1) == b"":
                    state.gone.set()

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, name="fake-gateway")
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_answer_is_written_piece_by_piece_and_remembered(gateway: Gateway) -> None:
    """X01: streaming, with the conversation so far in the next request; comments and empty deltas are skipped."""
    gateway.body = (
        b": awake\n\n" + b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n' + chunk("Hel") + chunk("lo") + DONE
    )
    options = ChatOptions(gateway.address, "demo", api_key="k", max_tokens=5, messages=[{"role": "system", "content": "s"}])
    out = io.StringIO()

    answer(options, "hi", out)
    answer(options, "again", out)

    assert out.getvalue() == "Hello\nHello\n"
    assert gateway.authorization == "Bearer k"
    assert gateway.asked[0] == {
        "model": "demo",
        "stream": True,
        "max_tokens": 5,
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
    }
    turns = gateway.asked[1]["messages"]
    assert isinstance(turns, list)
    assert [m["content"] for m in turns] == ["s", "hi", "Hello", "again"]


@pytest.mark.parametrize(
    ("status", "body", "expected", "words"),
    [
        (404, b'{"error": {"message": "no deployment is called x"}}', BadRequest, "no deployment is called x"),
        (503, b'{"error": {"message": "no replica"}}', ServerError, "no replica"),
        (500, b"<html>", ServerError, "the gateway answered 500"),
        (400, b"[]", BadRequest, "the gateway answered 400"),
        (200, chunk("a") + b'data: {"error": {"message": "engine lost"}}\n\n' + DONE, ServerError, "engine lost"),
        (200, chunk("a"), NetworkError, "without an end mark"),
    ],
    ids=["4xx", "5xx", "html", "not-an-object", "mid-stream", "cut"],
)
def test_a_failure_is_one_sentence(gateway: Gateway, status: int, body: bytes, expected: type[Exception], words: str) -> None:
    """A refusal, an error in mid-stream, and an answer that just stops: never a quiet half answer."""
    gateway.status, gateway.body = status, body
    options = ChatOptions(gateway.address, "demo")

    with pytest.raises(expected, match=words):
        answer(options, "hi", io.StringIO())

    assert options.messages == []


def test_nobody_there_is_one_sentence() -> None:
    """A gateway that is not there is named."""
    with pytest.raises(NetworkError, match=r"the gateway at 127\.0\.0\.1:1 broke off"):
        answer(ChatOptions("127.0.0.1:1", "demo"), "hi", io.StringIO())


class _Interrupting(io.StringIO):
    """A terminal whose user presses Ctrl-C at the second piece."""

    def __init__(self, hook: Callable[[], None]) -> None:
        super().__init__()
        self._writes, self._hook = 0, hook

    def write(self, text: str) -> int:
        self._writes += 1
        if self._writes == 2:
            self._hook()
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_the_connection(gateway: Gateway) -> None:
    """Ctrl-C stops the answer, not the program: the gateway sees us leave, and what was said stays in the conversation."""
    gateway.body, gateway.stall_after = chunk("one") + chunk("two"), True
    options = ChatOptions(gateway.address, "demo")

    def press() -> None:
        raise KeyboardInterrupt

    out = _Interrupting(press)
    answer(options, "hi", out)

    assert gateway.gone.wait(WAIT_S)
    assert out.getvalue() == "one …\n"
    assert options.messages[-1]["role"] == "assistant"


def test_leaving_the_iterator_closes_the_connection(gateway: Gateway) -> None:
    """Closing the iterator stops the generation."""
    gateway.body, gateway.stall_after = chunk("one"), True
    with closing(stream_answer(ChatOptions(gateway.address, "demo"))) as pieces:
        assert next(pieces) == "one"

    assert gateway.gone.wait(WAIT_S)
