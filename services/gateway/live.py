"""The requests in flight of one worker: begins them, keeps their time, counts and settles them."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Sequence
from typing import Protocol

from inference_runtime import telemetry
from inference_runtime.errors import Backpressure, Draining
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1 import engine_service_pb2
from services.gateway.budget import AttemptBudget, BudgetRule
from services.gateway.choices import Choices
from services.gateway.needs import Need
from services.gateway.request import Request
from services.gateway.routes import RouteTable
from services.gateway.settings import LimitSettings
from services.gateway.sink import NOBODY, Sink
from services.gateway.usage import UsageEntry

__all__ = ["LiveRequests", "UsageSink", "new_id"]

#: Seconds between two looks at the clock for all requests.
SWEEP_S = 0.25
ID_BYTES = 16
#: W3C trace context, version 00 and what later versions promise to keep.
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_POOL_IDS = 256
_pool: list[str] = []


def new_id() -> str:
    """32 hex digits of the kernel's randomness: no two requests of any gateway share one."""
    if not _pool:
        raw = os.urandom(ID_BYTES * _POOL_IDS).hex()
        _pool.extend(raw[i : i + 2 * ID_BYTES] for i in range(0, len(raw), 2 * ID_BYTES))
    return _pool.pop()


class UsageSink(Protocol):
    """Where records of ended requests go (usage.UsageReporter)."""

    def add(self, entry: UsageEntry) -> None:
        """Take a record. Never waits."""
        ...


