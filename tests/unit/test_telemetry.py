"""Logs, metrics and traces of one process, read the way their consumers read them."""

from __future__ import annotations

import json
import logging
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from inference_runtime.errors import ServerError
from inference_runtime.settings import TelemetrySettings
from inference_runtime.telemetry import (
    MAX_FIELD_CHARS,
    METRICS,
    Family,
    MetricSet,
    Telemetry,
    get_logger,
    merged,
    prometheus_text,
    setup_telemetry,
)
from inference_runtime.telemetry.names import LARGEST

WAIT_S = 10.0


@pytest.fixture
def restore_root_logger() -> Iterator[None]:
    """Put the process's logging back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(capsys: pytest.CaptureFixture[str], log_format: str, emit: Callable[[], None]) -> str:
    """What a process with this format writes to stderr."""
    setup_telemetry("sample", TelemetrySettings(log_format=log_format)).close()
    emit()
    return capsys.readouterr().err


@pytest.mark.usefixtures("restore_root_logger")
@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    "forged", ["x\n2030-01-01T00:00:00.000Z error   gateway: all is lost", "a\r\nb", "\x1b[2Jgone", "\u2028sep", "\x00"]
)
def test_a_field_cannot_forge_a_line(capsys: pytest.CaptureFixture[str], log_format: str, forged: str) -> None:
    """A client's text in a field stays inside its own line: control characters are escaped in both formats."""
    text = logged(capsys, log_format, lambda: get_logger("t").info("request refused", model=forged))

    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert all(c.isprintable() for c in text[:-1])


@pytest.mark.usefixtures("restore_root_logger")
def test_a_json_line_holds_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    """Collectors get the message constant and the facts by name."""
    line = json.loads(logged(capsys, "json", lambda: get_logger("t").warning("replica lost", replica="r-1", attempts=2)))

    assert (line["level"], line["service"], line["message"]) == ("warning", "sample", "replica lost")
    assert (line["replica"], line["attempts"]) == ("r-1", "2")


@pytest.mark.usefixtures("restore_root_logger")
def test_a_long_field_is_cut_and_debug_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    """A megabyte of header is not a log line; the level is respected."""

    def emit() -> None:
        get_logger("t").debug("not shown")
        get_logger("t").info("long", value="x" * 1_000_000)

    text = logged(capsys, "text", emit)

    assert "not shown" not in text
    assert len(text) < MAX_FIELD_CHARS + 200


def sample_metrics() -> MetricSet:
    """One of each kind, with values."""
    metrics = MetricSet()
    requests = metrics.counter("inference_requests_total", "deployment", "outcome")
    requests.inc("demo", "ok")
    requests.inc("demo", "ok", by=2)
    requests.inc('q"u\\o\nte', "ok")
    metrics.gauge("inference_running", "deployment").set(4, "demo")
    ttft = metrics.histogram("gen_ai_server_time_to_first_token_seconds", "deployment")
    for value in (0.004, 0.2, 1000.0):
        ttft.observe(value, "demo")
    return metrics


def test_prometheus_text_holds_every_kind() -> None:
    """V01, V03: counters, gauges, cumulative histograms; label values are escaped."""
    lines = sample_metrics().prometheus_text().decode().split("\n")

    name = "gen_ai_server_time_to_first_token_seconds"
    assert "# TYPE inference_requests_total counter" in lines
    assert 'inference_requests_total{deployment="demo",outcome="ok"} 3' in lines
    assert 'inference_requests_total{deployment="q\\"u\\\\o\\nte",outcome="ok"} 1' in lines
    assert 'inference_running{deployment="demo"} 4' in lines
    assert f'{name}_bucket{{deployment="demo",le="0.005"}} 1' in lines
    assert f'{name}_bucket{{deployment="demo",le="0.25"}} 2' in lines
    assert f'{name}_bucket{{deployment="demo",le="300.0"}} 2' in lines
    assert f'{name}_bucket{{deployment="demo",le="+Inf"}} 3' in lines
    assert f'{name}_count{{deployment="demo"}} 3' in lines
    assert lines[-1] == ""


def test_counts_keep_their_last_digit() -> None:
    """A rate is a difference: of a count in the millions as well."""
    metrics = MetricSet()
    series = metrics.histogram("inference_rpc_seconds", "method")
    series.observe(0.2, "x")
    series.values[("x",)][:1] = [12_345_678.0]
    text = metrics.prometheus_text().decode()
    assert 'inference_rpc_seconds_count{method="x"} 12345679\n' in text
    assert 'inference_rpc_seconds_bucket{method="x",le="0.001"} 12345678\n' in text


