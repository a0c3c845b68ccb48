"""Starting a singleton: its settings, and what it says when it cannot."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from inference_runtime.settings import ServiceSettings, load_settings
from inference_runtime.testing.etcd import EtcdProcess
from services.coordinator.settings import CoordinatorSettings
from services.deployment_manager.settings import DeploymentManagerSettings
from services.metrics.settings import MetricsSettings
from tests.integration.control.kit import ROLES

SETTINGS: dict[str, type[ServiceSettings]] = {
    "coordinator": CoordinatorSettings,
    "deployment_manager": DeploymentManagerSettings,
    "metrics": MetricsSettings,
}


def start(role: str, *argv: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a service that is expected to give up."""
    prefix = f"INFERENCE_{role.upper()}__"
    environment = {**os.environ, **{prefix + key: value for key, value in settings.items()}}
    return subprocess.run(
        [sys.executable, "-m", f"services.{role}", *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def sentence(role: str, result: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr that is not a log line."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("inference-")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert lines[0].startswith(f"inference-{role.replace('_', '-')}: ")
    return lines[0]


@pytest.mark.parametrize("role", ROLES)
def test_the_example_shows_the_defaults(role: str) -> None:
    """What the file says is what holds without it."""
    path = Path("services") / role / "example.toml"
    document = tomllib.loads(path.read_text())

    shown, default = load_settings(SETTINGS[role], ["--config", str(path)]), load_settings(SETTINGS[role], [])
    assert shown.model_dump() == default.model_dump()
    assert set(SETTINGS[role].model_fields) == document.keys(), "every setting is in it"


@pytest.mark.parametrize("role", ROLES)
def test_an_unknown_setting_is_one_sentence(role: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("gracee_s = 1\n")
    result = start(role, "--config", str(path))

    assert result.returncode == 2
    assert "did you mean 'grace_s'?" in sentence(role, result)


@pytest.mark.parametrize("role", ROLES)
def test_an_etcd_that_does_not_answer_is_one_sentence(role: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    more = {"STATE_DIR": str(tmp_path)} if role == "metrics" else {}
    result = start(role, ETCD__ENDPOINTS=f"127.0.0.1:{port}", **more)

    assert result.returncode == 1
    assert f"127.0.0.1:{port}" in sentence(role, result)


def test_a_taken_port_is_one_sentence(etcd: EtcdProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = start("coordinator", ETCD__ENDPOINTS=etcd.endpoint, RPC__PORT=str(port))

    assert result.returncode == 1
    assert "the port is taken; choose another rpc.port" in sentence("coordinator", result)


def test_a_ledger_that_cannot_be_opened_is_one_sentence(etcd: EtcdProcess, tmp_path: Path) -> None:
    (tmp_path / "usage.sqlite3").write_bytes(b"this is no database" * 1000)
    result = start("metrics", ETCD__ENDPOINTS=etcd.endpoint, STATE_DIR=str(tmp_path))

    assert result.returncode == 1
    assert "file is not a database" in sentence("metrics", result)
