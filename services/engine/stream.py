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

from inference_runtime.answers import ChoiceAssembler
from inference_runtime.errors import InferenceError, Internal, RequestCancelled, SlowConsumer, Timeout
from inference_runtime.generation import TokenChunk
from inference_runtime.runner import StepOutput
from services.engine.queue import Waiting
from services.engine.submission import Submission
from services.engine.worker import Flight

__all__ = ["RING_TEXT_BYTES", "RING_TOKENS", "STALL_S", "Outlet", "Stream", "StreamOwner"]

#: What a stream with credits keeps for its reader at most: tokens, and bytes of text. A step never waits for a reader.
RING_TOKENS = 8192
RING_TEXT_BYTES = 1 << 20
#: Tokens that are held back until there are enough leave after this time as they are, seconds: a slow answer is seen to begin,
#: and to go on.
HOLD_S = 1.0
#: Time that a stream with something to send waits for credit, seconds, before it is cut off.
STALL_S = 30.0


class Outlet(Protocol):
    """Where the chunks of a stream go. Never blocks: what is slow behind it is its own to bound."""

    def admitted(self, stream: Stream, input_tokens: int) -> None:
        """The stream waits or runs: its prompt has this many tokens. Once, before any chunk."""
        ...

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
        "_group",
        "_held",
        "_held_since_s",
        "_held_text_bytes",
        "_held_tokens",
        "_plain",
        "_stall_s",
        "_stall_timer",
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

    def __init__(self, core: StreamOwner, number: int, submission: Submission, outlet: Outlet, stall_s: float = STALL_S) -> None:
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
        # With credits, what is grouped lies in the ring too, so a group is no larger than that.
        self._group = min(submission.coalesce_tokens, RING_TOKENS) if submission.credits else submission.coalesce_tokens
        self._held: list[TokenChunk] = []
        self._held_tokens = self._held_text_bytes = 0
        self._held_since_s = 0.0
        self._stall_s = stall_s
        self._stall_timer: asyncio.TimerHandle | None = None
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
        self._drop_held()
        self._core.end(self, RequestCancelled("cancelled by the caller"))

    def grant(self, tokens: int) -> None:
        """Let this many more tokens go, and know that the reader lives. No meaning for a stream submitted without credits."""
        if self.submission.credits and tokens > 0:
            self._credit += tokens
            self._stop_stall_clock()
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
                self._hold(chunk)
                if chunk.finish_reason is not None:
                    break
            self._pass_on(chunk)
        else:
            self.deliver(self.choice.take(output))

    def on_failure(self, err: InferenceError) -> None:
        """The context is gone."""
        self.fail(err)

    # --- delivery ----------------------------------------------------------------------------------------------------

    def deliver(self, chunk: TokenChunk) -> None:
        """Send a chunk, or hold it until enough tokens or credit are there."""
        if not self._plain:
            self._hold(chunk)
            self._pass_on(chunk)
            return
        self.outlet.chunk(self, chunk)
        if chunk.finish_reason is not None:
            self._core.end(self, None)

    def _hold(self, chunk: TokenChunk) -> None:
        if not self._held:
            self._held_since_s = time.monotonic()
        self._held.append(chunk)
        self._held_tokens += len(chunk.token_ids)
        self._held_text_bytes += _size_bytes(chunk.text)

    def _pass_on(self, last: TokenChunk) -> None:
        """Send what may go of what was held, up to this chunk."""
        if last.finish_reason is not None:
            self._core.end(self, None)
        self._release()
        if self.submission.credits and (self._held_tokens > RING_TOKENS or self._held_text_bytes > RING_TEXT_BYTES):
            self._cut_off(f"left {self._held_tokens} tokens unread, more than are kept for it")

    def _cut_off(self, why: str) -> None:
        """End it because its reader does not keep up."""
        tokens_in = self.choice.usage().input_tokens if self.choice is not None else 0
        err = SlowConsumer(
            f"the reader of this answer {why}; read faster, or grant more credit",
            input_tokens=str(tokens_in),
            output_tokens=str(self.index),
        )
        self._drop_held()
        self._core.end(self, err)
        self.outlet.error(self, err)

    def _drop_held(self) -> None:
        self._held.clear()
        self._held_tokens = self._held_text_bytes = 0
        self._stop_stall_clock()

    def fail(self, err: InferenceError) -> None:
        """End with an error, after the tokens that are ready and may go. No-op once ended."""
        if not self.ended:
            self._core.end(self, err)
            self._release()
            self._drop_held()
            self.outlet.error(self, err)

    def _release(self) -> None:
        """Send what is held, as far as coalescing and credit allow, as one chunk."""
        full = self._held_tokens >= self._group or self._held_text_bytes >= RING_TEXT_BYTES
        if not self._held or not (full or self.ended or time.monotonic() - self._held_since_s > HOLD_S):
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
            self._held_text_bytes -= sum(_size_bytes(c.text) for c in ready)
            self.outlet.chunk(self, _join(ready))
        if not self._held:
            self._stop_stall_clock()
        elif self._stall_timer is None:
            loop = asyncio.get_running_loop()
            self._stall_timer = loop.call_later(self._stall_s, self._cut_off, f"granted no credit for {self._stall_s:g} s")

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

    def _stop_stall_clock(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def expire(self) -> None:
        """Its turn came, and the time in which it could begin is over."""
        by_s = self.first_chunk_by_s - self.admitted_s
        self._late("first_chunk" if self._first_chunk_timer is not None else "total", by_s)

    def _late(self, phase: str, limit_s: float) -> None:
        what = "the first chunk" if phase == "first_chunk" else "the whole answer"
        elapsed_s = time.monotonic() - self.admitted_s
        self.fail(Timeout(f"{what} took longer than {limit_s:g} s", phase=phase, elapsed_s=f"{elapsed_s:.3f}"))


def _size_bytes(text: str) -> int:
    """Size as UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


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
