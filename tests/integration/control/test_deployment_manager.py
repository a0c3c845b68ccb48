"""The deployment manager in office, with engines that are nothing but their records."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from inference_runtime.coordination import Candidate, Election, EtcdClient, Term, keys
from inference_runtime.errors import BadRequest, DeploymentNotFound, InferenceError, NotLeader, StaleLeader
from inference_runtime.rpc import open_channel
from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.v1 import (
    common_pb2,
    deployment_manager_service_pb2,
    deployment_pb2,
)
from inference_runtime.wire import duration
from services.deployment_manager.catalog import Catalog
from services.deployment_manager.settings import DeploymentManagerSettings
from tests.integration.control.kit import STUBS, FakeEngine, Singleton, assignments, singleton, until

pb = deployment_manager_service_pb2
Spec = deployment_pb2.DeploymentSpec
PENDING, LOADING = deployment_pb2.DEPLOYMENT_STATE_PENDING, deployment_pb2.DEPLOYMENT_STATE_LOADING
SERVING, DEGRADED = deployment_pb2.DEPLOYMENT_STATE_SERVING, deployment_pb2.DEPLOYMENT_STATE_DEGRADED
FAILED, DRAINING = deployment_pb2.DEPLOYMENT_STATE_FAILED, deployment_pb2.DEPLOYMENT_STATE_DRAINING
SETTINGS = DeploymentManagerSettings(engine_gone_s=0.3)


@pytest.fixture
async def manager(etcd: EtcdProcess, client: EtcdClient) -> AsyncIterator[Singleton]:
    async with singleton("deployment_manager", etcd.endpoint, SETTINGS) as leader:
        yield leader


def spec(name: str = "a", model: str = "m", replicas: int = 1, **more: object) -> Spec:
    return Spec(name=name, model=model, runtime="scripted", replicas=replicas, **more)  # type: ignore[arg-type]


async def apply(manager: Singleton, asked: Spec, *, dry_run: bool = False) -> pb.ApplyDeploymentResponse:
    answer = await manager.call("ApplyDeployment", pb.ApplyDeploymentRequest(spec=asked, dry_run=dry_run))
    assert isinstance(answer, pb.ApplyDeploymentResponse)
    return answer


async def get(manager: Singleton, name: str = "a") -> deployment_pb2.Deployment:
    answer = await manager.call("GetDeployment", pb.GetDeploymentRequest(name=name))
    assert isinstance(answer, pb.GetDeploymentResponse)
    return answer.deployment


async def reach(manager: Singleton, state: deployment_pb2.DeploymentState, name: str = "a") -> deployment_pb2.Deployment:
    async def look() -> deployment_pb2.Deployment | None:
        record = await get(manager, name)
        return record if record.status.state == state else None

    return await until(look, f"{name} to be {deployment_pb2.DeploymentState.Name(state)}")


async def assigned(client: EtcdClient, count: int, *without: str) -> list[common_pb2.Assignment]:
    """Assignments, once there are so many, and none of these replicas among them."""

    async def look() -> list[common_pb2.Assignment] | None:
        found = await assignments(client)
        return found if len(found) == count and not {a.replica_id for a in found} & set(without) else None

    return await until(look, f"{count} assignments") if count else []


async def test_trap_32_a_deployment_goes_from_pending_through_loading_to_serving(client: EtcdClient, manager: Singleton) -> None:
    """Trap 32, R04: deployments stayed Pending for ever. The reason says why, the generation what it speaks of."""
    answer = await apply(manager, spec())
    assert (answer.changed, answer.deployment.generation, answer.deployment.runtime) == (True, 1, "scripted")
    pending = await reach(manager, PENDING)
    assert pending.status.reason

    engine = await FakeEngine(client, "e1").join()
    [assignment] = await assigned(client, 1)
    await engine.serve("a", assignment.replica_id, common_pb2.REPLICA_STATE_LOADING)
    loading = await reach(manager, LOADING)
    assert loading.status.reason == "0 of 1 replicas serve"

    await engine.serve("a", assignment.replica_id)
    serving = await reach(manager, SERVING)
    assert (serving.status.reason, serving.status.observed_generation, serving.status.ready_replicas) == ("", 1, 1)
    assert serving.status.changed_at.seconds >= serving.created_at.seconds > 0


async def test_an_assignment_carries_what_the_engine_needs(client: EtcdClient, manager: Singleton) -> None:
    """P01, and the fencing token of the term."""
    await FakeEngine(client, "e1", gpus=4).join()
    await apply(manager, spec(accelerators=2))
    [assignment] = await assigned(client, 1)

    record = await get(manager)
    assert (assignment.engine_id, assignment.deployment, list(assignment.accelerators)) == ("e1", "a", [0, 1])
    assert (assignment.spec, assignment.generation, assignment.revision) == (record.spec, 1, record.revision)
    assert manager.election.term is not None
    assert assignment.fencing_token == manager.election.term.token.to_proto()


async def test_first_placement_does_not_wait(client: EtcdClient, manager: Singleton) -> None:
    """In the steady state it takes well below a second from Apply to Serving."""
    engine = await FakeEngine(client, "e1").join()
    begin_s = time.perf_counter()
    await apply(manager, spec())
    [assignment] = await assigned(client, 1)
    await engine.serve("a", assignment.replica_id)
    await reach(manager, SERVING)

    assert time.perf_counter() - begin_s < 1.0


async def test_asking_again_for_the_same_changes_nothing(manager: Singleton) -> None:
    first = await apply(manager, spec())
    again = await apply(manager, spec())

    assert (again.changed, again.deployment.generation) == (False, first.deployment.generation)


async def test_a_change_raises_the_generation_by_one(manager: Singleton) -> None:
    await apply(manager, spec())
    answer = await apply(manager, spec(model="m2"))

    assert (answer.changed, answer.deployment.generation) == (True, 2)
    assert answer.deployment.created_at.seconds > 0


async def test_concurrent_changes_each_get_a_generation(manager: Singleton) -> None:
    answers = await asyncio.gather(*(apply(manager, spec(model=f"m{i}")) for i in range(5)))

    assert sorted(a.deployment.generation for a in answers) == [1, 2, 3, 4, 5]
    last = max(answers, key=lambda a: a.deployment.generation)
    assert (await get(manager)).spec == last.deployment.spec


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (lambda s: s.ClearField("name"), "name"),
        (lambda s: setattr(s, "name", "../etc"), "name"),
        (lambda s: setattr(s, "name", "a/b"), "name"),
        (lambda s: s.ClearField("model"), "model"),
        (lambda s: setattr(s, "replicas", 1_000_000), "replicas"),
        (lambda s: setattr(s, "accelerators", 100), "accelerators"),
        (lambda s: setattr(s.serving, "max_concurrent", 100_000), "serving.max_concurrent"),
        (lambda s: s.timeouts.total.CopyFrom(duration(-1)), "timeouts.total_s"),
        (lambda s: s.runtime_config.update({"x": float("nan")}), "runtime_config"),
        (lambda s: s.runtime_config.update({"x": float("inf")}), "runtime_config"),
        (lambda s: s.MergeFrom(Spec(runtime="none", model="gpt-4")) or s.ClearField("runtime"), "model"),
    ],
)
async def test_trap_32_a_bad_spec_is_refused_by_name(
    manager: Singleton, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Spec], None], param: str
) -> None:
    """Trap 32: never Internal. Nothing is stored."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    asked = spec()
    wrong(asked)

    with pytest.raises(BadRequest) as caught:
        await apply(manager, asked)

    assert caught.value.param == param
    assert not (await manager.call("ListDeployments", pb.ListDeploymentsRequest())).deployments


