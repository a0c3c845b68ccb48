"""Readers that do not keep up: what is kept for them is bounded, the step never waits, and the end has a type."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from inference_runtime.answers import ChoiceAssembler
from inference_runtime.errors import SlowConsumer
from inference_runtime.generation import ChatPrompt, FinishReason, GenerationRequest, SamplingParams, TokenChunk
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.runner import StepOutput
from inference_runtime.runners.scripted import ScriptedCodec
from inference_runtime.testing.scripted import expected_tokens, user_says
from inference_runtime.v1 import engine_service_pb2, engine_service_pb2_grpc
from services.engine.core import EngineCore
from services.engine.stream import RING_TEXT_BYTES, RING_TOKENS, Stream
from services.engine.submission import Submission
from tests.integration.engine.kit import EngineUnderTest, assignment, running_engine, session, submission, until
from tests.integration.engine.test_session import check_exact


def core(engine: EngineUnderTest, replica_id: str) -> EngineCore:
    """A hosted core, to shorten its patience."""
    found = engine.replicas._hosted[replica_id].core
    assert found is not None
    return found


class Owner:
    """Owns one stream and remembers how it ended."""

    context_generation = 1

    def __init__(self) -> None:
        self.ends: list[Exception | None] = []

    def end(self, stream: Stream, err: Exception | None) -> None:
        if not stream.ended:
            stream.ended = True
            self.ends.append(err)


class Outlet:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.chunks: list[TokenChunk] = []
        self.errors: list[Exception] = []

    def admitted(self, stream: Stream, input_tokens: int) -> None:
        pass

    def chunk(self, stream: Stream, chunk: TokenChunk) -> None:
        self.chunks.append(chunk)

    def error(self, stream: Stream, err: Exception) -> None:
        self.errors.append(err)

    @property
    def tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.chunks)


def make_stream(*, credits: int, coalesce: int = 0, stall_s: float = 30.0) -> tuple[Stream, Owner, Outlet]:
    """A stream by itself, ready for outputs."""
    owner, outlet = Owner(), Outlet()
    request = GenerationRequest("r", "d", ChatPrompt(user_says("hello")), SamplingParams(max_tokens=30_000))
    stream = Stream(owner, 1, Submission(request, credits=credits, coalesce_tokens=coalesce), outlet, stall_s)
    stream.choice = ChoiceAssembler(ScriptedCodec(), stop=(), prompt_tokens=7)
    return stream, owner, outlet


async def test_the_ring_holds_its_tokens_and_one_more_ends_the_stream() -> None:
    """To the token, beyond the credit; what was generated is counted."""
    stream, owner, outlet = make_stream(credits=5)
    for _ in range(RING_TOKENS + 5):
        stream.on_output(StepOutput(1, (300,)))
    assert (outlet.tokens, owner.ends) == (5, [])
    stream.on_output(StepOutput(1, (300,)))
    (error,) = outlet.errors
    assert owner.ends == [error]
    assert isinstance(error, SlowConsumer)
    assert error.metadata == {"input_tokens": "7", "output_tokens": str(RING_TOKENS + 6)}
    stream.grant(10**6)
    assert outlet.tokens == 5, "nothing follows the end"


async def test_a_reader_that_keeps_up_is_never_cut_off_however_long_the_answer() -> None:
    """The ring bounds what is unread, not the answer."""
    stream, _, outlet = make_stream(credits=256)
    for i in range(3 * RING_TOKENS):
        stream.on_output(StepOutput(1, (300, 301) if i % 2 else (302,)))
        if i % 64 == 0:
            stream.grant(128)
    assert not outlet.errors
    assert [c.index for c in outlet.chunks] == sorted(c.index for c in outlet.chunks)


async def test_the_ring_is_bounded_in_text_too() -> None:
    """Few tokens may stand for much text."""

    class Wordy(ScriptedCodec):
        def token_bytes(self, token_id: int) -> bytes:
            return b"\xc3\xa9" * 40_000

    stream, _, outlet = make_stream(credits=1)
    stream.choice = ChoiceAssembler(Wordy(), stop=(), prompt_tokens=7)
    fits = RING_TEXT_BYTES // 80_000
    for _ in range(1 + fits):
        stream.on_output(StepOutput(1, (300,)))
    assert not outlet.errors
    stream.on_output(StepOutput(1, (300,)))
    assert isinstance(outlet.errors[0], SlowConsumer)


@pytest.mark.parametrize("finished", [False, True], ids=["running", "finished"])
async def test_a_stalled_reader_is_cut_off_and_a_grant_shows_that_it_lives(finished: bool) -> None:
    """Also when the answer is complete: its end must not wait for ever."""
    stream, owner, outlet = make_stream(credits=1, stall_s=0.2)
    for i in range(8):
        stream.on_output(StepOutput(1, (300,), FinishReason.LENGTH if finished and i == 7 else None))
    begin = asyncio.get_running_loop().time()
    for _ in range(4):  # each grant begins the time anew
        await asyncio.sleep(0.1)
        stream.grant(1)
    assert not outlet.errors
    await until(lambda: bool(outlet.errors), "it is cut off")
    assert 0.55 < asyncio.get_running_loop().time() - begin < 2.0
    assert (outlet.tokens, len(owner.ends)) == (5, 1)
    assert all(c.finish_reason is None for c in outlet.chunks)


async def test_a_stream_that_waits_for_its_group_is_not_stalled() -> None:
    """Coalescing is the caller's wish; a group is cut at the size of the ring."""
    stream, _, outlet = make_stream(credits=10**6, coalesce=10**6, stall_s=0.01)
    for _ in range(RING_TOKENS + 1):
        stream.on_output(StepOutput(1, (300,)))
    await asyncio.sleep(0.05)
    assert not outlet.errors
    assert [len(c.token_ids) for c in outlet.chunks] == [RING_TOKENS]


