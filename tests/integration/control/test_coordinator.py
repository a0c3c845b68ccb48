"""The coordinator in office: what watchers hear, and who may be routed to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from inference_runtime.coordination import EtcdClient, Lease, keys
from inference_runtime.errors import BadRequest, DeploymentNotFound, EngineLost, InferenceError, NoReplica, NotLeader
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.settings import EtcdSettings
from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.v1 import common_pb2, coordinator_service_pb2
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.table import GATHER_S
from tests.integration.control.kit import STUBS, FakeEngine, Singleton, put_deployment, singleton, until

pb = coordinator_service_pb2
SETTINGS = CoordinatorSettings(keep_alive_s=30, registration_ttl_s=2)


@pytest.fixture
async def coordinator(etcd: EtcdProcess, client: EtcdClient) -> AsyncIterator[Singleton]:
    async with singleton("coordinator", etcd.endpoint, SETTINGS) as leader:
        yield leader


class Watch:
    """A gateway's watch. `table` is what it would route by."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[pb.WatchRoutesResponse | InferenceError] = asyncio.Queue()
        self.messages: list[pb.WatchRoutesResponse] = []
        self.table: dict[str, list[str]] = {}

    async def read(self, stream: Any) -> None:
        """Keep what arrives, and how it ended. A task of its own, since a read that is given up would end the stream."""
        try:
            async for message in stream:
                self._arrived.put_nowait(message)
        except grpc.aio.AioRpcError as err:
            self._arrived.put_nowait(error_from_rpc(err))

    async def next(self, timeout_s: float = 10) -> pb.WatchRoutesResponse:
        """The next message, taken in. Raises how the stream ended."""
        async with asyncio.timeout(timeout_s):
            message = await self._arrived.get()
        if isinstance(message, InferenceError):
            raise message
        self.messages.append(message)
        if message.snapshot:
            self.table.clear()
        self.table |= {line.deployment: [r.id for r in line.replicas] for line in message.deployments}
        for name in message.removed:
            del self.table[name]
        return message

    async def until_table(self, table: dict[str, list[str]]) -> None:
        """Listen until the table is this one."""
        while self.table != table:
            await self.next()


@contextlib.asynccontextmanager
async def watching(coordinator: Singleton) -> AsyncIterator[Watch]:
    channel = open_channel(coordinator.address)
    stream = STUBS["coordinator"](channel).WatchRoutes(pb.WatchRoutesRequest(gateway_id="g"))
    watch = Watch()
    async with asyncio.TaskGroup() as group:
        reader = group.create_task(watch.read(stream))
        try:
            yield watch
        finally:
            reader.cancel()
            await channel.close(None)


def load(replica_id: str, running: int) -> common_pb2.ReplicaLoad:
    return common_pb2.ReplicaLoad(replica_id=replica_id, running=running)


async def test_the_first_message_is_the_whole_table(client: EtcdClient, coordinator: Singleton) -> None:
    """R03. Deployments that nobody serves are in it."""
    engine = await FakeEngine(client, "e1").join()
    await put_deployment(client, "idle")
    await put_deployment(client, "busy")
    await engine.serve("busy", "r1")
    await engine.serve("busy", "r2", common_pb2.REPLICA_STATE_LOADING)
    async with watching(coordinator) as first:
        await first.until_table({"idle": [], "busy": ["r1"]})

    async with watching(coordinator) as watch:
        message = await watch.next()

    assert message.snapshot
    assert watch.table == {"idle": [], "busy": ["r1"]}
    assert message.revision > 0
    assert message.fencing_token.role == "coordinator"
    assert message.fencing_token.revision > 0


async def test_trap_06_changes_reach_a_watcher_within_250_ms(client: EtcdClient, coordinator: Singleton) -> None:
    """Trap 6: nothing ever told a gateway. Each write to etcd is followed by its message; the revision never falls."""
    engine = await FakeEngine(client, "e1").join()
    await put_deployment(client, "a")
    took_s: list[float] = []
    async with watching(coordinator) as watch:
        await watch.until_table({"a": []})
        for i in range(10):
            begin_s = time.perf_counter()
            await engine.serve("a", f"r{i}")
            await watch.until_table({"a": [f"r{i}"]})
            took_s.append(time.perf_counter() - begin_s)
            await engine.drop("a", f"r{i}")
            await watch.until_table({"a": []})

    assert sorted(took_s)[8] < 0.25, took_s
    revisions = [m.revision for m in watch.messages]
    assert revisions == sorted(revisions)
    assert not any(m.snapshot for m in watch.messages[1:])


