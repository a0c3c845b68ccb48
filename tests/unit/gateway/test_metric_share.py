"""One scrape shows all workers of a gateway, and no counter falls."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference_runtime.telemetry import MetricSet
from services.gateway.metric_share import SUFFIX, MetricShare, text_of_all


class Worker:
    """A worker's metrics and its part of them all."""

    def __init__(self, folder: Path, number: int) -> None:
        self.metrics = MetricSet()
        self.requests = self.metrics.counter("inference_requests_total", "deployment", "outcome")
        self.sessions = self.metrics.gauge("inference_sessions")
        self.seconds = self.metrics.histogram("gen_ai_server_request_duration_seconds", "deployment")
        self.share = MetricShare(self.metrics, folder / f"{number}{SUFFIX}")

    def serve(self, requests: int) -> None:
        """Count some."""
        self.requests.inc("demo", "ok", by=requests)
        for _ in range(requests):
            self.seconds.observe(0.2, "demo")


def value(text: bytes, series: str) -> float:
    """Of one series; 0 for none."""
    found = [line for line in text.decode().splitlines() if line.startswith((series + " ", series + "{"))]
    assert len(found) <= 1
    return float(found[0].rsplit(" ", 1)[1]) if found else 0.0


def test_whoever_is_asked_answers_for_all(tmp_path: Path) -> None:
    one, two = Worker(tmp_path, 0), Worker(tmp_path, 1)
    one.serve(3)
    two.serve(4)
    one.sessions.set(2)
    two.sessions.set(5)
    one.share.text()
    for text in (two.share.text(), one.share.text(), text_of_all(tmp_path)):
        assert value(text, "inference_requests_total") == 7
        assert value(text, "gen_ai_server_request_duration_seconds_count") == 7
        assert value(text, "inference_sessions") == 7
        assert text.count(b"# TYPE inference_requests_total counter") == 1


def test_what_one_worker_has_shown_of_itself_the_next_one_shows_too(tmp_path: Path) -> None:
    """Prometheus would take a smaller value for a restart, and the difference for new requests."""
    one, two = Worker(tmp_path, 0), Worker(tmp_path, 1)
    shown = 0.0
    for turn in range(20):
        worker = (one, two)[turn % 2]
        worker.serve(5)
        now = value(worker.share.text(), "inference_requests_total")
        assert now >= shown
        shown = now
    assert shown == 100


def test_a_worker_that_takes_a_dead_ones_place_goes_on_from_its_counters(tmp_path: Path) -> None:
    dead, other = Worker(tmp_path, 0), Worker(tmp_path, 1)
    dead.serve(10)
    dead.sessions.set(9)
    dead.share.text()
    other.share.text()
    heir = Worker(tmp_path, 0)
    heir.serve(1)
    for text in (heir.share.text(), other.share.text()):
        assert value(text, "inference_requests_total") == 11
        assert value(text, "gen_ai_server_request_duration_seconds_count") == 11
        assert value(text, "inference_sessions") == 0


def test_gauges_of_a_worker_that_writes_no_more_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dead or stands still; what it counted has happened all the same."""
    gone, other = Worker(tmp_path, 0), Worker(tmp_path, 1)
    gone.serve(2)
    gone.sessions.set(3)
    gone.share.text()
    monkeypatch.setattr("services.gateway.metric_share.STALE_S", -1.0)
    text = other.share.text()
    assert value(text, "inference_requests_total") == 2
    assert value(text, "inference_sessions") == 0


def test_a_page_that_cannot_be_read_or_written_hides_nothing_else(tmp_path: Path) -> None:
    worker = Worker(tmp_path, 0)
    worker.serve(1)
    (tmp_path / f"1{SUFFIX}").write_bytes(b"[1, {}]")
    assert value(worker.share.text(), "inference_requests_total") == 1
    (tmp_path / "0.draft").mkdir()
    worker.serve(1)
    assert value(worker.share.text(), "inference_requests_total") == 2
