"""Metrics of one process: counted in plain dictionaries, read as Prometheus' text or OpenTelemetry's data points."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from inference_runtime import __version__
from inference_runtime.telemetry.names import LARGEST, METRICS

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricsData
    from opentelemetry.sdk.resources import Resource

__all__ = [
    "PROMETHEUS_CONTENT_TYPE",
    "SECONDS_BUCKETS",
    "Counter",
    "Family",
    "Gauge",
    "Histogram",
    "MetricSet",
    "merged",
    "prometheus_text",
]

Labels = tuple[str, ...]
PROMETHEUS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Upper bounds of histogram buckets, seconds.
SECONDS_BUCKETS: tuple[float, ...] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip


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


@dataclass(slots=True)
class Family:
    """All series of one metric, at one moment: a number each, or the counts of a histogram and their sum."""

    name: str
    kind: str  #: "counter", "gauge" or "histogram"
    labels: Labels
    series: list[tuple[Labels, float | list[float]]]


def merged(parts: Iterable[Sequence[Family]]) -> list[Family]:
    """The metrics of several processes as those of one. Counters and histograms add up; for gauges see `LARGEST`.

    A family that another version of a process shows under another form is left out of the sum.
    """
    whole: dict[str, Family] = {}
    found: dict[str, dict[Labels, float | list[float]]] = {}
    for part in parts:
        for family in part:
            first = whole.setdefault(family.name, family)
            if (first.kind, first.labels) != (family.kind, family.labels):
                continue
            series = found.setdefault(family.name, {})
            for labels, value in family.series:
                series[labels] = _together(family.name, series.get(labels), value)
    return [Family(f.name, f.kind, f.labels, list(found[f.name].items())) for f in whole.values()]


def _together(name: str, one: float | list[float] | None, other: float | list[float]) -> float | list[float]:
    if one is None:
        return other
    if isinstance(one, list):
        return [a + b for a, b in zip(one, other, strict=True)] if isinstance(other, list) and len(one) == len(other) else one
    if isinstance(other, list):
        return one
    return max(one, other) if name in LARGEST else one + other


def prometheus_text(families: Iterable[Family]) -> bytes:
    """All series in Prometheus' text format, version 0.0.4."""
    lines: list[str] = []
    for family in families:
        if family.name not in METRICS:
            continue  # of another version of a process
        name = family.name
        lines += [f"# HELP {name} {METRICS[name][1]}", f"# TYPE {name} {family.kind}"]
        for labels, value in family.series:
            if isinstance(value, list):
                total = 0.0
                for bound, count in zip((*map(str, SECONDS_BUCKETS), "+Inf"), value, strict=False):
                    total += count
                    lines.append(f"{name}_bucket{_labels((*family.labels, 'le'), (*labels, bound))} {total:.0f}")
                lines.append(f"{name}_sum{_labels(family.labels, labels)} {value[-1]!r}")
                lines.append(f"{name}_count{_labels(family.labels, labels)} {total:.0f}")
            else:
                lines.append(f"{name}{_labels(family.labels, labels)} {value!r}")
    return ("\n".join(lines) + "\n").encode()


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
        return prometheus_text(self.families())

    def families(self) -> list[Family]:
        """All series as they are now. May be called from any thread."""
        found = []
        for metric in list(self._metrics):
            kind = "histogram" if isinstance(metric, Histogram) else "gauge" if isinstance(metric, Gauge) else "counter"
            values: dict[Labels, Any] = {**metric.values}
            series = [(labels, value[:] if isinstance(value, list) else value) for labels, value in values.items()]
            found.append(Family(metric.name, kind, metric.labels, series))
        return found

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
