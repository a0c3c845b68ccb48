"""C-01: the wall clock is for people. No lease, limit, deadline or budget may go by it: each use stands here, with why."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Files that may read the wall clock, and what they do with it. None of it decides anything.
SHOWN = {
    "libs/inference_runtime/runners/torch_lm/chat_template.py": "templates print the date",
    "libs/inference_runtime/telemetry/metrics.py": "time stamps of exported metrics",
    "services/deployment_manager/catalog.py": "when a deployment was made and changed",
    "services/deployment_manager/reconcile.py": "since when a deployment is in its state",
    "services/engine/measures.py": "ends of spans",
    "services/engine/node.py": "when an engine started",
    "services/engine/stream.py": "beginnings of spans",
    "services/gateway/choices.py": "when a request was accepted, in answers and usage records",
    "services/gateway/request.py": "when a request was accepted, in answers and usage records",
    "services/gateway/worker.py": "`created` of /v1/models",
}
WALL = {
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "CLOCK_REALTIME"),
    ("time", "ctime"),
    ("time", "localtime"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
}


def sources() -> list[Path]:
    """What runs in production: not the test kit, not generated code."""
    found = [*(ROOT / "libs").rglob("*.py"), *(ROOT / "services").rglob("*.py")]
    left_out = ("libs/inference_runtime/testing/", "libs/inference_runtime/v1/", "libs/inference_runtime/coordination/etcd_api/")
    return [path for path in found if not path.relative_to(ROOT).as_posix().startswith(left_out)]


def uses_of_the_wall_clock(source: str) -> list[int]:
    """Lines that read it."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if (name, node.attr) in WALL:
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            lines += [node.lineno for alias in node.names if ("time", alias.name) in WALL]
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "import time\nx = time.time()",
        "import time\nx = time.clock_gettime(time.CLOCK_REALTIME)",
        "from time import time\nx = time()",
        "import datetime\nx = datetime.datetime.now()",
        "from datetime import datetime\nx = datetime.utcnow()",
        "from datetime import date\nx = date.today()",
    ],
)
def test_a_use_is_seen(source: str) -> None:
    assert uses_of_the_wall_clock(source)


def test_clocks_that_nobody_can_set_are_no_use() -> None:
    assert uses_of_the_wall_clock("import time\nx = time.monotonic() + time.clock_gettime(time.CLOCK_BOOTTIME)") == []


def test_nothing_goes_by_the_wall_clock_but_what_people_are_shown() -> None:
    found = {}
    for path in sources():
        if lines := uses_of_the_wall_clock(path.read_text(encoding="utf-8")):
            found[path.relative_to(ROOT).as_posix()] = lines

    assert {name: lines for name, lines in found.items() if name not in SHOWN} == {}
    assert set(SHOWN) - set(found) == set(), "these read it no more: take them off the list"
