"""Parts die while requests run: real processes, real signals, every fault seen to be there and every word counted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest

from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import Freeze, Kill, injected, process_state
from inference_runtime.testing.history import History
from tests.e2e.kit import ECHO

LEASE_TTL_S = 2.0
#: Words of each answer, and what makes an answer last half a second.
TOKENS, PACED = 25, {"pace_s": 0.02}
SINGLETONS = ("coordinator", "deployment_manager", "metrics")


class Traffic:
    """Streams that never pause: each worker asks again as soon as its answer has ended. Nothing is retried by the client."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self.history = History()
        self.failures: list[str] = []
        self.ended_at: list[float] = []

    async def _ask(self, client: openai.AsyncOpenAI, worker: int, number: int) -> None:
        text, seed = f"worker {worker} asks {number}", worker * 100_000 + number
        record = self.history.begin(text, seed=seed, tokens=TOKENS, name=text)
        try:
            stream = await client.chat.completions.create(
                model=self._model, messages=[{"role": "user", "content": text}], seed=seed, max_tokens=TOKENS, stream=True
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    record.text(choice.delta.content or "")
            record.end()
        except openai.OpenAIError as err:
            record.fail(str(err))
            self.failures.append(f"{text}: {err}")
        self.ended_at.append(time.monotonic())

    async def _work(self, client: openai.AsyncOpenAI, worker: int, stop: asyncio.Event) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            await self._ask(client, worker, number)

    @asynccontextmanager
    async def running(self, workers: int = 4) -> AsyncIterator[None]:
        """Traffic runs during the body; afterwards every stream has ended."""
        stop = asyncio.Event()
        async with openai.AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            async with asyncio.TaskGroup() as tasks:
                for worker in range(workers):
                    tasks.create_task(self._work(client, worker, stop))
                try:
                    yield
                finally:
                    stop.set()

    async def answered(self, number: int) -> None:
        """Return once this many more answers have ended."""
        goal = len(self.ended_at) + number
        async with asyncio.timeout(60):
            while len(self.ended_at) < goal:  # noqa: ASYNC110 - a condition with a deadline
                await asyncio.sleep(0.02)

    def check(self) -> None:
        """No request failed, no word was lost, doubled, moved or mixed up."""
        assert self.failures == []
        self.history.check()


async def test_trap_07_killing_the_leader_of_each_singleton_moves_leadership_and_no_request_fails() -> None:
    """R03, R04, R13, trap 7: two candidates each; kill -9 the leader of each role in turn while streams run. Leadership moves to
    the other, the killed one comes back as standby, and requests on a known route never notice."""
    async with Cluster(singletons=2, lease_ttl_s=LEASE_TTL_S) as cluster:
        await cluster.apply({**ECHO, "runtime_config": PACED})
        await cluster.wait_serving("echo")
        traffic = Traffic(cluster.http, "echo")
        async with traffic.running():
            await traffic.answered(4)
            for role in SINGLETONS:
                old = await cluster.leader(role)
                begin = time.monotonic()
                async with injected(Kill(cluster, old)):
                    new = await cluster.leader(role, other_than=old)
                    print(f"{role}: {old} -> {new} after {time.monotonic() - begin:.2f} s")
                    assert new != old
                    await traffic.answered(4)
                assert await cluster.leader(role) == new
            # The new leaders do the work of the old ones: what is applied now is served.
            await cluster.apply({**ECHO, "name": "later"})
            await cluster.wait_serving("later")
            await traffic.answered(4)
        traffic.check()
        assert len(traffic.history.streams) >= 16


@pytest.mark.parametrize(
    "outage_s",
    [
        pytest.param(8.0, id="four leases long"),
        pytest.param(60.0, id="a minute", marks=pytest.mark.timeout(240)),
    ],
)
async def test_etcd_may_be_away_for_long_and_requests_go_on(outage_s: float) -> None:
    """§5: etcd is killed. Every lease would have run out several times; every stream goes on, without one failure. When etcd is
    back, on its data, the control plane leads again and takes orders."""
    async with Cluster(lease_ttl_s=LEASE_TTL_S) as cluster:
        await cluster.apply({**ECHO, "runtime_config": PACED})
        await cluster.wait_serving("echo")
        traffic = Traffic(cluster.http, "echo")
        async with traffic.running():
            await traffic.answered(4)
            async with injected(Kill(cluster, "etcd")):
                end = time.monotonic() + outage_s
                while time.monotonic() < end:
                    await traffic.answered(4)
                for name, pid in cluster.pids().items():
                    assert name == "etcd" or process_state(pid) not in {"", "Z"}, f"{name} ended while etcd was away"
            await cluster.wait_ready()
            for role in SINGLETONS:
                assert await cluster.leader(role) == role
            await cluster.apply({**ECHO, "name": "later"})
            await cluster.wait_serving("later")
            await traffic.answered(4)
        traffic.check()


async def test_the_whole_control_plane_may_be_away_and_requests_go_on() -> None:
    """R14: coordinator, manager, metrics and etcd are all dead at once; requests on known routes are answered."""
    async with Cluster(lease_ttl_s=LEASE_TTL_S) as cluster:
        await cluster.apply({**ECHO, "runtime_config": PACED})
        await cluster.wait_serving("echo")
        traffic = Traffic(cluster.http, "echo")
        async with traffic.running():
            await traffic.answered(4)
            for name in (*SINGLETONS, "etcd"):
                cluster.kill(name)
            begin = time.monotonic()
            while time.monotonic() < begin + 2 * LEASE_TTL_S:
                await traffic.answered(4)
            for name in ("etcd", *SINGLETONS):
                await cluster.restart(name)
            await cluster.wait_ready()
            await traffic.answered(4)
        traffic.check()


async def test_a_stream_outlives_its_engine_word_for_word() -> None:
    """T04, house 4: one of two engines is killed in the middle of streams; another replica goes on from the journal. No word is
    lost or shown twice, and no client sees an error."""
    async with Cluster(engines=2, lease_ttl_s=LEASE_TTL_S) as cluster:
        await cluster.apply({**ECHO, "replicas": 2, "runtime_config": PACED})
        await cluster.wait_serving("echo")
        traffic = Traffic(cluster.http, "echo")
        async with traffic.running(workers=8):
            await traffic.answered(8)
            async with injected(Kill(cluster, "engine")):
                await traffic.answered(16)
            await traffic.answered(8)
        traffic.check()


async def test_a_frozen_manager_is_replaced_and_does_not_lead_when_it_wakes() -> None:
    """§5: a leader that stands still loses its lease; the other takes over; the old one, woken, is a follower."""
    async with Cluster(singletons=2, lease_ttl_s=LEASE_TTL_S) as cluster:
        old = await cluster.leader("deployment_manager")
        async with injected(Freeze(cluster, old)):
            new = await cluster.leader("deployment_manager", other_than=old)
            await cluster.apply(ECHO)
            await cluster.wait_serving("echo")
        assert await cluster.leader("deployment_manager") == new
        async with cluster.client() as client:
            assert [d.spec.name for d in await client.deployments()] == ["echo"]


async def test_services_may_start_in_any_order_and_a_gateway_without_a_replica_says_so() -> None:
    """Trap 36, R01: /healthz says that the process lives, /readyz that it can serve: they differ when they must. The engine is
    the last to come here; nothing is restarted for it."""

    def ask(path: str) -> tuple[int, dict[str, object]]:
        try:
            with urlopen(Request(f"{cluster.http}{path}"), timeout=10) as response:
                return response.status, json.loads(response.read())
        except HTTPError as err:
            with err:
                return err.code, json.loads(err.read())

    async with Cluster(lease_ttl_s=LEASE_TTL_S) as cluster:
        cluster.kill("engine")
        await cluster.apply(ECHO)
        alive, _ = await asyncio.to_thread(ask, "/healthz")
        ready, why = await asyncio.to_thread(ask, "/readyz")
        await cluster.restart("engine")
        await cluster.wait_serving("echo")
        ready_then, _ = await asyncio.to_thread(ask, "/readyz")

    assert (alive, ready, ready_then) == (200, 503, 200)
    assert why["reason"]


def test_a_cluster_leaves_nothing_behind() -> None:
    """The test kit itself, used synchronously: no process and no folder after the body, also when the body fails."""
    with pytest.raises(RuntimeError, match="on purpose"):
        with Cluster() as cluster:
            pids = cluster.pids()
            assert len(pids) == 6
            assert all(process_state(pid) not in {"", "Z"} for pid in pids.values())
            raise RuntimeError("on purpose")

    assert [name for name, pid in pids.items() if process_state(pid) != ""] == []
    assert not cluster.folder.exists()
