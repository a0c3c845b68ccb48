"""One request's life: find a replica, submit, take chunks into the journal, hand them to the client, and survive what breaks.

Before the client has seen anything, an attempt that fails is made again on another replica. After that, another replica of the
same revision goes on behind the journal's last token. A request has no task of its own: sessions, connections and the sweeper of
`LiveRequests` call it, all on one loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from inference_runtime import telemetry
from inference_runtime.errors import (
    Backpressure,
    ContextPoisoned,
    Draining,
    EngineLost,
    InferenceError,
    Internal,
    NetworkError,
    NoReplica,
    Retry,
    RevisionMismatch,
    Timeout,
)
from inference_runtime.rpc import error_from_status
from inference_runtime.v1 import engine_service_pb2, generation_pb2
from services.gateway.allowance import NEXT_CHUNK, Again, Allowance
from services.gateway.attempt import Attempt
from services.gateway.budget import AttemptBudget
from services.gateway.journal import NEW, Journal, Verdict
from services.gateway.needs import Need, unmet
from services.gateway.position import place
from services.gateway.routes import Route, Target, choose
from services.gateway.sink import NOBODY, Follower, Sink

if TYPE_CHECKING:
    from services.gateway.live import LiveRequests
    from services.gateway.sessions import Session

__all__ = ["Request"]

log = telemetry.get_logger(__name__)

Submission = engine_service_pb2.Submission
ChunkDetail = engine_service_pb2.ChunkDetail

#: Taken off the time that an engine is given, for the way back.
HOP_S = 0.02
#: With less time left than this a request is not begun.
LEAST_TIME_S = 0.1
#: Bounds of the pause before another attempt, seconds. Drawn at random: a lost replica's requests do not all move in lock-step.
#: One that is full sends requests away one by one; they are tried elsewhere at once, so that a refusal comes soon.
JITTER_S = (0.002, 0.03)
#: A replica that failed is tried again after this, doubled each time, where there is no other.
SAME_AGAIN_S = 0.25

#: Errors by which a replica that is well sends a request away.
_NO_FAULT = (Backpressure, Draining, RevisionMismatch)


class Request:
    """A request for one choice, in flight. `begin` once; `cancel` at any time; the sink is told of everything else.

    Args:
        live: The requests it is one of, with what they share.
        submission: What to generate. Owned by the request from here on.
        sink: Where the answer goes.
        shows_at_once: The client sees each chunk as it comes. False where it gets the whole answer at the end: such a request
            can start over as long as it runs.
        needs: What a replica must be able to do, besides generating.
        idempotent: It may be attempted more than once.
        traceparent: W3C context of the client's span, "" for none.
        time_limit_s: The client's own limit, seconds.
    """

    # Most of a request's state keeps its first value: it stands here and not in __init__, which every request pays for.
    deadline = first_chunk_by = float("inf")
    ended = False
    #: Choices of it.
    width = 1
    seen = 0
    first_at = 0.0
    finish_reason = 0
    replica_id = ""
    #: Joints in the answer: attempts that went on behind tokens of another one.
    resumptions = 0
    input_tokens = reasoning_tokens = cached_input_tokens = 0
    _output_tokens = 0
    _route: Route | None = None
    _target: Target | None = None
    _budget: AttemptBudget | None = None
    _current: Attempt | None = None
    _stream_id = 0
    _revision = ""
    _tried: set[str] | None = None
    #: It goes on behind tokens that another request was given (see `go_on`).
    _carried = False
    #: Attempt as the ledger counts it, and tokens of earlier ones that it has.
    attempt = settled_input_tokens = settled_output_tokens = 0
    #: Tokens that another gateway has a copy of; -1: it is not copied.
    copied = -1
    follower: Follower | None = None
    _allowance: Allowance | None = None
    _error: InferenceError | None = None
    _wait_until = _again_at = 0.0

    def __init__(
        self,
        live: LiveRequests,
        submission: Submission,
        sink: Sink,
        *,
        shows_at_once: bool,
        needs: Sequence[Need] = (),
        idempotent: bool = True,
        traceparent: str = "",
        time_limit_s: float = float("inf"),
    ) -> None:
        self._live, self.submission, self.sink, self.shows_at_once = live, submission, sink, shows_at_once
        self._needs, self._idempotent = needs, idempotent
        self.traceparent, self._limit_s = traceparent, time_limit_s
        request = submission.request
        self.request_id, self.model, self.tenant = request.request_id, request.deployment, request.tenant
        self.journal = Journal()
        self.accepted_ns = time.time_ns()
        self.began = self.quiet_since = time.monotonic()

    @property
    def known(self) -> bool:
        """There is a deployment of its name."""
        return self._route is not None

    @property
    def output_tokens(self) -> int:
        """Tokens generated: as the engine counted them, or those that have come so far."""
        return self._output_tokens or len(self.journal.tokens)

    @property
    def progress(self) -> int:
        """Tokens that have come."""
        return len(self.journal.tokens)

    def place(self, index: int) -> bytes:
        """What follows the id of this request in the id of an event with the text of this token. On every chunk's path."""
        return b"%d" % index if self.copied < 0 else place(self.copied, self.journal.tokens, index)

    @property
    def revision(self) -> str:
        """Revision of the replica that answers, "" before there is one."""
        return self._target.revision if self._target is not None else self._revision

    def go_on(self, tokens: Sequence[int], revision: str) -> None:
        """Have it go on behind these tokens, which its client has. Call it before `begin`."""
        self.journal.tokens.extend(tokens)
        self._carried = True
        lost = f"no replica of revision {revision!r} of deployment {self.model!r} takes requests, to go on with this answer"
        self._error = NoReplica(lost, retry_after_s=1)
        if tokens:
            self._revision = revision

    def recall(self, revision: str, usage: generation_pb2.Usage, finish_reason: int) -> None:
        """Make it what a request was that ended elsewhere. It is not to be begun."""
        self._revision, self.finish_reason, self.ended = revision, finish_reason, True
        self.input_tokens, self._output_tokens = usage.input_tokens, usage.output_tokens
        self.reasoning_tokens, self.cached_input_tokens = usage.reasoning_tokens, usage.cached_input_tokens

    # --- placing -----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Send it off, or fail it. The sink may be called before this returns."""
        name = self.model
        route = self._live.table.routes.get(name)
        if route is None:
            if self._live.table.known:
                self._finish(self._live.table.unknown(name))
            elif not self._wait_until:  # a gateway that has just started: its table is on the way
                self._wait_until = self.began + self._live.limits.route_wait_s
                self._live.waiting.add(self)
            return
        self._wait_until = 0.0
        self._live.waiting.discard(self)
        self._route = route
        self._budget = self._live.budget(name)
        self._budget.accept(self.began)
        limit_s = min(route.total_timeout_s, self._limit_s)
        self.deadline = self.began + limit_s
        if limit_s < LEAST_TIME_S:
            self._finish(Timeout("less than 0.1 s is left for this request", phase="admission"))
            return
        self._place()

    def _place(self) -> None:
        """Submit to the best replica, or wait for one."""
        if self.ended or self._target is not None:
            return
        now = time.monotonic()
        route = self._live.table.routes.get(self.model, self._route)
        assert route is not None  # begin() has seen to it
        target = choose(route, self._tried or (), self._revision)
        if target is None and self._revision and not self.shows_at_once:
            # Nobody has seen anything yet: where nobody can go on, somebody can start over.
            target = choose(route, self._tried or ())
            if target is not None:
                self._forget()
                self._revision = ""
        if target is not None:
            self._submit(target, route, now)
            return
        if self._error is not None and not isinstance(self._error, ContextPoisoned | NetworkError):
            self._finish(self._error)  # a replica that is full or broken in another way does not get better by waiting
            return
        if not self._wait_until:
            self._wait_until = now + self._live.limits.route_wait_s
            self._live.waiting.add(self)

    def try_again(self, now: float) -> None:
        """Look for a replica once more: something changed, or time has passed."""
        if self._target is not None or self.ended or not self._wait_until:
            return
        if self._route is None:
            if self._live.table.known:
                self.begin()
            elif now > self._wait_until:
                self._finish(NoReplica("this gateway has no routing table yet; is a coordinator running?", retry_after_s=1))
            return
        if self._tried and now >= self._again_at:
            self._tried.clear()
        self._place()
        if self._target is None and not self.ended and now > self._wait_until:
            self._finish(
                self._error or NoReplica(f"no replica of deployment {self.model!r} takes requests at present", retry_after_s=1)
            )

    def _submit(self, target: Target, route: Route, now: float) -> None:
        if self._wait_until:
            self._wait_until = 0.0
            self._live.waiting.discard(self)
        for need in self._needs:
            refusal = unmet(need, target.capabilities, route.deployment, route.runtime)
            if refusal is not None:
                self._finish(refusal)
                return
        left_s = self.deadline - now - HOP_S
        if left_s < LEAST_TIME_S - HOP_S:
            self._finish(self._error or Timeout("no time is left for this request", phase="total"))
            return
        submission = self.submission
        submission.epoch = self.journal.epoch
        submission.replica_id = self.replica_id = target.replica_id
        whole_s = int(left_s)
        submission.time_left.seconds = whole_s
        submission.time_left.nanos = int((left_s - whole_s) * 1e9)
        if self._error is not None:
            self._continue(target)
        if not self.first_at:
            self.first_chunk_by = now + route.first_chunk_timeout_s
        target.in_flight += 1
        self._target = target
        self._stream_id = stream_id = cast("Session", target.link).submit(submission, self)
        self._current = Attempt(target.pace, stream_id, now, self.progress, steady=self.shows_at_once)

    def _continue(self, target: Target) -> None:
        """Have it go on behind what is there, if anything is."""
        submission = self.submission
        del submission.generated_prefix[:]
        submission.revision = ""
        if self.journal.tokens:
            submission.revision = target.revision
            submission.generated_prefix.add(choice=submission.choice, token_ids=self.journal.tokens)
            self.resumptions += 1
            self._live.resumptions.inc(self.model, "resumed")
            self.sink.resumed(self.resumptions)

    # --- chunks ------------------------------------------------------------------------------------------------------------

    def on_admitted(self, input_tokens: int) -> None:
        """An engine took it and knows its prompt's length: that is what it costs, however it ends."""
        self.input_tokens = input_tokens

    def on_token(self, epoch: int, index: int, token: int, text: str) -> None:
        """One token, and nothing else."""
        verdict = self.journal.accept_one(epoch, index, token)
        if verdict is NEW:
            if not self.first_at:
                self._first()
            self.sink.token(index, token, text)
        else:
            self._refused(verdict, index)

    def on_chunk(self, epoch: int, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None) -> None:
        """Any other chunk."""
        finish = 0
        if detail is not None:
            if detail.HasField("error"):
                if epoch == self.journal.epoch:
                    self._attempt_failed(error_from_status(detail.error), told=True)
                return
            finish = int(detail.finish_reason)
        verdict = self.journal.accept(epoch, index, tokens, last=bool(finish))
        if verdict is not NEW:
            self._refused(verdict, index)
            return
        if not self.first_at:
            self._first()
        if not finish:
            self.sink.chunk(index, tokens, text, detail, False)
            return
        assert detail is not None
        if detail.HasField("usage"):
            usage = detail.usage
            self.input_tokens, self._output_tokens = usage.input_tokens, usage.output_tokens
            self.reasoning_tokens, self.cached_input_tokens = usage.reasoning_tokens, usage.cached_input_tokens
        self.finish_reason = finish
        self.sink.chunk(index, tokens, text, detail, True)
        self._close("ok")

    def hold(self) -> None:
        """Several chunks follow at once."""
        self.sink.hold()

    def release(self) -> None:
        """That was all of them."""
        self.sink.release()

    def _first(self) -> None:
        self.first_at = time.monotonic()
        self.first_chunk_by = float("inf")
        if self._target is not None and self._current is not None:
            self._target.outcomes.succeeded()
            self._current.first(self.first_at, self.progress)

    def _refused(self, verdict: Verdict, index: int) -> None:
        self._live.dropped.inc(verdict.value)
        if verdict is Verdict.GAP:
            log.warning("gap in a stream", request_id=self.request_id, index=index, expected=self.progress)
            self._attempt_failed(EngineLost("the engine skipped tokens"), told=False)

    # --- failing and going on ----------------------------------------------------------------------------------------------

    def on_lost(self, error: InferenceError) -> None:
        """The stream is gone, and what it carried with it."""
        self._attempt_failed(error, told=True)

    def _attempt_failed(self, error: InferenceError, *, told: bool) -> None:
        """Give the attempt up, and make another one where that can help.

        Args:
            error: Why.
            told: The engine knows that it is over; else it is told to stop.
        """
        target = self._target
        if target is None or self.ended:
            return
        if deaths := error.metadata.get("context_deaths"):  # whoever goes on must know that it may be what killed them
            self.submission.context_deaths = int(deaths)
        self._leave(target, told=told)
        if (error.retry is Retry.ELSEWHERE and not isinstance(error, _NO_FAULT)) or isinstance(error, Internal):
            target.outcomes.failed(time.monotonic())
        now = time.monotonic()
        again, self._error = Again.NO, error
        if self._idempotent and now <= self.deadline - LEAST_TIME_S:
            again, self._error = self._attempts.take(
                error, shown=self._shown, begun=self.progress > 0, resumable=target.capabilities.resume, now=now
            )
        if again is Again.NO:
            if self._shown:
                self._live.resumptions.inc(self.model, "failed")
            self._finish(self._error)
            return
        if again is Again.START_OVER:
            self._forget()
        self._revision = target.revision if self.journal.tokens else ""
        self.journal.begin_epoch()
        if self._tried is None or now >= self._again_at:  # those that were left long ago are as good as any
            self._tried = set()
        self._tried.add(target.replica_id)
        self._again_at = now + max(error.retry_after_s or 0.0, SAME_AGAIN_S * 2 ** max(0, self._attempts.failures - 1))
        log.info(
            "request goes on elsewhere",
            request_id=self.request_id, replica=target.replica_id, reason=error.reason, after_tokens=self.progress,
        )  # fmt: skip
        pause_s = 0.0 if isinstance(error, Backpressure) else random.uniform(*JITTER_S)
        asyncio.get_running_loop().call_later(pause_s, self._place)

    @property
    def _shown(self) -> bool:
        """The client has seen a part of it."""
        return self.shows_at_once and bool(self.first_at or self._carried)

    @property
    def _attempts(self) -> Allowance:
        """Further attempts that it has."""
        if self._allowance is None:
            assert self._budget is not None  # an attempt was made
            self._allowance = Allowance(self._live.limits, self._budget, partial(self._live.retries.inc, self.model))
        return self._allowance

    def _forget(self) -> None:
        """Start over: no token of this answer comes from an earlier attempt."""
        self.journal.forget()
        self.resumptions = 0

    def expire(self, now: float) -> None:
        """Called by the sweeper: end it when its time is up."""
        if now > self.deadline:
            self.abandon(Timeout("the request took longer than its deployment allows", phase="total"))
        elif now > self.first_chunk_by:
            if self._target is not None:
                self._target.outcomes.failed(now)
            self.abandon(Timeout("no token came in the time that its deployment allows", phase="first_chunk"))
        elif self._target is not None:
            self._look(self._target, now)

    def _look(self, target: Target, now: float) -> None:
        """See how it gets on. Where it stands still another replica does it, before this one's session is known to be dead."""
        table, current = self._live.table, self._current
        route = table.routes.get(self.model, self._route)
        assert current is not None  # there is one for each target
        assert route is not None
        current.look(now, self.progress)
        if not current.begun and target.shunned:
            other = self._other(target, route, now)
            if other is not None and target.worse_than(other):
                self._attempt_failed(EngineLost(f"replica {target.replica_id} does not answer in time"), told=False)
        elif self.first_at and (late := current.overdue(now, route.first_chunk_timeout_s, route.next_chunk_timeout_s)):
            waits = not table.serves(target)  # for its context, which is being replaced; then it goes on with what it has
            if not waits or self._other(target, route, now):
                self._attempt_failed(Timeout(late, phase=NEXT_CHUNK), told=False)

    def _other(self, target: Target, route: Route, now: float) -> Target | None:
        """Another replica that may go on with it, where another attempt is allowed."""
        if not self._idempotent or now > self.deadline - LEAST_TIME_S or not (self._budget and self._budget.may_move(now)):
            return None
        if not self._attempts.left(shown=self._shown, resumable=target.capabilities.resume):
            return None
        return choose(route, {*(self._tried or ()), target.replica_id}, self._revision)

    def cancel(self) -> None:
        """The client left: stop the engine within one step. Nothing is sent to the sink any more."""
        if not self.ended:
            if self._target is not None:
                self._leave(self._target, told=False)
            self._close("cancelled")

    def abandon(self, error: InferenceError) -> None:
        """End it with an error, whatever it is doing."""
        if self.ended:
            return
        if self._target is not None:
            self._leave(self._target, told=False)
        self._finish(error)

    def _leave(self, target: Target, *, told: bool) -> None:
        session = cast("Session", target.link)
        if told:
            session.forget(self._stream_id)
        else:
            session.cancel(self._stream_id, self.journal.epoch)
        target.in_flight -= 1
        self._target = None

    def _finish(self, error: InferenceError) -> None:
        """End it with an error: the client is told, once."""
        sink = self._close(error.reason)
        sink.fail(error)

    def _close(self, outcome: str) -> Sink:
        """Count it and settle it. The last thing that happens to a request. Returns the sink, which it lets go of.

        Request and sink know each other: parted, both are freed at once instead of waiting for the garbage collector.
        """
        self.ended = True
        now = time.monotonic()
        if self._budget is not None:
            self._budget.end()
        target, self._target = self._target, None
        if target is not None:
            self._revision = target.revision
            target.in_flight -= 1
            cast("Session", target.link).forget(self._stream_id)
            if outcome == "ok" and self._current is not None:
                target.outcomes.succeeded()
                self._current.look(now, self.progress)
        if self._wait_until:
            self._live.waiting.discard(self)
        self._settle(outcome, now)
        sink, self.sink = self.sink, NOBODY
        return sink

    def _settle(self, outcome: str, now: float) -> None:
        self._live.end(self, outcome, now)
        if self.follower is not None:
            self.follower.ended(outcome)
