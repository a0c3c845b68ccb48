"""Logs, traces and metrics of every process, and the table of their names.

Logs are one event per fact: a constant message and fields. Traces and metrics are OpenTelemetry's; names follow its GenAI
conventions where they exist. Metrics are pulled by Prometheus (`/metrics`) and pushed over OTLP where an endpoint is set. A
process without either pays nothing for spans.
"""

from __future__ import annotations

import bisect
import contextlib
import http.server
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from inference_runtime import __version__
from inference_runtime.errors import ServerError

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricsData
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import Tracer

    from inference_runtime.settings import TelemetrySettings

__all__ = [
    "PROMETHEUS_CONTENT_TYPE",
    "Counter",
    "Gauge",
    "Histogram",
    "Logger",
    "MetricSet",
    "Telemetry",
    "get_logger",
    "setup_telemetry",
]

# --- names -----------------------------------------------------------------------------------------------------------

#: Metrics, by name: (unit, description). Everything that a service measures stands here.
METRICS: dict[str, tuple[str, str]] = {
    "inference_requests_total": ("", "Requests that ended, by deployment and outcome (ok, cancelled or the error's reason)"),
    "inference_requests_in_flight": ("", "Requests that are being answered, by deployment"),
    "inference_tokens_in_total": ("", "Prompt tokens, by deployment"),
    "inference_tokens_out_total": ("", "Generated tokens, by deployment"),
    "inference_cost_usd_total": ("", "Cost in US dollars, by deployment"),
    "gen_ai_server_time_to_first_token_seconds": ("s", "From acceptance to the first token, by deployment"),
    "gen_ai_server_time_per_output_token_seconds": ("s", "Mean time between tokens of a request, by deployment"),
    "gen_ai_server_request_duration_seconds": ("s", "From acceptance to the end, by deployment"),
    "inference_queue_seconds": ("s", "From admission to the first step, by deployment"),
    "inference_cancel_to_stop_seconds": ("s", "From a cancellation to the step that no longer holds the request"),
    "inference_route_table_revision": ("", "Revision of the routing table in use"),
    "inference_route_table_age_seconds": ("s", "Time since the routing table was last confirmed"),
    "inference_sessions": ("", "Open sessions between gateways and engines"),
    "inference_frames_dropped_total": ("", "Chunks that were dropped, by cause (old epoch, duplicate, gap)"),
    "inference_resumptions_total": ("", "Broken answers, by deployment and outcome (resumed: went on elsewhere; failed)"),
    "inference_usage_records_lost_total": ("", "Usage records dropped because the metrics service was away for too long"),
    "inference_running": ("", "Requests that run on a replica"),
    "inference_queued": ("", "Requests that wait at a replica"),
    "inference_kv_use": ("", "Share of a replica's KV cache in use"),
    "inference_context_restarts_total": ("", "Context restarts, by deployment and cause"),
    "inference_step_seconds": ("s", "Duration of one engine step, by deployment"),
    "inference_leader": ("", "1 while this process leads its role"),
    "inference_leader_terms_total": ("", "Terms that this process began"),
    "inference_watch_restarts_total": ("", "Watches that had to be re-listed"),
    "inference_replicas": ("", "Replicas by deployment and state"),
    "inference_rpc_seconds": ("s", "Duration of a unary call, by method"),
}

#: Span attributes of the GenAI conventions.
ATTR_OPERATION = "gen_ai.operation.name"
ATTR_MODEL = "gen_ai.request.model"
ATTR_SYSTEM = "gen_ai.provider.name"
ATTR_INPUT_TOKENS = "gen_ai.usage.input_tokens"
ATTR_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
ATTR_FINISH = "gen_ai.response.finish_reasons"
ATTR_REQUEST_ID = "inference.request_id"
ATTR_REPLICA = "inference.replica_id"
ATTR_RESUMPTIONS = "inference.resumptions"

#: Upper bounds of histogram buckets, seconds.
SECONDS_BUCKETS: tuple[float, ...] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip

# --- logs ------------------------------------------------------------------------------------------------------------

#: A logged field longer than this is cut: a header of a megabyte is not a log line.
MAX_FIELD_CHARS = 2048