def process_metrics(requests: int, age_s: float, seconds: list[float]) -> MetricSet:
    """The metrics of one of several processes."""
    metrics = MetricSet()
    metrics.counter("inference_requests_total", "deployment", "outcome").inc("demo", "ok", by=requests)
    metrics.gauge("inference_sessions").set(requests)
    metrics.gauge("inference_route_table_age_seconds").set(age_s)
    for value in seconds:
        metrics.histogram("inference_rpc_seconds", "method").observe(value, "x")
    return metrics


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 100), st.lists(st.floats(0, 500), max_size=5)), min_size=1, max_size=5)
)
def test_the_metrics_of_several_processes_are_those_of_one(parts: list[tuple[int, float, list[float]]]) -> None:
    """Counters and histograms as one process would have counted them; gauges by their sum, or by the largest."""
    together = {f.name: f for f in merged(process_metrics(*part).families() for part in parts)}
    one = {f.name: f for f in process_metrics(0, 0.0, [s for part in parts for s in part[2]]).families()}
    requests = sum(part[0] for part in parts)
    assert together["inference_requests_total"].series == [(("demo", "ok"), requests)]
    assert together["inference_sessions"].series == [((), requests)]
    assert together["inference_route_table_age_seconds"].series == [((), max(part[1] for part in parts))]
    if "inference_rpc_seconds" in one:
        ((_, counted),) = together["inference_rpc_seconds"].series
        ((_, expected),) = one["inference_rpc_seconds"].series
        assert counted == pytest.approx(expected)


def test_every_gauge_whose_largest_counts_is_in_the_table() -> None:
    assert METRICS.keys() >= LARGEST


def test_what_another_version_shows_in_another_form_is_not_added() -> None:
    """Workers of two versions run side by side while a gateway is updated."""
    ours = [Family("inference_sessions", "gauge", (), [((), 2)])]
    theirs = [Family("inference_sessions", "gauge", ("engine",), [(("a",), 5)]), Family("inference_new", "gauge", (), [((), 1)])]
    text = prometheus_text(merged([ours, theirs])).decode()
    assert "\ninference_sessions 2\n" in text
    assert "inference_new" not in text


def test_a_metric_must_stand_in_the_table() -> None:
    """Names live in one place; a new one is added there first."""
    with pytest.raises(KeyError, match="METRICS"):
        MetricSet().counter("inference_invented_total")


def test_every_metric_of_the_table_has_a_sentence() -> None:
    """V01: the table is the documentation."""
    assert all(description and unit in {"", "s"} for unit, description in METRICS.values())


def test_metrics_are_served_to_prometheus() -> None:
    """V03: /metrics over HTTP on a port of its own; other paths are not found."""
    telemetry = Telemetry("sample", TelemetrySettings(prometheus_port=0))
    try:
        telemetry.metrics.gauge("inference_leader", "role").set(1, "coordinator")
        with urllib.request.urlopen(f"http://{telemetry.prometheus_address}/metrics", timeout=WAIT_S) as response:
            body, content_type = response.read().decode(), response.headers["content-type"]
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://{telemetry.prometheus_address}/", timeout=WAIT_S)
        caught.value.close()
    finally:
        telemetry.close()

    assert 'inference_leader{role="coordinator"} 1' in body
    assert content_type.startswith("text/plain")
    assert caught.value.code == 404


def test_a_taken_metrics_port_is_one_sentence() -> None:
    """Bad input: the port and the key to change are named."""
    first = Telemetry("sample", TelemetrySettings(prometheus_port=0))
    try:
        port = int(first.prometheus_address.rpartition(":")[2])
        with pytest.raises(ServerError, match=f"port {port} .*prometheus_port"):
            Telemetry("sample", TelemetrySettings(prometheus_port=port))
    finally:
        first.close()


@dataclass
class Collector:
    """What an OTLP collector was sent."""

    spans: list[Span] = field(default_factory=list)
    metrics: dict[str, Metric] = field(default_factory=dict)
    services: set[str] = field(default_factory=set)
    address: str = ""


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            self._collector.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            self._collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self._collector.metrics.update({metric.name: metric for metric in scope.metrics})
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A real OTLP collector over gRPC on loopback."""
    found = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(found), server)  # type: ignore[no-untyped-call]
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(found), server)  # type: ignore[no-untyped-call]
    found.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield found
    server.stop(grace=None).wait()


def test_spans_reach_a_collector_with_their_parent(collector: Collector) -> None:
    """V02, V03: a span recorded after the fact keeps the caller's trace, its times, attributes and failure."""
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    telemetry = Telemetry("gateway", TelemetrySettings(otlp_endpoint=collector.address))
    start = time.time_ns()

    telemetry.record_span(
        "chat demo",
        traceparent=f"00-{trace_id}-{parent_id}-01",
        start_ns=start,
        end_ns=start + 5_000_000,
        attributes={"gen_ai.request.model": "demo", "gen_ai.usage.output_tokens": 7},
        error="ENGINE_LOST",
    )
    with telemetry.rpc_span("/inference_runtime.v1.EngineService/Execute", {"traceparent": f"00-{trace_id}-{parent_id}-01"}):
        pass
    telemetry.close()

    by_name = {span.name: span for span in collector.spans}
    chat, call = by_name["chat demo"], by_name["inference_runtime.v1.EngineService/Execute"]
    assert {chat.trace_id.hex(), call.trace_id.hex()} == {trace_id}
    assert {chat.parent_span_id.hex(), call.parent_span_id.hex()} == {parent_id}
    assert chat.end_time_unix_nano - chat.start_time_unix_nano == 5_000_000
    assert {a.key for a in chat.attributes} == {"gen_ai.request.model", "gen_ai.usage.output_tokens"}
    assert (chat.status.code, chat.status.message) == (2, "ENGINE_LOST")
    assert collector.services == {"inference-gateway"}