async def test_a_request_without_a_spec_is_refused(manager: Singleton) -> None:
    with pytest.raises(BadRequest) as caught:
        await manager.call("ApplyDeployment", pb.ApplyDeploymentRequest())
    assert caught.value.param == "spec"


@pytest.mark.parametrize("name", ["nobody", ""])
async def test_who_is_not_there_is_not_found(manager: Singleton, name: str) -> None:
    """E15."""
    with pytest.raises(DeploymentNotFound):
        await get(manager, name)
    with pytest.raises(DeploymentNotFound):
        await manager.call("DeleteDeployment", pb.DeleteDeploymentRequest(name=name))


async def test_trap_31_a_refusal_lists_each_engine_with_its_reason(client: EtcdClient, manager: Singleton) -> None:
    """Trap 31, R12."""
    await FakeEngine(client, "e1", gpus=1).join()
    await FakeEngine(client, "e2", runtimes=("torch",)).join()
    await apply(manager, spec(accelerators=2))

    async def reasoned() -> bool:
        return "e2" in (await get(manager)).status.reason

    await until(reasoned, "a reason")
    record = await get(manager)
    assert record.status.state == PENDING
    assert record.status.reason == (
        "no engine takes it: e1: its node has 1 accelerators, 2 are needed; "
        "e2: runtime 'scripted' is not installed (it has torch)"
    )


