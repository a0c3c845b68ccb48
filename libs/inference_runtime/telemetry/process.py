"""The whole of one process: spans, metrics, exporters, logging."""

from __future__ import annotations

import contextlib
import http.server
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from inference_runtime import __version__
from inference_runtime.errors import ServerError
from inference_runtime.telemetry.logs import Formatter
from inference_runtime.telemetry.metrics import PROMETHEUS_CONTENT_TYPE, MetricSet

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import Tracer

    from inference_runtime.settings import TelemetrySettings

__all__ = ["Telemetry", "setup_telemetry"]


class Telemetry:
    """Spans, metrics and exporters of one process. Made by `setup_telemetry`, closed by its owner.

    `tracer` is None where no OTLP endpoint is set; hot code then builds no span at all.
    """

    def __init__(self, service: str, settings: TelemetrySettings) -> None:
        self.service = service
        self.metrics = MetricSet()
        self.tracer: Tracer | None = None
        #: What is shown to Prometheus on a port of its own.
        self.render: Callable[[], bytes] = self.metrics.prometheus_text
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
        resource = Resource.create(
            {
                "service.name": f"inference-{self.service}",
                "service.version": __version__,
                "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",  # a collector keeps processes apart by it
            }
        )
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
        telemetry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = telemetry.render() if self.path.split("?")[0] == "/metrics" else b""
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
    handler.setFormatter(Formatter(service, settings.log_format == "json"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    return Telemetry(service, settings)
