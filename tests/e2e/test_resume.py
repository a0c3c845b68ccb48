"""A stream outlives the gateway that served it (G-01): killed at any moment, it goes on at the other one, to the letter."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import process_state
from inference_runtime.testing.scripted import expected_text, user_says

PROMPT = "Count the doors of this house."
TOKENS = 40
PATIENCE_S = 30.0


@dataclass
class Reader:
    """An EventSource: what it was given, and the id of the last event."""

    texts: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    last_id: str = ""
    usage: Mapping[str, int] | None = None
    finish: str = ""
    error: str = ""
    done: bool = False

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self.texts)

    def event(self, event_id: str, data: str) -> None:
        """One event, whole."""
        if '"error"' in data:
            self.error = json.loads(data)["error"]["code"] or json.loads(data)["error"]["type"]
            return
        assert event_id, f"an event without an id: {data}"
        self.last_id = event_id
        self.ids.append(event_id)
        if data == "[DONE]":
            self.done = True
            return
        document = json.loads(data)
        self.usage = document.get("usage") or self.usage
        for choice in document["choices"]:
            if text := choice["delta"].get("content"):
                self.texts.append(text)
            self.finish = choice["finish_reason"] or self.finish

    @property
    def tail(self) -> list[int]:
        """The tokens that the last id carries: those that no other gateway had when it was sent."""
        place = self.last_id.split(":", 2)
        return json.loads(place[2]) if len(place) == 3 and place[2].startswith("[") else []

    async def read(self, lines: AsyncIterator[str], until: int = 10**6, *, copied: bool = False) -> None:
        """Read until so many pieces of text are here, and, where asked for, until all but a few are copied; or to the end."""
        event_id = ""
        async for line in lines:
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                self.event(event_id, line[6:])
                event_id = ""
                if len(self.texts) >= until and (not copied or 0 < len(self.tail) < 20):
                    return


def request(**fields: Any) -> dict[str, Any]:
    """A streamed request of `slow`."""
    messages = [{"role": "user", "content": PROMPT}]
    return {
        "model": "slow", "messages": messages, "seed": 5, "max_tokens": TOKENS, "stream": True,
        "stream_options": {"include_usage": True}, **fields,
    }  # fmt: skip


async def eventually(client: httpx.AsyncClient, url: str, line: str) -> None:
    """Wait until a gateway's metrics hold this line."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if line in (await client.get(f"{url}/metrics")).text.splitlines():
                return
            await asyncio.sleep(0.02)


