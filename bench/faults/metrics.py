"""What a process says at /metrics, as numbers."""

from __future__ import annotations

import re

from inference_runtime.cli.local import http_get
from inference_runtime.testing.faults import FaultNotVerified

__all__ = ["metrics_of", "parse"]

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse(text: str) -> list[tuple[str, dict[str, str], float]]:
    """Samples of Prometheus' text format: name, labels, value."""
    found = (_SAMPLE.fullmatch(line) for line in text.splitlines())
    return [(m["name"], dict(_LABEL.findall(m["labels"] or "")), float(m["value"])) for m in found if m is not None]


async def metrics_of(address: str) -> list[tuple[str, dict[str, str], float]]:
    """Samples of the process at host:port.

    Raises:
        FaultNotVerified: It does not tell.
    """
    status, body = await http_get(address, "/metrics")
    if status != 200:
        raise FaultNotVerified(f"{address} shows no metrics (status {status})")
    return parse(body.decode())
