"""The answer of 64 tokens, broken at every token: what the client gets is the undisturbed answer, each time.

The engines are real from the stable tier down (`SteppedRunner` over the scripted runner); what breaks an attempt is on the wire.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest

from inference_runtime.errors import ContextPoisoned, EngineLost
from inference_runtime.generation import TokenChunk
from inference_runtime.rpc import RpcServer
from inference_runtime.runner import RunnerConfig
from inference_runtime.runners.scripted import FIRST_WORD, RUNTIME, ScriptedCodec
from inference_runtime.settings import TelemetrySettings
from inference_runtime.stepped import SteppedRunner
from inference_runtime.telemetry import Telemetry
from inference_runtime.testing.scripted import expected_text, expected_tokens, user_says
from inference_runtime.v1 import engine_service_pb2, engine_service_pb2_grpc
from inference_runtime.wire import request_from_proto, usage_to_proto
from tests.integration.gateway.conftest import Gateway, Start
from tests.integration.gateway.peer import Peer, Row, deployment_route, error_row

TOKENS, SEED, PROMPT = 64, 11, "Tell me about doors."
CONFIG = RunnerConfig("every-index", max_batch=512)
#: Rows of one frame: attempts break inside of frames and between them.
ROWS = 5
TRUTH = expected_tokens(user_says(PROMPT), SEED, n=TOKENS)


class PiecesCodec(ScriptedCodec):
    """Tokens are pieces of UTF-8 characters: an answer has whole ones, torn ones and bytes that never become one."""

    PIECES = (b"\xf0\x9f", b"\x99\x82", "ß".encode(), b"\xe4", b"\xb8\x96", b" a", b"\xc3", b"\xa9")

    def token_bytes(self, token_id: int) -> bytes:
        return self.PIECES[token_id % len(self.PIECES)] if token_id >= FIRST_WORD else super().token_bytes(token_id)


@dataclass(frozen=True)
class Case:
    """One answer: how its tokens are spelt, and what ends it."""

    codec: ScriptedCodec
    stop: str

    @property
    def text(self) -> str:
        """The undisturbed text, from the tokens alone."""
        whole = b"".join(map(self.codec.token_bytes, TRUTH)).decode(errors="replace")
        return whole.partition(self.stop)[0] if self.stop else whole

    @property
    def tokens(self) -> int:
        """Tokens up to the one that completes the stop string."""
        if not self.stop:
            return TOKENS
        spelt = (b"".join(map(self.codec.token_bytes, TRUTH[:n])).decode() for n in range(TOKENS))
        return next(n for n, text in enumerate(spelt) if self.stop in text)


WORDS = expected_text(user_says(PROMPT), SEED, n=TOKENS).split(" ")
#: From inside the 57th word into the 60th: each break there finds half a stop string that nobody has seen.
LATE_STOP = f"{WORDS[57][-1]} {WORDS[58]} {WORDS[59]} {WORDS[60][:5]}"
CASES = {
    "ended by its length": Case(ScriptedCodec(), ""),
    "ended by a stop string late": Case(ScriptedCodec(), LATE_STOP),
    "of torn characters": Case(PiecesCodec(), ""),
}


class BreakingEngine(Peer):
    """Answers as an engine does; breaks the first attempt of each request as `break_at` says."""

    def __init__(self, name: str, tasks: asyncio.TaskGroup, codec: ScriptedCodec, break_at: Callable[[], int | None]) -> None:
        super().__init__(name)
        self._tasks, self._break_at = tasks, break_at
        self._runner = SteppedRunner(codec, lambda: RUNTIME.make_runner(CONFIG), CONFIG)
        self.cut_stream = False
        #: Where the first attempt of a choice breaks, by choice.
        self.break_choice_at: dict[int, int] = {}
        #: Prefixes that attempts went on from.
        self.prefixes: list[list[int]] = []

    async def load(self) -> None:
        await self._runner.load()

    async def close(self) -> None:
        await self._runner.close()

    async def _read(self, read: Callable[[], Any]) -> None:
        while isinstance(message := await read(), engine_service_pb2.SessionRequest):
            for submission in message.submissions:
                self._tasks.create_task(self._answer(submission))

    async def _answer(self, s: engine_service_pb2.Submission) -> None:
        break_at = self.break_choice_at.get(s.choice, self._break_at()) if s.epoch == 0 else None
        prefix = list(s.generated_prefix[0].token_ids) if s.generated_prefix else []
        if s.epoch:
            self.prefixes.append(prefix)
        rows: list[Row] = []
        chunks = self._runner.execute(request_from_proto(s.request), prefix, s.choice)
        async with aclosing(cast(AsyncGenerator[TokenChunk, None], chunks)):
            async for chunk in chunks:
                if chunk.index == break_at:
                    break
                detail = None
                if chunk.finish_reason is not None:
                    assert chunk.usage is not None
                    detail = engine_service_pb2.ChunkDetail(usage=usage_to_proto(chunk.usage))
                    detail.finish_reason = int(chunk.finish_reason)  # type: ignore[assignment]
                rows.append(Row(s, chunk.index, chunk.token_ids, chunk.text, detail=detail))
        for at in range(0, len(rows), ROWS):
            self.send(*rows[at : at + ROWS])
        if break_at is None:
            return
        if self.cut_stream:
            self.cut(EngineLost("the engine is gone"))
        else:
            self.send(error_row(s, ContextPoisoned("the context is being replaced"), len(rows)))


@asynccontextmanager
async def breaking(name: str, codec: ScriptedCodec, break_at: Callable[[], int | None]) -> AsyncIterator[BreakingEngine]:
    """A running one."""
    async with AsyncExitStack() as stack:
        telemetry = Telemetry("peer", TelemetrySettings())
        stack.callback(telemetry.close)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        engine = BreakingEngine(name, tasks, codec, break_at)
        server = RpcServer("127.0.0.1", 0, telemetry)
        server.add(engine_service_pb2_grpc.add_EngineServiceServicer_to_server, engine, "inference_runtime.v1.EngineService")
        engine.address = await server.start()
        stack.push_async_callback(server.stop, 0)
        await engine.load()
        stack.push_async_callback(engine.close)
        yield engine


@dataclass(frozen=True)
class Got:
    """What a client was given."""

    text: str
    finish: str
    tokens: int
    prompt_tokens: int


async def ask(gateway: Gateway, case: Case, stream: bool) -> Got:
    """The answer; fails where it is not a proper one."""
    fields: dict[str, Any] = {"max_tokens": TOKENS, "seed": SEED, "messages": [{"role": "user", "content": PROMPT}]}
    if case.stop:
        fields["stop"] = [case.stop]
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    response = await gateway.chat(**fields)
    assert response.status_code == 200, response.text
    if not stream:
        answer = response.json()
        choice, usage = answer["choices"][0], answer["usage"]
        return Got(choice["message"]["content"], choice["finish_reason"], usage["completion_tokens"], usage["prompt_tokens"])
    data = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]", response.text
    events: Sequence[Any] = [json.loads(d) for d in data[:-1]]
    choices = [c for e in events for c in e["choices"]]
    text = "".join(c["delta"].get("content") or "" for c in choices)
    (finish,) = [c["finish_reason"] for c in choices if c["finish_reason"]]
    usage = events[-1]["usage"]
    return Got(text, finish, usage["completion_tokens"], usage["prompt_tokens"])


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_trap_08_an_answer_broken_at_any_token_is_the_undisturbed_one(start: Start, case: Case, stream: bool) -> None:
    """Trap 8: text, tokens, finish reason and usage, for every k from 0 to behind the last token, all at once."""
    ends = iter([None, *range(case.tokens + 1)])
    async with breaking("a", case.codec, lambda: next(ends)) as engine, start() as gateway:
        await gateway.route(deployment_route(engine.replica("demo")))
        undisturbed = await ask(gateway, case, stream)
        answers = await asyncio.gather(*(ask(gateway, case, stream) for _ in range(case.tokens + 1)))
        assert undisturbed == Got(case.text, "stop" if case.stop else "length", case.tokens, undisturbed.prompt_tokens)
        assert case.tokens > TOKENS - 6
        assert set(answers) == {undisturbed}
        assert sorted(engine.prefixes, key=len) == [TRUTH[:k] for k in range(case.tokens)]
        assert gateway.metric('inference_resumptions_total{deployment="demo",outcome="resumed"}') == case.tokens - 1


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("broken_at", [0, 1, 57, 58, 59])
async def test_a_lost_engine_is_as_good_as_a_lost_context(start: Start, broken_at: int, stream: bool) -> None:
    """The stream to the first engine ends; another engine goes on, half a stop string in hand."""
    case = CASES["ended by a stop string late"]
    ends = iter([broken_at])
    async with breaking("a", case.codec, lambda: next(ends)) as a, breaking("b", case.codec, lambda: next(ends)) as b:
        a.cut_stream = b.cut_stream = True
        async with start() as gateway:
            await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
            got = await ask(gateway, case, stream)
        assert (got.text, got.finish, got.tokens) == (case.text, "stop", case.tokens)
        assert a.prefixes + b.prefixes == [TRUTH[:broken_at]]