async def test_trap_31_two_deployments_never_share_an_accelerator(client: EtcdClient, manager: Singleton) -> None:
    """Trap 31, P01, with both asked for at once."""
    await FakeEngine(client, "e1", gpus=3).join()
    await asyncio.gather(*(apply(manager, spec(name, accelerators=1)) for name in ("a", "b", "c")))
    found = await assigned(client, 3)

    assert sorted(index for a in found for index in a.accelerators) == [0, 1, 2]


async def test_a_failed_replica_fails_the_deployment_with_its_reason(client: EtcdClient, manager: Singleton) -> None:
    engine = await FakeEngine(client, "e1").join()
    await apply(manager, spec())
    [assignment] = await assigned(client, 1)
    await engine.serve("a", assignment.replica_id, common_pb2.REPLICA_STATE_FAILED, "no such file: /models/m")

    assert "no such file: /models/m" in (await reach(manager, FAILED)).status.reason


async def test_delete_drains_and_then_removes(client: EtcdClient, manager: Singleton) -> None:
    """R04: deleting, drained, removed."""
    engine = await FakeEngine(client, "e1").join()
    await apply(manager, spec())
    [assignment] = await assigned(client, 1)
    await engine.serve("a", assignment.replica_id)
    await reach(manager, SERVING)

    await manager.call("DeleteDeployment", pb.DeleteDeploymentRequest(name="a"))
    await manager.call("DeleteDeployment", pb.DeleteDeploymentRequest(name="a"))  # asking twice is the same
    draining = await reach(manager, DRAINING)
    assert draining.deleting
    await assigned(client, 0)
    await engine.serve("a", assignment.replica_id, common_pb2.REPLICA_STATE_DRAINING)
    assert (await get(manager)).deleting, "it waits for what runs"
    await engine.drop("a", assignment.replica_id)

    async def gone() -> bool:
        try:
            await get(manager)
        except DeploymentNotFound:
            return True
        return False

    await until(gone, "the record to go")
    assert (await apply(manager, spec())).deployment.generation == 1, "a new life"


async def test_asking_again_while_it_is_deleted_brings_it_back(client: EtcdClient, manager: Singleton) -> None:
    engine = await FakeEngine(client, "e1").join()
    await apply(manager, spec())
    [old] = await assigned(client, 1)
    await engine.serve("a", old.replica_id)
    await reach(manager, SERVING)
    await manager.call("DeleteDeployment", pb.DeleteDeploymentRequest(name="a"))
    answer = await apply(manager, spec())

    assert (answer.changed, answer.deployment.generation, answer.deployment.deleting) == (True, 2, False)
    [new] = await assigned(client, 1)
    await engine.serve("a", new.replica_id)
    await reach(manager, SERVING)


async def test_replicas_of_a_lost_engine_are_placed_again(client: EtcdClient, manager: Singleton) -> None:
    engine = await FakeEngine(client, "e1").join()
    await apply(manager, spec())
    [lost] = await assigned(client, 1)
    await engine.serve("a", lost.replica_id)
    await reach(manager, SERVING)
    other = await FakeEngine(client, "e2").join()
    await engine.leave()
    [new] = await assigned(client, 1, lost.replica_id)
    await other.serve("a", new.replica_id)

    assert new.engine_id == "e2"
    assert (await reach(manager, SERVING)).status.ready_replicas == 1