async def acquainted(cluster: Cluster, client: httpx.AsyncClient) -> None:
    """Start the gateway that the test before killed, wait until both serve `slow` and know each other."""
    for process in cluster.local.of("gateway"):
        if not process.running:
            await cluster.restart(process.spec.name)
    await cluster.wait_serving("slow")
    for url in cluster.local.http_urls:
        await eventually(client, url, "inference_gateway_peers 1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two gateways that drain for a second, two engines, and a deployment that takes 20 ms for a token."""
    drain = {"INFERENCE_GATEWAY__DRAIN_TIMEOUT_S": "1", "INFERENCE_GATEWAY__DRAIN_NOTICE_S": "0.1"}
    with Cluster(engines=2, gateways=2, lease_ttl_s=3, settings={"gateway": drain}) as running:
        spec = {"name": "slow", "model": "scripted", "runtime": "scripted", "replicas": 2, "runtime_config": {"pace_s": 0.02}}
        asyncio.run(running.apply(spec))
        yield running


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client without a pool's memory of dead gateways."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        yield http


def kill_gateway(cluster: Cluster, number: int) -> None:
    """kill -9, and see that it is gone."""
    process = cluster.local.of("gateway")[number]
    pid = process.pid
    cluster.kill(process.spec.name)
    assert process_state(pid) == "", f"gateway {number + 1} still runs"


@pytest.mark.parametrize(
    ("index", "way"), [(0, "POST"), (1, "POST"), (2, "GET"), (7, "POST"), (19, "GET"), (33, "POST"), (38, "POST")]
)
async def test_g_01_a_stream_goes_on_at_the_other_gateway_when_its_own_is_killed(
    cluster: Cluster, client: httpx.AsyncClient, index: int, way: str
) -> None:
    """G-01: killed after any token, nothing of the answer is lost, doubled or foreign."""
    await acquainted(cluster, client)
    victim = index % 2
    urls = cluster.local.http_urls
    reader = Reader()
    async with client.stream("POST", f"{urls[victim]}/v1/chat/completions", json=request()) as first:
        lines = first.aiter_lines()
        await reader.read(lines, until=index + 1)
        before = reader.text
        kill_gateway(cluster, victim)
        with contextlib.suppress(httpx.RemoteProtocolError):
            await reader.read(lines)  # what the kernel still held
    assert not reader.done
    assert expected_text(user_says(PROMPT), seed=5, n=TOKENS).startswith(before)
    headers = {"last-event-id": reader.last_id}
    other = urls[1 - victim]
    if way == "POST":
        again = client.stream("POST", f"{other}/v1/chat/completions", json=request(), headers=headers)
    else:
        again = client.stream("GET", f"{other}/v1/streams/{reader.last_id.partition(':')[0]}", headers=headers)
    async with again as second:
        assert second.status_code == 200, await second.aread()
        await reader.read(second.aiter_lines())
    assert reader.text == expected_text(user_says(PROMPT), seed=5, n=TOKENS)
    assert (reader.finish, reader.done) == ("length", True)
    assert reader.usage is not None
    assert reader.usage["completion_tokens"] == TOKENS
    assert len(set(reader.ids)) == len(reader.ids) - 1, "only the counts and [DONE] share an id"
    assert len({event_id.partition(":")[0] for event_id in reader.ids}) == 1, "it stays one stream"


async def test_a_stream_survives_one_gateway_after_the_other(cluster: Cluster, client: httpx.AsyncClient) -> None:
    """Who has it now keeps it copied, too: three attachments, and the sum is one answer."""
    await acquainted(cluster, client)
    urls, reader, served_by = cluster.local.http_urls, Reader(), 0
    for round_ in range(3):
        headers = {"last-event-id": reader.last_id} if reader.last_id else {}
        async with client.stream("POST", f"{urls[served_by]}/v1/chat/completions", json=request(), headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            await reader.read(response.aiter_lines(), until=10 * (round_ + 1) if round_ < 2 else 10**6)
            if round_ < 2:
                kill_gateway(cluster, served_by)
        if round_ < 2:
            served_by = 1 - served_by
            await acquainted(cluster, client)
    assert reader.text == expected_text(user_says(PROMPT), seed=5, n=TOKENS)
    assert reader.done


async def test_a_stop_string_that_began_before_the_kill_ends_the_answer_after_it(
    cluster: Cluster, client: httpx.AsyncClient
) -> None:
    """Text that was held back as a possible stop string is rebuilt from the tokens, not from what was shown."""
    await acquainted(cluster, client)
    whole = [expected_text(user_says(PROMPT), seed=5, n=n) for n in range(TOKENS + 1)]
    stop = whole[12][len(whole[11]) - 3 :]  # begins within the 11th word, ends with the 12th
    reader = Reader()
    async with client.stream("POST", f"{cluster.local.http_urls[0]}/v1/chat/completions", json=request(stop=stop)) as first:
        await reader.read(first.aiter_lines(), until=11)
        kill_gateway(cluster, 0)
    headers = {"last-event-id": reader.last_id}
    again = client.stream("POST", f"{cluster.local.http_urls[1]}/v1/chat/completions", json=request(stop=stop), headers=headers)
    async with again as second:
        assert second.status_code == 200, await second.aread()
        await reader.read(second.aiter_lines())
    assert reader.text == whole[TOKENS][: whole[TOKENS].index(stop)]
    assert (reader.finish, reader.done) == ("stop", True)


async def test_a_stream_that_outlives_its_gateways_drain_goes_on_at_the_other(
    cluster: Cluster, client: httpx.AsyncClient
) -> None:
    """R-05: SIGTERM cuts what is not over in time, with an error event; nothing of it is lost."""
    await acquainted(cluster, client)
    tokens, reader = 150, Reader()  # three seconds
    body = request(max_tokens=tokens)
    async with client.stream("POST", f"{cluster.local.http_urls[0]}/v1/chat/completions", json=body) as first:
        lines = first.aiter_lines()
        await reader.read(lines, until=5)
        cluster.kill("gateway", signal.SIGTERM)
        await reader.read(lines)
    assert reader.error, "the stream ended in time: nothing was put to the test"
    assert not reader.done
    headers = {"last-event-id": reader.last_id}
    async with client.stream("POST", f"{cluster.local.http_urls[1]}/v1/chat/completions", json=body, headers=headers) as second:
        assert second.status_code == 200, await second.aread()
        await reader.read(second.aiter_lines())
    assert reader.text == expected_text(user_says(PROMPT), seed=5, n=tokens)
    assert reader.done
    cluster.kill("gateway")  # it is on its way out; the next test starts it anew


async def test_a_frozen_gateway_neither_keeps_a_stream_nor_spoils_it_when_it_wakes(
    cluster: Cluster, client: httpx.AsyncClient
) -> None:
    """It still believes to serve the stream, and goes on with it; what the other one gave its client meanwhile is what counts."""
    await acquainted(cluster, client)
    tokens, reader = 600, Reader()  # twelve seconds: those that it takes to notice, twice
    body, urls = request(max_tokens=tokens), cluster.local.http_urls
    async with client.stream("POST", f"{urls[0]}/v1/chat/completions", json=body) as first:
        await reader.read(first.aiter_lines(), until=10)
        cluster.pause("gateway")
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if process_state(cluster.pids()["gateway"]) == "T":
                    break
                await asyncio.sleep(0.001)
        headers = {"last-event-id": reader.last_id}
        async with client.stream("POST", f"{urls[1]}/v1/chat/completions", json=body, headers=headers) as second:
            assert second.status_code == 200, await second.aread()
            lines = second.aiter_lines()
            await reader.read(lines, until=20)
            cluster.resume("gateway")
            await reader.read(lines, until=40, copied=True)
            assert not reader.done, "the stream was too short for its copy to come back to the gateway that had slept"
            kill_gateway(cluster, 1)
    headers = {"last-event-id": reader.last_id}
    async with client.stream("GET", f"{urls[0]}/v1/streams/{reader.last_id.partition(':')[0]}", headers=headers) as third:
        assert third.status_code == 200, await third.aread()
        await reader.read(third.aiter_lines())
    assert reader.text == expected_text(user_says(PROMPT), seed=5, n=tokens)
    assert reader.done
