"""The step loop and what is built on it: order, death, memory, cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from inference_runtime.answers import ChoiceAssembler
from inference_runtime.errors import (
    Backpressure,
    BadRequest,
    ContextLengthExceeded,
    ContextPoisoned,
    Internal,
    ServerError,
    Unsupported,
)
from inference_runtime.generation import FinishReason, GenerationRequest, SamplingParams, TextPrompt, TokenChunk, TokenPrompt
from inference_runtime.runner import RebuildCause, RunnerConfig, StepOutput, StepRequest
from inference_runtime.runners.scripted import ScriptedCodec, ScriptedRunner
from inference_runtime.stepped import SteppedRunner
from inference_runtime.testing.scripted import expected_text, expected_tokens


def stepped(model: str = "m", make: type[ScriptedRunner] = ScriptedRunner, **options: object) -> SteppedRunner:
    """A ModelRunner over the scripted one."""
    config = RunnerConfig(model, options, max_batch=8)
    return SteppedRunner(ScriptedCodec(), lambda: make(config), config)


def request(prompt: str = "hi", **sampling: object) -> GenerationRequest:
    """A request."""
    params = {"max_tokens": 10, **sampling}
    return GenerationRequest("r", "d", TextPrompt(prompt), SamplingParams(**params))  # type: ignore[arg-type]


async def collect(runner: SteppedRunner, asked: GenerationRequest, prefix: Sequence[int] = ()) -> list[TokenChunk]:
    """A whole answer."""
    return [chunk async for chunk in runner.execute(asked, prefix)]


async def test_many_requests_share_steps() -> None:
    """Trap 9: eight requests of ten tokens take ten steps of 20 ms, not eighty."""
    runner = stepped(pace_s=0.02)
    await runner.load()
    loop = asyncio.get_running_loop()
    begin = loop.time()
    answers = await asyncio.gather(*(collect(runner, request(f"p{i}")) for i in range(8)))
    took_s = loop.time() - begin
    for i, chunks in enumerate(answers):
        assert [t for c in chunks for t in c.token_ids] == expected_tokens(f"p{i}", n=10)
    assert took_s < 8 * 10 * 0.02 / 2
    await runner.close()


async def test_a_death_reaches_every_request_and_a_rebuild_heals() -> None:
    """Trap 12: a fault in the thread is not invisible."""
    runner = stepped("death", poison_at_step=3)
    await runner.load()
    first, second = await asyncio.gather(collect(runner, request("a")), collect(runner, request("b")), return_exceptions=True)
    assert isinstance(first, ContextPoisoned)
    assert isinstance(second, ContextPoisoned)
    with pytest.raises(ContextPoisoned):
        await collect(runner, request())
    await runner.rebuild_session(RebuildCause.CONTEXT_POISONED)
    assert len(await collect(runner, request())) == 10
    await runner.close()


class Explodes(ScriptedRunner):
    """Raises something that nobody declared."""

    def step(self) -> Sequence[StepOutput]:
        raise ZeroDivisionError("a bug")


async def test_an_unknown_exception_is_internal_with_its_cause() -> None:
    """Nothing is swallowed."""
    runner = stepped("bug", Explodes)
    await runner.load()
    with pytest.raises(Internal, match="ZeroDivisionError") as caught:
        await collect(runner, request())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    await runner.close()


async def test_running_out_of_memory_fails_that_batch_and_no_more() -> None:
    """The context is sound: the next request is answered by the same one."""
    runner = stepped(oom_at_step=3, pace_s=0.005)
    await runner.load()
    results = await asyncio.gather(collect(runner, request("a")), collect(runner, request("b")), return_exceptions=True)
    assert [type(r) for r in results] == [Backpressure, Backpressure]
    assert [t for c in await collect(runner, request("c")) for t in c.token_ids] == expected_tokens("c", n=10)
    await runner.close()


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class Full(ScriptedRunner):
    """Has no memory for any step."""

    def step(self) -> Sequence[StepOutput]:
        raise OutOfMemoryError("CUDA out of memory")


async def test_the_third_step_without_memory_within_a_minute_ends_the_loop() -> None:
    """Two may be chance; after the third the context is replaced."""
    runner = stepped("full", Full)
    await runner.load()
    for _ in range(2):
        with pytest.raises(Backpressure):
            await collect(runner, request())
    with pytest.raises(Internal, match="OutOfMemoryError"):
        await collect(runner, request())
    with pytest.raises(Internal, match="step loop died"):
        await collect(runner, request())
    await runner.close()


class Bug(ScriptedRunner):
    """Raises an error of Python for one prompt; what the probe says is a matter of the model's name."""

    def step(self) -> Sequence[StepOutput]:
        if any(s.left == 7 for s in self._sequences.values()):
            raise ValueError("a shape does not fit")
        return super().step()

    def probe(self) -> bool:
        if self._config.model == "raises":
            raise RuntimeError("CUDA error")
        return self._config.model == "well"


@pytest.mark.parametrize("model", ["well", "broken", "raises"])
async def test_after_an_error_in_a_step_the_probe_decides_whether_the_loop_goes_on(model: str) -> None:
    """Sticky errors repeat on every call, so a small computation tells them apart."""
    runner = stepped(model, Bug)
    await runner.load()
    with pytest.raises(Internal, match="a shape does not fit"):
        await collect(runner, request(max_tokens=7))
    if model == "well":
        assert len(await collect(runner, request(max_tokens=6))) == 6
    else:
        with pytest.raises(Internal, match="step loop died"):
            await collect(runner, request(max_tokens=6))
    await runner.close()


