"""Two processes of each singleton: one leads, and the other takes over, whatever happens to the first."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.errors import InferenceError, NotLeader
from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.v1 import (
    common_pb2,
    coordinator_service_pb2,
    deployment_manager_service_pb2,
    deployment_pb2,
    generation_pb2,
    metrics_service_pb2,
)
from tests.integration.control.kit import (
    PROBE,
    ROLES,
    TTL_S,
    FakeEngine,
    ServiceProcess,
    answers,
    assignments,
    call,
    health,
    leader_of,
    processes,
    put_deployment,
    until,
)

manager_pb = deployment_manager_service_pb2
#: From the death of a leader to the next: the lease, up to a second of etcd's own, and the election.
TAKEOVER_S = TTL_S + 3


async def in_office(address: str, role: str) -> float:
    """When this address first answers as the leader, on the monotonic clock."""
    await until(lambda: answers(address, role, *PROBE[role]), f"{role} at {address} in office")
    return time.monotonic()


@pytest.mark.parametrize("role", ROLES)
async def test_trap_07_one_leads_and_the_other_takes_over(
    etcd: EtcdProcess, client: EtcdClient, tmp_path: Path, role: str
) -> None:
    """Trap 7: "singleton" was a word. Followers name the leader and are healthy; SIGKILL of the leader moves the office within
    the lease, SIGTERM within a second. Neither process is large."""
    method, request = PROBE[role]
    async with processes(role, etcd.endpoint, tmp_path, 2) as [first, second]:
        leader, follower = await first.address(client), await second.address(client)
        await in_office(leader, role)
        with pytest.raises(NotLeader) as caught:
            await call(follower, role, method, request)
        assert caught.value.address == leader
        assert await health(leader) == await health(follower) == health_pb2.HealthCheckResponse.SERVING
        assert max(first.rss_mb(), second.rss_mb()) <= 90
        assert "libtorch" not in first.maps()

        killed_s = time.monotonic()
        first.kill()
        assert await in_office(follower, role) - killed_s < TAKEOVER_S

        third = ServiceProcess(role, etcd.endpoint, tmp_path)
        try:
            successor = await third.address(client)
            term_s = time.monotonic()
            async with asyncio.TaskGroup() as group:
                group.create_task(second.stop())
                taken_s = await in_office(successor, role)
            assert taken_s - term_s < 1.0
            assert second.process.returncode == 0
            assert await third.stop() == 0
        finally:
            if third.process.poll() is None:
                third.kill()
    assert await leader_of(client, role) is None, "who leaves resigns"


async def test_trap_32_the_catalogue_survives_the_leader(etcd: EtcdProcess, client: EtcdClient, tmp_path: Path) -> None:
    """Trap 32, R04: what was applied at A is there at B, with its assignment, and the generation goes on."""
    asked = deployment_pb2.DeploymentSpec(name="a", model="m", runtime="scripted", replicas=1)
    engine = await FakeEngine(client, "e1").join()
    async with processes("deployment_manager", etcd.endpoint, tmp_path, 2) as [first, second]:
        a, b = await first.address(client), await second.address(client)
        await in_office(a, "deployment_manager")
        applied = await call(a, "deployment_manager", "ApplyDeployment", manager_pb.ApplyDeploymentRequest(spec=asked))

        async def placed() -> list[common_pb2.Assignment]:
            return await assignments(client)

        [assignment] = await until(placed, "an assignment")
        await engine.serve("a", assignment.replica_id)
        first.kill()
        await in_office(b, "deployment_manager")

        async def serving() -> deployment_pb2.Deployment | None:
            found = await call(b, "deployment_manager", "GetDeployment", manager_pb.GetDeploymentRequest(name="a"))
            record: deployment_pb2.Deployment = found.deployment
            return record if record.status.state == deployment_pb2.DEPLOYMENT_STATE_SERVING else None

        record = await until(serving, "the deployment to serve")
        assert (record.spec, record.generation) == (applied.deployment.spec, 1)
        assert await assignments(client) == [assignment], "the new leader leaves alone what is right"
        asked.model = "m2"
        changed = await call(b, "deployment_manager", "ApplyDeployment", manager_pb.ApplyDeploymentRequest(spec=asked))
        assert changed.deployment.generation == 2

        async def rolled() -> list[common_pb2.Assignment]:
            return [x for x in await assignments(client) if x.generation == 2]

        [newer] = await until(rolled, "the next generation's assignment")
        assert newer.fencing_token.revision > assignment.fencing_token.revision, "a later term has a higher token"


async def test_trap_07_a_paused_leader_changes_nothing_when_it_wakes(
    etcd: EtcdProcess, client: EtcdClient, tmp_path: Path
) -> None:
    """Trap 7: frozen for longer than its lease, then woken with an order waiting. The order is refused or goes unanswered, and
    fencing tokens never fall."""
    asked = deployment_pb2.DeploymentSpec(name="a", model="new", runtime="scripted", replicas=1)
    stale = deployment_pb2.DeploymentSpec(name="a", model="stale", runtime="scripted", replicas=1)
    await FakeEngine(client, "e1").join()
    async with processes("deployment_manager", etcd.endpoint, tmp_path, 2) as [first, second]:
        a, b = await first.address(client), await second.address(client)
        await in_office(a, "deployment_manager")
        first.pause()
        async with asyncio.TaskGroup() as group:
            late = group.create_task(
                _outcome(a, "ApplyDeployment", manager_pb.ApplyDeploymentRequest(spec=stale), timeout_s=TAKEOVER_S + 20)
            )
            await in_office(b, "deployment_manager")
            await call(b, "deployment_manager", "ApplyDeployment", manager_pb.ApplyDeploymentRequest(spec=asked))
            first.resume()
        assert late.result() != "OK"

        stored = await client.get(keys.deployment("a"))
        assert stored is not None
        assert deployment_pb2.Deployment.FromString(stored.value).spec.model == "new"
        leader = await leader_of(client, "deployment_manager")
        assert leader is not None
        assert leader.pid == second.pid


async def _outcome(address: str, method: str, request: Any, timeout_s: float) -> str:
    """How a call ended: "OK" or the reason of its error."""
    try:
        await call(address, "deployment_manager", method, request, timeout_s=timeout_s)
    except InferenceError as err:
        return err.reason
    return "OK"


async def test_the_next_coordinator_has_the_whole_table(etcd: EtcdProcess, client: EtcdClient, tmp_path: Path) -> None:
    """Trap 7: the table is made from what is registered, so nobody has to tell it again."""
    engine = await FakeEngine(client, "e1").join()
    await put_deployment(client, "a")
    await engine.serve("a", "r1")
    route = coordinator_service_pb2.RouteRequest(deployment="a")
    async with processes("coordinator", etcd.endpoint, tmp_path, 2) as [first, second]:
        a, b = await first.address(client), await second.address(client)
        await in_office(a, "coordinator")
        assert (await call(a, "coordinator", "Route", route)).replica.id == "r1"
        first.kill()
        await in_office(b, "coordinator")
        assert (await call(b, "coordinator", "Route", route)).replica.id == "r1"


async def test_trap_06_usage_survives_kill_and_restart(etcd: EtcdProcess, client: EtcdClient, tmp_path: Path) -> None:
    """Trap 6, B04: sent to A, A killed, sent again to B because no answer was seen: counted once."""
    records = [
        metrics_service_pb2.UsageRecord(
            request_id=f"r{i}", deployment="a", usage=generation_pb2.Usage(input_tokens=2, output_tokens=1)
        )
        for i in range(50)
    ]
    batch = metrics_service_pb2.RecordUsageRequest(records=records)
    async with processes("metrics", etcd.endpoint, tmp_path, 2) as [first, second]:
        a, b = await first.address(client), await second.address(client)
        await in_office(a, "metrics")
        assert (await call(a, "metrics", "RecordUsage", batch)).accepted == 50
        first.kill()
        await in_office(b, "metrics")
        assert (await call(b, "metrics", "RecordUsage", batch)).accepted == 0
        [usage] = (await call(b, "metrics", "GetSnapshot", metrics_service_pb2.GetSnapshotRequest())).deployments

    assert (usage.requests, usage.input_tokens, usage.output_tokens) == (50, 100, 50)