async def test_a_deployment_leaves_the_table_when_it_is_deleted(client: EtcdClient, coordinator: Singleton) -> None:
    await put_deployment(client, "a")
    async with watching(coordinator) as watch:
        await watch.until_table({"a": []})
        await client.delete(keys.deployment("a"))
        await watch.until_table({})

    assert list(watch.messages[-1].removed) == ["a"]


async def test_a_burst_is_told_in_few_messages(client: EtcdClient, coordinator: Singleton) -> None:
    async with watching(coordinator) as watch:
        await watch.next()
        begin_s = time.monotonic()
        await asyncio.gather(*(put_deployment(client, f"d{i:03d}") for i in range(300)))
        await watch.until_table({f"d{i:03d}": [] for i in range(300)})
        took_s = time.monotonic() - begin_s

    assert len(watch.messages) <= took_s / GATHER_S + 3


async def test_load_is_pushed_and_coalesced(client: EtcdClient, coordinator: Singleton) -> None:
    engine = await FakeEngine(client, "e1").join()
    await put_deployment(client, "a")
    await engine.serve("a", "r1")
    async with watching(coordinator) as watch:
        await watch.until_table({"a": ["r1"]})
        begin_s = time.monotonic()
        for running in range(1, 11):
            request = pb.ReportLoadRequest(engine_id="e1", loads=[load("r1", running), load("unknown", 7)])
            await coordinator.call("ReportLoad", request)
        while [x.running for x in watch.messages[-1].loads] != [10]:
            await watch.next()
        took_s = time.monotonic() - begin_s

    told = [m for m in watch.messages if m.loads]
    assert len(told) <= took_s / SETTINGS.load_interval_s + 2
    assert {x.replica_id for m in told for x in m.loads} == {"r1"}, "nobody hears of replicas that do not exist"


async def test_an_idle_watch_hears_that_it_is_alive(etcd: EtcdProcess, client: EtcdClient) -> None:
    """A gateway that hears nothing knows that its table is getting old."""
    settings = CoordinatorSettings(keep_alive_s=0.1)
    async with singleton("coordinator", etcd.endpoint, settings) as leader, watching(leader) as watch:
        await watch.next()
        empty = await watch.next()

    assert not empty.snapshot
    assert not empty.deployments
    assert empty.revision == watch.messages[0].revision


async def test_a_watch_ends_with_not_leader_when_the_term_ends(etcd: EtcdProcess, client: EtcdClient) -> None:
    """E16: the gateway keeps its table and looks for the next leader."""
    async with singleton("coordinator", etcd.endpoint, SETTINGS) as leader, watching(leader) as watch:
        await watch.next()
        await client.delete_prefix(keys.election_prefix("coordinator"))
        with pytest.raises(NotLeader):
            while True:
                await watch.next()


async def test_route_gives_a_replica_or_says_what_is_missing(client: EtcdClient, coordinator: Singleton) -> None:
    """R03 for thin clients, E15."""
    engine = await FakeEngine(client, "e1").join()
    await put_deployment(client, "a")
    await put_deployment(client, "idle")
    await engine.serve("a", "busy")
    await engine.serve("a", "calm")
    async with watching(coordinator) as watch:
        await watch.until_table({"a": ["busy", "calm"], "idle": []})
    await coordinator.call("ReportLoad", pb.ReportLoadRequest(engine_id="e1", loads=[load("busy", 9), load("calm", 1)]))

    chosen = {(await coordinator.call("Route", pb.RouteRequest(deployment="a"))).replica.id for _ in range(10)}
    assert chosen == {"calm"}
    with pytest.raises(NoReplica, match="'idle'"):
        await coordinator.call("Route", pb.RouteRequest(deployment="idle"))
    with pytest.raises(DeploymentNotFound, match="'nobody'"):
        await coordinator.call("Route", pb.RouteRequest(deployment="nobody"))


