"""Logs, traces and metrics of every process, and the table of their names.

Logs are one event per fact: a constant message and fields. Traces and metrics are OpenTelemetry's; names follow its GenAI
conventions where they exist. Metrics are pulled by Prometheus (`/metrics`) and pushed over OTLP where an endpoint is set. A
process without either pays nothing for spans.
"""

from inference_runtime.telemetry.logs import MAX_FIELD_CHARS, Logger, get_logger
from inference_runtime.telemetry.metrics import (
    PROMETHEUS_CONTENT_TYPE,
    Counter,
    Family,
    Gauge,
    Histogram,
    MetricSet,
    merged,
    prometheus_text,
)
from inference_runtime.telemetry.names import (
    ATTR_FINISH,
    ATTR_INPUT_TOKENS,
    ATTR_MODEL,
    ATTR_OPERATION,
    ATTR_OUTPUT_TOKENS,
    ATTR_REPLICA,
    ATTR_REQUEST_ID,
    ATTR_RESUMPTIONS,
    ATTR_SYSTEM,
    METRICS,
)
from inference_runtime.telemetry.process import Telemetry, setup_telemetry

__all__ = [
    "ATTR_FINISH",
    "ATTR_INPUT_TOKENS",
    "ATTR_MODEL",
    "ATTR_OPERATION",
    "ATTR_OUTPUT_TOKENS",
    "ATTR_REPLICA",
    "ATTR_REQUEST_ID",
    "ATTR_RESUMPTIONS",
    "ATTR_SYSTEM",
    "MAX_FIELD_CHARS",
    "METRICS",
    "PROMETHEUS_CONTENT_TYPE",
    "Counter",
    "Family",
    "Gauge",
    "Histogram",
    "Logger",
    "MetricSet",
    "Telemetry",
    "get_logger",
    "merged",
    "prometheus_text",
    "setup_telemetry",
]
