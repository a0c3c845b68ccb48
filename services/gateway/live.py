"""The requests in flight of one worker: begins them, keeps their time, counts and settles them."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Protocol

from inference_runtime import telemetry
from inference_runtime.errors import Backpressure, Draining
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1 import engine_service_pb2, metrics_service_pb2
from services.gateway.request import Ended, Request, Sink
from services.gateway.routes import RouteTable
from services.gateway.settings import LimitSettings

__all__ = ["LiveRequests", "UsageSink", "new_id"]

#: Seconds between two looks at the clock for all requests.
SWEEP_S = 0.25
ID_BYTES = 16
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

    def add(self, record: metrics_service_pb2.UsageRecord) -> None:
        """Take a record. Never waits."""
        ...


class LiveRequests:
    """See module. What requests share: the routing table, limits, metrics, the usage reporter."""

    def __init__(self, table: RouteTable, limits: LimitSettings, usage: UsageSink, tele: Telemetry, keepalive_s: float) -> None:
        self.table, self.limits, self._usage, self._telemetry = table, limits, usage, tele
        self._keepalive_s = keepalive_s
        self.requests: set[Request] = set()
        #: Those that have no replica at present.
        self.waiting: set[Request] = set()
        self.draining = False
        metrics = tele.metrics
        self.dropped = metrics.counter("inference_frames_dropped_total", "cause")
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
        traceparent: str = "",
        time_limit_s: float = float("inf"),
    ) -> Request:
        """A new request. Give it to the sink, then call its `begin`.

        Raises:
            Draining: This gateway is about to end.
            Backpressure: It has as many requests as it may.
        """
        if self.draining:
            raise Draining("this gateway is shutting down; ask another one", retry_after_s=1)
        if len(self.requests) >= self.limits.max_requests:
            raise Backpressure("this gateway has as many requests as it may; try again in a moment", retry_after_s=1)
        if not traceparent and self._telemetry.tracer is not None:
            # Both hops hang their spans under one trace, though nobody outside began it.
            traceparent = f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"
        if traceparent:
            submission.traceparent = traceparent
        request = Request(self, submission, sink, shows_at_once=shows_at_once, traceparent=traceparent, time_limit_s=time_limit_s)
        self.requests.add(request)
        return request

    def end(self, request: Request, ended: Ended) -> None:
        """Count and settle a request. Called by it, once."""
        self.requests.discard(request)
        self.waiting.discard(request)
        name, outcome = ended.deployment or "unknown", ended.outcome
        self._ended.inc(name, outcome)
        if ended.input_tokens:
            self._tokens_in.inc(name, by=ended.input_tokens)
        self._duration.observe(ended.duration_s, name)
        if ended.first_token_s:
            self._tokens_out.inc(name, by=ended.output_tokens)
            self._first_token.observe(ended.first_token_s, name)
            if ended.output_tokens > 1:
                self._per_token.observe((ended.duration_s - ended.first_token_s) / (ended.output_tokens - 1), name)
        if ended.deployment:  # a name that nobody deployed has no ledger
            self._settle(request, ended)
        if self._telemetry.tracer is not None:
            self._trace(request, ended)

    def _settle(self, request: Request, ended: Ended) -> None:
        asked = request.submission
        record = metrics_service_pb2.UsageRecord(
            request_id=asked.request.request_id, deployment=ended.deployment, replica_id=asked.replica_id
        )
        if asked.request.tenant:
            record.tenant = asked.request.tenant
        usage = record.usage
        usage.input_tokens, usage.output_tokens = ended.input_tokens, ended.output_tokens
        if ended.reasoning_tokens or ended.cached_input_tokens:
            usage.reasoning_tokens, usage.cached_input_tokens = ended.reasoning_tokens, ended.cached_input_tokens
        if ended.outcome == "ok":
            record.finish_reason = ended.finish_reason  # type: ignore[assignment]
        elif ended.outcome == "cancelled":
            record.finish_reason = 5  # type: ignore[assignment]  # FINISH_REASON_CANCELLED
        else:
            record.error_reason = ended.outcome
        record.accepted_at.seconds, record.accepted_at.nanos = divmod(ended.accepted_ns, 1_000_000_000)
        for field, value_s in ((record.time_to_first_token, ended.first_token_s), (record.duration, ended.duration_s)):
            whole_s = int(value_s)
            field.seconds, field.nanos = whole_s, int((value_s - whole_s) * 1e9)
        self._usage.add(record)

    def _trace(self, request: Request, ended: Ended) -> None:
        asked = request.submission
        self._telemetry.record_span(
            f"chat {ended.deployment or 'unknown'}",
            traceparent=request.traceparent,
            start_ns=ended.accepted_ns,
            end_ns=ended.accepted_ns + int(ended.duration_s * 1e9),
            attributes={
                telemetry.ATTR_OPERATION: "chat",
                telemetry.ATTR_MODEL: asked.request.deployment,
                telemetry.ATTR_REQUEST_ID: asked.request.request_id,
                telemetry.ATTR_REPLICA: asked.replica_id,
                telemetry.ATTR_INPUT_TOKENS: ended.input_tokens,
                telemetry.ATTR_OUTPUT_TOKENS: ended.output_tokens,
            },
            error="" if ended.outcome in ("ok", "cancelled") else ended.outcome,
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
        self.wake()
        in_flight: dict[str, int] = dict.fromkeys(self.table.routes, 0)
        for request in tuple(self.requests):
            request.expire(now)
            if request.ended:
                continue
            name = request.submission.request.deployment
            in_flight[name] = in_flight.get(name, 0) + 1
            tokens = len(request.journal.first)
            if tokens != request.seen:
                request.seen, request.quiet_since = tokens, now
            elif now - request.quiet_since > self._keepalive_s:
                request.quiet_since = now
                request.sink.keep_alive()
        self._in_flight.clear()
        for name, count in in_flight.items():
            self._in_flight.set(count, name)
