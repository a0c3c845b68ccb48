"""The gateway among the real services: real engines, coordinator, deployment manager, metrics and etcd."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.scripted import expected_text, user_says

PROMPT = "Count the doors of this house."
TOKENS = 40


def body(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": PROMPT}], "seed": 5, "max_tokens": TOKENS, **fields}


def truth(tokens: int = TOKENS) -> str:
    """What the scripted runtime must answer."""
    return expected_text(user_says(PROMPT), seed=5, n=tokens)


async def streamed(client: httpx.AsyncClient, request: dict[str, Any], after: int = 0, then: Any = None) -> str:
    """The text of a stream that ends properly. After `after` pieces, `then` is called once."""
    text, pieces, done = "", 0, False
    async with client.stream("POST", "/v1/chat/completions", json={**request, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                pieces += 1
                if then is not None and pieces > after:
                    then()
                    then = None
    assert done
    return text


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """Two engines; `quick` answers at once, `slow` paces its tokens."""
    async with Cluster(engines=2, lease_ttl_s=3) as running:
        for name, options in (("quick", {}), ("slow", {"pace_s": 0.05})):
            spec = {"name": name, "model": "scripted", "runtime": "scripted", "replicas": 2, "runtime_config": options}
            await running.apply(spec)
        for name in ("quick", "slow"):
            await running.wait_serving(name)
        yield running


async def test_answers_are_the_models_to_the_letter_and_every_request_is_in_the_ledger(cluster: Cluster) -> None:
    """Traps 1 and 2: a request goes the whole way, unary and streamed, and is accounted for."""
    async with httpx.AsyncClient(base_url=cluster.http, timeout=30) as client:
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body("quick")) for _ in range(20)))
        assert {a.json()["choices"][0]["message"]["content"] for a in answers} == {truth()}
        assert {a.json()["usage"]["completion_tokens"] for a in answers} == {TOKENS}
        texts = await asyncio.gather(*(streamed(client, body("quick")) for _ in range(20)))
        assert set(texts) == {truth()}
        long = await client.post(
            "/v1/chat/completions", json=body("quick") | {"messages": [{"role": "user", "content": "x" * 50_000}]}
        )
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        refused = await client.post("/v1/chat/completions", json=body("quick", logprobs=True))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
    async with cluster.client() as sdk:
        async with asyncio.timeout(20):
            while True:
                usage = {u.deployment: u for u in await sdk.usage()}
                if "quick" in usage and usage["quick"].requests + usage["quick"].errors >= 42:
                    break
                await asyncio.sleep(0.1)
        assert usage["quick"].requests == 40
        assert usage["quick"].errors == 2
        assert usage["quick"].output_tokens == 40 * TOKENS


async def test_the_death_of_an_engine_in_mid_stream_costs_no_token(cluster: Cluster) -> None:
    async with httpx.AsyncClient(base_url=cluster.http, timeout=30) as client:
        kill = iter([lambda: cluster.kill("engine")])
        texts = await asyncio.gather(
            *(streamed(client, body("slow"), after=8, then=lambda: next(kill, lambda: None)()) for _ in range(12))
        )
        assert set(texts) == {truth()}
        assert (await client.post("/v1/chat/completions", json=body("quick"))).status_code == 200


async def choices_streamed(
    client: httpx.AsyncClient, request: dict[str, Any], after: int, then: Any
) -> dict[int, tuple[str, str]]:
    """Text and finish reason of each choice of a stream that ends properly. After `after` pieces, `then` is called once."""
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    pieces, done = 0, False
    async with client.stream("POST", "/v1/chat/completions", json={**request, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            done = done or line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            for choice in event["choices"]:
                assert choice["index"] not in finishes, "something followed the end of a choice"
                texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
                if choice["finish_reason"]:
                    finishes[choice["index"]] = choice["finish_reason"]
            pieces += 1
            if pieces == after:
                then()
    assert done
    return {k: (texts[k], finishes[k]) for k in texts}


async def test_the_death_of_an_engine_costs_no_token_of_any_choice(cluster: Cluster) -> None:
    """Trap 8 with n=2, a stop string and a seed: the choices lie on both engines, and one of these is killed in mid-stream."""
    second = expected_text(user_says(PROMPT), seed=5, choice=1, n=TOKENS)
    stop = second[-60:-40]
    assert stop not in truth()
    undisturbed = {0: (truth(), "length"), 1: (second.partition(stop)[0], "stop")}
    request = body("slow", n=2, stop=[stop])
    killed: list[int] = []

    def kill() -> None:
        if not killed:
            killed.append(1)
            cluster.kill("engine")

    async with httpx.AsyncClient(base_url=cluster.http, timeout=30) as client:
        whole = asyncio.create_task(client.post("/v1/chat/completions", json=request))
        streams = await asyncio.gather(*(choices_streamed(client, request, 15, kill) for _ in range(8)))
        assert streams == [undisturbed] * 8
        answer = (await whole).json()
        assert {c["index"]: (c["message"]["content"], c["finish_reason"]) for c in answer["choices"]} == undisturbed
        metrics = (await client.get("/metrics")).text
    resumed = [line for line in metrics.splitlines() if line.startswith('inference_resumptions_total{deployment="slow"')]
    assert resumed, "the fault did not take effect: no choice was resumed"
    assert all('outcome="resumed"' in line for line in resumed)
    async with cluster.client() as sdk, asyncio.timeout(20):
        while True:
            usage = {u.deployment: u for u in await sdk.usage()}
            if "slow" in usage and usage["slow"].requests >= 9:
                break
            await asyncio.sleep(0.1)
    assert (usage["slow"].requests, usage["slow"].errors) == (9, 0)
    assert usage["slow"].output_tokens == 9 * answer["usage"]["completion_tokens"]
    assert usage["slow"].input_tokens == 9 * answer["usage"]["prompt_tokens"]


async def test_requests_go_on_without_control_plane_and_etcd(cluster: Cluster) -> None:
    async with httpx.AsyncClient(base_url=cluster.http, timeout=30) as client:
        for name in ("coordinator", "deployment_manager", "metrics", "etcd"):
            cluster.kill(name)
        for _ in range(3):
            assert await streamed(client, body("slow")) == truth()
            answer = await client.post("/v1/chat/completions", json=body("quick"))
            assert answer.json()["choices"][0]["message"]["content"] == truth()
        assert (await client.get("/readyz")).status_code == 200