async def test_list_replicas_shows_every_state_and_the_load(client: EtcdClient, coordinator: Singleton) -> None:
    engine = await FakeEngine(client, "e1").join()
    await put_deployment(client, "a")
    await engine.serve("a", "r1")
    await engine.serve("a", "r2", common_pb2.REPLICA_STATE_FAILED)
    await engine.serve("b", "r3")

    async def published() -> str | None:
        text = coordinator.telemetry.metrics.prometheus_text().decode()
        return text if 'inference_replicas{deployment="b",state="serving"} 1' in text else None

    text = await until(published, "all three replicas to be seen")
    await coordinator.call("ReportLoad", pb.ReportLoadRequest(engine_id="e1", loads=[load("r1", 3)]))
    everything = await coordinator.call("ListReplicas", pb.ListReplicasRequest())
    of_a = await coordinator.call("ListReplicas", pb.ListReplicasRequest(deployment="a"))

    assert 'inference_replicas{deployment="a",state="serving"} 1' in text
    assert 'inference_replicas{deployment="a",state="failed"} 1' in text
    assert 'inference_leader{role="coordinator"} 1' in text
    assert [r.id for r in everything.replicas] == ["r1", "r2", "r3"]
    assert [r.id for r in of_a.replicas] == ["r1", "r2"]
    assert [(x.replica_id, x.running) for x in of_a.loads] == [("r1", 3)]


def engine_by_call(replicas: list[str]) -> pb.RegisterRequest:
    engine = common_pb2.Engine(id="far", address="10.0.0.9:1", state=common_pb2.ENGINE_STATE_READY)
    records = [
        common_pb2.Replica(id=i, deployment="a", engine_id="far", address=engine.address, state=common_pb2.REPLICA_STATE_SERVING)
        for i in replicas
    ]
    return pb.RegisterRequest(engine=engine, replicas=records)


async def test_trap_02_an_engine_registers_by_call_and_is_routed_to(client: EtcdClient, coordinator: Singleton) -> None:
    """Trap 2: nobody ever registered. The announcement replaces the one before, and Deregister takes it back."""
    await put_deployment(client, "a")
    async with watching(coordinator) as watch:
        answer = await coordinator.call("Register", engine_by_call(["r1", "r2"]))
        assert answer.valid_for.seconds == 2
        await watch.until_table({"a": ["r1", "r2"]})
        await coordinator.call("Register", engine_by_call(["r2", "r3"]))
        await watch.until_table({"a": ["r2", "r3"]})
        await coordinator.call("Deregister", pb.DeregisterRequest(engine_id="far"))
        await watch.until_table({"a": []})


async def test_a_registration_lives_as_long_as_it_is_renewed(client: EtcdClient, coordinator: Singleton) -> None:
    await FakeEngine(client, "e1").join()  # with nobody left, the last one would be believed in for a while
    await put_deployment(client, "a")
    async with watching(coordinator) as watch:
        await coordinator.call("Register", engine_by_call(["r1"]))
        await watch.until_table({"a": ["r1"]})
        until_s = time.monotonic() + 2 * SETTINGS.registration_ttl_s + 1  # etcd ends leases up to a second late
        while time.monotonic() < until_s:
            await coordinator.call("ReportLoad", pb.ReportLoadRequest(engine_id="far"))
            with contextlib.suppress(TimeoutError):
                await watch.next(timeout_s=0.3)
            assert watch.table == {"a": ["r1"]}
        await watch.until_table({"a": []})  # it fell silent

    with pytest.raises(EngineLost, match="register it again"):
        await coordinator.call("ReportLoad", pb.ReportLoadRequest(engine_id="far"))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (lambda r: r.engine.ClearField("id"), "engine"),
        (lambda r: r.engine.ClearField("address"), "engine"),
        (lambda r: r.replicas[0].ClearField("deployment"), "replicas[0]"),
        (lambda r: setattr(r.replicas[0], "engine_id", "other"), "replicas[0].engine_id"),
        (lambda r: setattr(r.replicas[0], "id", "a/b"), "replica id"),
        (lambda r: r.replicas.extend(r.replicas[0] for _ in range(61)), "replicas"),
    ],
)
async def test_a_wrong_registration_is_refused_by_name(coordinator: Singleton, change: Any, param: str) -> None:
    request = engine_by_call(["r1"])
    change(request)

    with pytest.raises(BadRequest) as caught:
        await coordinator.call("Register", request)

    assert caught.value.param == param


async def leases_end_together(client: EtcdClient, coordinator: Singleton, lost: int) -> dict[str, list[str]]:
    """Four engines with a replica each; some lose their lease at once. The table after a fifth engine came, which shows that the
    losses have been seen."""
    await put_deployment(client, "a")
    engines = [await FakeEngine(client, f"e{i}").join() for i in range(4)]
    for i, engine in enumerate(engines):
        await engine.serve("a", f"r{i}")
    async with watching(coordinator) as watch:
        await watch.until_table({"a": ["r0", "r1", "r2", "r3"]})
        await asyncio.gather(*(engine.leave() for engine in engines[:lost]))
        fifth = await FakeEngine(client, "e5").join()
        await fifth.serve("a", "r5")
        while "r5" not in watch.table["a"]:
            await watch.next()
        with contextlib.suppress(TimeoutError):
            await watch.next(timeout_s=0.1)
        return watch.table


