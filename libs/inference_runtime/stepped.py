"""A StepRunner behind the ModelRunner contract: one step loop that every request shares."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from inference_runtime.answers import ChoiceAssembler, check_supported, encode_prompt, fit_context
from inference_runtime.errors import ContextPoisoned, InferenceError, Internal, Unsupported
from inference_runtime.generation import FinishReason, GenerationRequest, TokenChunk
from inference_runtime.runner import (
    Codec,
    RateLimits,
    RebuildCause,
    RunnerConfig,
    RunnerInfo,
    StepOutput,
    StepRequest,
    StepRunner,
)
from inference_runtime.stepping import StepLoop, StepReport
from inference_runtime.supervision.policy import Fault
from inference_runtime.telemetry import get_logger

__all__ = ["SteppedRunner"]

log = get_logger(__name__)


class _Lane:
    """One life of a StepLoop inside a SteppedRunner: its streams and its end."""

    def __init__(self, make_runner: Callable[[], StepRunner], config: RunnerConfig, name: str) -> None:
        self.streams: dict[int, asyncio.Queue[StepOutput]] = {}
        self.retired = False
        self.loaded: asyncio.Future[RunnerInfo] = asyncio.get_running_loop().create_future()
        self.death: Exception | None = None
        self.loop = StepLoop(make_runner, self, name=name, max_batch=config.max_batch)

    def on_loaded(self, info: RunnerInfo) -> None:
        if not self.loaded.done():
            self.loaded.set_result(info)

    def on_step(self, report: StepReport) -> None:
        for output in report.outputs:
            queue = self.streams.get(output.sequence_id)
            if queue is not None:
                queue.put_nowait(output)

    def on_death(self, err: Exception, fault: Fault) -> None:
        self.die(err)

    def die(self, err: Exception) -> None:
        """Tell every stream."""
        self.death = err
        if not self.loaded.done():
            self.loaded.set_exception(err)
        for sequence_id, queue in self.streams.items():
            queue.put_nowait(StepOutput(sequence_id, (), error=err))


class SteppedRunner:
    """A ModelRunner over a StepRunner: every choice is a sequence of one shared loop.

    After the loop died, requests fail with the cause until `rebuild_session`. There is no admission queue: more than `max_batch`
    requests at once wait inside the StepRunner.

    Args:
        codec: Of the model.
        make_runner: Makes the StepRunner, in the loop's thread.
        config: What the runner was configured with.
    """

    def __init__(self, codec: Codec, make_runner: Callable[[], StepRunner], config: RunnerConfig) -> None:
        self._codec, self._make_runner, self._config = codec, make_runner, config
        self._lane: _Lane | None = None
        self._retired: set[_Lane] = set()
        self._info: RunnerInfo | None = None
        self._sequences = 0
        self._lanes = 0

    @property
    def info(self) -> RunnerInfo:
        """What it is. Valid after `load`."""
        assert self._info is not None, "load() comes first"
        return self._info

    async def load(self) -> None:
        """Start the loop and load the model. Raises what the StepRunner's load raises."""
        if self._lane is None:
            self._lane = await self._new_lane()

    async def _new_lane(self) -> _Lane:
        self._lanes += 1
        lane = _Lane(self._make_runner, self._config, f"steps-{self._config.model[:40]}-{self._lanes}")
        lane.loop.start()
        try:
            self._info = await lane.loaded
        except BaseException:
            await lane.loop.close()
            raise
        return lane

    async def execute(
        self, request: GenerationRequest, generated_prefix: Sequence[int] = (), choice: int = 0
    ) -> AsyncIterator[TokenChunk]:
        """Stream one choice of the answer.

        Raises:
            Unsupported, BadRequest, ContextLengthExceeded: Before the first chunk.
            InferenceError: What failed the sequence. ContextPoisoned when the loop died.

        On cancel: the sequence is dropped before the next step.
        """
        lane = self._lane
        if lane is None:
            raise ContextPoisoned("the runner is not loaded, or was closed; call load() first")
        if lane.death is not None:
            raise _death(lane.death)
        info = self.info
        check_supported(info, request, generated_prefix, choice)
        if request.sampling.n > 1:
            raise Unsupported("a call makes one choice: set n to 1, and say which one it is", feature="n", runtime=info.runtime)
        tokens = encode_prompt(self._codec, request.prompt, self.info.max_context_tokens)
        sampling = fit_context(info, len(tokens), request.sampling)
        prefix = tuple(generated_prefix)
        answer = ChoiceAssembler(self._codec, stop=sampling.stop, prompt_tokens=len(tokens), choice=choice, prefix=prefix)
        if answer.stopped or len(prefix) >= sampling.max_tokens:
            yield answer.end(FinishReason.STOP if answer.stopped else FinishReason.LENGTH)
            return
        self._sequences += 1
        sequence_id = self._sequences
        queue: asyncio.Queue[StepOutput] = asyncio.Queue()  # bounded by max_tokens
        lane.streams[sequence_id] = queue
        finished = False
        try:
            lane.loop.admit(StepRequest(sequence_id, tokens, sampling, choice, prefix))
            while not finished:
                output = await queue.get()
                if output.error is not None:
                    finished = True
                    raise _death(output.error) if lane.death is not None else output.error
                chunk = answer.take(output)
                finished = output.finish_reason is not None
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            del lane.streams[sequence_id]
            if not finished and lane.death is None:
                lane.loop.abort(sequence_id)
            if lane.retired and not lane.streams:
                self._retired.discard(lane)
                await lane.loop.close()

    async def rebuild_session(self, cause: RebuildCause) -> None:
        """Load a new StepRunner for later requests. What runs finishes on the old one, which is closed after it."""
        old, self._lane = self._lane, None
        if old is not None:
            if old.streams and old.death is None:
                old.retired = True
                self._retired.add(old)
            else:
                await old.loop.close()
        log.info("runner rebuilt", model=self._config.model, cause=cause.name.lower())
        self._lane = await self._new_lane()

    def rate_limits(self) -> RateLimits:
        """None: nothing stands behind a local runner."""
        return RateLimits()

    def estimate_cost(self, request: GenerationRequest) -> int:
        """0: a local runner charges nothing."""
        return 0

    async def close(self) -> None:
        """End every loop and its thread. Streams that still run fail with ContextPoisoned. Idempotent."""
        lanes = [*self._retired, *([self._lane] if self._lane else [])]
        self._lane = None
        self._retired.clear()
        for lane in lanes:
            await lane.loop.close()
            if lane.death is None:
                lane.die(ContextPoisoned("the runner was closed"))


def _death(err: Exception) -> InferenceError:
    """What a request gets for the death of its loop."""
    if isinstance(err, InferenceError):
        return err
    fault = Internal(f"the step loop died: {type(err).__name__}: {err}")
    fault.__cause__ = err
    return fault