class Logger:
    """Logs events with fields: `log.info("replica registered", deployment=…, replica=…)`."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def _log(self, level: int, message: str, exc_info: BaseException | None, fields: Mapping[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, message, exc_info=exc_info, extra={"fields": fields})

    def debug(self, message: str, /, **fields: object) -> None:
        """An expected refusal, a detail."""
        self._log(logging.DEBUG, message, None, fields)

    def info(self, message: str, /, **fields: object) -> None:
        """A decision or a change of state."""
        self._log(logging.INFO, message, None, fields)

    def warning(self, message: str, /, **fields: object) -> None:
        """Something a person should know by tomorrow."""
        self._log(logging.WARNING, message, None, fields)

    def error(self, message: str, /, *, exc_info: BaseException | None = None, **fields: object) -> None:
        """A surprise. Wakes someone."""
        self._log(logging.ERROR, message, exc_info, fields)


def get_logger(name: str) -> Logger:
    """The logger of a module."""
    return Logger(name)


def _field(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    if len(text) > MAX_FIELD_CHARS:
        text = f"{text[:MAX_FIELD_CHARS]}…"
    return text


class _Formatter(logging.Formatter):
    """One record, one line: control characters are escaped, so that a field cannot forge a line."""

    def __init__(self, service: str, as_json: bool) -> None:
        super().__init__()
        self._service, self._as_json = service, as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        trace = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
        if self._as_json:
            entry: dict[str, object] = {
                "time": stamp,
                "level": record.levelname.lower(),
                "service": self._service,
                "logger": record.name,
                "message": record.getMessage(),
            }
            entry.update({key: _field(value) for key, value in fields.items()})
            if trace:
                entry["exception"] = trace
            return json.dumps(entry)
        pairs = " ".join(f"{key}={json.dumps(_field(value), ensure_ascii=False)}" for key, value in fields.items())
        event = f"{_printable(record.getMessage())} {_printable(pairs)}".rstrip()
        line = f"{stamp} {record.levelname.lower():7s} {self._service}: {event}"
        return f"{line}\n{trace}" if trace else line


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- metrics ---------------------------------------------------------------------------------------------------------

Labels = tuple[str, ...]
PROMETHEUS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counter:
    """A sum that only rises. `inc` costs a dictionary access: it stands on the hot path."""

    __slots__ = ("labels", "name", "values")

    def __init__(self, name: str, labels: Labels) -> None:
        self.name, self.labels = name, labels
        self.values: dict[Labels, float] = {}

    def inc(self, *labels: str, by: float = 1) -> None:
        """Add to the series with these label values."""
        self.values[labels] = self.values.get(labels, 0) + by


class Gauge(Counter):
    """A value that rises and falls."""

    __slots__ = ()

    def set(self, value: float, *labels: str) -> None:
        """Set the series with these label values."""
        self.values[labels] = value

    def clear(self) -> None:
        """Forget all series, before they are set anew."""
        self.values.clear()


class Histogram:
    """A distribution over fixed buckets, seconds."""

    __slots__ = ("labels", "name", "values")

    def __init__(self, name: str, labels: Labels) -> None:
        self.name, self.labels = name, labels
        #: counts per bucket (one more than bounds), then the sum
        self.values: dict[Labels, list[float]] = {}

    def observe(self, seconds: float, *labels: str) -> None:
        """Count one observation."""
        series = self.values.get(labels)
        if series is None:
            series = self.values[labels] = [0.0] * (len(SECONDS_BUCKETS) + 2)
        series[bisect.bisect_left(SECONDS_BUCKETS, seconds)] += 1
        series[-1] += seconds


M = TypeVar("M", Counter, Gauge, Histogram)


class MetricSet:
    """The metrics of one process. Names must stand in METRICS.

    Updates are plain dictionary writes from the owner's thread; readers copy. OpenTelemetry's own instruments cost 3-5 µs a
    call, which the gateway's budget of a request does not hold; what is exported is the same data points.
    """

    def __init__(self) -> None:
        self._metrics: list[Counter | Histogram] = []
        self._start_ns = time.time_ns()

    def counter(self, name: str, *labels: str) -> Counter:
        """A counter with these label names."""
        return self._add(Counter(_known(name), labels))

    def gauge(self, name: str, *labels: str) -> Gauge:
        """A gauge with these label names."""
        return self._add(Gauge(_known(name), labels))

    def histogram(self, name: str, *labels: str) -> Histogram:
        """A histogram of seconds with these label names."""
        return self._add(Histogram(_known(name), labels))

    def _add(self, metric: M) -> M:
        """The metric of this name: two parts of a process that ask for one share it."""
        for known in self._metrics:
            if known.name == metric.name:
                if type(known) is not type(metric) or known.labels != metric.labels:
                    raise KeyError(f"metric {metric.name} exists with other labels or of another kind")
                return known
        self._metrics.append(metric)
        return metric

    def prometheus_text(self) -> bytes:
        """All series in Prometheus' text format, version 0.0.4."""
        lines: list[str] = []
        for metric in self._metrics:
            kind = "histogram" if isinstance(metric, Histogram) else "gauge" if isinstance(metric, Gauge) else "counter"
            lines += [f"# HELP {metric.name} {METRICS[metric.name][1]}", f"# TYPE {metric.name} {kind}"]
            if isinstance(metric, Histogram):
                for labels, series in list(metric.values.items()):
                    total = 0.0
                    for bound, count in zip((*map(str, SECONDS_BUCKETS), "+Inf"), series, strict=False):
                        total += count
                        lines.append(f"{metric.name}_bucket{_labels((*metric.labels, 'le'), (*labels, bound))} {total:g}")
                    lines.append(f"{metric.name}_sum{_labels(metric.labels, labels)} {series[-1]!r}")
                    lines.append(f"{metric.name}_count{_labels(metric.labels, labels)} {total:g}")
            else:
                for labels, value in list(metric.values.items()):
                    lines.append(f"{metric.name}{_labels(metric.labels, labels)} {value!r}")
        return ("\n".join(lines) + "\n").encode()

    def otlp_data(self, resource: Resource) -> MetricsData:
        """All series as OpenTelemetry data points, cumulative."""
        from opentelemetry.sdk.metrics import export
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        now = time.time_ns()
        metrics: list[Any] = []
        for metric in self._metrics:
            unit, description = METRICS[metric.name]
            points: list[Any] = []
            value: Any
            for labels, value in list(metric.values.items()):
                attributes = dict(zip(metric.labels, labels, strict=True))
                if isinstance(value, list):
                    counts = [int(c) for c in value[:-1]]
                    points.append(
                        export.HistogramDataPoint(
                            attributes, self._start_ns, now, sum(counts), value[-1], counts, SECONDS_BUCKETS, 0.0, 0.0
                        )
                    )
                else:
                    points.append(export.NumberDataPoint(attributes, self._start_ns, now, value))
            if isinstance(metric, Histogram):
                data: Any = export.Histogram(points, export.AggregationTemporality.CUMULATIVE)
            elif isinstance(metric, Gauge):
                data = export.Gauge(points)
            else:
                data = export.Sum(points, export.AggregationTemporality.CUMULATIVE, True)
            metrics.append(export.Metric(metric.name, description, unit, data))
        scope = export.ScopeMetrics(InstrumentationScope("inference_runtime", __version__), metrics, "")
        return export.MetricsData([export.ResourceMetrics(resource, [scope], "")])


