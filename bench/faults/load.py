"""The standing load: clients that stream without a pause and can tell to the token what they must get; and probes beside them.

Half of the clients speak HTTP, half gRPC; each stays with one gateway. Nothing is repeated for them. Only where a cell takes a
gateway down does a client that was refused before anything was answered ask another one, as every load balancer does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from inference_runtime.client import InferenceClient
from inference_runtime.errors import InferenceError
from inference_runtime.generation import SamplingParams
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.history import History, Stream

__all__ = ["MODEL", "Answer", "Load"]

MODEL = "echo"
#: Seconds between two new requests that only ask whether new requests are answered.
PROBE_EVERY_S = 0.1
#: Seconds after which an answer that has not come counts as none.
PATIENCE_S = 45.0
#: Seconds that a client waits before it asks again after a failure, so that a refused one does not spin.
AFTER_FAILURE_S = 0.1
#: Largest line of a stream, bytes.
LINE_BYTES = 1 << 20

#: Errors over gRPC with which a gateway that starts, drains or is gone does not take a request: what is status 503 over HTTP.
REFUSALS = frozenset({"NetworkError", "Draining", "NoReplica"})

Outcome = Literal["open", "ended", "failed", "broken"]


class _Refused(Exception):
    """A gateway did not take the request: nothing of it was answered."""


class _Broken(Exception):
    """The connection ended in the middle of an answer."""


class _Failed(Exception):
    """The answer was an error."""


@dataclass(slots=True)
class Answer:
    """One request: when each token came (seconds of the monotonic clock), and how it ended."""

    record: Stream
    gateway: int
    begin: float
    probe: bool
    stamps: list[float] = field(default_factory=list)
    end: float = 0.0
    outcome: Outcome = "open"
    error: str = ""

    def stall_s(self, since: float, until: float) -> float | None:
        """The longest silence that touches this window, from the request on; None when the stream was not open in it."""
        if self.begin > until or self.end < since:
            return None
        moments = [self.begin, *self.stamps]
        gaps = [b - a for a, b in pairwise(moments) if b >= since and a <= until]
        return max(gaps, default=None)


class Load:
    """Streams and probes on one cluster.

    Args:
        cluster: It serves the deployment `MODEL` with the scripted runtime.
        streams: Streams that are open at any time.
        tokens: Tokens of each.
        rng: Where randomness comes from.
        elsewhere: Clients that are refused ask the next gateway.
    """

    def __init__(self, cluster: Cluster, *, streams: int, tokens: int, rng: random.Random, elsewhere: bool = False) -> None:
        self._cluster, self._streams, self._tokens, self._rng = cluster, streams, tokens, rng
        self._elsewhere = elsewhere
        self._addresses = [url.removeprefix("http://") for url in cluster.local.http_urls]
        self._clients: list[InferenceClient] = []
        self._seed = 0
        self._started: set[int] = set()
        self._all_started = asyncio.Event()
        self.history = History()
        self.answers: list[Answer] = []
        #: Requests that one gateway refused and another one was asked for.
        self.asked_elsewhere = 0
        #: Probes stay away from these gateways: they are dead on purpose.
        self.probed = list(range(len(self._addresses)))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load runs during the body; afterwards every request has come to its end."""
        stop = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            for address in self._cluster.local.grpc_addresses:
                self._clients.append(await stack.enter_async_context(InferenceClient(gateway=address)))
            async with asyncio.TaskGroup() as tasks:
                for worker in range(self._streams):
                    tasks.create_task(self._work(worker, self._rng.random(), stop))
                tasks.create_task(self._probe(tasks, stop))
                try:
                    yield
                finally:
                    stop.set()

    async def started(self) -> None:
        """Return once every client has had its first token."""
        async with asyncio.timeout(PATIENCE_S):
            await self._all_started.wait()

    async def _work(self, worker: int, delay_s: float, stop: asyncio.Event) -> None:
        await asyncio.sleep(delay_s)  # streams are not in step with each other
        count = len(self._addresses)
        gateway, grpc = worker % count, bool(worker // count % 2)
        while not stop.is_set():
            answer = self._begin(gateway, self._tokens, probe=False)
            await self._ask(answer, grpc=grpc, first=lambda: self._has_started(worker))
            if answer.outcome != "ended":
                await asyncio.sleep(AFTER_FAILURE_S)

    def _has_started(self, worker: int) -> None:
        self._started.add(worker)
        if len(self._started) == self._streams:
            self._all_started.set()

    async def _probe(self, tasks: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            gateway = self.probed[number % len(self.probed)]
            tasks.create_task(self._ask(self._begin(gateway, 1, probe=True), grpc=False, first=lambda: None))
            await asyncio.sleep(PROBE_EVERY_S)

    def _begin(self, gateway: int, tokens: int, *, probe: bool) -> Answer:
        self._seed += 1
        kind = "probe" if probe else "stream"
        record = self.history.begin(f"{kind} {self._seed}", seed=self._seed, tokens=tokens, name=f"{kind} {self._seed}")
        answer = Answer(record, gateway, time.monotonic(), probe)
        self.answers.append(answer)
        return answer

    async def _ask(self, answer: Answer, *, grpc: bool, first: Callable[[], None]) -> None:
        ask = self._over_grpc if grpc else self._over_http
        count = len(self._addresses)
        try:
            async with asyncio.timeout(PATIENCE_S):
                for attempt in range(count):
                    try:
                        await ask(answer, first)
                        break
                    except _Refused as err:
                        if not self._elsewhere or attempt + 1 == count:
                            raise _Failed(f"refused: {err}") from err
                        self.asked_elsewhere += 1
                        answer.gateway = (answer.gateway + 1) % count
            answer.outcome = "ended"
            answer.record.end()
        except (_Failed, TimeoutError) as err:
            answer.outcome, answer.error = "failed", str(err) or f"no end after {PATIENCE_S:g} s"
            answer.record.fail(answer.error)
        except _Broken as err:
            answer.outcome, answer.error = "broken", str(err)
            answer.record.fail(answer.error)
        finally:
            answer.end = time.monotonic()

    # --- over gRPC ---------------------------------------------------------------------------------------------------

    async def _over_grpc(self, answer: Answer, first: Callable[[], None]) -> None:
        record = answer.record
        assert record.seed is not None
        sampling = SamplingParams(seed=record.seed, max_tokens=record.tokens)
        prompt = record.messages
        chunks = self._clients[answer.gateway].generate(MODEL, prompt, sampling, timeout_s=PATIENCE_S)
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
                raise _Failed(said) from err
            raise (_Broken if answer.stamps else _Refused)(said) from err
        if not finished:
            raise _Broken("the call ended without a finish reason")

    # --- over HTTP ---------------------------------------------------------------------------------------------------

    async def _over_http(self, answer: Answer, first: Callable[[], None]) -> None:
        host, _, port = self._addresses[answer.gateway].rpartition(":")
        try:
            reader, writer = await asyncio.open_connection(host, int(port), limit=LINE_BYTES)
        except OSError as err:
            raise _Refused(str(err)) from err
        try:
            writer.write(_request(answer.record))
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(maxsplit=2)[1])
            if status != 200:
                body = (await reader.read()).decode(errors="replace")
                raise (_Refused if status == 503 else _Failed)(f"HTTP {status}: {body[-300:]}")
            await self._events(reader, answer, first)
        except (OSError, asyncio.IncompleteReadError) as err:
            raise _Broken(f"the connection ended after {len(answer.stamps)} pieces: {type(err).__name__}") from err
        finally:
            writer.close()

    async def _events(self, reader: asyncio.StreamReader, answer: Answer, first: Callable[[], None]) -> None:
        async for line in _lines(reader):
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]":
                return
            event = json.loads(line[6:])
            if "error" in event:
                raise _Failed(f"error event: {event['error']}")
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    answer.stamps.append(time.monotonic())
                    answer.record.text(text)
                    first()
        raise _Broken("the stream ended without [DONE]")


def _request(record: Stream) -> bytes:
    assert not isinstance(record.messages, str)
    messages = [{"role": "user", "content": message.text} for message in record.messages]
    body = json.dumps(
        {"model": MODEL, "messages": messages, "seed": record.seed, "max_tokens": record.tokens, "stream": True}
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: faults\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + body


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines of a chunked body. Raises IncompleteReadError when it ends before its last chunk."""
    rest = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        *lines, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
        for line in lines:
            yield line