class Picky(ScriptedRunner):
    """Cannot take some prompts, and says so by an error that nobody declared."""

    def admit(self, request: StepRequest) -> None:
        if request.prompt_token_ids[0] == ord("b"):
            raise ValueError("a bug")
        super().admit(request)


async def test_an_error_at_admission_fails_that_sequence_when_the_probe_is_well() -> None:
    """The others of the batch are not touched."""
    runner = stepped("picky", Picky, pace_s=0.002)
    await runner.load()
    good, bad = await asyncio.gather(collect(runner, request("a")), collect(runner, request("b")), return_exceptions=True)
    assert isinstance(bad, Internal)
    assert not isinstance(good, BaseException)
    assert len(good) == 10
    await runner.close()


async def test_a_refused_sequence_fails_alone() -> None:
    """The other one runs on."""
    runner = stepped(fail_admit=2, pace_s=0.005)
    await runner.load()
    good, bad = await asyncio.gather(collect(runner, request("a")), collect(runner, request("b")), return_exceptions=True)
    assert isinstance(bad, ServerError)
    assert not isinstance(good, BaseException)
    assert len(good) == 10
    await runner.close()


class Recording(ScriptedRunner):
    """Remembers which sequences it stepped and dropped."""

    events: list[tuple[str, int]] = []  # noqa: RUF012 - reset by the test that reads it

    def abort(self, sequence_id: int) -> None:
        super().abort(sequence_id)
        self.events.append(("abort", sequence_id))

    def step(self) -> Sequence[StepOutput]:
        outputs = super().step()
        self.events += [("step", o.sequence_id) for o in outputs]
        return outputs


async def test_a_cancelled_request_is_gone_before_the_next_step() -> None:
    """After the abort, no step holds the sequence."""
    events: list[tuple[str, int]] = []
    Recording.events = events
    runner = stepped("recording", Recording, pace_s=0.005)
    await runner.load()
    chunks = runner.execute(request(max_tokens=1000))
    await anext(chunks)
    await chunks.aclose()  # type: ignore[attr-defined]
    await collect(runner, request())
    assert ("abort", 1) in events
    assert ("step", 1) not in events[events.index(("abort", 1)) :]
    await runner.close()


async def test_a_stop_string_ends_the_sequence_in_the_runner_too() -> None:
    """Text and usage end there, and nothing goes on behind it."""
    events: list[tuple[str, int]] = []
    Recording.events = events
    runner = stepped("recording-stop", Recording, tokens_per_step=4)
    await runner.load()
    whole = expected_text("hi", n=10)
    chunks = await collect(runner, request(stop=(whole[13:20],), max_tokens=1000))
    assert "".join(c.text for c in chunks) == whole[:13]
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].stop_sequence == whole[13:20]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.output_tokens == sum(len(c.token_ids) for c in chunks) <= 4
    await collect(runner, request())
    assert ("abort", 1) in events
    await runner.close()


@pytest.mark.parametrize(
    ("asked", "prefix", "error"),
    [
        (request(top_logprobs=1), (), Unsupported),
        (request(presence_penalty=1.0), (), Unsupported),
        (request(logit_bias={1: 2.0}), (), Unsupported),
        (request(min_p=0.1), (), Unsupported),
        (request(n=2), (), Unsupported),
        (request(max_tokens=10**6), (), ContextLengthExceeded),
        (request("x" * 40_000), (), ContextLengthExceeded),
        (request(""), (), BadRequest),
        (GenerationRequest("r", "d", TokenPrompt((1, 99_999))), (), BadRequest),
    ],
)
async def test_refusals(asked: GenerationRequest, prefix: Sequence[int], error: type[Exception]) -> None:
    """Typed, before the first chunk."""
    runner = stepped()
    await runner.load()
    with pytest.raises(error):
        await collect(runner, asked, prefix)
    await runner.close()


async def test_what_runs_finishes_on_the_old_context_when_rebuilt_by_hand() -> None:
    """Two lives for a while, one after that."""
    runner = stepped("rebuilt", pace_s=0.01)
    await runner.load()
    running = asyncio.ensure_future(collect(runner, request(max_tokens=20)))
    await asyncio.sleep(0.05)
    await runner.rebuild_session(RebuildCause.MANUAL)
    assert len(await collect(runner, request("after"))) == 10
    assert [t for c in await running for t in c.token_ids] == expected_tokens("hi", n=20)
    await runner.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("steps-rebuilt")]


async def test_a_failed_load_is_raised_and_leaves_no_thread() -> None:
    """The cause is the runner's own."""
    runner = stepped("fails", load_fails=True)
    with pytest.raises(BadRequest, match="load_fails"):
        await runner.load()
    await runner.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("steps-fails")]


def test_a_choice_reports_cached_tokens_in_its_usage() -> None:
    """They are set on the first output and counted at the end."""
    choice = ChoiceAssembler(ScriptedCodec(), stop=(), prompt_tokens=20)
    choice.take(StepOutput(1, (300,), cached_tokens=16))
    usage = choice.take(StepOutput(1, (301,), FinishReason.LENGTH)).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.cached_input_tokens) == (20, 2, 16)


def test_a_step_request_carries_the_prefix_as_output() -> None:
    """Not as prompt."""
    asked = StepRequest(1, [1, 2], SamplingParams(max_tokens=5), generated_prefix=(300, 301))
    subject = ScriptedRunner(RunnerConfig("m"))
    subject.load(lambda progress: None)
    subject.admit(asked)
    count = 0
    while subject.has_work():
        count += sum(len(o.token_ids) for o in subject.step())
    assert count == 3