@pytest.mark.parametrize("outside", ["", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"])
def test_a_span_that_was_handed_on_keeps_its_id(collector: Collector, outside: str) -> None:
    """V02: the next hop's span hangs below it, whether or not somebody outside began the trace."""
    telemetry = Telemetry("gateway", TelemetrySettings(otlp_endpoint=collector.address))

    span = telemetry.begin_span(outside)
    for name, parent, own in (("engine", span, ""), ("gateway", outside, span), ("another", "", "")):
        telemetry.record_span(name, traceparent=parent, span=own, start_ns=1, end_ns=2, attributes={})
    telemetry.close()

    by_name = {s.name: s for s in collector.spans}
    gateway, engine = by_name["gateway"], by_name["engine"]
    assert engine.parent_span_id == gateway.span_id
    assert engine.trace_id == gateway.trace_id
    assert gateway.parent_span_id.hex() == outside[36:52]
    assert not outside or gateway.trace_id.hex() == outside[3:35]
    assert by_name["another"].trace_id != gateway.trace_id
    assert by_name["another"].span_id != gateway.span_id


def test_what_is_not_sampled_is_handed_on_as_such(collector: Collector) -> None:
    """V02: all hops of a trace record it, or none does."""
    telemetry = Telemetry("gateway", TelemetrySettings(otlp_endpoint=collector.address, trace_ratio=0.0))
    span = telemetry.begin_span("")
    telemetry.record_span("gateway", traceparent="", span=span, start_ns=1, end_ns=2, attributes={})
    telemetry.close()

    assert span.endswith("-00")
    assert not collector.spans


def test_metrics_reach_a_collector_as_what_they_are(collector: Collector) -> None:
    """V03: OTLP gets the same numbers as Prometheus, as sums, gauges and histograms, at the latest when the process ends."""
    telemetry = Telemetry("gateway", TelemetrySettings(otlp_endpoint=collector.address, metric_interval_s=3600))
    telemetry.metrics.counter("inference_requests_total", "deployment", "outcome").inc("demo", "ok", by=3)
    telemetry.metrics.gauge("inference_running", "deployment").set(4, "demo")
    telemetry.metrics.histogram("gen_ai_server_time_to_first_token_seconds", "deployment").observe(0.2, "demo")
    telemetry.close()

    total = collector.metrics["inference_requests_total"].sum
    histogram = collector.metrics["gen_ai_server_time_to_first_token_seconds"].histogram.data_points[0]
    assert total.is_monotonic
    assert 3 in (total.data_points[0].as_double, total.data_points[0].as_int)
    assert {a.key: a.value.string_value for a in total.data_points[0].attributes} == {"deployment": "demo", "outcome": "ok"}
    assert collector.metrics["inference_running"].gauge.data_points
    assert (histogram.count, round(histogram.sum, 6)) == (1, 0.2)
    assert sum(histogram.bucket_counts) == 1


def test_without_a_collector_no_span_is_built() -> None:
    """A process without an exporter pays nothing for spans."""
    telemetry = Telemetry("gateway", TelemetrySettings())
    telemetry.record_span("x", traceparent="", start_ns=0, end_ns=1, attributes={})
    telemetry.close()

    assert telemetry.tracer is None


def test_parts_that_ask_for_one_metric_share_it() -> None:
    """A session to each engine counts in one series; two blocks of one name are not valid in Prometheus' format."""
    metrics = MetricSet()
    first, second = metrics.gauge("inference_sessions"), metrics.gauge("inference_sessions")
    first.inc()
    second.inc()
    text = metrics.prometheus_text().decode()
    assert text.count("# TYPE inference_sessions gauge") == 1
    assert "\ninference_sessions 2" in text
    with pytest.raises(KeyError, match="other labels"):
        metrics.gauge("inference_sessions", "engine")
