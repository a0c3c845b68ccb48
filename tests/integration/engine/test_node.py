"""The engine's side of the control plane, with a real etcd: records, assignments, outages, load reports, the process itself."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from inference_runtime.coordination import keys
from inference_runtime.coordination.election import LeaderObserver
from inference_runtime.coordination.etcd import EtcdClient
from inference_runtime.coordination.registry import Registration
from inference_runtime.coordination.watch import WatchBatch
from inference_runtime.generation import SamplingParams
from inference_runtime.rpc import RpcServer
from inference_runtime.settings import environment
from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.v1 import common_pb2, coordinator_service_pb2, coordinator_service_pb2_grpc
from services.engine.node import FencedAssignments, LoadReporter, Node
from tests.integration.engine.kit import EngineUnderTest, assignment, running_engine, session, submission, until
from tests.integration.engine.test_session import check_exact

SERVING = common_pb2.REPLICA_STATE_SERVING


@pytest.fixture
def etcd() -> Iterator[EtcdProcess]:
    """An etcd that the test may stop."""
    with EtcdProcess(fsync=False) as process:
        yield process


@pytest.fixture
async def client(etcd: EtcdProcess) -> AsyncIterator[EtcdClient]:
    """The test's own client."""
    async with EtcdClient([etcd.endpoint]) as opened:
        yield opened


@contextlib.asynccontextmanager
async def registered(etcd: EtcdProcess, engine: EngineUnderTest) -> AsyncIterator[Node]:
    """The engine's node, at work."""
    async with EtcdClient([etcd.endpoint]) as client, Registration(client, ttl_s=4.0, jitter_s=0.1) as records:
        node = Node(client, records, engine.replicas.engine)
        engine.on_publish, engine.on_withdraw = node.publish, node.withdraw
        node.set_state(common_pb2.ENGINE_STATE_READY)
        tasks = [asyncio.ensure_future(part) for part in (node.write_records(), node.follow_assignments(engine.replicas))]
        try:
            yield node
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def record(client: EtcdClient, deployment: str, replica_id: str) -> common_pb2.Replica | None:
    """The replica as others see it."""
    kv = await client.get(keys.replica(deployment, replica_id))
    return common_pb2.Replica.FromString(kv.value) if kv is not None else None


async def until_state(client: EtcdClient, replica_id: str, state: common_pb2.ReplicaState | None) -> None:
    """Wait for the replica's record to have this state; None waits for its removal."""
    async with asyncio.timeout(15):
        while True:
            seen = await record(client, replica_id.rsplit("-", 1)[0], replica_id)
            if (seen.state if seen is not None else None) == state:
                return
            await asyncio.sleep(0.02)


async def test_an_engine_has_caught_up_once_its_records_say_what_it_hosts(etcd: EtcdProcess, client: EtcdClient) -> None:
    """P-02: after a restart, and with nothing to host too."""
    async with running_engine() as engine, registered(etcd, engine) as node, asyncio.timeout(15):
        await node.caught_up.wait()
    wanted = assignment("known", {"load_s": 600})
    await client.put(keys.assignment("engine-1", "known-0"), wanted.SerializeToString())
    async with running_engine() as engine, registered(etcd, engine) as node, asyncio.timeout(15):
        assert not node.caught_up.is_set()
        await node.caught_up.wait()
        seen = await record(client, "known", "known-0")
    assert seen is not None
    assert seen.state == common_pb2.REPLICA_STATE_LOADING


async def test_no_session_is_welcomed_before_the_engine_knows_what_it_hosts() -> None:
    """P-02: gateways that have it in their routes from an earlier life send nothing yet."""
    opened = asyncio.Event()
    async with running_engine() as engine:
        engine.service._opened = opened
        async with asyncio.TaskGroup() as tasks, contextlib.AsyncExitStack() as stack:
            welcomed = tasks.create_task(stack.enter_async_context(session(engine)))
            await until(lambda: len(engine.service.sessions) == 1, "a gateway at the door")
            await engine.host(assignment("late", {}))
            assert not welcomed.done()
            opened.set()
            gateway = await welcomed
            await gateway.send(submission(1, "late"))
            check_exact(await gateway.answer(1), "hello", 10)


