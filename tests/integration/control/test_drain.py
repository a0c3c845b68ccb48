"""A singleton that is told to stop while it is asked: it resigns first, no order is lost, and a second signal does not wait."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inference_runtime.client import InferenceClient
from inference_runtime.coordination import EtcdClient
from inference_runtime.errors import InferenceError
from inference_runtime.rpc import open_channel
from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.v1 import coordinator_service_pb2, generation_pb2, metrics_service_pb2
from tests.integration.control.kit import (
    PROBE,
    ROLES,
    WAIT_S,
    FakeEngine,
    answers,
    call,
    leader_of,
    processes,
    put_deployment,
    until,
)

#: Calls that are made at any time while a leader is stopped.
ASKERS = 8


@contextlib.asynccontextmanager
async def asked(ask: Callable[[int], Awaitable[None]]) -> AsyncIterator[list[int]]:
    """Calls go on during the body; gives the numbers of those that were answered. An error ends the test."""
    answered: list[int] = []
    stop = asyncio.Event()

    async def work(worker: int) -> None:
        number = worker
        while not stop.is_set():
            await ask(number)
            answered.append(number)
            number += ASKERS

    async with asyncio.TaskGroup() as tasks:
        for worker in range(ASKERS):
            tasks.create_task(work(worker))
        try:
            await until(_more_than(answered, 2 * ASKERS), "the calls begin")
            yield answered
            await until(_more_than(answered, len(answered) + 2 * ASKERS), "the calls go on")
        finally:
            stop.set()


def _more_than(answered: list[int], count: int) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return len(answered) > count

    return look


@pytest.mark.parametrize("role", ROLES)
async def test_a_leader_that_is_stopped_under_load_hands_over_within_a_second_and_no_call_fails(
    etcd: EtcdProcess, client: EtcdClient, tmp_path: Path, role: str
) -> None:
    """R03, R04: SIGTERM while calls are being answered. The next leader is in office within a second, and whoever asks as our
    client does, which looks for the leader again, gets its answer."""
    await put_deployment(client, "a")
    engine = await FakeEngine(client, "e1").join()
    await engine.serve("a", "r1")
    async with processes(role, etcd.endpoint, tmp_path, 2) as [first, second], InferenceClient(etcd=[etcd.endpoint]) as asker:
        addresses = [await first.address(client), await second.address(client)]

        async def ask(number: int) -> None:
            if role == "coordinator":
                assert [r.id for r, _ in await asker.replicas("a")] == ["r1"]
            elif role == "metrics":
                await asker.usage()
            else:
                await asker.apply({"name": f"d{number}", "model": "m", "runtime": "scripted", "replicas": 0})

        await until(lambda: answers(addresses[0], role, *PROBE[role]), "the first is in office")
        async with asked(ask) as answered:
            begin = time.monotonic()
            first.process.terminate()
            await until(lambda: answers(addresses[1], role, *PROBE[role]), "the second is in office")
            handed_over_s = time.monotonic() - begin
            assert await asyncio.to_thread(first.process.wait, WAIT_S) == 0
        print(f"{role}: handed over after {handed_over_s:.2f} s, {len(answered)} calls")
        assert handed_over_s < 2.0, "a second is promised on a free machine"
        if role == "deployment_manager":
            there = {d.spec.name for d in await asker.deployments()}
            assert {f"d{number}" for number in answered} <= there, "an order that was confirmed is kept"


async def test_what_the_ledger_confirmed_is_there_and_counted_once_whoever_leads(
    etcd: EtcdProcess, client: EtcdClient, tmp_path: Path
) -> None:
    """B04: batches are sent while the leader is stopped, and sent again where no answer came. The next leader has each, once."""

    def batch(number: int) -> metrics_service_pb2.RecordUsageRequest:
        usage = generation_pb2.Usage(input_tokens=1, output_tokens=1)
        record = metrics_service_pb2.UsageRecord(request_id=f"r{number}", deployment="a", usage=usage)
        return metrics_service_pb2.RecordUsageRequest(records=[record])

    async with processes("metrics", etcd.endpoint, tmp_path, 2) as [first, second]:
        await second.address(client)

        async def send(number: int) -> None:
            while True:
                leader = await leader_of(client, "metrics")
                with contextlib.suppress(InferenceError):
                    if leader is not None:
                        await call(leader.address, "metrics", "RecordUsage", batch(number))
                        return

        async with asked(send) as sent:
            assert await first.stop() == 0
        leader = await leader_of(client, "metrics")
        assert leader is not None
        assert leader.pid == second.pid
        [usage] = (await call(leader.address, "metrics", "GetSnapshot", metrics_service_pb2.GetSnapshotRequest())).deployments
    assert usage.requests == len(set(sent)) == len(sent)


@pytest.mark.parametrize("role", ROLES)
async def test_a_second_signal_is_now(etcd: EtcdProcess, client: EtcdClient, tmp_path: Path, role: str) -> None:
    """A call that does not end holds up the stop, for as long as the settings say; a second signal does not wait. By then the
    office is free: who leaves resigns first."""
    async with processes(role, etcd.endpoint, tmp_path, 1, GRACE_S="60") as [process]:
        address = await process.address(client)
        async with open_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            process.process.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING

            async def resigned() -> bool:
                return await leader_of(client, role) is None

            await until(resigned, "it resigns")
            assert process.process.poll() is None, "it waits for the call"
            process.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.process.wait, 10) == 143
            watch.cancel()


@pytest.mark.parametrize("role", ROLES)
async def test_a_leader_ends_in_order_while_etcd_is_away(tmp_path: Path, role: str) -> None:
    """R10: it cannot resign, and does not wait for that."""
    with EtcdProcess(fsync=False) as mine:
        async with EtcdClient([mine.endpoint]) as own, processes(role, mine.endpoint, tmp_path, 1) as [process]:
            address = await process.address(own)
            await until(lambda: answers(address, role, *PROBE[role]), "in office")
            mine.kill()
            assert await process.stop() == 0, process.log.read_text()
            assert "Traceback" not in process.log.read_text()


async def test_followers_stop_at_once(etcd: EtcdProcess, client: EtcdClient, tmp_path: Path) -> None:
    """Who only stands for election has nothing to hand over, and its candidacy goes with it."""
    async with processes("coordinator", etcd.endpoint, tmp_path, 2) as [first, second]:
        leader, _ = await first.address(client), await second.address(client)
        await until(lambda: answers(leader, "coordinator", *PROBE["coordinator"]), "the first is in office")
        assert await second.stop() == 0
        found = await leader_of(client, "coordinator")
        assert found is not None
        assert found.pid == first.pid
        request = coordinator_service_pb2.ListReplicasRequest()
        assert not (await call(leader, "coordinator", "ListReplicas", request)).replicas