async def test_engines_that_all_vanish_find_their_assignments_again(client: EtcdClient, manager: Singleton) -> None:
    """When etcd loses everybody, nobody loses what it runs."""
    engine = await FakeEngine(client, "e1").join()
    await apply(manager, spec())
    [before] = await assigned(client, 1)
    await engine.serve("a", before.replica_id)
    await reach(manager, SERVING)
    await engine.leave()
    await reach(manager, PENDING)
    back = await FakeEngine(client, "e1").join()
    await back.serve("a", before.replica_id)
    await reach(manager, SERVING)

    assert await assignments(client) == [before]


async def test_a_changed_model_is_rolled_without_a_gap(client: EtcdClient, manager: Singleton) -> None:
    """The old replica keeps its assignment until the new one serves."""
    engine = await FakeEngine(client, "e1").join()
    await apply(manager, spec())
    [old] = await assigned(client, 1)
    await engine.serve("a", old.replica_id)
    await reach(manager, SERVING)

    await apply(manager, spec(model="m2"))
    both = await assigned(client, 2)
    [new] = [a for a in both if a.replica_id != old.replica_id]
    assert (new.generation, new.spec.model) == (2, "m2")
    await engine.serve("a", new.replica_id, common_pb2.REPLICA_STATE_LOADING)
    degraded = await reach(manager, DEGRADED)
    assert degraded.status.observed_generation == 2
    await engine.serve("a", new.replica_id)
    assert await assigned(client, 1, old.replica_id) == [new]


async def test_assignments_of_no_deployment_are_swept(client: EtcdClient, manager: Singleton) -> None:
    await client.put(
        keys.assignment("e1", "stray"),
        common_pb2.Assignment(replica_id="stray", engine_id="e1", deployment="x").SerializeToString(),
    )

    async def swept() -> bool:
        return not await assignments(client)

    await until(swept, "the stray to go")


@pytest.mark.parametrize(
    ("key", "record"),
    [
        (keys.ENGINES + "e0", b"\xff\xff"),
        (keys.ENGINES + "e0", common_pb2.Engine(id="a/b", runtimes=["scripted"]).SerializeToString()),
        (keys.ENGINES + "e0", common_pb2.Engine(runtimes=["scripted"]).SerializeToString()),
        (keys.DEPLOYMENTS + "x", deployment_pb2.Deployment().SerializeToString()),
        (keys.ASSIGNMENTS + "e0/x", common_pb2.Assignment().SerializeToString()),
    ],
)
async def test_a_record_that_makes_no_sense_hurts_nobody_else(
    client: EtcdClient, manager: Singleton, key: str, record: bytes
) -> None:
    await client.put(key, record)
    await FakeEngine(client, "e1").join()
    await apply(manager, spec())

    async def placed() -> bool:
        return any(a.engine_id == "e1" for a in await assignments_of(client, "e1"))

    await until(placed, "the assignment")


async def assignments_of(client: EtcdClient, engine_id: str) -> list[common_pb2.Assignment]:
    stored, _ = await client.list(keys.assignments_of(engine_id))
    return [common_pb2.Assignment.FromString(kv.value) for kv in stored]


async def test_a_new_leader_waits_for_engines_that_are_expected(etcd: EtcdProcess, client: EtcdClient) -> None:
    """It reads first, and acts when everybody named is back: nothing moves because a registration came late."""
    late, other = FakeEngine(client, "e1"), await FakeEngine(client, "e2").join()
    hasty = DeploymentManagerSettings(settle_s=10, engine_gone_s=0)
    async with singleton("deployment_manager", etcd.endpoint, hasty) as first:
        await late.join()
        await apply(first, spec(replicas=2))
        before = await assigned(client, 2)
    await late.leave()
    async with singleton("deployment_manager", etcd.endpoint, hasty) as second:
        await apply(second, spec("b"))
        assert {a.replica_id for a in await assignments(client)} == {a.replica_id for a in before}, "it waits"
        back = await FakeEngine(client, "e1").join()
        after = await assigned(client, 3)

    assert {a.replica_id for a in before} < {a.replica_id for a in after}
    assert other.id != back.id


