"""A real engine is killed with SIGKILL at every token of an answer of 64 tokens in two choices: nobody can tell from it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest

from bench.faults.metrics import metrics_of
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import process_state
from inference_runtime.testing.scripted import expected_text, user_says

PROMPT, SEED, TOKENS = "Tell me about doors.", 11, 64
#: Late in the second choice, and no part of the first.
WORDS = expected_text(user_says(PROMPT), SEED, 1, TOKENS).split(" ")
STOP = f"{WORDS[57][-1]} {WORDS[58]} {WORDS[59][:4]}"
FIRST = expected_text(user_says(PROMPT), SEED, 0, TOKENS)
TRUTH = {0: (FIRST, "length"), 1: (expected_text(user_says(PROMPT), SEED, 1, TOKENS).partition(STOP)[0], "stop")}
REQUEST = {
    "model": "echo",
    "messages": [{"role": "user", "content": PROMPT}],
    "seed": SEED,
    "max_tokens": TOKENS,
    "n": 2,
    "stop": [STOP],
    "stream": True,
}


async def streamed(client: httpx.AsyncClient, at: int, then: Callable[[], None]) -> tuple[dict[int, tuple[str, str]], int]:
    """Text and finish reason of each choice, and how often the stream says that it went on elsewhere. Once the first choice has
    `at` tokens, `then` is called."""
    texts, finishes, resumed, called = {0: "", 1: ""}, {0: "", 1: ""}, 0, False
    async with client.stream("POST", "/v1/chat/completions", json=REQUEST) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            resumed += line.startswith(": resumed")
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
                finishes[choice["index"]] = choice["finish_reason"] or finishes[choice["index"]]
            if not called and texts[0].count(" word") >= at:
                called = True
                then()
    return {k: (texts[k], finishes[k]) for k in texts}, resumed


async def reached(cluster: Cluster, engines: int) -> None:
    """Return once the gateway has sessions to so many engines: etcd still holds what the last life of an engine wrote."""
    address = cluster.http.removeprefix("http://")
    async with asyncio.timeout(60):
        while True:
            if sum(value for name, _, value in await metrics_of(address) if name == "inference_sessions") == engines:
                return
            await asyncio.sleep(0.05)


async def killed_at(cluster: Cluster, client: httpx.AsyncClient, victim: str, k: int) -> bool:
    """Kill an engine when the first choice has k tokens. Returns whether that met a choice, which went on elsewhere: the second
    one is over before the first."""
    await cluster.wait_serving("echo")
    await reached(cluster, 2)
    pid = cluster.pids()[victim]
    answer, resumed = await streamed(client, k, lambda: cluster.kill(victim))
    assert process_state(pid) == "", f"{victim} was not killed at token {k}"
    assert answer == TRUTH, f"{victim} killed at token {k}"
    await cluster.restart(victim)
    return resumed > 0


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_trap_08_killed_at_every_token_of_two_choices() -> None:
    """Trap 8: n=2, a stop string and a seed; the engines take turns in dying, and each death met a choice that had begun."""
    assert STOP not in FIRST
    # Leases outlast every restart: the replicas stay where they are.
    async with Cluster(engines=2, lease_ttl_s=60) as cluster, httpx.AsyncClient(base_url=cluster.http, timeout=60) as client:
        options = {"pace_s": 0.02}
        await cluster.apply(
            {"name": "echo", "model": "scripted", "runtime": "scripted", "replicas": 2, "runtime_config": options}
        )
        for k in range(TOKENS):
            met = False
            for victim in ("engine", "engine-2") if k % 2 else ("engine-2", "engine"):
                met = met or await killed_at(cluster, client, victim, k)
            # Nothing to go on from at the first token; at the last ones the answer may be over before the signal is there.
            assert met or k == 0 or k > TOKENS - 4, f"no choice was on an engine that was killed at token {k}"