async def test_assignments_in_etcd_are_hosted_and_replicas_registered(etcd: EtcdProcess, client: EtcdClient) -> None:
    """P01: from an assignment to a leased SERVING record, and back."""
    async with running_engine() as engine, registered(etcd, engine):
        wanted = assignment("hosted", {"pace_s": 0.002})
        await client.put(keys.assignment("engine-1", "hosted-0"), wanted.SerializeToString())
        await until_state(client, "hosted-0", SERVING)
        seen = await record(client, "hosted", "hosted-0")
        assert seen is not None
        assert (seen.engine_id, seen.address, seen.revision) == ("engine-1", engine.address, wanted.revision)
        kv = await client.get(keys.replica("hosted", "hosted-0"))
        assert kv is not None
        assert kv.lease_id
        async with session(engine) as gateway:
            await gateway.send(submission(1, "hosted", replica_id="hosted-0", revision=wanted.revision))
            check_exact(await gateway.answer(1), "hello", 10)
        await client.delete(keys.assignment("engine-1", "hosted-0"))
        await until_state(client, "hosted-0", None)


async def test_a_replica_that_fails_says_why_in_etcd(etcd: EtcdProcess, client: EtcdClient) -> None:
    """C05: Pending for ever is not an answer."""
    async with running_engine() as engine, registered(etcd, engine):
        await client.put(keys.assignment("engine-1", "bad-0"), assignment("bad", {"load_fails": True}).SerializeToString())
        await until_state(client, "bad-0", common_pb2.REPLICA_STATE_FAILED)
        seen = await record(client, "bad", "bad-0")
        assert seen is not None
        assert "load_fails" in seen.reason


async def test_etcd_may_be_away_and_requests_go_on(etcd: EtcdProcess, client: EtcdClient) -> None:
    """R10: longer than the lease; then everything is registered again without a restart of anything."""
    async with running_engine() as engine, registered(etcd, engine), session(engine) as gateway:
        await client.put(keys.assignment("engine-1", "away-0"), assignment("away", {"pace_s": 0.01}).SerializeToString())
        await until_state(client, "away-0", SERVING)
        await gateway.send(submission(1, "away", sampling=SamplingParams(max_tokens=500)))
        etcd.kill()
        check_exact(await gateway.answer(1), "hello", 500)
        assert engine.replica("away-0").state == SERVING
        etcd.start()
        await until_state(client, "away-0", SERVING)
        await until(lambda: engine.replica("away-0").state == SERVING, "nothing was restarted")
        assert engine.replica("away-0").restarts == 0
        await gateway.send(submission(2, "away"))
        check_exact(await gateway.answer(2), "hello", 10)


async def test_an_etcd_that_lost_its_data_stops_no_replica(etcd: EtcdProcess, client: EtcdClient) -> None:
    """R10: only a deletion does."""
    async with running_engine() as engine, registered(etcd, engine) as node:
        await engine.host(assignment("kept", {}))
        node.apply(WatchBatch(snapshot=True, revision=1, cluster_id=2, puts=[], deletes=[]), engine.replicas)
        assert engine.replica("kept-0").state == SERVING
        deletes = [keys.assignment("engine-1", "kept-0")]
        node.apply(WatchBatch(snapshot=False, revision=2, cluster_id=2, puts=[], deletes=deletes), engine.replicas)
        await until(lambda: not engine.replicas.describe(), "it is stopped")


class FakeCoordinator(coordinator_service_pb2_grpc.CoordinatorServiceServicer):
    """Collects reports."""

    def __init__(self) -> None:
        self.reports: list[coordinator_service_pb2.ReportLoadRequest] = []

    async def ReportLoad(
        self, request: coordinator_service_pb2.ReportLoadRequest, context: object
    ) -> coordinator_service_pb2.ReportLoadResponse:
        self.reports.append(request)
        return coordinator_service_pb2.ReportLoadResponse()