async def test_a_restart_of_etcd_costs_nothing_but_time(etcd: EtcdProcess, client: EtcdClient, manager: Singleton) -> None:
    await apply(manager, spec())
    await asyncio.to_thread(etcd.restart)

    async def applied() -> bool:
        try:
            return (await apply(manager, spec(model="m2"))).deployment.generation == 2
        except InferenceError:
            return False

    await until(applied, "the manager to go on")
    engine = await FakeEngine(client, "e1").join()
    [assignment] = await assigned(client, 1)
    await engine.serve("a", assignment.replica_id)
    await reach(manager, SERVING)


async def test_a_dry_run_says_what_would_happen_and_stores_nothing(client: EtcdClient, manager: Singleton) -> None:
    await FakeEngine(client, "e1").join()

    async def foreseen() -> bool:
        answer = await apply(manager, spec(), dry_run=True)
        assert answer.changed
        return answer.deployment.status.reason == "would be placed on e1"

    await until(foreseen, "the engine to be seen")
    with pytest.raises(DeploymentNotFound):
        await get(manager)
    assert not await assignments(client)


async def test_list_engines_shows_who_is_registered(client: EtcdClient, manager: Singleton) -> None:
    for engine_id in ("e2", "e1"):
        await FakeEngine(client, engine_id).join()
    answer = await manager.call("ListEngines", pb.ListEnginesRequest())

    assert [engine.id for engine in answer.engines] == ["e1", "e2"]


async def test_a_watch_shows_what_is_and_what_becomes_of_it(client: EtcdClient, manager: Singleton) -> None:
    await apply(manager, spec("a"))
    channel = open_channel(manager.address)
    stream = STUBS["deployment_manager"](channel).WatchDeployments(pb.WatchDeploymentsRequest())
    seen: list[tuple[str, int, bool]] = []

    async def until_seen(name: str, generation: int, removed: bool) -> None:
        async with asyncio.timeout(10):
            while (name, generation, removed) not in seen:
                message = await stream.read()
                assert isinstance(message, pb.WatchDeploymentsResponse)
                seen.append((message.deployment.spec.name, message.deployment.generation, message.removed))

    try:
        await until_seen("a", 1, False)
        await apply(manager, spec("b"))
        await until_seen("b", 1, False)
        await apply(manager, spec("a", model="m2"))
        await until_seen("a", 2, False)
        await manager.call("DeleteDeployment", pb.DeleteDeploymentRequest(name="b"))
        await until_seen("b", 0, True)
        await client.delete_prefix(keys.election_prefix("deployment_manager"))
        with pytest.raises(grpc.aio.AioRpcError):
            while True:
                await stream.read()
    finally:
        stream.cancel()
        await channel.close(None)


async def test_a_former_leader_writes_nothing(client: EtcdClient) -> None:
    """A catalogue whose term is over, and whose process does not know it yet, is refused by etcd."""
    terms: asyncio.Queue[Term] = asyncio.Queue()

    async def lead(term: Term) -> None:
        terms.put_nowait(term)
        await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        campaign = group.create_task(Election(client, "deployment_manager", Candidate.here("x:1")).run(lead))
        term = await terms.get()
        await Catalog(client, term).apply(spec(), {}, [], dry_run=False)
        # Its key goes while it is between two looks: what it believes does not matter.
        await client.delete(term.leader_key)
        with pytest.raises(StaleLeader):
            await Catalog(client, term).apply(spec(model="m2"), {}, [], dry_run=False)
        campaign.cancel()

    stored = await client.get(keys.deployment("a"))
    assert stored is not None
    assert deployment_pb2.Deployment.FromString(stored.value).spec.model == "m"


async def test_a_follower_names_the_leader(etcd: EtcdProcess, client: EtcdClient, manager: Singleton) -> None:
    """Trap 7, E16."""
    async with singleton("deployment_manager", etcd.endpoint, SETTINGS, wait=False) as follower:

        async def refused() -> str:
            with pytest.raises(NotLeader) as caught:
                await get(follower)
            return caught.value.address

        assert await until(refused, "an address") == manager.address
