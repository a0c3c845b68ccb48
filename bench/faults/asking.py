"""One request, asked over HTTP or gRPC as any client would, and what came of it: each token, when it came, and how it ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from inference_runtime.client import InferenceClient
from inference_runtime.errors import InferenceError
from inference_runtime.generation import SamplingParams
from inference_runtime.testing.history import Stream

__all__ = ["MODEL", "PATIENCE_S", "Answer", "Broken", "Failed", "Outcome", "Refused", "over_grpc", "over_http", "verdict_on"]

MODEL = "echo"
#: Seconds after which an answer that has not come counts as none.
PATIENCE_S = 45.0
#: Largest line of a stream, bytes.
LINE_BYTES = 1 << 20
#: Errors over gRPC with which a gateway that starts, drains or is gone does not take a request: what is status 503 over HTTP.
REFUSALS = frozenset({"NetworkError", "Draining", "NoReplica"})
#: Statuses of a request that was not taken: its deployment is full; nobody is there.
FULL, NOBODY = 429, 503

#: "refused" is said where a cell offers more than can be served; elsewhere a refusal is a failure.
Outcome = Literal["open", "ended", "failed", "broken", "refused"]


class Refused(Exception):
    """The request was not taken: nothing of it was answered.

    Args:
        said: What the gateway said.
        full: It has no place for more; else another gateway may take it.
    """

    def __init__(self, said: str, *, full: bool = False) -> None:
        super().__init__(said)
        self.full = full


class Broken(Exception):
    """The connection ended in the middle of an answer."""


class Failed(Exception):
    """The answer was an error."""


@dataclass(slots=True)
class Answer:
    """One request: when each token came (seconds of the monotonic clock), and how it ended.

    Args:
        record: What came of it.
        gateway: Number of the gateway that was asked.
        begin: When.
        probe: It only asks whether new requests are answered.
        stamps: When each piece came.
        end: When it ended.
        outcome: How.
        error: What was said.
        model: The deployment. Only answers of `MODEL` tell how long streams stood still.
        last_id: Id of the last event that came, over HTTP.
    """

    record: Stream
    gateway: int
    begin: float
    probe: bool
    stamps: list[float] = field(default_factory=list)
    end: float = 0.0
    outcome: Outcome = "open"
    error: str = ""
    model: str = MODEL
    last_id: str = ""

    def stall_s(self, since: float, until: float) -> float | None:
        """The longest silence that touches this window, from the request on; None when the stream was not open in it."""
        if self.begin > until or self.end < since:
            return None
        moments = [self.begin, *self.stamps]
        gaps = [b - a for a, b in pairwise(moments) if b >= since and a <= until]
        return max(gaps, default=None)


# --- over gRPC -------------------------------------------------------------------------------------------------------


async def over_grpc(client: InferenceClient, answer: Answer, first: Callable[[], None]) -> None:
    """Ask, and note each token; `first` is called with each. Raises Refused, Broken or Failed."""
    record = answer.record
    assert record.seed is not None
    sampling = SamplingParams(seed=record.seed, max_tokens=record.tokens)
    chunks = client.generate(answer.model, record.messages, sampling, timeout_s=PATIENCE_S)
    finished = False
    try:
        async with aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.token_ids:
                    answer.stamps.append(time.monotonic())
                    record.chunk(chunk.index, chunk.token_ids)
                    first()
                finished = finished or chunk.finish_reason is not None
    except InferenceError as err:
        said = f"{type(err).__name__}: {err.message}"
        if type(err).__name__ not in REFUSALS:
            raise Failed(said) from err
        raise (Broken if answer.stamps else Refused)(said) from err
    if not finished:
        raise Broken("the call ended without a finish reason")


# --- over HTTP -------------------------------------------------------------------------------------------------------


async def over_http(address: str, answer: Answer, first: Callable[[], None]) -> None:
    """Ask host:port on a connection of its own, and note each token; `first` is called with each. An answer that has begun goes
    on behind its last event. Raises Refused, Broken or Failed."""
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), limit=LINE_BYTES)
    except OSError as err:
        raise Refused(str(err)) from err
    try:
        writer.write(_request(answer))
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(maxsplit=2)[1])
        if status != 200:
            said = f"HTTP {status}: {(await reader.read()).decode(errors='replace')[-300:]}"
            raise Refused(said, full=status == FULL) if status in (FULL, NOBODY) else Failed(said)
        await _events(reader, answer, first)
    except (OSError, asyncio.IncompleteReadError) as err:
        raise Broken(f"the connection ended after {len(answer.stamps)} pieces: {type(err).__name__}") from err
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader, answer: Answer, first: Callable[[], None]) -> None:
    async for line in _lines(reader):  # of whole events: one never spans two chunks
        if line.startswith(b"id: "):
            answer.last_id = line[4:].decode()
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]":
            return
        event = json.loads(line[6:])
        if "error" in event:
            raise Failed(f"error event: {event['error']}")
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                answer.stamps.append(time.monotonic())
                answer.record.text(text)
                first()
    raise Broken("the stream ended without [DONE]")


async def verdict_on(address: str, prompt: str, *, tokens: int, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
    """Ask host:port for a whole answer to a prompt that may not be answered: the status, and what was said.

    Raises:
        TimeoutError: Nothing was said in time.
        Broken: The connection ended instead.
    """
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, int(port), limit=LINE_BYTES)
        try:
            body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
            writer.write(_post(body))
            head, _, said = (await reader.read()).partition(b"\r\n\r\n")
            return int(head.split(maxsplit=2)[1]), said.decode(errors="replace")
        except (OSError, IndexError) as err:
            raise Broken("the connection ended without an answer") from err
        finally:
            writer.close()


def _request(answer: Answer) -> bytes:
    record = answer.record
    assert not isinstance(record.messages, str)
    messages = [{"role": "user", "content": message.text} for message in record.messages]
    fields = {"model": answer.model, "messages": messages, "seed": record.seed, "max_tokens": record.tokens, "stream": True}
    return _post(fields, last_id=answer.last_id)


def _post(fields: dict[str, Any], *, last_id: str = "") -> bytes:
    body = json.dumps(fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: faults\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
    if last_id:
        head += f"last-event-id: {last_id}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + body


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines of a chunked body. Raises IncompleteReadError when it ends before its last chunk."""
    rest = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        *lines, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
        for line in lines:
            yield line
