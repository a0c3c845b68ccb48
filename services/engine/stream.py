"""One request of a replica, from admission to its last chunk: its clocks, its credit, what is held back for it.

A stream produces nothing itself. The worker gives it step outputs, it makes chunks of them and hands them to an outlet; its core
hears when it ends.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from inference_runtime.errors import InferenceError, Internal, RequestCancelled, Timeout
from inference_runtime.generation import TokenChunk
from inference_runtime.runner import StepOutput
from inference_runtime.stepping import ChoiceAssembler
from services.engine.queue import Waiting
from services.engine.submission import Submission
from services.engine.worker import Flight

__all__ = ["Outlet", "Stream", "StreamOwner"]


class Outlet(Protocol):
    """Where the chunks of a stream go. Never blocks: what is slow behind it is its own to bound."""

    def chunk(self, stream: Stream, chunk: TokenChunk) -> None:
        """A piece of the answer; the last one has a finish reason."""
        ...

    def error(self, stream: Stream, err: InferenceError) -> None:
        """The answer ends with this."""
        ...


class StreamOwner(Protocol):
    """Who owns streams: EngineCore."""

    @property
    def context_generation(self) -> int:
        """Number of the present context."""
        ...

    def end(self, stream: Stream, err: InferenceError | None) -> None:
        """The stream is over: free its place. Idempotent."""
        ...


class Stream:
    """One request, from admission to its last chunk. Made by EngineCore.submit; the caller may cancel it and grant credit."""

    __slots__ = (
        "_core",
        "_credit",
        "_first_chunk_timer",
        "_held",
        "_held_tokens",
        "_plain",
        "_total_timer",
        "admitted_ns",
        "admitted_s",
        "choice",
        "ended",
        "first_chunk_by_s",
        "flight",
        "number",
        "outlet",
        "place",
        "submission",
    )

    def __init__(self, core: StreamOwner, number: int, submission: Submission, outlet: Outlet) -> None:
        self._core, self.number, self.submission, self.outlet = core, number, submission, outlet
        self.admitted_s = time.monotonic()
        self.admitted_ns = time.time_ns()
        self.choice: ChoiceAssembler | None = None
        self.flight: Flight | None = None
        #: Its place in the waiting room, also after it was served from there.
        self.place: Waiting[Stream] | None = None
        #: Monotonic time by which the first chunk is due.
        self.first_chunk_by_s = math.inf
        #: Nothing will be produced any more. Held chunks may still wait for credit.
        self.ended = False
        self._credit = submission.credits
        self._plain = not submission.credits and submission.coalesce_tokens <= 1
        self._held: list[TokenChunk] = []
        self._held_tokens = 0
        self._first_chunk_timer: asyncio.TimerHandle | None = None
        self._total_timer: asyncio.TimerHandle | None = None

    @property
    def context_generation(self) -> int:
        """Generation of the context that runs it."""
        return self._core.context_generation

    @property
    def index(self) -> int:
        """Tokens of the answer so far."""
        return self.choice.index if self.choice is not None else len(self.submission.prefix)

    def cancel(self) -> None:
        """The caller wants no more. Nothing more is delivered, and the sequence is gone before the next step. Idempotent."""
        self._held.clear()
        self._core.end(self, RequestCancelled("cancelled by the caller"))

    def grant(self, tokens: int) -> None:
        """Let this many more tokens go. No meaning for a stream that was submitted without credits."""
        if self.submission.credits:
            self._credit += tokens
            self._release()

    # --- FlightOwner -------------------------------------------------------------------------------------------------

    def on_output(self, output: StepOutput) -> None:
        """Turn what a step made into a chunk, and deliver it."""
        if output.error is not None:
            err = output.error
            self.fail(err if isinstance(err, InferenceError) else Internal(f"the sequence failed: {err!r}"))
            return
        if self._first_chunk_timer is not None:
            self._first_chunk_timer.cancel()
            self._first_chunk_timer = None
        assert self.choice is not None
        if self.submission.credits and len(output.token_ids) > 1:  # credit counts single tokens, so text must be cut at each
            last = len(output.token_ids) - 1
            for i, token in enumerate(output.token_ids):
                logprobs = output.logprobs[i : i + 1]
                chunk = self.choice.take(
                    replace(
                        output, token_ids=(token,), logprobs=logprobs, finish_reason=output.finish_reason if i == last else None
                    )
                )
                self.deliver(chunk)
                if chunk.finish_reason is not None:
                    return
        else:
            self.deliver(self.choice.take(output))

    def on_failure(self, err: InferenceError) -> None:
        """The context is gone."""
        self.fail(err)

    # --- delivery ----------------------------------------------------------------------------------------------------

    def deliver(self, chunk: TokenChunk) -> None:
        """Send a chunk, or hold it until enough tokens or credit are there."""
        if self._plain:
            self.outlet.chunk(self, chunk)
        else:
            self._held.append(chunk)
            self._held_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self._core.end(self, None)
        if not self._plain:
            self._release()

    def fail(self, err: InferenceError) -> None:
        """End with an error, after the tokens that are ready and may go. No-op once ended."""
        if not self.ended:
            self._core.end(self, err)
            self._release()
            self._held.clear()
            self.outlet.error(self, err)

    def _release(self) -> None:
        """Send what is held, as far as coalescing and credit allow, as one chunk."""
        if not self._held or (self._held_tokens < self.submission.coalesce_tokens and not self.ended):
            return
        count = len(self._held)
        if self.submission.credits:
            count, credit = 0, self._credit
            for chunk in self._held:
                if len(chunk.token_ids) > credit:
                    break
                credit -= len(chunk.token_ids)
                count += 1
            self._credit = credit
        if count:
            ready, self._held = self._held[:count], self._held[count:]
            self._held_tokens -= sum(len(c.token_ids) for c in ready)
            self.outlet.chunk(self, _join(ready))

    # --- time --------------------------------------------------------------------------------------------------------

    def start_clocks(self, first_chunk_s: float, total_s: float) -> None:
        """Fail the stream when a phase takes longer than it may."""
        loop = asyncio.get_running_loop()
        self.first_chunk_by_s = self.admitted_s + min(first_chunk_s, total_s)
        self._total_timer = loop.call_later(total_s, self._late, "total", total_s)
        if first_chunk_s < total_s:
            self._first_chunk_timer = loop.call_later(first_chunk_s, self._late, "first_chunk", first_chunk_s)

    def stop_clocks(self) -> None:
        """No phase is left that could take too long."""
        for timer in (self._first_chunk_timer, self._total_timer):
            if timer is not None:
                timer.cancel()
        self._first_chunk_timer = self._total_timer = None

    def expire(self) -> None:
        """Its turn came, and the time in which it could begin is over."""
        by_s = self.first_chunk_by_s - self.admitted_s
        self._late("first_chunk" if self._first_chunk_timer is not None else "total", by_s)

    def _late(self, phase: str, limit_s: float) -> None:
        what = "the first chunk" if phase == "first_chunk" else "the whole answer"
        elapsed_s = time.monotonic() - self.admitted_s
        self.fail(Timeout(f"{what} took longer than {limit_s:g} s", phase=phase, elapsed_s=f"{elapsed_s:.3f}"))


def _join(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """Neighbouring chunks of one choice as one."""
    if len(chunks) == 1:
        return chunks[0]
    return replace(
        chunks[-1],
        index=chunks[0].index,
        token_ids=tuple(t for c in chunks for t in c.token_ids),
        text="".join(c.text for c in chunks),
        logprobs=tuple(p for c in chunks for p in c.logprobs),
    )