class LiveRequests:
    """See module. What requests share: the routing table, limits, metrics, the usage reporter."""

    def __init__(self, table: RouteTable, limits: LimitSettings, usage: UsageSink, tele: Telemetry, keepalive_s: float) -> None:
        self.table, self.limits, self._usage, self._telemetry = table, limits, usage, tele
        self._keepalive_s = keepalive_s
        self.requests: set[Request | Choices] = set()
        #: Choices that they have together, beyond one each.
        self._more_choices = 0
        #: Those that have no replica at present.
        self.waiting: set[Request] = set()
        #: This gateway is about to end: `draining` once it says so, `closed` once nothing can be taken any more.
        self.draining = self.closed = False
        self._rule = BudgetRule(
            limits.budget_window_s, limits.retry_share, limits.retry_floor, limits.moves_per_request, limits.move_floor
        )
        self._budgets: dict[str, AttemptBudget] = {}
        metrics = tele.metrics
        self.dropped = metrics.counter("inference_frames_dropped_total", "cause")
        self.resumptions = metrics.counter("inference_resumptions_total", "deployment", "outcome")
        self.retries = metrics.counter("inference_retries_total", "deployment", "kind")
        self._ended = metrics.counter("inference_requests_total", "deployment", "outcome")
        self._in_flight = metrics.gauge("inference_requests_in_flight", "deployment")
        self._tokens_in = metrics.counter("inference_tokens_in_total", "deployment")
        self._tokens_out = metrics.counter("inference_tokens_out_total", "deployment")
        self._first_token = metrics.histogram("gen_ai_server_time_to_first_token_seconds", "deployment")
        self._per_token = metrics.histogram("gen_ai_server_time_per_output_token_seconds", "deployment")
        self._duration = metrics.histogram("gen_ai_server_request_duration_seconds", "deployment")

    def begin(
        self,
        submission: engine_service_pb2.Submission,
        sink: Sink,
        *,
        shows_at_once: bool,
        needs: Sequence[Need] = (),
        idempotent: bool = True,
        traceparent: str = "",
        time_limit_s: float = float("inf"),
    ) -> Request:
        """A new request for one choice. Give it to the sink, then call its `begin`.

        Raises:
            Draining: This gateway is about to end.
            Backpressure: It has as many requests as it may.
        """
        request = Request(
            self,
            submission,
            sink,
            shows_at_once=shows_at_once,
            needs=needs,
            idempotent=idempotent,
            traceparent=self._admit(1, submission, traceparent),
            time_limit_s=time_limit_s,
        )
        self.requests.add(request)
        return request

    def begin_choices(
        self,
        submission: engine_service_pb2.Submission,
        sinks: Sequence[Sink],
        *,
        shows_at_once: bool,
        needs: Sequence[Need] = (),
        idempotent: bool = True,
        traceparent: str = "",
        time_limit_s: float = float("inf"),
    ) -> Request | Choices:
        """A new request for as many choices as there are sinks, which counts as so many. Otherwise as `begin`."""
        if len(sinks) == 1:
            return self.begin(
                submission,
                sinks[0],
                shows_at_once=shows_at_once,
                needs=needs,
                idempotent=idempotent,
                traceparent=traceparent,
                time_limit_s=time_limit_s,
            )
        choices = Choices(
            self,
            submission,
            sinks,
            shows_at_once=shows_at_once,
            needs=needs,
            idempotent=idempotent,
            traceparent=self._admit(len(sinks), submission, traceparent),
            time_limit_s=time_limit_s,
        )
        self.requests.add(choices)
        self._more_choices += choices.width - 1
        return choices

    def _admit(self, choices: int, submission: engine_service_pb2.Submission, traceparent: str) -> str:
        """Refuse what is too much. Returns the client's trace context, and gives the engine's spans ours to hang below."""
        if self.closed:
            raise Draining("this gateway is shutting down; ask another one", retry_after_s=1)
        if len(self.requests) + self._more_choices + choices > self.limits.max_requests:
            raise Backpressure("this gateway has as many requests as it may; try again in a moment", retry_after_s=1)
        if traceparent and not TRACEPARENT.fullmatch(traceparent):
            traceparent = ""  # whatever it is, it is no trace of anybody
        span = traceparent if self._telemetry.tracer is None else self._telemetry.begin_span(traceparent)
        if span:
            submission.traceparent = span
        return traceparent

    def past(self, submission: engine_service_pb2.Submission) -> Request:
        """A request that is not one of these: to tell from what became of another."""
        return Request(self, submission, NOBODY, shows_at_once=True)

    def budget(self, deployment: str) -> AttemptBudget:
        """What requests of a deployment share. Only for one that is in the table: it is kept as long as that."""
        budget = self._budgets.get(deployment)
        if budget is None:
            budget = self._budgets[deployment] = AttemptBudget(self._rule)
        return budget

    def end(self, request: Request | Choices, outcome: str, now: float) -> None:
        """Count and settle a request. Called by it, once.

        Args:
            request: The one that ended.
            outcome: "ok", "cancelled", or the reason of its error.
            now: time.monotonic().
        """
        self.requests.discard(request)
        width = request.width
        if width > 1:
            self._more_choices -= width - 1
        known = request.known
        name = request.model if known else "unknown"  # what clients make up must not become series
        duration_s = now - request.began
        first_token_s = 0.0
        output_tokens = request.output_tokens
        self._ended.inc(name, outcome)
        self._duration.observe(duration_s, name)
        input_tokens = request.input_tokens
        if request.attempt:  # what earlier ones were counted for is not counted again
            input_tokens = max(0, input_tokens - request.settled_input_tokens)
            output_tokens = max(0, output_tokens - request.settled_output_tokens)
        if input_tokens:
            self._tokens_in.inc(name, by=input_tokens)
        if first_at := request.first_at:
            first_token_s = first_at - request.began
            self._tokens_out.inc(name, by=output_tokens)
            self._first_token.observe(first_token_s, name)
            if output_tokens > width and request.shows_at_once:  # a whole answer comes in few pieces: they tell no pace
                self._per_token.observe((duration_s - first_token_s) / (output_tokens / width - 1), name)
        if known:  # a name that nobody deployed has no ledger
            self._usage.add(
                (
                    request.request_id, name, request.replica_id, input_tokens, output_tokens, request.reasoning_tokens,
                    request.cached_input_tokens, request.finish_reason, outcome, request.accepted_ns, first_token_s, duration_s,
                    request.tenant, request.attempt,
                )
            )  # fmt: skip
        if self._telemetry.tracer is not None:
            self._trace(request, outcome, duration_s)

    def _trace(self, request: Request | Choices, outcome: str, duration_s: float) -> None:
        self._telemetry.record_span(
            f"chat {request.model if request.known else 'unknown'}",
            traceparent=request.traceparent,
            span=request.submission.traceparent,
            start_ns=request.accepted_ns,
            end_ns=request.accepted_ns + int(duration_s * 1e9),
            attributes={
                telemetry.ATTR_OPERATION: "chat",
                telemetry.ATTR_MODEL: request.model,
                telemetry.ATTR_REQUEST_ID: request.request_id,
                telemetry.ATTR_REPLICA: request.replica_id,
                telemetry.ATTR_INPUT_TOKENS: request.input_tokens,
                telemetry.ATTR_OUTPUT_TOKENS: request.output_tokens,
                telemetry.ATTR_RESUMPTIONS: request.resumptions,
            },
            error="" if outcome in ("ok", "cancelled") else outcome,
        )

    def wake(self) -> None:
        """Something changed: let those go on that wait for a replica."""
        if self.waiting:
            now = time.monotonic()
            for request in tuple(self.waiting):
                request.try_again(now)

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self._sweep(time.monotonic())

    def _sweep(self, now: float) -> None:
        self.table.sweep(now)
        self.wake()
        in_flight: dict[str, int] = dict.fromkeys(self.table.routes, 0)
        for request in tuple(self.requests):
            request.expire(now)
            if request.ended:
                continue
            name = request.model
            in_flight[name] = in_flight.get(name, 0) + 1
            tokens = request.progress
            if tokens != request.seen:
                request.seen, request.quiet_since = tokens, now
            elif now - request.quiet_since > self._keepalive_s:
                request.quiet_since = now
                request.sink.keep_alive()
        self._in_flight.clear()
        for name, count in in_flight.items():
            self._in_flight.set(count, name)
        for name in [n for n, budget in self._budgets.items() if n not in self.table.routes and not budget.in_flight]:
            del self._budgets[name]
