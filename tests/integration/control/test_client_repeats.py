"""InferenceClient while leadership moves and etcd restarts: what may be repeated is, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from inference_runtime.client import InferenceClient
from inference_runtime.coordination import EtcdClient, EtcdOutcomeUnknown, EtcdUnavailable, keys
from inference_runtime.errors import BadRequest, DeploymentNotFound, InferenceError, NetworkError, NotLeader, StaleLeader
from inference_runtime.rpc import RpcServer
from inference_runtime.settings import TelemetrySettings
from inference_runtime.telemetry import Telemetry
from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.v1 import (
    common_pb2,
    deployment_manager_service_pb2,
    deployment_manager_service_pb2_grpc,
    deployment_pb2,
)

SPEC = {"name": "demo", "model": "demo", "runtime": "scripted"}


class Manager(deployment_manager_service_pb2_grpc.DeploymentManagerServiceServicer):
    """A deployment manager that fails as a test tells it to, and else does what it is asked."""

    def __init__(self, *failures: InferenceError) -> None:
        self.failures = list(failures)
        self.asked = 0

    def _answer(self) -> None:
        self.asked += 1
        if self.failures:
            raise self.failures.pop(0)

    async def ApplyDeployment(self, request: Any, context: object) -> deployment_manager_service_pb2.ApplyDeploymentResponse:
        """Fail as told, or accept."""
        self._answer()
        return deployment_manager_service_pb2.ApplyDeploymentResponse(
            deployment=deployment_pb2.Deployment(spec=request.spec, generation=1), changed=True
        )

    async def DeleteDeployment(self, request: object, context: object) -> deployment_manager_service_pb2.DeleteDeploymentResponse:
        """Fail as told, or accept."""
        self._answer()
        return deployment_manager_service_pb2.DeleteDeploymentResponse()


@asynccontextmanager
async def leading(etcd: EtcdClient, manager: Manager) -> AsyncIterator[str]:
    """The manager serves, and its key says that it leads. Gives its address."""
    telemetry = Telemetry("manager", TelemetrySettings())
    server = RpcServer("127.0.0.1", 0, telemetry)
    add = deployment_manager_service_pb2_grpc.add_DeploymentManagerServiceServicer_to_server
    server.add(add, manager, "inference_runtime.v1.DeploymentManagerService")
    address = await server.start()
    await etcd.put(keys.election("deployment_manager", "test"), common_pb2.Leader(address=address).SerializeToString())
    try:
        yield address
    finally:
        await server.stop(0)
        telemetry.close()


@pytest.mark.parametrize(
    "failure",
    [
        StaleLeader("another process leads by now"),
        NotLeader("not me", role="deployment_manager"),
        EtcdUnavailable("etcd restarts"),
        EtcdOutcomeUnknown("etcd did not answer"),
        NetworkError("cut"),
    ],
    ids=lambda e: type(e).__name__,
)
async def test_apply_is_repeated_until_a_leader_takes_it(etcd: EtcdProcess, client: EtcdClient, failure: InferenceError) -> None:
    """An equal specification changes nothing, so asking again is safe whatever became of the first."""
    manager = Manager(failure, failure)
    async with leading(client, manager), InferenceClient(etcd=[etcd.endpoint]) as admin:
        assert (await admin.apply(SPEC)).deployment.generation == 1
    assert manager.asked == 3


async def test_apply_survives_a_restart_of_etcd_at_its_start(client: EtcdClient) -> None:
    """The client finds nobody to ask where the leader is, for a while."""
    manager = Manager()
    with EtcdProcess(fsync=False) as process:
        async with (
            EtcdClient([process.endpoint]) as etcd,
            leading(etcd, manager),
            InferenceClient(etcd=[process.endpoint]) as admin,
        ):
            await admin.apply(SPEC)
            process.kill()
            applying = asyncio.create_task(admin.apply(SPEC))
            await asyncio.wait({applying}, timeout=4)  # longer than etcd's client waits by itself
            assert not applying.done()
            await asyncio.to_thread(process.start)
            assert (await applying).deployment.generation == 1
    assert manager.asked == 2


async def test_what_is_wrong_is_told_at_once(etcd: EtcdProcess, client: EtcdClient) -> None:
    manager = Manager(BadRequest("no such option", param="runtime_config.x"))
    async with leading(client, manager), InferenceClient(etcd=[etcd.endpoint]) as admin:
        with pytest.raises(BadRequest):
            await admin.apply(SPEC)
    assert manager.asked == 1


async def test_an_etcd_that_never_answered_is_told_at_once() -> None:
    """A wrong endpoint is not waited for."""
    async with asyncio.timeout(5), InferenceClient(etcd=["127.0.0.1:1"]) as admin:
        with pytest.raises(EtcdUnavailable):
            await admin.apply(SPEC)


async def test_a_deployment_that_is_gone_after_an_unknown_outcome_was_deleted(etcd: EtcdProcess, client: EtcdClient) -> None:
    gone = DeploymentNotFound("no deployment is called 'demo'")
    async with InferenceClient(etcd=[etcd.endpoint]) as admin:
        manager = Manager(NetworkError("cut"), gone)
        async with leading(client, manager):
            await admin.delete("demo")
        assert manager.asked == 2
        for failures in ([gone], [StaleLeader("nothing was changed"), gone]):
            async with leading(client, Manager(*failures)):
                with pytest.raises(DeploymentNotFound):
                    await admin.delete("demo")
