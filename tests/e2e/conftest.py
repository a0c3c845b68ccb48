"""One cluster for every test that only reads or asks; tests that break things start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.kit import ECHO, Up, project

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder starts real processes."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`inferctl up` as the README says, with deployment `demo`, and scripted deployments beside it: `echo` answers at once,
    `slow` 20 ms after 20 ms."""
    folder = tmp_path_factory.mktemp("up")
    with Up(folder) as running:
        running.wait_serving()
        slow = {**ECHO, "name": "slow", "runtime_config": {"pace_s": 0.02}}
        applied = running.cli("apply", "--wait", "-f", str(project(folder / "scripted.toml", ECHO, slow)))
        assert applied.returncode == 0, applied.stderr
        yield running
