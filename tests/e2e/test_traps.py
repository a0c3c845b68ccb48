"""What the original left unconnected, shown connected: from the HTTP door to the last service and back."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from inference_runtime.errors import BadRequest, InferenceError
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.scripted import expected_text, user_says
from tests.e2e.kit import ECHO, Up


def http(url: str, body: object = None) -> tuple[int, bytes]:
    """Status and body of a request by hand, without any SDK."""
    data = json.dumps(body).encode() if body is not None else None
    try:
        with urlopen(Request(url, data, {"content-type": "application/json"}), timeout=60) as response:
            return response.status, response.read()
    except HTTPError as err:
        with err:
            return err.code, err.read()


def chat(up: Up, text: str, **more: Any) -> dict[str, Any]:
    """One answer of the scripted deployment."""
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], **more}
    status, answer = http(f"{up.http}/v1/chat/completions", body)
    assert status == 200, answer
    document: dict[str, Any] = json.loads(answer)
    return document


def test_trap_01_the_answer_has_the_models_text(up: Up) -> None:
    """Trap 1: not content "" with HTTP 200."""
    assert chat(up, "x", max_tokens=9)["choices"][0]["message"]["content"] == expected_text(user_says("x"), n=9)


def test_trap_02_the_curl_that_is_printed_works_without_further_wiring(up: Up) -> None:
    """Trap 2: engines are constructed from deployments and registered: a fresh `up` answers, with two replicas in the table."""
    replicas = json.loads(up.cli("get", "replicas", "-o", "json").stdout)

    assert {r["replica"]["deployment"] for r in replicas} >= {"demo", "echo"}
    assert {r["replica"]["state"] for r in replicas} == {"REPLICA_STATE_SERVING"}
    assert chat(up, "x", max_tokens=1)["choices"]


async def test_trap_03_a_request_is_dispatched_to_the_replica_that_was_chosen() -> None:
    """Trap 3: target and channel are not thrown away: with two engines, both get work, and the load they report is of it."""
    async with Cluster(engines=2) as cluster:
        await cluster.apply({**ECHO, "replicas": 2, "runtime_config": {"pace_s": 0.02}})
        await cluster.wait_serving("echo")
        body = {"model": "echo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 100}
        async with asyncio.TaskGroup() as tasks, cluster.client() as client:
            asked = [tasks.create_task(asyncio.to_thread(http, f"{cluster.http}/v1/chat/completions", body)) for _ in range(8)]
            async with asyncio.timeout(20):
                while sum(load.running > 0 for _, load in await client.replicas("echo")) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    assert {task.result()[0] for task in asked} == {200}


async def test_trap_06_every_request_is_counted_once_and_load_placement_and_metrics_are_alive() -> None:
    """Trap 6, B04: usage reaches the metrics service, load reaches the coordinator, and /metrics shows both sides."""
    async with Cluster() as cluster:
        await cluster.apply(ECHO)
        await cluster.wait_serving("echo")
        body = {"model": "echo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 10}
        for stream in (False, True, False, True):
            status, _ = http(f"{cluster.http}/v1/chat/completions", {**body, "stream": stream})
            assert status == 200
        refused, _ = http(f"{cluster.http}/v1/chat/completions", {**body, "max_tokens": -1})
        exposed = http(f"{cluster.http}/metrics")[1].decode()
        async with cluster.client() as client:
            deadline = time.monotonic() + 20
            while not (usage := await client.usage("echo")) or usage[0].requests < 4:
                assert time.monotonic() < deadline, usage

    assert refused == 400
    assert (usage[0].requests, usage[0].output_tokens) == (4, 40)
    assert usage[0].input_tokens > 0
    assert 'inference_requests_total{deployment="echo",outcome="ok"} 4' in exposed
    assert 'inference_tokens_out_total{deployment="echo"} 40' in exposed
    assert "gen_ai_server_time_to_first_token_seconds_count" in exposed


async def test_trap_07_deployments_survive_the_death_of_everything_that_knew_them() -> None:
    """Trap 7: state is in etcd, on disk: every process is killed; after a restart the deployment serves without being applied."""
    async with Cluster(lease_ttl_s=2.0) as cluster:
        await cluster.apply(ECHO)
        await cluster.wait_serving("echo")
        names = list(cluster.pids())
        for name in reversed(names):
            cluster.kill(name)
        for name in names:
            await cluster.restart(name)
        await cluster.wait_serving("echo")
        status, answer = http(
            f"{cluster.http}/v1/chat/completions",
            {"model": "echo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
        )

    assert status == 200
    assert json.loads(answer)["choices"][0]["message"]["content"] == expected_text(user_says("x"), n=3)


async def test_trap_32_a_deployment_leaves_pending_and_a_bad_one_says_why() -> None:
    """Trap 32: Pending is not for ever: a specification that cannot work is refused with its key, or ends in Failed with the
    sentence of the runtime, never in an internal error."""
    async with Cluster() as cluster, cluster.client() as client:
        with pytest.raises(BadRequest, match="replicas"):
            await client.apply({**ECHO, "replicas": -1})
        with pytest.raises(BadRequest, match="pace_s"):
            await client.apply({**ECHO, "name": "typo", "runtime_config": {"pase_s": 1}})
        await cluster.apply({**ECHO, "name": "broken", "runtime_config": {"load_fails": True}})
        with pytest.raises(InferenceError, match="'broken' failed"):
            await client.wait_serving("broken", 30)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/healthz", None, 200, b""),
        ("/readyz", None, 200, b"ready"),
        ("/v1/models", None, 200, b'"echo"'),
        ("/metrics", None, 200, b"# TYPE inference_requests_total counter"),
        ("/v1/no/such/route", None, 404, b'"error"'),
        ("/v1/chat/completions", {"model": "none", "messages": [{"role": "user", "content": "x"}]}, 404, b"model_not_found"),
        ("/v1/chat/completions", {"model": "echo", "messages": "x"}, 400, b'"param"'),
    ],
)
def test_trap_36_the_gateways_other_doors(up: Up, path: str, body: object, status: int, words: bytes) -> None:
    """Trap 36: models, metrics, health and readiness exist; what is unknown is 404, what is wrong is 400."""
    seen, answer = http(f"{up.http}{path}", body)

    assert seen == status
    assert words in answer


@pytest.mark.parametrize("raw", [b"{", b"", b"[]", b'"x"', b"\xff\xfe", b"null"])
def test_a_body_that_is_no_request_is_400_and_the_gateway_lives(up: Up, raw: bytes) -> None:
    """Bad input: invalid JSON and JSON that is no object."""
    try:
        with urlopen(
            Request(f"{up.http}/v1/chat/completions", raw, {"content-type": "application/json"}), timeout=30
        ) as response:
            status, body = response.status, response.read()
    except HTTPError as err:
        with err:
            status, body = err.code, err.read()

    assert status == 400
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert chat(up, "x", max_tokens=1)["choices"]
