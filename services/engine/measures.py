"""What the replicas of one engine measure, and the span that each request leaves."""

from __future__ import annotations

import time

from inference_runtime.errors import InferenceError, RequestCancelled
from inference_runtime.telemetry import Telemetry, get_logger
from services.engine.stream import Stream

__all__ = ["CoreMetrics"]

log = get_logger(__name__)


class CoreMetrics:
    """What the cores of one process measure."""

    def __init__(self, telemetry: Telemetry) -> None:
        metrics = telemetry.metrics
        self.telemetry = telemetry
        self.queue_s = metrics.histogram("inference_queue_seconds", "deployment")
        self.step_s = metrics.histogram("inference_step_seconds", "deployment")
        self.cancel_s = metrics.histogram("inference_cancel_to_stop_seconds", "deployment")
        self.restarts = metrics.counter("inference_context_restarts_total", "deployment", "cause")
        self.running = metrics.gauge("inference_running", "deployment", "replica")
        self.queued = metrics.gauge("inference_queued", "deployment", "replica")
        self.kv_use = metrics.gauge("inference_kv_use", "deployment", "replica")
        self.ready = metrics.gauge("inference_replica_ready", "deployment", "replica")

    def record(self, stream: Stream, err: InferenceError | None, deployment: str, replica_id: str) -> None:
        """A request has ended, well or with this error."""
        request = stream.submission.request
        if err is not None and not isinstance(err, RequestCancelled):
            log.debug("request failed", request_id=request.request_id, replica=replica_id, reason=err.reason)
        if self.telemetry.tracer is not None:
            self.telemetry.record_span(
                "engine.request",
                traceparent=stream.submission.traceparent,
                start_ns=stream.admitted_ns,
                end_ns=time.time_ns(),
                attributes={
                    "inference.request_id": request.request_id,
                    "inference.replica_id": replica_id,
                    "gen_ai.request.model": deployment,
                    "gen_ai.usage.output_tokens": stream.index,
                },
                error=err.reason if err is not None else "",
            )
