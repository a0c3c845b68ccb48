"""`inferctl get -o`, `describe` and `scale` as they are typed, against a cluster of real processes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference_runtime.cli.scale import scale
from inference_runtime.errors import BadRequest
from inference_runtime.testing.cluster import Cluster

INFERCTL = str(Path(sys.executable).with_name("inferctl"))
SPEC = {"name": "echo", "model": "scripted", "runtime": "scripted"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
async def echo(cluster: Cluster) -> None:
    """One replica of `echo` serves."""
    await cluster.apply(SPEC)
    await cluster.wait_serving("echo")


async def inferctl(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    command = [INFERCTL, *words, "--etcd", ",".join(cluster.etcd)]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)


async def as_json(cluster: Cluster, *words: str) -> Any:
    done = await inferctl(cluster, *words, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.usefixtures("echo")
async def test_each_kind_is_described_with_its_state_and_its_replicas(cluster: Cluster) -> None:
    shown = await inferctl(cluster, "describe", "deployment", "echo")
    assert shown.returncode == 0, shown.stderr
    assert "State:        serving since " in shown.stdout
    assert "Ready:        1 of 1 replicas" in shown.stdout

    document = await as_json(cluster, "describe", "deployment", "echo")
    replica = document["replicas"][0]["replica"]
    assert replica["id"] in shown.stdout

    engine = await inferctl(cluster, "describe", "engine", replica["engine_id"])
    assert "State:        ready" in engine.stdout
    assert replica["id"] in engine.stdout

    one = await inferctl(cluster, "describe", "replica", replica["id"])
    assert f"Engine:       {replica['engine_id']} at {replica['address']}" in one.stdout
    assert "State:        serving" in one.stdout


@pytest.mark.usefixtures("echo")
async def test_yaml_holds_what_json_holds(cluster: Cluster) -> None:
    yaml: Any = pytest.importorskip("yaml")
    done = await inferctl(cluster, "get", "engines", "-o", "yaml")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == await as_json(cluster, "get", "engines")


async def test_a_refused_deployment_names_each_engine_with_its_reason(cluster: Cluster) -> None:
    await cluster.apply(SPEC | {"name": "picky", "node_labels": {"rack": "r9"}})
    async with cluster.client() as client, asyncio.timeout(60):
        while True:
            if (await client.deployment("picky")).status.reason.startswith("no engine takes it"):
                break
            await asyncio.sleep(0.05)
        engine = (await client.engines())[0].id
    shown = await inferctl(cluster, "describe", "deployment", "picky")
    assert f"no engine takes it: {engine}: its node has no label rack=r9" in shown.stdout
    assert "State:        pending" in shown.stdout


@pytest.mark.parametrize("kind", ["deployment", "engine", "replica"])
async def test_what_is_not_there_is_one_sentence(cluster: Cluster, kind: str) -> None:
    done = await inferctl(cluster, "describe", kind, "nobody")
    assert done.returncode == 1
    assert "'nobody'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("echo")
async def test_scale_changes_the_number_of_replicas_once(cluster: Cluster) -> None:
    before = (await as_json(cluster, "describe", "deployment", "echo"))["deployment"]
    done = await inferctl(cluster, "scale", "echo", "--replicas", "2")
    assert done.returncode == 0, done.stderr
    assert "1 -> 2 replicas" in done.stdout
    await cluster.wait_serving("echo")

    after = (await as_json(cluster, "describe", "deployment", "echo"))["deployment"]
    assert after["status"]["ready_replicas"] == 2
    assert after["spec"] == before["spec"] | {"replicas": 2}
    assert "unchanged" in (await inferctl(cluster, "scale", "echo", "--replicas", "2")).stdout


@pytest.mark.usefixtures("echo")
async def test_an_order_for_another_generation_changes_nothing(cluster: Cluster) -> None:
    async with cluster.client() as client:
        found = await client.deployment("echo")
        with pytest.raises(BadRequest) as refused:
            await client.apply(SPEC | {"replicas": 3}, expected_generation=found.generation - 1 or 99)
        assert refused.value.param == "expected_generation"
        assert (await client.deployment("echo")).generation == found.generation


@pytest.mark.usefixtures("echo")
async def test_scaling_and_other_changes_at_once_lose_neither(cluster: Cluster) -> None:
    async with cluster.client() as client:
        limits = {"serving": {"queue_capacity": 7}}
        await asyncio.gather(client.apply(SPEC | limits), scale(client, "echo", 2), scale(client, "echo", 2))
        found = await scale(client, "echo", 2)
        assert (await client.deployment("echo")).spec.serving.queue_capacity == 7
        assert found.generation == (await client.deployment("echo")).generation


async def test_scaling_what_is_not_there_is_one_sentence(cluster: Cluster) -> None:
    done = await inferctl(cluster, "scale", "nobody", "--replicas", "2")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("echo")
async def test_a_rollout_is_watched_until_it_serves(cluster: Cluster) -> None:
    applied = await cluster.apply(SPEC | {"serving": {"max_context_tokens": 64}})
    watched = await inferctl(cluster, "rollout", "status", "echo", "--watch")
    assert watched.returncode == 0, watched.stderr
    assert watched.stdout.splitlines()[-1] == f"deployment echo: generation {applied.generation}, serving, 1 of 1 replicas"
    assert (await inferctl(cluster, "rollout", "status", "echo")).stdout.splitlines() == watched.stdout.splitlines()[-1:]


async def test_the_status_of_what_cannot_be_placed_says_why(cluster: Cluster) -> None:
    await cluster.apply(SPEC | {"name": "heavy", "accelerators": 64})
    async with cluster.client() as client, asyncio.timeout(60):
        while True:
            if (await client.deployment("heavy")).status.reason.startswith("no engine takes it"):
                break
            await asyncio.sleep(0.05)
    done = await inferctl(cluster, "rollout", "status", "heavy")
    assert done.returncode == 0
    assert "pending, 0 of 1 replicas: no engine takes it" in done.stdout


async def test_the_logs_of_a_running_cluster_are_found(cluster: Cluster) -> None:
    command = [INFERCTL, "logs", "coordinator", "--state-dir", str(cluster.folder)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    written = (cluster.folder / "logs" / "coordinator.log").read_text().splitlines()
    assert done.stdout
    assert set(done.stdout.splitlines()) <= set(written)