async def test_routes_survive_a_mass_loss_of_leases(client: EtcdClient, coordinator: Singleton) -> None:
    """The registry can lose everybody while everybody is well."""
    assert await leases_end_together(client, coordinator, lost=3) == {"a": ["r0", "r1", "r2", "r3", "r5"]}


async def test_routes_of_single_losses_go_at_once(client: EtcdClient, coordinator: Singleton) -> None:
    assert await leases_end_together(client, coordinator, lost=2) == {"a": ["r2", "r3", "r5"]}


async def test_routes_of_a_mass_loss_go_when_their_time_is_over(etcd: EtcdProcess, client: EtcdClient) -> None:
    settings = CoordinatorSettings(freeze_s=1.0, etcd=EtcdSettings(lease_ttl_s=2))
    async with singleton("coordinator", etcd.endpoint, settings) as leader:
        assert await leases_end_together(client, leader, lost=4) == {"a": ["r0", "r1", "r2", "r3", "r5"]}
        async with watching(leader) as watch:
            await watch.until_table({"a": ["r5"]})


async def test_routes_survive_when_everybody_loses_the_lease(client: EtcdClient, coordinator: Singleton) -> None:
    """E-06 in a small cluster: two engines, or one, are no crowd, but all there were."""
    await put_deployment(client, "a")
    engines = [await FakeEngine(client, f"e{i}").join() for i in range(2)]
    for i, engine in enumerate(engines):
        await engine.serve("a", f"r{i}")
    async with watching(coordinator) as watch:
        await watch.until_table({"a": ["r0", "r1"]})
        await asyncio.gather(*(engine.leave() for engine in engines))
        await put_deployment(client, "b")  # shows that the losses were seen
        await watch.until_table({"a": ["r0", "r1"], "b": []})
        status = await coordinator.call("GetStatus", pb.GetStatusRequest())
        assert status.routes_frozen
        assert "2 replicas are kept" in status.degraded[0]

        back = await FakeEngine(client, "e0").join()
        await back.serve("a", "r0")
        await FakeEngine(client, "e1").join()
        await watch.until_table({"a": ["r0", "r1"], "b": []})


async def test_routes_of_a_vanished_engine_go_when_it_is_back_as_another_process(
    client: EtcdClient, coordinator: Singleton
) -> None:
    """P-02: it has begun anew, and hosts nothing until it says so; requests that are sent there only cost an attempt."""
    await put_deployment(client, "a")
    engines = [await FakeEngine(client, f"e{i}").join() for i in range(2)]
    for i, engine in enumerate(engines):
        await engine.serve("a", f"r{i}")
    async with watching(coordinator) as watch:
        await watch.until_table({"a": ["r0", "r1"]})
        await asyncio.gather(*(engine.leave() for engine in engines))
        again = FakeEngine(client, "e0")
        again.record.boot_id = "another"
        await again.join()
        await watch.until_table({"a": ["r1"]})
        await again.serve("a", "r0")
        await watch.until_table({"a": ["r0", "r1"]})


async def assigned(client: EtcdClient, engine_id: str, replica_id: str) -> None:
    assignment = common_pb2.Assignment(replica_id=replica_id, engine_id=engine_id, deployment="a")
    await client.put(keys.assignment(engine_id, replica_id), assignment.SerializeToString())


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_new_leader_keeps_its_table_back_while_a_crowd_is_missing(
    etcd: EtcdProcess, client: EtcdClient, comes_back: bool
) -> None:
    """E-06: the leader lost its lease with everybody else. It knows who is assigned, and does not tell the gateways that nobody
    serves; who does not come back in time is dead."""
    await put_deployment(client, "a")
    for i in range(3):
        await assigned(client, f"e{i}", f"r{i}")
    settings = CoordinatorSettings(settle_s=60 if comes_back else 0.5)
    async with singleton("coordinator", etcd.endpoint, settings) as leader, watching(leader) as watch:
        status = await leader.call("GetStatus", pb.GetStatusRequest())
        if comes_back:
            assert (status.leading, status.routes_frozen) == (True, True)
            assert "3 replicas that are assigned are not registered" in status.degraded[0]
            for i in range(3):
                assert not watch.messages
                engine = await FakeEngine(client, f"e{i}").join()
                await engine.serve("a", f"r{i}")
            await watch.until_table({"a": ["r0", "r1", "r2"]})
        else:
            await watch.until_table({"a": []})
        assert len(watch.messages) == 1, "nobody was told a table with holes"
        status = await leader.call("GetStatus", pb.GetStatusRequest())
        assert not status.routes_frozen


