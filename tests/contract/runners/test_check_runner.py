"""The conformance check passes on the runners of the package, and finds each fault it claims to find (M01, N03)."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import inference_runtime
from inference_runtime.generation import GenerationRequest, TokenChunk
from inference_runtime.runner import RunnerConfig, RunnerInfo, StepOutput, StepRequest, load_runtime
from inference_runtime.runners.scripted import RUNTIME, ScriptedRunner, ScriptedRuntime
from inference_runtime.stepped import SteppedRunner
from inference_runtime.testing.check_runner import Check, RunnerFault, check_runner

CONFIG = RunnerConfig("check", {"max_context_tokens": 4096})
DEMO = Path(inference_runtime.__file__).parent / "demo_model" / "model.safetensors"


async def test_scripted_passes() -> None:
    """A runtime with its configuration is checked through the step loop."""
    await check_runner(lambda: (RUNTIME, CONFIG))


async def test_scripted_passes_with_several_tokens_a_step() -> None:
    """Chunks of more than one token keep the same rules."""
    await check_runner(lambda: (RUNTIME, RunnerConfig("check", {"tokens_per_step": 5, "pace_s": 0.001})))


async def test_a_model_runner_is_checked_as_it_is() -> None:
    """A ModelRunner needs no runtime around it."""
    await check_runner(lambda: SteppedRunner(RUNTIME.make_codec(CONFIG), lambda: RUNTIME.make_runner(CONFIG), CONFIG))


@pytest.mark.skipif(
    not DEMO.exists() or importlib.util.find_spec("torch") is None,
    reason="needs torch and the demo model: pip install '.[torch]'",
)
async def test_torch_passes_with_the_demo_model() -> None:
    """The local engine keeps the contract."""
    runtime = load_runtime("torch")
    await check_runner(lambda: (runtime, RunnerConfig("demo", max_batch=8)))


class _Broken(ScriptedRuntime):
    """A runtime whose runner is broken in one way."""

    def __init__(self, runner: Callable[[RunnerConfig], ScriptedRunner]) -> None:
        self._runner = runner

    def make_runner(self, config: RunnerConfig) -> ScriptedRunner:
        return self._runner(config)


class _Mixes(ScriptedRunner):
    """Gives the outputs of two sequences to each other."""

    def step(self) -> Sequence[StepOutput]:
        outputs = list(super().step())
        if len(outputs) > 1 and not any(o.finish_reason for o in outputs):
            first, second = outputs[:2]
            outputs[:2] = [replace(first, token_ids=second.token_ids), replace(second, token_ids=first.token_ids)]
        return outputs


class _Repeats(ScriptedRunner):
    """Starts anew instead of continuing a prefix."""

    def admit(self, request: StepRequest) -> None:
        super().admit(replace(request, generated_prefix=()))


class _NeverEnds(ScriptedRunner):
    """Ignores max_tokens."""

    def admit(self, request: StepRequest) -> None:
        super().admit(replace(request, sampling=replace(request.sampling, max_tokens=request.sampling.max_tokens + 3)))


class _DropsTheChoice(ScriptedRunner):
    """Draws every choice alike."""

    def admit(self, request: StepRequest) -> None:
        super().admit(replace(request, choice=0))


class _DrawsAnew(ScriptedRunner):
    """Draws a choice above the first differently each time."""

    def admit(self, request: StepRequest) -> None:
        super().admit(replace(request, choice=request.choice and request.choice + self._admitted))


class _ResumesAsTheFirst(ScriptedRunner):
    """Goes on with another choice than it began."""

    def admit(self, request: StepRequest) -> None:
        super().admit(replace(request, choice=0) if request.generated_prefix else request)


class _HasOneChoice(ScriptedRunner):
    """Says it has but one choice: then the loop refuses others, and the runner passes."""

    def load(self, report: object) -> RunnerInfo:
        info = super().load(lambda progress: None)
        return replace(info, capabilities=replace(info.capabilities, max_choices=1))


class _ProbesWrong(ScriptedRunner):
    """Says of a sound context that it is lost."""

    def probe(self) -> bool:
        return False


class _ForgetsInNeed(ScriptedRunner):
    """Gives back memory that it still needs."""

    def on_oom(self) -> None:
        self._sequences.clear()


class _ClaimsNoResume(ScriptedRunner):
    """Says it cannot resume: then the loop refuses, and the runner passes."""

    def load(self, report: object) -> RunnerInfo:
        info = super().load(lambda progress: None)
        return replace(info, capabilities=replace(info.capabilities, resume=False))


class _Wrapped(SteppedRunner):
    """A ModelRunner to break from outside."""

    def __init__(self) -> None:
        super().__init__(RUNTIME.make_codec(CONFIG), lambda: RUNTIME.make_runner(CONFIG), CONFIG)


class _LosesUsage(_Wrapped):
    async def execute(
        self, request: GenerationRequest, generated_prefix: Sequence[int] = (), choice: int = 0
    ) -> AsyncIterator[TokenChunk]:
        async for chunk in super().execute(request, generated_prefix, choice):
            yield replace(chunk, usage=None)


class _SkipsAToken(_Wrapped):
    async def execute(
        self, request: GenerationRequest, generated_prefix: Sequence[int] = (), choice: int = 0
    ) -> AsyncIterator[TokenChunk]:
        async for chunk in super().execute(request, generated_prefix, choice):
            if chunk.index != 3:
                yield chunk


class _IgnoresLogprobs(_Wrapped):
    async def execute(
        self, request: GenerationRequest, generated_prefix: Sequence[int] = (), choice: int = 0
    ) -> AsyncIterator[TokenChunk]:
        quiet = replace(request, sampling=replace(request.sampling, top_logprobs=None))
        async for chunk in super().execute(quiet, generated_prefix, choice):
            yield chunk


class _LeavesAThread(_Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    async def load(self) -> None:
        threading.Thread(target=self.released.wait, args=(8.0,), name="left-behind", daemon=True).start()
        await super().load()


class _DoesNotCancel(_Wrapped):
    async def execute(
        self, request: GenerationRequest, generated_prefix: Sequence[int] = (), choice: int = 0
    ) -> AsyncIterator[TokenChunk]:
        try:
            async for chunk in super().execute(request, generated_prefix, choice):
                yield chunk
        except GeneratorExit:
            time.sleep(0.3)  # noqa: ASYNC251 - stands for a device call that nobody interrupts
            raise


class _IgnoresOptions(ScriptedRuntime):
    def validate(self, config: RunnerConfig) -> None:
        """Takes anything."""


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: (_Broken(_Mixes), CONFIG), "mixed up"),
        (lambda: (_Broken(_Repeats), CONFIG), "usage counts|differs|tokens came"),
        (lambda: (_Broken(_NeverEnds), CONFIG), "max_tokens"),
        (lambda: (_Broken(_DropsTheChoice), CONFIG), "two choices of one seed are the same"),
        (lambda: (_Broken(_DrawsAnew), CONFIG), "differs when it is generated again"),
        (lambda: (_Broken(_ResumesAsTheFirst), CONFIG), "choice 1 continued from token 6 differs"),
        (lambda: (_Broken(_ProbesWrong), CONFIG), "probe\\(\\) of a sound runner"),
        (lambda: (_Broken(_ForgetsInNeed), CONFIG), "is gone after on_oom"),
        (lambda: (_IgnoresOptions(), CONFIG), "unknown option was accepted"),
        (_LosesUsage, "no usage"),
        (_SkipsAToken, "index 4 where 3 was due"),
        (_IgnoresLogprobs, "logprobs is not among the capabilities"),
        (_DoesNotCancel, "was gone only after"),
        (_LeavesAThread, "left-behind"),
    ],
)
async def test_a_broken_runner_is_found(make: Callable[[], object], sentence: str) -> None:
    """Each rule fails for a runner that breaks it."""
    made: list[object] = []

    def once() -> object:
        made.append(make())
        return made[0]

    try:
        with pytest.raises(RunnerFault, match=sentence):
            await check_runner(once, Check(cancel_within_s=0.2, threads_end_within_s=0.5))  # type: ignore[arg-type]
    finally:
        if isinstance(made[0], _LeavesAThread):
            made[0].released.set()
            await asyncio.sleep(0)


@pytest.mark.parametrize("runner", [_ClaimsNoResume, _HasOneChoice])
async def test_a_runner_that_cannot_do_something_passes_when_it_says_so(runner: type[ScriptedRunner]) -> None:
    """Honesty is the rule, not the ability."""
    await check_runner(lambda: (_Broken(runner), CONFIG))
