"""A conformance check for runners: whatever passes it can be hosted by an engine.

    async def test_my_runner() -> None:
        await check_runner(lambda: (MY_RUNTIME, RunnerConfig(model="…")))

It judges by what comes out only. Each rule is one function below, and its failure is one sentence.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace

from inference_runtime.errors import BadRequest, ContextLengthExceeded, InferenceError, Unsupported
from inference_runtime.generation import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    Message,
    Role,
    SamplingParams,
    TextPart,
    TextPrompt,
    TokenChunk,
)
from inference_runtime.runner import ModelRunner, RebuildCause, RunnerConfig, Runtime, StepRequest
from inference_runtime.stepped import SteppedRunner

__all__ = ["Check", "RunnerFault", "check_runner"]

#: Time that one check gets, seconds.
CHECK_TIMEOUT_S = 60.0
#: Requests that run at once in the check for mix-ups.
CONCURRENT = 6
#: A key that no runtime has.
UNKNOWN_OPTION = "surely_no_runtime_has_this_option"


class RunnerFault(AssertionError):
    """A runner broke a rule of the contract. The message is the rule and what was seen."""


@dataclass(frozen=True, slots=True)
class Check:
    """What the checks ask of the runner.

    Args:
        prompts: Different prompts, at least two. The answer to each must be longer than `tokens`.
        tokens: Length of the answers asked for, 8 or more.
        long_tokens: Length of the answer that is cut off by a cancellation.
        cancel_within_s: Time in which a cancelled request must be gone.
        threads_end_within_s: Time in which the runner's threads must be gone after `close`.
    """

    prompts: tuple[str, ...] = tuple(f"Count from {n} upwards." for n in range(1, CONCURRENT + 1))
    tokens: int = 12
    long_tokens: int = 200
    cancel_within_s: float = 5.0
    threads_end_within_s: float = 5.0


@dataclass(frozen=True, slots=True)
class _Answer:
    token_ids: tuple[int, ...]
    text: str
    last: TokenChunk


_Made = ModelRunner | tuple[Runtime, RunnerConfig]


def _require(good: bool, sentence: str) -> None:
    if not good:
        raise RunnerFault(sentence)


def _build(made: _Made) -> ModelRunner:
    if isinstance(made, tuple):
        runtime, config = made
        return SteppedRunner(runtime.make_codec(config), lambda: runtime.make_runner(config), config)
    return made


class _Subject:
    """The runner under check and the requests made to it."""

    def __init__(self, runner: ModelRunner, check: Check) -> None:
        self.runner, self.check = runner, check
        self._count = 0

    def request(self, prompt: str, **sampling: object) -> GenerationRequest:
        """A greedy request, seeded where the runner takes seeds."""
        can = self.runner.info.capabilities
        params = SamplingParams(max_tokens=self.check.tokens, temperature=0.0, ignore_eos=True, seed=1 if can.seed else None)
        params = replace(params, **sampling)  # type: ignore[arg-type]
        self._count += 1
        turns = ChatPrompt((Message(Role.USER, (TextPart(prompt),)),))
        return GenerationRequest(f"check-{self._count}", "check", turns if can.chat else TextPrompt(prompt), params)

    async def answer(self, request: GenerationRequest, prefix: Sequence[int] = (), choice: int = 0) -> _Answer:
        """A whole choice, its form checked on the way."""
        tokens: list[int] = []
        text: list[str] = []
        last: TokenChunk | None = None
        async with aclosing(_generator(self.runner, request, prefix, choice)) as chunks:
            async for chunk in chunks:
                _require(last is None or last.finish_reason is None, "a chunk came after the one with the finish reason")
                _require(chunk.choice == choice, f"choice {choice} was asked for and a chunk of choice {chunk.choice} came")
                due = len(prefix) + len(tokens)
                _require(chunk.index == due, f"a chunk has index {chunk.index} where {due} was due: a gap, or tokens twice")
                tokens += chunk.token_ids
                text.append(chunk.text)
                last = chunk
        _require(last is not None, "the answer has no chunk at all; even an empty one ends with a finish reason")
        assert last is not None
        _require(last.finish_reason is not None, "the last chunk has no finish reason")
        _require(last.usage is not None, "the last chunk has no usage")
        assert last.usage is not None
        total = len(prefix) + len(tokens)
        counted = last.usage.output_tokens
        _require(counted == total, f"usage counts {counted} output tokens where {total} were generated, the prefix included")
        _require(last.usage.input_tokens > 0, "usage counts no input tokens")
        limit = request.sampling.max_tokens
        _require(not limit or total <= limit, f"{total} tokens came where max_tokens is {limit}")
        return _Answer(tuple(tokens), "".join(text), last)


def _generator(  # type: ignore[no-untyped-def]
    runner: ModelRunner, request: GenerationRequest, prefix: Sequence[int], choice: int = 0
):
    chunks = runner.execute(request, prefix, choice)
    _require(hasattr(chunks, "aclose"), "execute must return an async generator: an iterator without aclose cannot be cancelled")
    return chunks


# --- the rules -------------------------------------------------------------------------------------------------------


async def _describes_itself(subject: _Subject) -> None:
    info = subject.runner.info
    _require(bool(info.runtime and info.model), "info must name runtime and model")
    _require(info.max_context_tokens > 1, f"info.max_context_tokens is {info.max_context_tokens}")
    _require(info.max_batch >= 1, f"info.max_batch is {info.max_batch}")
    _require(info.capabilities.max_choices >= 1, "capabilities.max_choices is below 1")
    _require(info.capabilities.chat or info.capabilities.completion, "the runner takes neither chat nor plain prompts")


async def _streams_in_order(subject: _Subject) -> None:
    answer = await subject.answer(subject.request(subject.check.prompts[0]))
    _require(len(answer.token_ids) == subject.check.tokens, f"{len(answer.token_ids)} tokens came where max_tokens must end it")
    _require(answer.last.finish_reason is FinishReason.LENGTH, f"max_tokens ended it, not {answer.last.finish_reason!r}")


async def _runs_requests_together(subject: _Subject) -> None:
    requests = [subject.request(prompt) for prompt in subject.check.prompts]
    together = await asyncio.gather(*(subject.answer(r) for r in requests))
    if not subject.runner.info.capabilities.deterministic:
        return
    for prompt, beside in zip(subject.check.prompts, together, strict=True):
        alone = await subject.answer(subject.request(prompt))
        _require(
            alone.token_ids == beside.token_ids and alone.text == beside.text,
            "an answer differs when other requests run beside it: requests are mixed up, or `deterministic` is not true",
        )


async def _stops_at_a_stop_string(subject: _Subject) -> None:
    if not subject.runner.info.capabilities.deterministic:
        return
    prompt = subject.check.prompts[0]
    whole = (await subject.answer(subject.request(prompt))).text
    middle = len(whole) // 2
    stop = whole[middle : middle + 4]
    answer = await subject.answer(subject.request(prompt, stop=(stop,)))
    _require(answer.last.finish_reason is FinishReason.STOP, f"a stop string ended it with {answer.last.finish_reason!r}")
    _require(answer.last.stop_sequence == stop, "the last chunk does not name the stop string that ended it")
    _require(answer.text == whole[: whole.index(stop)], "the text does not end where the stop string begins")


async def _stops_when_cancelled(subject: _Subject) -> None:
    request = subject.request(subject.check.prompts[0], max_tokens=subject.check.long_tokens)
    chunks = _generator(subject.runner, request, ())
    await anext(chunks)
    begin = time.monotonic()
    await chunks.aclose()
    took_s = time.monotonic() - begin
    within = subject.check.cancel_within_s
    _require(took_s <= within, f"a cancelled request was gone only after {took_s:.1f} s")
    waiting = asyncio.ensure_future(subject.answer(replace(request, request_id="check-task")))
    await asyncio.sleep(0)
    waiting.cancel()
    done, _ = await asyncio.wait([waiting], timeout=within)
    _require(bool(done), "a cancelled task that awaits an answer does not end")
    await subject.answer(subject.request(subject.check.prompts[1]))


async def _resumes_honestly(subject: _Subject) -> None:
    can = subject.runner.info.capabilities
    prompt = subject.check.prompts[0]
    whole = (await subject.answer(subject.request(prompt))).token_ids
    for cut in (1, len(whole) // 2, len(whole) - 1):
        request = subject.request(prompt)
        if not can.resume:
            await _refuses(subject, request, "resume", whole[:cut])
            continue
        rest = (await subject.answer(request, whole[:cut])).token_ids
        _require(
            not can.deterministic or whole[:cut] + rest == whole,
            f"an answer continued from token {cut} differs from the uninterrupted one",
        )


async def _draws_choices_apart(subject: _Subject) -> None:
    can, prompt = subject.runner.info.capabilities, subject.check.prompts[0]
    if can.max_choices == 1:
        await _refuses(subject, subject.request(prompt), "n", choice=1)
        return
    if not can.seed:
        return
    for prompt in subject.check.prompts:  # a model may be sure of its answer to one of them
        request = subject.request(prompt, temperature=2.0, seed=7)
        first, second = [await subject.answer(request, choice=choice) for choice in (0, 1)]
        if first.token_ids != second.token_ids:
            break
    else:
        raise RunnerFault("two choices of one seed are the same answer, whatever the prompt: their number is part of each draw")
    if not can.deterministic:
        return
    beside = await asyncio.gather(*(subject.answer(request, choice=choice) for choice in (1, 0)))
    _require(
        [a.token_ids for a in beside] == [second.token_ids, first.token_ids],
        "a choice differs when it is generated again with the same seed, beside the other one",
    )
    if can.resume:
        cut = len(second.token_ids) // 2
        rest = await subject.answer(request, second.token_ids[:cut], choice=1)
        _require(
            second.token_ids[:cut] + rest.token_ids == second.token_ids,
            f"choice 1 continued from token {cut} differs from the uninterrupted one",
        )


async def _refuses_what_it_cannot_do(subject: _Subject) -> None:
    can, prompt = subject.runner.info.capabilities, subject.check.prompts[0]
    for feature, able, sampling in (
        ("logprobs", can.logprobs, {"top_logprobs": 1}),
        ("seed", can.seed, {"seed": 7}),
        ("penalties", can.penalties, {"presence_penalty": 1.0}),
        ("logit_bias", can.logit_bias, {"logit_bias": {1: 1.0}}),
        ("min_p", can.min_p, {"min_p": 0.1}),
        ("n", can.max_choices > 1, {"n": 2}),
    ):
        if not able:
            await _refuses(subject, subject.request(prompt, **sampling), feature)


async def _refuses(
    subject: _Subject, request: GenerationRequest, feature: str, prefix: Sequence[int] = (), choice: int = 0
) -> None:
    try:
        await subject.answer(request, prefix, choice)
    except Unsupported as err:
        _require(err.metadata.get("feature") == feature, f"the refusal of {feature} names {err.metadata.get('feature')!r}")
    else:
        raise RunnerFault(f"{feature} is not among the capabilities, and a request with it was answered: it was ignored silently")


async def _refuses_what_does_not_fit(subject: _Subject) -> None:
    limit = subject.runner.info.max_context_tokens
    request = subject.request(subject.check.prompts[0], max_tokens=limit)
    try:
        await subject.answer(request)
    except ContextLengthExceeded as err:
        _require(err.metadata.get("max_tokens") == str(limit), "ContextLengthExceeded does not tell the limit in max_tokens")
        _require(err.metadata.get("tokens", "").isdigit(), "ContextLengthExceeded does not tell the tokens asked for")
    else:
        raise RunnerFault("a request larger than the context was answered; it must end with ContextLengthExceeded")


async def _works_after_a_rebuild(subject: _Subject) -> None:
    await subject.runner.rebuild_session(RebuildCause.MANUAL)
    await subject.answer(subject.request(subject.check.prompts[0]))


async def _counts_cost(subject: _Subject) -> None:
    cost = subject.runner.estimate_cost(subject.request(subject.check.prompts[0]))
    _require(isinstance(cost, int) and cost >= 0, f"estimate_cost gave {cost!r}, not a whole number of micro-dollars")


_RULES: tuple[Callable[[_Subject], Awaitable[None]], ...] = (
    _describes_itself,
    _streams_in_order,
    _runs_requests_together,
    _stops_at_a_stop_string,
    _stops_when_cancelled,
    _resumes_honestly,
    _draws_choices_apart,
    _refuses_what_it_cannot_do,
    _refuses_what_does_not_fit,
    _works_after_a_rebuild,
    _counts_cost,
)


# --- before and after ------------------------------------------------------------------------------------------------


def _refuses_unknown_options(runtime: Runtime, config: RunnerConfig) -> None:
    wrong = replace(config, options={**config.options, UNKNOWN_OPTION: 1})
    try:
        runtime.validate(wrong)
    except BadRequest as err:
        _require(UNKNOWN_OPTION in (err.param or ""), f"the refusal of an unknown option has param {err.param!r}, not its name")
    else:
        raise RunnerFault("an unknown option was accepted; a setting that looks set must be set")
    runtime.validate(config)


def _keeps_optional_promises(runtime: Runtime, config: RunnerConfig, check: Check) -> None:
    """`probe` and `on_oom`, where the StepRunner has them. Loads a runner of its own, in the thread that it is called in."""
    runner = runtime.make_runner(config)
    probe, on_oom = getattr(runner, "probe", None), getattr(runner, "on_oom", None)
    try:
        if probe is None and on_oom is None:
            return
        runner.load(lambda progress: None)
        if probe is not None:
            answer = probe()
            _require(answer is True, f"probe() of a sound runner gave {answer!r}; the engine would replace a context that works")
        tokens = runtime.make_codec(config).encode(check.prompts[0])
        runner.admit(StepRequest(1, tokens, SamplingParams(max_tokens=check.tokens, temperature=0.0, ignore_eos=True)))
        made: list[int] = []
        deadline = time.monotonic() + CHECK_TIMEOUT_S
        while len(made) < check.tokens:
            _require(time.monotonic() < deadline, "a sequence makes no progress after on_oom()")
            for output in runner.step():
                _require(output.error is None, f"a sequence failed after on_oom(): {output.error!r}")
                made += output.token_ids
            _require(runner.has_work() or len(made) == check.tokens, "a sequence is gone after on_oom(); it may only free memory")
            if on_oom is not None:
                on_oom()
    finally:
        runner.close()


async def _closes(
    runner: ModelRunner, request: GenerationRequest, threads_before: set[threading.Thread], within_s: float
) -> None:
    await runner.close()
    await runner.close()
    try:
        async with aclosing(_generator(runner, request, ())) as chunks:
            async for _ in chunks:
                raise RunnerFault("a closed runner still answers")
    except InferenceError:
        pass
    deadline = time.monotonic() + within_s
    while left := [t.name for t in threading.enumerate() if t not in threads_before and t.is_alive()]:
        _require(time.monotonic() < deadline, f"threads are left after close: {', '.join(left)}")
        await asyncio.sleep(0.01)


async def check_runner(make: Callable[[], _Made], check: Check | None = None) -> None:
    """Check one kind of runner against the contract.

    Args:
        make: Makes a fresh ModelRunner that is not loaded, or gives a runtime with a configuration. Called once.
        check: What to ask of it; None for the default.

    Raises:
        RunnerFault: It broke a rule; the message says which.
        InferenceError: It could not be loaded, or refused something it must do.
    """
    threads_before = set(threading.enumerate())
    made = make()
    if isinstance(made, tuple):
        _refuses_unknown_options(*made)
        with ThreadPoolExecutor(1) as thread:
            await asyncio.wrap_future(thread.submit(_keeps_optional_promises, *made, check or Check()))
    runner = _build(made)
    subject = _Subject(runner, check or Check())
    try:
        await runner.load()
        _require(isinstance(runner, ModelRunner), "the runner lacks a method of ModelRunner")  # looks at info, so after load
        for rule in _RULES:
            try:
                async with asyncio.timeout(CHECK_TIMEOUT_S):
                    await rule(subject)
            except TimeoutError:
                raise RunnerFault(f"no progress within {CHECK_TIMEOUT_S:g} s in the check {rule.__name__.strip('_')}") from None
        request = subject.request(subject.check.prompts[0])
    except BaseException:
        await runner.close()
        raise
    await _closes(runner, request, threads_before, subject.check.threads_end_within_s)