async def test_a_new_leader_tells_its_table_at_once_when_one_engine_of_many_is_missing(
    etcd: EtcdProcess, client: EtcdClient
) -> None:
    await put_deployment(client, "a")
    for i in range(3):
        await assigned(client, f"e{i}", f"r{i}")
    for i in range(2):
        await (await FakeEngine(client, f"e{i}").join()).serve("a", f"r{i}")
    async with singleton("coordinator", etcd.endpoint, CoordinatorSettings(settle_s=60)) as leader, watching(leader) as watch:
        await watch.until_table({"a": ["r0", "r1"]})


async def test_a_leader_that_engines_do_not_reach_says_so_and_stays(etcd: EtcdProcess, client: EtcdClient) -> None:
    """M-05: it holds its lease, and hears nobody. Nobody else leads; metric, log and status tell."""
    settings = CoordinatorSettings(load_ttl_s=0.5)
    async with singleton("coordinator", etcd.endpoint, settings) as leader:
        term = leader.election.term
        await FakeEngine(client, "e1").join()

        async def lacks() -> str:
            status = await leader.call("GetStatus", pb.GetStatusRequest())
            assert status.leading
            return " ".join(status.degraded)

        async def reported() -> bool:
            with contextlib.suppress(EngineLost):
                await leader.call("ReportLoad", pb.ReportLoadRequest(engine_id="e1"))
            return not await lacks()

        assert "1 of 1 engines" in await until(lacks, "silence to be noticed")
        await until(degraded_metric(leader, "engines_silent", 1), "the metric")
        await until(reported, "the engine to be heard")
        await until(degraded_metric(leader, "engines_silent", 0), "the metric to fall")
        async with watching(leader) as watch:
            await watch.next()

        async def gateways_missed() -> bool:
            return "no gateway watches the routes any more; 1 did" in await lacks()

        await until(gateways_missed, "the gateways to be missed")
        assert leader.election.term is term is not None


def degraded_metric(leader: Singleton, reason: str, value: int) -> Callable[[], Awaitable[bool]]:
    line = f'inference_coordinator_degraded{{reason="{reason}"}} {value}'

    async def shows() -> bool:
        return line in leader.telemetry.metrics.prometheus_text().decode().splitlines()

    return shows


async def test_a_follower_tells_its_status_too(etcd: EtcdProcess, client: EtcdClient, coordinator: Singleton) -> None:
    async with singleton("coordinator", etcd.endpoint, SETTINGS, wait=False) as follower:
        status = await follower.call("GetStatus", pb.GetStatusRequest())

    assert status == pb.GetStatusResponse()


async def test_a_follower_names_the_leader(etcd: EtcdProcess, client: EtcdClient, coordinator: Singleton) -> None:
    """Trap 7, E16."""
    async with singleton("coordinator", etcd.endpoint, SETTINGS, wait=False) as follower:

        async def refused() -> str:
            with pytest.raises(NotLeader) as caught:
                await follower.call("ListReplicas", pb.ListReplicasRequest())
            return caught.value.address

        assert await until(refused, "an address") == coordinator.address


async def test_a_record_that_is_not_readable_hurts_nobody_else(client: EtcdClient, coordinator: Singleton) -> None:
    await client.put(keys.DEPLOYMENTS + "broken", b"\xff\xff\xff")
    await put_deployment(client, "a")
    async with watching(coordinator) as watch:
        await watch.until_table({"a": []})


async def test_a_lease_of_somebody_else_is_not_kept_alive(client: EtcdClient, coordinator: Singleton) -> None:
    """An engine that reaches etcd answers for its own lease; reporting load does not keep a dead one in the table."""
    await put_deployment(client, "a")
    lease = Lease(client, ttl_s=1)
    await lease.grant()
    record = common_pb2.Engine(id="e1", address="x:1", state=common_pb2.ENGINE_STATE_READY)
    await client.put(keys.engine("e1"), record.SerializeToString(), lease.id)

    async def forgotten() -> bool:
        try:
            await coordinator.call("ReportLoad", pb.ReportLoadRequest(engine_id="e1"))
        except EngineLost:
            return True
        return False

    await until(forgotten, "the engine's own lease to end")
