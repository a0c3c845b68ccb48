"""The async client for applications (X03): generate through a gateway, operate a cluster through its leaders.

    async with InferenceClient(gateway="127.0.0.1:9090", etcd=["127.0.0.1:2379"]) as client:
        await client.apply({"name": "demo", "model": "demo"})
        async for chunk in client.generate("demo", "Hello"):
            print(chunk.text, end="")

Every failure is one of `inference_runtime.errors`, the same class that the service raised.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from inference_runtime import wire
from inference_runtime.coordination import EtcdClient, EtcdOutcomeUnknown, EtcdUnavailable, StoreReplaced, keys
from inference_runtime.deployment import DeploymentSpec, parse_deployment
from inference_runtime.errors import (
    BadRequest,
    DeploymentNotFound,
    EngineLost,
    InferenceError,
    Internal,
    NetworkError,
    NotLeader,
    StaleLeader,
    Timeout,
)
from inference_runtime.generation import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    Message,
    Role,
    SamplingParams,
    TextPart,
    TokenChunk,
    Tokens,
    Usage,
)
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.v1 import (
    common_pb2,
    coordinator_service_pb2,
    coordinator_service_pb2_grpc,
    deployment_manager_service_pb2,
    deployment_manager_service_pb2_grpc,
    deployment_pb2,
    engine_service_pb2,
    engine_service_pb2_grpc,
    gateway_service_pb2,
    gateway_service_pb2_grpc,
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)

__all__ = ["ROLES", "InferenceClient"]

#: The singleton roles.
ROLES = ("coordinator", "deployment_manager", "metrics")
#: Limit of one administrative call, seconds.
CALL_TIMEOUT_S = 5.0
#: How long a call looks for a leader before it gives up, seconds: an election after a crash takes up to 12.
LEADER_TIMEOUT_S = 15.0
#: Pause between two looks for a leader, seconds.
LEADER_RETRY_S = 0.1

T = TypeVar("T")


class InferenceClient:
    """One connection to a gateway, and to a cluster through etcd. Either may be left out.

    Args:
        gateway: host:port of a gateway's gRPC door, for `generate`, `complete` and `models`.
        etcd: host:port of etcd members, for everything else.

    Close it, or use it as an async context manager. Safe to use from many tasks of one event loop.
    """

    def __init__(self, gateway: str = "", etcd: Sequence[str] = ()) -> None:
        self._gateway_address = gateway
        self._etcd = EtcdClient(list(etcd)) if etcd else None
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection. Idempotent."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close(None)
        if self._etcd is not None:
            await self._etcd.close()

    # --- generation --------------------------------------------------------------------------------------------------

    async def generate(
        self,
        deployment: str,
        prompt: str | Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        timeout_s: float = 600.0,
    ) -> AsyncIterator[TokenChunk]:
        """Stream an answer. The last chunk of each choice carries its finish reason, the last chunk of all the usage.

        Args:
            deployment: Name of the deployment.
            prompt: One user message as text, or a conversation.
            sampling: How to draw; None is the model's default.
            timeout_s: Limit of the whole request, seconds.

        On cancel: the generation stops within one step.
        """
        turns = (Message(Role.USER, (TextPart(prompt),)),) if isinstance(prompt, str) else tuple(prompt)
        request = GenerationRequest(uuid.uuid4().hex, deployment, ChatPrompt(turns), sampling or SamplingParams())
        stub = gateway_service_pb2_grpc.GatewayServiceStub(self._channel(self._gateway()))  # type: ignore[no-untyped-call]
        call = stub.Generate(gateway_service_pb2.GenerateRequest(request=wire.request_to_proto(request)), timeout=timeout_s)
        try:
            async for response in call:
                detail = response.detail
                yield TokenChunk(
                    response.choice,
                    response.index,
                    tuple(response.token_ids),
                    response.text,
                    FinishReason(int(detail.finish_reason)) if detail.finish_reason else None,
                    wire.usage_from_proto(detail.usage) if detail.HasField("usage") else None,
                    tuple(wire.logprob_from_proto(x) for x in detail.logprobs),
                    detail.stop_sequence,
                )
        except grpc.aio.AioRpcError as err:
            raise _failure(err) from err
        finally:
            call.cancel()

    async def complete(
        self,
        deployment: str,
        prompt: str | Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        timeout_s: float = 600.0,
    ) -> Tokens:
        """The whole answer to a request with one choice. Arguments and errors as for `generate`.

        Raises:
            BadRequest: `sampling.n` asks for several choices; `generate` tells them apart.
        """
        if sampling is not None and sampling.n > 1:
            raise BadRequest("complete() gives one choice; use generate() for more", param="n")
        text: list[str] = []
        tokens: list[int] = []
        finish, usage = FinishReason.STOP, Usage()
        async with aclosing(self.generate(deployment, prompt, sampling, timeout_s=timeout_s)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                text.append(chunk.text)
                tokens.extend(chunk.token_ids)
                finish, usage = chunk.finish_reason or finish, chunk.usage or usage
        return Tokens("".join(text), tuple(tokens), finish, usage)

    async def models(self) -> list[gateway_service_pb2.Model]:
        """The deployments that the gateway can reach, by name."""
        stub = gateway_service_pb2_grpc.GatewayServiceStub(self._channel(self._gateway()))  # type: ignore[no-untyped-call]
        return list((await self._call(stub.ListModels, gateway_service_pb2.ListModelsRequest())).models)

    # --- operation ---------------------------------------------------------------------------------------------------

    async def apply(
        self, spec: DeploymentSpec | Mapping[str, Any], *, expected_generation: int = 0
    ) -> deployment_manager_service_pb2.ApplyDeploymentResponse:
        """Create or change a deployment. Equal specifications change nothing, so it is asked again while leadership moves or etcd
        restarts. Raises BadRequest with `param`.

        Args:
            spec: What to serve.
            expected_generation: Change it only while it is of this generation, else BadRequest with `param` =
                "expected_generation"; 0 for whatever it is.
        """
        value = spec if isinstance(spec, DeploymentSpec) else parse_deployment(spec)
        request = deployment_manager_service_pb2.ApplyDeploymentRequest(
            spec=wire.spec_to_proto(value), expected_generation=expected_generation
        )
        response: deployment_manager_service_pb2.ApplyDeploymentResponse
        response = await self._at_leader(_manager, lambda stub: stub.ApplyDeployment, request)
        return response

    async def delete(self, name: str) -> None:
        """Drain and remove a deployment. Raises DeploymentNotFound."""
        request = deployment_manager_service_pb2.DeleteDeploymentRequest(name=name)
        await self._at_leader(_manager, lambda stub: stub.DeleteDeployment, request, done=DeploymentNotFound)

    async def deployment(self, name: str) -> deployment_pb2.Deployment:
        """One deployment. Raises DeploymentNotFound."""
        request = deployment_manager_service_pb2.GetDeploymentRequest(name=name)
        response: deployment_manager_service_pb2.GetDeploymentResponse
        response = await self._at_leader(_manager, lambda stub: stub.GetDeployment, request)
        return response.deployment

    async def deployments(self) -> list[deployment_pb2.Deployment]:
        """All deployments, by name."""
        request = deployment_manager_service_pb2.ListDeploymentsRequest()
        return list((await self._at_leader(_manager, lambda stub: stub.ListDeployments, request)).deployments)

    async def engines(self) -> list[common_pb2.Engine]:
        """All engines, by id."""
        request = deployment_manager_service_pb2.ListEnginesRequest()
        return list((await self._at_leader(_manager, lambda stub: stub.ListEngines, request)).engines)

    async def replicas(self, deployment: str = "") -> list[tuple[common_pb2.Replica, common_pb2.ReplicaLoad]]:
        """Replicas with their load (zero where none was reported), by deployment and id."""
        request = coordinator_service_pb2.ListReplicasRequest(deployment=deployment)
        response: coordinator_service_pb2.ListReplicasResponse
        response = await self._at_leader(_coordinator, lambda stub: stub.ListReplicas, request)
        loads = {load.replica_id: load for load in response.loads}
        return [(r, loads.get(r.id, common_pb2.ReplicaLoad(replica_id=r.id))) for r in response.replicas]

    async def coordinator(self) -> coordinator_service_pb2.GetStatusResponse:
        """How the coordinator that leads is doing, and what it lacks."""
        request = coordinator_service_pb2.GetStatusRequest()
        response: coordinator_service_pb2.GetStatusResponse
        response = await self._at_leader(_coordinator, lambda stub: stub.GetStatus, request)
        return response

    async def usage(self, deployment: str = "") -> list[metrics_service_pb2.DeploymentUsage]:
        """Counters by deployment."""
        request = metrics_service_pb2.GetSnapshotRequest(deployment=deployment)
        return list((await self._at_leader(_metrics, lambda stub: stub.GetSnapshot, request)).deployments)

    async def leaders(self) -> dict[str, common_pb2.Leader | None]:
        """Who leads each role; None while nobody does."""
        return {role: await self._leader(role) for role in ROLES}

    async def drain_engine(self, engine_id: str, *, undo: bool = False) -> int:
        """Take an engine out of service without ending it, or (`undo`) put it back.

        Returns the requests that run there now: they get the engine's drain time-out to end; other engines go on with the rest.
        Raises EngineLost when no engine has this id.
        """
        channel = self._channel((await self._engine(engine_id)).address)
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        response: engine_service_pb2.DrainEngineResponse
        response = await self._call(stub.DrainEngine, engine_service_pb2.DrainEngineRequest(undo=undo))
        return response.requests

    async def wait_drained(self, engine_id: str, timeout_s: float = 300.0) -> None:
        """Wait until no request runs or waits on an engine.

        Raises:
            EngineLost: No engine has this id.
            Timeout: Some still run; the message says how many.
        """
        channel = self._channel((await self._engine(engine_id)).address)
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        left = 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    seen: engine_service_pb2.GetEngineResponse
                    seen = await self._call(stub.GetEngine, engine_service_pb2.GetEngineRequest())
                    left = sum(load.running + load.queued for load in seen.loads)
                    if not left:
                        return
                    await asyncio.sleep(LEADER_RETRY_S)
        except TimeoutError as err:
            raise Timeout(f"engine {engine_id!r} still has {left} requests after {timeout_s:g} s") from err

    async def _engine(self, engine_id: str) -> common_pb2.Engine:
        for engine in await self.engines():
            if engine.id == engine_id:
                return engine
        raise EngineLost(f"no engine has the id {engine_id!r}; list them with `inferctl get engines`", engine_id=engine_id)

    async def rebuild_session(self, replica_id: str, cause: engine_service_pb2.RebuildCause | None = None) -> int:
        """Replace the context or remote session of a replica by hand. Returns the new context generation.

        Raises DeploymentNotFound when no replica has this id.
        """
        for replica, _ in await self.replicas():
            if replica.id == replica_id:
                channel = self._channel(replica.address)
                stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
                manual = engine_service_pb2.REBUILD_CAUSE_MANUAL
                request = engine_service_pb2.RebuildReplicaRequest(replica_id=replica_id, cause=cause or manual)
                response: engine_service_pb2.RebuildReplicaResponse = await self._call(stub.RebuildReplica, request)
                return response.context_generation
        raise DeploymentNotFound(f"no replica has the id {replica_id!r}; list them with `inferctl get replicas`")

    async def wait_serving(self, name: str, timeout_s: float = 60.0) -> deployment_pb2.Deployment:
        """Wait until all replicas of the current generation serve.

        Raises:
            InferenceError: It failed; the message is the deployment's reason.
            Timeout: It did not serve in time; the message holds its last state.
        """
        last = deployment_pb2.Deployment()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    last = await self.deployment(name)
                    if last.status.observed_generation == last.generation:
                        if last.status.state == deployment_pb2.DEPLOYMENT_STATE_SERVING:
                            return last
                        if last.status.state == deployment_pb2.DEPLOYMENT_STATE_FAILED:
                            raise Internal(f"deployment {name!r} failed: {last.status.reason}")
                    await asyncio.sleep(LEADER_RETRY_S)
        except TimeoutError as err:
            state = deployment_pb2.DeploymentState.Name(last.status.state).removeprefix("DEPLOYMENT_STATE_").lower()
            reason = f": {last.status.reason}" if last.status.reason else ""
            raise Timeout(f"deployment {name!r} is {state} after {timeout_s:g} s{reason}") from err

    # --- inside ------------------------------------------------------------------------------------------------------

    def _gateway(self) -> str:
        if not self._gateway_address:
            raise BadRequest("this client was made without a gateway; pass gateway='host:port'", param="gateway")
        return self._gateway_address

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address)
        return channel

    async def _call(self, method: Callable[..., Awaitable[Any]], request: object) -> Any:
        try:
            return await method(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as err:
            raise _failure(err) from err

    @property
    def _etcd_answered(self) -> bool:
        """The endpoints are right."""
        return self._etcd is not None and self._etcd.cluster_id != 0

    async def _leader(self, role: str) -> common_pb2.Leader | None:
        if self._etcd is None:
            raise BadRequest("this client was made without etcd; pass etcd=['host:port']", param="etcd")
        candidates, _ = await self._etcd.list(keys.election_prefix(role))
        if not candidates:
            return None
        oldest = min(candidates, key=lambda kv: kv.create_revision)
        leader = common_pb2.Leader.FromString(oldest.value)
        leader.token.role, leader.token.revision = role, oldest.create_revision
        return leader

    async def _at_leader(
        self,
        role: _Role,
        pick: Callable[[Any], Callable[..., Awaitable[Any]]],
        request: object,
        done: type[InferenceError] | None = None,
    ) -> Any:
        """Call the leader of a role; while leadership moves or etcd restarts, try again until LEADER_TIMEOUT_S is over.

        Args:
            role: The role.
            pick: The method of its stub.
            request: Must be safe to repeat.
            done: The error that says, after an attempt of which nobody knows what became, that it was carried out.
        """
        name, stub_of = role
        unknown = False
        last: InferenceError = NotLeader(f"no process leads {name}; start one, or wait for the election", role=name)
        try:
            async with asyncio.timeout(LEADER_TIMEOUT_S):
                while True:
                    try:
                        leader = await self._leader(name)
                        if leader is not None:
                            return await self._call(pick(stub_of(self._channel(leader.address))), request)
                    except (NotLeader, StaleLeader, NetworkError, EtcdUnavailable) as err:
                        if isinstance(err, StoreReplaced) or not self._etcd_answered:
                            raise  # a person must do something about it
                        unknown = unknown or isinstance(err, NetworkError | EtcdOutcomeUnknown)
                        last = err
                    except InferenceError as err:
                        if done is not None and unknown and isinstance(err, done):
                            return None
                        raise
                    await asyncio.sleep(LEADER_RETRY_S)
        except TimeoutError:
            raise last from None


def _failure(err: grpc.aio.AioRpcError) -> InferenceError:
    """The exception behind a failed call. What a service cancelled because it was ending is a broken connection to us: a
    cancellation of our own never comes as a status."""
    if err.code() is grpc.StatusCode.CANCELLED:
        return NetworkError("the service ended before it answered; ask again")
    return error_from_rpc(err)


_Role = tuple[str, Callable[[grpc.aio.Channel], Any]]
_coordinator: _Role = ("coordinator", coordinator_service_pb2_grpc.CoordinatorServiceStub)
_manager: _Role = ("deployment_manager", deployment_manager_service_pb2_grpc.DeploymentManagerServiceStub)
_metrics: _Role = ("metrics", metrics_service_pb2_grpc.MetricsServiceStub)