def _known(name: str) -> str:
    if name not in METRICS:
        raise KeyError(f"metric {name} is not in telemetry.METRICS")
    return name


def _labels(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    pairs = (
        '{}="{}"'.format(n, v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
        for n, v in zip(names, values, strict=True)
    )
    return "{" + ",".join(pairs) + "}"


# --- the whole of one process ----------------------------------------------------------------------------------------


class Telemetry:
    """Spans, metrics and exporters of one process. Made by `setup_telemetry`, closed by its owner.

    `tracer` is None where no OTLP endpoint is set; hot code then builds no span at all.
    """

    def __init__(self, service: str, settings: TelemetrySettings) -> None:
        self.service = service
        self.metrics = MetricSet()
        self.tracer: Tracer | None = None
        self.prometheus_address = ""
        self._rpc_seconds = self.metrics.histogram("inference_rpc_seconds", "method")
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._server: http.server.ThreadingHTTPServer | None = None
        self._provider: TracerProvider | None = None
        self._sampler: Sampler | None = None
        #: Trace and span id of the span that `record_span` starts, in its thread.
        self._preset = threading.local()
        if settings.otlp_endpoint:
            self._start_otlp(settings)
        if settings.prometheus_port >= 0:
            self._start_prometheus(settings.prometheus_port)

    def _start_otlp(self, settings: TelemetrySettings) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        preset = self._preset

        class Ids(RandomIdGenerator):
            def generate_trace_id(self) -> int:
                return getattr(preset, "trace_id", 0) or super().generate_trace_id()

            def generate_span_id(self) -> int:
                return getattr(preset, "span_id", 0) or super().generate_span_id()

        self._sampler = ParentBased(TraceIdRatioBased(settings.trace_ratio))
        resource = Resource.create({"service.name": f"inference-{self.service}", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, sampler=self._sampler, id_generator=Ids())
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=True)))
        self.tracer = self._provider.get_tracer("inference_runtime", __version__)
        exporter = OTLPMetricExporter(endpoint=settings.otlp_endpoint, insecure=True)

        def push() -> None:
            while not self._stop.wait(settings.metric_interval_s):
                exporter.export(self.metrics.otlp_data(resource))
            exporter.export(self.metrics.otlp_data(resource))
            exporter.shutdown()

        self._threads.append(threading.Thread(target=push, name="otlp-metrics", daemon=True))
        self._threads[-1].start()

    def _start_prometheus(self, port: int) -> None:
        metrics = self.metrics

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = metrics.prometheus_text() if self.path.split("?")[0] == "/metrics" else b""
                self.send_response(200 if body else 404)
                self.send_header("content-type", PROMETHEUS_CONTENT_TYPE)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not events."""

        try:
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as err:
            raise ServerError(
                f"cannot listen on port {port} for /metrics: {err.strerror}; choose another prometheus_port"
            ) from err
        self.prometheus_address = f"127.0.0.1:{self._server.server_address[1]}"
        self._threads.append(threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True))
        self._threads[-1].start()

    @contextlib.contextmanager
    def rpc_span(self, method: str, metadata: Mapping[str, str]) -> Iterator[None]:
        """Time one call and, where traces are on, give it a server span under the caller's."""
        begin = time.perf_counter()
        try:
            if self.tracer is None:
                yield
                return
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            parent = TraceContextTextMapPropagator().extract(dict(metadata))
            with self.tracer.start_as_current_span(
                method.lstrip("/"), context=parent, kind=SpanKind.SERVER, attributes={"rpc.system": "grpc"}
            ):
                yield
        finally:
            self._rpc_seconds.observe(time.perf_counter() - begin, method)

    def begin_span(self, traceparent: str) -> str:
        """W3C context of a span below `traceparent` ("" for none), to hand on now and to record when it is over."""
        if self._sampler is None:
            return traceparent
        if traceparent:
            trace_id, flags = traceparent[3:35], traceparent[53:55]
        else:
            from opentelemetry.sdk.trace.sampling import Decision

            trace_id = os.urandom(16).hex()
            dropped = self._sampler.should_sample(None, int(trace_id, 16), "").decision is Decision.DROP
            flags = "00" if dropped else "01"
        return f"00-{trace_id}-{os.urandom(8).hex()}-{flags}"

    def record_span(
        self,
        name: str,
        *,
        traceparent: str,
        span: str = "",
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, str | int | float | Sequence[str]],
        error: str = "",
        server: bool = True,
    ) -> None:
        """Record a span that is over. `traceparent` is the W3C context of its parent, "" for none. No-op without an exporter.

        `span` is what `begin_span` gave for it: those below it know it by that. "" for a span that nobody knows yet.

        Hot paths keep two timestamps and call this once, at the end.
        """
        if self.tracer is None:
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})
        kind = SpanKind.SERVER if server else SpanKind.CLIENT
        if span:
            self._preset.trace_id, self._preset.span_id = int(span[3:35], 16), int(span[36:52], 16)
        try:
            over = self.tracer.start_span(name, context=parent, kind=kind, attributes=dict(attributes), start_time=start_ns)
        finally:
            self._preset.trace_id = self._preset.span_id = 0
        if error:
            over.set_status(Status(StatusCode.ERROR, error))
        over.end(end_ns)

    def close(self) -> None:
        """Flush and stop every exporter. Blocks for at most a few seconds; call it last, off the event loop's hot time."""
        self._stop.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        for thread in self._threads:
            thread.join(timeout=3)
        if self._provider is not None:
            self._provider.shutdown()


def setup_telemetry(service: str, settings: TelemetrySettings) -> Telemetry:
    """Set up logging for this process and start its exporters. Called once, in `__main__`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(service, settings.log_format == "json"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    return Telemetry(service, settings)
