"""An engine that is told to stop: nothing it has or still gets is lost, and a second signal does not wait."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator

import grpc
import psutil
import pytest

from inference_runtime.coordination import keys
from inference_runtime.coordination.etcd import EtcdClient
from inference_runtime.errors import Draining
from inference_runtime.generation import SamplingParams
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.testing.scripted import expected_tokens, user_says
from inference_runtime.v1 import common_pb2, engine_service_pb2, engine_service_pb2_grpc
from tests.integration.engine.kit import EngineUnderTest, Gateway, assignment, running_engine, session, submission, until
from tests.integration.engine.test_node import start_process, until_state
from tests.integration.engine.test_session import check_exact

DRAINING = common_pb2.REPLICA_STATE_DRAINING
LONG = SamplingParams(max_tokens=100)
#: Longer than any test.
ENDLESS = SamplingParams(max_tokens=30_000)


@contextlib.asynccontextmanager
async def draining(engine: EngineUnderTest) -> AsyncIterator[asyncio.Task[None]]:
    """The engine drains during the body, as its `__main__` has it do."""
    engine.replicas.start_draining()
    async with asyncio.TaskGroup() as tasks:
        yield tasks.create_task(engine.replicas.drain())


async def begun(gateway: Gateway, *stream_ids: int) -> None:
    """Wait until these answers have begun."""
    await until(lambda: all(len(gateway.answers[i].token_ids) > 2 for i in stream_ids), "they run")


async def test_late_arrivals_are_served_while_the_notice_lasts_and_refused_after_it() -> None:
    """R09: a gateway that has not read the news is not punished for it; after the notice it is sent elsewhere. What runs ends."""
    async with running_engine(drain_notice_s=0.5) as engine, session(engine) as gateway:
        await engine.host(assignment("late", {"pace_s": 0.01}))
        await gateway.send(submission(1, "late", sampling=LONG))
        await begun(gateway, 1)
        async with draining(engine) as drain:
            await gateway.send(submission(2, "late", "late"))
            await until(lambda: gateway.draining, "the gateway is told")
            assert engine.replica("late-0").state == DRAINING
            check_exact(await gateway.answer(2), "late", 10)
            number = 2
            while not isinstance(gateway.answers[number].error, Draining):
                number += 1
                await gateway.send(submission(number, "late", f"{number}"))
                await gateway.answer(number)
            check_exact(await gateway.answer(1), "hello", 100)
            async with asyncio.timeout(2):
                await drain


async def test_a_drain_waits_for_what_waits() -> None:
    """Queued requests were admitted: they are run, not refused."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("queue", {"pace_s": 0.01}, {"max_concurrent": 1}))
        await gateway.send(*(submission(i, "queue", f"{i}") for i in range(1, 5)))
        await begun(gateway, 1)
        async with draining(engine):
            for i in range(1, 5):
                check_exact(await gateway.answer(i), f"{i}", 10)


async def test_what_outlives_the_time_out_is_handed_over_and_goes_on_elsewhere_to_the_token() -> None:
    """R09, trap 16: the error comes behind every token that was made, and another engine goes on from exactly there."""
    async with running_engine(drain_timeout_s=0.3) as first, running_engine() as second:
        made = assignment("moves", {"pace_s": 0.01})
        async with session(first) as gateway, session(second) as other:
            await first.host(made)
            await second.host(made)
            await gateway.send(*(submission(i, "moves", f"{i}", sampling=LONG) for i in range(8)))
            await begun(gateway, *range(8))
            async with draining(first):
                pass
            for i in range(8):
                answer = await gateway.answer(i)
                assert isinstance(answer.error, Draining)
                prefix = tuple(answer.token_ids)
                assert 0 < len(prefix) < 100
                await other.send(submission(i, "moves", f"{i}", sampling=LONG, epoch=1, prefix=prefix))
                rest = (await other.answer(i)).token_ids
                assert [*prefix, *rest] == expected_tokens(user_says(f"{i}"), None, 0, 100)
        assert first.load("moves-0").running == first.load("moves-0").queued == 0


async def test_sessions_end_by_themselves_once_everything_is_read() -> None:
    """The end of the stream says why, so that a gateway holds nothing against the engine."""
    async with running_engine(drain_timeout_s=0.2) as engine, session(engine) as gateway, session(engine, "other") as idle:
        await engine.host(assignment("ends", {"pace_s": 0.01}))
        await gateway.send(submission(1, "ends", sampling=ENDLESS))
        await begun(gateway, 1)
        async with draining(engine):
            pass
        await engine.service.end_sessions(5.0)
        assert not engine.service.sessions
        for peer in (gateway, idle):
            await until(lambda peer=peer: peer.end is not None, "the session ends")  # type: ignore[misc]
            assert peer.end is not None
            assert isinstance(error_from_rpc(peer.end), Draining)
        assert isinstance(gateway.answers[1].error, Draining)