async def test_trap_06_load_is_reported_to_the_coordinators_leader(etcd: EtcdProcess, client: EtcdClient) -> None:
    """Changes come quickly, an unchanged load comes as a sign of life, and a new leader gets everything."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("loaded", {"pace_s": 0.01}, {"max_concurrent": 2}))
        coordinator, leaders = FakeCoordinator(), LeaderObserver(client, "coordinator")
        server = RpcServer("127.0.0.1", 0, engine.telemetry)
        server.add(
            coordinator_service_pb2_grpc.add_CoordinatorServiceServicer_to_server,
            coordinator,
            "inference_runtime.v1.CoordinatorService",
        )
        address = await server.start()
        reporter = LoadReporter(engine.replicas, leaders, 0.02, 0.2)
        tasks = [asyncio.ensure_future(part) for part in (leaders.run(), reporter.run())]
        try:
            leader = common_pb2.Leader(role="coordinator", candidate_id="c", address=address)
            await client.put(keys.election("coordinator", "c"), leader.SerializeToString())
            await until(lambda: len(coordinator.reports) > 0, "the idle engine reports")
            await gateway.send(*(submission(i, "loaded", sampling=SamplingParams(max_tokens=50)) for i in range(3)))
            await until(
                lambda: any(r.loads[0].running == 2 and r.loads[0].queued == 1 for r in coordinator.reports), "2 run, 1 waits"
            )
            await until(lambda: coordinator.reports[-1].loads[0].running == 0, "all are done")
            count = len(coordinator.reports)
            await until(lambda: len(coordinator.reports) >= count + 2, "an unchanged load is reported too")
            assert coordinator.reports[-1].engine_id == "engine-1"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await server.stop(0)


def test_a_replaced_leaders_assignment_is_refused_unless_it_was_listed() -> None:
    """C03: the highest term seen counts; another cluster starts anew."""

    def of(cluster_id: int, revision: int) -> common_pb2.Assignment:
        token = common_pb2.FencingToken(role="deployment_manager", cluster_id=cluster_id, revision=revision)
        return common_pb2.Assignment(replica_id="r", fencing_token=token)

    fence = FencedAssignments()
    assert fence.accept(of(1, 5), listed=True)
    assert fence.accept(of(1, 9), listed=True)
    assert fence.accept(of(1, 5), listed=True)
    assert not fence.accept(of(1, 8), listed=False)
    assert fence.accept(of(1, 9), listed=False)
    assert fence.accept(of(2, 1), listed=False)


def start_process(etcd: EtcdProcess, **more: str) -> subprocess.Popen[bytes]:
    """`inference-engine` as a process of its own."""
    settings = {"ENGINE_ID": "process", "ETCD__ENDPOINTS": etcd.endpoint, "DRAIN_TIMEOUT_S": "10", **more}
    env = {**environment(), **{f"INFERENCE_ENGINE__{key}": value for key, value in settings.items()}}
    return subprocess.Popen([sys.executable, "-m", "services.engine"], env=env, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        ({"ETCD__ENDPOINTS": "127.0.0.1:1"}, 1, b"etcd at 127.0.0.1:1 cannot be reached"),
        ({"DRAIN_TIMEOUTS": "1"}, 2, b"did you mean 'drain_timeout_s'"),
        ({"RPC__PORT": "ETCD"}, 1, b"the port is taken"),
    ],
)
def test_a_start_that_cannot_work_says_so_in_one_sentence(
    etcd: EtcdProcess, settings: dict[str, str], status: int, words: bytes
) -> None:
    """S12: no traceback, and an exit status."""
    taken = etcd.endpoint.rsplit(":", 1)[1]
    process = start_process(etcd, **{key: taken if value == "ETCD" else value for key, value in settings.items()})
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status
    assert words in stderr
    assert len(stderr.strip().splitlines()) == 1
