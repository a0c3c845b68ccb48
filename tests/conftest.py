"""What holds for every test: in CI a test may not be skipped for want of something that CI could install."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest

# A shell that starts the tests in the background hands down a SIGINT that is ignored, and every program under test would inherit
# that: no Ctrl-C would reach it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"skipped, which CI does not allow: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip is a failure in CI, except where a GPU is what is missing."""
    report = yield
    if os.environ.get("CI") and report.skipped and item.get_closest_marker("gpu") is None:
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """So is a module that skips itself."""
    report = yield
    if os.environ.get("CI") and report.skipped:
        _fail(report)
    return report