async def test_credits_that_run_out_end_one_stream_of_a_session_and_no_other() -> None:
    """The sequence leaves the batch, its place is free, the usage comes with the error."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("stall", {"pace_s": 0.002}))
        core(engine, "stall-0").stall_s = 0.3
        long = SamplingParams(max_tokens=20_000)
        await gateway.send(submission(1, "stall", sampling=long, credits=20), submission(2, "stall", sampling=long))
        error = (await gateway.answer(1)).error
        assert isinstance(error, SlowConsumer)
        assert gateway.answers[1].token_ids == expected_tokens(user_says("hello"), n=20)
        detail = next(d for f in gateway.frames for d in f.details if d.HasField("error"))
        assert detail.usage.output_tokens == int(error.metadata["output_tokens"]) > 20
        await until(lambda: engine.load("stall-0").running == 1, "its sequence is gone")
        seen = len(gateway.answers[2].token_ids)
        await until(lambda: len(gateway.answers[2].token_ids) > seen + 5, "the other goes on")


async def test_a_reader_of_execute_that_stalls_is_cut_off_and_holds_up_nobody() -> None:
    """The same bound for the public face; another call never waits."""
    async with running_engine() as engine, open_channel(engine.address) as channel:
        await engine.host(assignment("call", {"tokens_per_step": 64, "pace_s": 0.001}))
        core(engine, "call-0").stall_s = 0.5
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        wanted = submission(0, "call", sampling=SamplingParams(max_tokens=30_000))
        call = stub.Execute(engine_service_pb2.ExecuteRequest(submission=wanted))
        await call.read()
        await until(lambda: engine.load("call-0").running == 0, "the sequence leaves the batch")
        async with session(engine) as gateway:
            await gateway.send(submission(1, "call", sampling=SamplingParams(max_tokens=400)))
            check_exact(await gateway.answer(1), "hello", 400)
        tokens = 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while (response := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                tokens += len(response.token_ids)
        assert isinstance(error_from_rpc(caught.value), SlowConsumer)
        assert tokens < 30_000


async def test_execute_gives_the_whole_of_a_long_answer_to_a_reader_that_reads() -> None:
    """Credit is renewed as the chunks are taken."""
    async with running_engine() as engine, open_channel(engine.address) as channel:
        await engine.host(assignment("whole", {"tokens_per_step": 16}))
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        wanted = submission(0, "whole", sampling=SamplingParams(max_tokens=6000))
        call = stub.Execute(engine_service_pb2.ExecuteRequest(submission=wanted))
        tokens = [t async for r in call for t in r.token_ids]
        assert tokens == expected_tokens(user_says("hello"), n=6000)