async def test_a_session_that_nobody_reads_does_not_hold_up_the_end() -> None:
    """Bounded: a gateway that stands still is cut off."""
    async with running_engine() as engine, open_channel(engine.address) as channel:
        await engine.host(assignment("unread", {}))
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Session()
        hello = engine_service_pb2.SessionHello(gateway_id="stands still", protocol_version=1)
        many = [submission(i, "unread", sampling=ENDLESS) for i in range(8)]
        await call.write(engine_service_pb2.SessionRequest(hello=hello, submissions=many))
        await until(lambda: any(s.waiting > 1000 for s in engine.service.sessions), "more waits than the connection holds")
        async with asyncio.timeout(5):
            await engine.service.end_sessions(0.1)
        assert len(engine.service.sessions) == 1
        call.cancel()


async def test_an_engine_without_work_and_gateways_is_gone_at_once() -> None:
    """Nobody can be late whom nobody told: the notice is for gateways."""
    async with running_engine(drain_notice_s=60.0, drain_timeout_s=60.0) as engine:
        await engine.host(assignment("idle", {}))
        async with asyncio.timeout(5):
            await engine.replicas.drain()


async def test_a_replica_that_is_taken_back_is_drained_alike() -> None:
    """P-node: notice, then nothing new, then the hand-over; only then is it gone."""
    async with running_engine(drain_timeout_s=0.5, drain_notice_s=0.2) as engine, session(engine) as gateway:
        await engine.host(assignment("back", {"pace_s": 0.01}))
        await gateway.send(submission(1, "back", sampling=ENDLESS))
        await begun(gateway, 1)
        engine.replicas.unassign("back-0")
        assert engine.replica("back-0").state == DRAINING
        await gateway.send(submission(2, "back", "late"))
        check_exact(await gateway.answer(2), "late", 10)
        assert isinstance((await gateway.answer(1)).error, Draining)
        await until(lambda: engine.withdrawn == ["back-0"], "it is gone")


async def test_a_thin_client_is_told_to_ask_elsewhere() -> None:
    """Execute: its caller has no gateway that moves it, so the status says what to do."""
    async with running_engine(drain_timeout_s=0.2) as engine, open_channel(engine.address) as channel:
        await engine.host(assignment("thin", {"pace_s": 0.01}))
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Execute(engine_service_pb2.ExecuteRequest(submission=submission(0, "thin", sampling=ENDLESS)))
        await call.read()
        async with draining(engine):
            pass
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while isinstance(await call.read(), engine_service_pb2.ExecuteResponse):
                pass
        assert isinstance(error_from_rpc(caught.value), Draining)


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def etcd() -> Iterator[EtcdProcess]:
    """An etcd of its own."""
    with EtcdProcess(fsync=False) as process:
        yield process


@pytest.fixture
async def client(etcd: EtcdProcess) -> AsyncIterator[EtcdClient]:
    """The test's own client."""
    async with EtcdClient([etcd.endpoint]) as opened:
        yield opened


@contextlib.asynccontextmanager
async def engine_process(
    etcd: EtcdProcess, client: EtcdClient, isolation: str = "auto", **settings: str
) -> AsyncIterator[tuple[subprocess.Popen[bytes], Gateway]]:
    """`inference-engine` that serves deployment `drains`, and a session to it."""
    process = start_process(etcd, **settings)
    engine = EngineUnderTest()
    try:
        async with asyncio.timeout(30):
            while (kv := await client.get(keys.engine("process"))) is None:  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.02)
        engine.address = common_pb2.Engine.FromString(kv.value).address
        wanted = assignment("drains", {"pace_s": 0.01}, isolation=isolation)
        await client.put(keys.assignment("process", "drains-0"), wanted.SerializeToString())
        await until_state(client, "drains-0", common_pb2.REPLICA_STATE_SERVING)
        async with session(engine) as gateway:
            yield process, gateway
    finally:
        process.kill()
        process.communicate()
        engine.telemetry.close()


async def state_in_etcd(client: EtcdClient) -> int | None:
    """What others see of the engine; None when it is not registered."""
    kv = await client.get(keys.engine("process"))
    return None if kv is None else common_pb2.Engine.FromString(kv.value).state


