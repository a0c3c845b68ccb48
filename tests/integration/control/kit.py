"""Singletons in this process or in processes of their own, on a real etcd; and engines made of nothing but their records."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inference_runtime.coordination import Candidate, Election, EtcdClient, LeaderObserver, Lease, keys
from inference_runtime.errors import InferenceError
from inference_runtime.rpc import RpcServer, error_from_rpc, open_channel
from inference_runtime.settings import TelemetrySettings
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1 import (
    common_pb2,
    coordinator_service_pb2,
    coordinator_service_pb2_grpc,
    deployment_manager_service_pb2,
    deployment_manager_service_pb2_grpc,
    deployment_pb2,
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)
from services.coordinator.service import CoordinatorService
from services.coordinator.settings import CoordinatorSettings
from services.deployment_manager.service import DeploymentManagerService
from services.deployment_manager.settings import DeploymentManagerSettings
from services.metrics.service import MetricsService
from services.metrics.settings import MetricsSettings

WAIT_S = 15.0
#: Lease of every process here: two seconds, so that losing a leader takes no longer than that.
TTL_S = 2.0
ROLES = ("coordinator", "deployment_manager", "metrics")

STUBS: dict[str, Any] = {
    "coordinator": coordinator_service_pb2_grpc.CoordinatorServiceStub,
    "deployment_manager": deployment_manager_service_pb2_grpc.DeploymentManagerServiceStub,
    "metrics": metrics_service_pb2_grpc.MetricsServiceStub,
}
_REGISTER: dict[str, Any] = {
    "coordinator": coordinator_service_pb2_grpc.add_CoordinatorServiceServicer_to_server,
    "deployment_manager": deployment_manager_service_pb2_grpc.add_DeploymentManagerServiceServicer_to_server,
    "metrics": metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server,
}
_NAMES = {"coordinator": "Coordinator", "deployment_manager": "DeploymentManager", "metrics": "Metrics"}

#: A call that every leader answers.
PROBE: dict[str, tuple[str, Any]] = {
    "coordinator": ("ListReplicas", coordinator_service_pb2.ListReplicasRequest()),
    "deployment_manager": ("ListDeployments", deployment_manager_service_pb2.ListDeploymentsRequest()),
    "metrics": ("GetSnapshot", metrics_service_pb2.GetSnapshotRequest()),
}

T = TypeVar("T")


async def until(look: Callable[[], Awaitable[T | None]], what: str, timeout_s: float = WAIT_S) -> T:
    """The first truthy answer of `look`; fails with `what` after the time is over."""
    answer: T | None = None
    try:
        async with asyncio.timeout(timeout_s):
            while not (answer := await look()):  # noqa: ASYNC110 - the condition is another process's
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"waited {timeout_s} s for: {what}; last seen: {answer!r}") from None
    return answer


async def call(address: str, role: str, method: str, request: Any, timeout_s: float = 5.0) -> Any:
    """One unary call. Raises our exceptions."""
    channel = open_channel(address)
    try:
        return await getattr(STUBS[role](channel), method)(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as err:
        raise error_from_rpc(err) from err
    finally:
        await channel.close(None)


async def health(address: str) -> int:
    """What the health service says of the whole server."""
    channel = open_channel(address)
    try:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        return int(answer.status)
    finally:
        await channel.close(None)


# --- in this process -------------------------------------------------------------------------------------------------


@dataclass
class Singleton:
    """One service of this process, in office or not."""

    role: str
    address: str
    telemetry: Telemetry
    election: Election

    async def call(self, method: str, request: Any) -> Any:
        return await call(self.address, self.role, method, request)


@contextlib.asynccontextmanager
async def singleton(
    role: str,
    endpoint: str,
    settings: CoordinatorSettings | DeploymentManagerSettings | MetricsSettings,
    *,
    wait: bool = True,
) -> AsyncIterator[Singleton]:
    """A service wired as its `__main__` wires it; with `wait`, in office when the context begins."""
    telemetry = Telemetry(role, TelemetrySettings())
    async with EtcdClient([endpoint]) as etcd:
        leaders = LeaderObserver(etcd, role)
        service: CoordinatorService | DeploymentManagerService | MetricsService
        if isinstance(settings, CoordinatorSettings):
            service = CoordinatorService(etcd, leaders, settings, telemetry.metrics)
        elif isinstance(settings, DeploymentManagerSettings):
            service = DeploymentManagerService(etcd, leaders, settings, telemetry.metrics)
        else:
            service = MetricsService(leaders, settings, telemetry.metrics)
        server = RpcServer("127.0.0.1", 0, telemetry)
        server.add(_REGISTER[role], service, f"inference_runtime.v1.{_NAMES[role]}Service")
        address = await server.start()
        election = Election(etcd, role, Candidate.here(address), ttl_s=10)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(leaders.run()), group.create_task(election.run(service.lead))]
            try:
                if wait:
                    await until(lambda: answers(address, role, *PROBE[role]), f"{role} in office")
                yield Singleton(role, address, telemetry, election)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                await server.stop(0)


# --- processes of their own ------------------------------------------------------------------------------------------


class ServiceProcess:
    """`python -m services.<role>`, on a port of its own choice."""

    def __init__(self, role: str, endpoint: str, state_dir: Path, **more: str) -> None:
        self.role = role
        prefix = f"INFERENCE_{role.upper()}__"
        given = {"ETCD__ENDPOINTS": endpoint, "ETCD__LEASE_TTL_S": str(TTL_S), **more}
        if role == "metrics":
            given["STATE_DIR"] = str(state_dir)
        self.log = state_dir / f"{role}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"services.{role}"],
                env={**os.environ, **{prefix + key: value for key, value in given.items()}},
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    async def address(self, client: EtcdClient) -> str:
        """Where it answers, from its candidacy."""

        async def look() -> str:
            assert self.process.poll() is None, self.log.read_text()
            stored, _ = await client.list(keys.election_prefix(self.role))
            found = [common_pb2.Leader.FromString(kv.value) for kv in stored]
            return next((leader.address for leader in found if leader.pid == self.pid), "")

        return await until(look, f"{self.role} stands for election")

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        self.process.kill()
        self.process.wait()

    async def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, WAIT_S)

    def pause(self) -> None:
        """SIGSTOP, and standing still when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        _wait_state(self.pid, "T")

    def resume(self) -> None:
        """SIGCONT, and running again when this returns."""
        os.kill(self.pid, signal.SIGCONT)

    def maps(self) -> str:
        """What is mapped into its memory, shared libraries among it."""
        return Path(f"/proc/{self.pid}/maps").read_text()

    def rss_mb(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


def _wait_state(pid: int, state: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
        assert time.monotonic() < deadline, "the process ignored the signal"
        time.sleep(0.001)


@contextlib.asynccontextmanager
async def processes(role: str, endpoint: str, state_dir: Path, count: int, **more: str) -> AsyncIterator[list[ServiceProcess]]:
    """Several processes of one service, all standing for election; the first leads. None is left behind."""
    started: list[ServiceProcess] = []
    try:
        async with EtcdClient([endpoint]) as client:
            for _ in range(count):
                started.append(ServiceProcess(role, endpoint, state_dir, **more))
                await started[-1].address(client)
            yield started
    finally:
        for service in started:
            if service.process.poll() is None:
                service.process.send_signal(signal.SIGCONT)
                service.kill()


async def leader_of(client: EtcdClient, role: str) -> common_pb2.Leader | None:
    """Who leads, read from etcd."""
    stored, _ = await client.list(keys.election_prefix(role))
    oldest = min(stored, key=lambda kv: kv.create_revision, default=None)
    return None if oldest is None else common_pb2.Leader.FromString(oldest.value)


async def answers(address: str, role: str, method: str, request: Any) -> bool:
    """Whether this address answers as a leader, not only as a process."""
    try:
        await call(address, role, method, request, timeout_s=1.0)
    except InferenceError:
        return False
    return True


# --- engines and deployments -----------------------------------------------------------------------------------------


class FakeEngine:
    """An engine's records under a lease of its own, without the engine."""

    def __init__(self, client: EtcdClient, engine_id: str, *, gpus: int = 0, runtimes: Sequence[str] = ("scripted",)) -> None:
        self._client, self.id = client, engine_id
        self._lease = Lease(client, ttl_s=60)
        self.record = common_pb2.Engine(
            id=engine_id,
            address=f"127.0.0.1:{10000 + len(engine_id)}",
            runtimes=runtimes,
            state=common_pb2.ENGINE_STATE_READY,
            node=common_pb2.Node(hostname=engine_id, accelerators=[common_pb2.Accelerator(index=i) for i in range(gpus)]),
        )

    async def join(self) -> FakeEngine:
        """Take a lease and register."""
        await self._lease.grant()
        await self.write()
        return self

    async def write(self) -> None:
        """Write the engine's own record."""
        await self._client.put(keys.engine(self.id), self.record.SerializeToString(), self._lease.id)

    async def serve(
        self,
        deployment: str,
        replica_id: str,
        state: common_pb2.ReplicaState = common_pb2.REPLICA_STATE_SERVING,
        reason: str = "",
    ) -> None:
        """Register a replica in a state."""
        replica = common_pb2.Replica(
            id=replica_id,
            deployment=deployment,
            engine_id=self.id,
            address=self.record.address,
            state=state,
            reason=reason,
            max_concurrent=10,
        )
        await self._client.put(keys.replica(deployment, replica_id), replica.SerializeToString(), self._lease.id)

    async def drop(self, deployment: str, replica_id: str) -> None:
        """Deregister a replica."""
        await self._client.delete(keys.replica(deployment, replica_id))

    async def leave(self) -> None:
        """End the lease, as etcd does for an engine that is silent for too long."""
        await self._lease.revoke()


async def put_deployment(client: EtcdClient, name: str, generation: int = 1) -> None:
    """A record of the catalogue, written past the manager."""
    spec = deployment_pb2.DeploymentSpec(name=name, model="m", runtime="scripted", replicas=1)
    record = deployment_pb2.Deployment(spec=spec, generation=generation, runtime="scripted", revision="r1")
    await client.put(keys.deployment(name), record.SerializeToString())


async def assignments(client: EtcdClient) -> list[common_pb2.Assignment]:
    """All assignments, by engine and replica."""
    stored, _ = await client.list(keys.ASSIGNMENTS)
    return [common_pb2.Assignment.FromString(kv.value) for kv in stored]