def context_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The child that holds the context."""
    (child,) = [c for c in psutil.Process(process.pid).children() if "services.engine.child" in c.cmdline()]
    return child


async def test_the_process_drains_on_sigterm_and_leaves_nothing_behind(etcd: EtcdProcess, client: EtcdClient) -> None:
    """R09: its key says that it drains for as long as anything runs, running requests end, then the keys go, exit status 0."""
    async with engine_process(etcd, client) as (process, gateway):
        await gateway.send(submission(1, "drains", sampling=SamplingParams(max_tokens=250)))
        await begun(gateway, 1)
        process.send_signal(signal.SIGTERM)
        await until(lambda: gateway.draining, "the gateway is told")
        while not gateway.answers[1].over:
            assert await state_in_etcd(client) in (common_pb2.ENGINE_STATE_DRAINING, common_pb2.ENGINE_STATE_READY)
        check_exact(await gateway.answer(1), "hello", 250)
        assert await asyncio.to_thread(process.wait, 20) == 0
        assert await state_in_etcd(client) is None
        assert await client.get(keys.replica("drains", "drains-0")) is None


async def test_the_process_hands_over_what_outlives_the_time_out_and_exits_with_0(etcd: EtcdProcess, client: EtcdClient) -> None:
    """R09: a long stream does not keep an engine alive, and is not lost by it: the words of an undisturbed one, up to here."""
    async with engine_process(etcd, client, DRAIN_TIMEOUT_S="0.5") as (process, gateway):
        await gateway.send(submission(1, "drains", sampling=ENDLESS))
        await begun(gateway, 1)
        process.send_signal(signal.SIGTERM)
        answer = await gateway.answer(1)
        assert isinstance(answer.error, Draining)
        assert answer.token_ids == expected_tokens(user_says("hello"), None, 0, len(answer.token_ids))
        assert await asyncio.to_thread(process.wait, 20) == 0
        assert await state_in_etcd(client) is None


async def test_the_process_drains_also_while_etcd_is_away(etcd: EtcdProcess, client: EtcdClient) -> None:
    """R10: gateways are told directly, and nobody waits for a store that does not answer."""
    async with engine_process(etcd, client) as (process, gateway):
        await gateway.send(submission(1, "drains", sampling=SamplingParams(max_tokens=250)))
        await begun(gateway, 1)
        etcd.kill()
        process.send_signal(signal.SIGTERM)
        await until(lambda: gateway.draining, "the gateway is told")
        check_exact(await gateway.answer(1), "hello", 250)
        assert await asyncio.to_thread(process.wait, 30) == 0


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_a_model_that_still_loads_does_not_hold_up_the_end(etcd: EtcdProcess, client: EtcdClient, isolation: str) -> None:
    """Weights take minutes; nobody waits for them to be loaded in order to throw them away."""
    process = start_process(etcd)
    try:
        wanted = assignment("loads", {"load_s": 600}, isolation=isolation)
        await client.put(keys.assignment("process", "loads-0"), wanted.SerializeToString())
        await until_state(client, "loads-0", common_pb2.REPLICA_STATE_LOADING)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0
        assert await state_in_etcd(client) is None
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_second_signal_is_now_and_the_context_dies_with_its_engine(
    etcd: EtcdProcess, client: EtcdClient, second: int, status: int
) -> None:
    """R09: not 0, so that whoever started it knows; no child holds the device."""
    async with engine_process(etcd, client, "process", DRAIN_TIMEOUT_S="60") as (process, gateway):
        await gateway.send(submission(1, "drains", sampling=ENDLESS))
        await begun(gateway, 1)
        child = context_of(process)
        process.send_signal(signal.SIGTERM)
        await until(lambda: gateway.draining, "the first one is heard")
        process.send_signal(second)
        assert await asyncio.to_thread(process.wait, 10) == status
        await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the context is gone")


async def test_a_signal_for_the_whole_group_of_processes_drains_too(etcd: EtcdProcess, client: EtcdClient) -> None:
    """systemd signals every process of a unit: the context must not die under the requests that the engine lets end."""
    async with engine_process(etcd, client, "process") as (process, gateway):
        await gateway.send(submission(1, "drains", sampling=SamplingParams(max_tokens=150)))
        await begun(gateway, 1)
        child = context_of(process)
        for pid in (child.pid, process.pid):
            os.kill(pid, signal.SIGTERM)
        check_exact(await gateway.answer(1), "hello", 150)
        record = await client.get(keys.replica("drains", "drains-0"))
        assert record is None or common_pb2.Replica.FromString(record.value).restarts == 0
        assert await asyncio.to_thread(process.wait, 20) == 0
