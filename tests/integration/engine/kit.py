"""An engine without its control plane: real replicas behind a real gRPC server on loopback, and a gateway's end of a session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import grpc

from inference_runtime.deployment import parse_deployment, revision_of
from inference_runtime.generation import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    Priority,
    SamplingParams,
    Usage,
)
from inference_runtime.rpc import RpcServer, error_from_status, open_channel
from inference_runtime.settings import TelemetrySettings
from inference_runtime.supervision import RestartPolicy
from inference_runtime.telemetry import Telemetry
from inference_runtime.testing.scripted import user_says
from inference_runtime.v1 import common_pb2, engine_service_pb2, engine_service_pb2_grpc
from inference_runtime.wire import duration, request_to_proto, spec_to_proto, usage_from_proto
from services.engine.core import EngineCore
from services.engine.health import READY_S
from services.engine.probation import TRIALS_S
from services.engine.replicas import Replicas
from services.engine.service import EngineService
from services.engine.settings import EngineSettings

WAIT_S = 10.0
#: As in production, without the pauses.
NO_BACKOFF = RestartPolicy(backoff_s=(0.0,))
TEN_TOKENS = SamplingParams(max_tokens=10)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; fail with `what` after WAIT_S."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - the condition is of another process or thread
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_S} s: {what}") from None


def assignment(
    name: str,
    config: Mapping[str, object],
    serving: Mapping[str, object] = {},
    timeouts: Mapping[str, object] = {},
    replica: str = "",
    isolation: str = "auto",
    accelerators: tuple[int, ...] = (),
) -> common_pb2.Assignment:
    """An assignment of a scripted deployment."""
    spec = parse_deployment(
        {
            "name": name,
            "model": name,
            "runtime": "scripted",
            "runtime_config": dict(config),
            "serving": dict(serving),
            "timeouts": dict(timeouts),
            "isolation": isolation,
        }
    )
    return common_pb2.Assignment(
        replica_id=replica or f"{name}-0",
        engine_id="engine-1",
        deployment=name,
        spec=spec_to_proto(spec),
        generation=1,
        revision=revision_of(spec, "scripted"),
        accelerators=accelerators,
        fencing_token=common_pb2.FencingToken(role="deployment_manager", cluster_id=1, revision=1),
    )


class EngineUnderTest:
    """Replicas and service of one engine."""

    def __init__(
        self,
        buffer: int = 65_536,
        policy: RestartPolicy = NO_BACKOFF,
        hang_s: float = 30.0,
        trials_s: float = TRIALS_S,
        ready_s: float = READY_S,
        drain_timeout_s: float = 5.0,
        drain_notice_s: float = 0.0,
    ) -> None:
        self.telemetry = Telemetry("engine", TelemetrySettings())
        self.published: list[common_pb2.Replica] = []
        self.withdrawn: list[str] = []
        self.engine_records = 0
        self.on_publish: Callable[[common_pb2.Replica], None] | None = None
        self.on_withdraw: Callable[[str, str], None] | None = None
        self.replicas = Replicas(
            common_pb2.Engine(id="engine-1", boot_id="boot-1"),
            EngineSettings(drain_timeout_s=drain_timeout_s, drain_notice_s=drain_notice_s, ready_s=ready_s),
            self.telemetry,
            publish=self._published,
            withdraw=self._withdrawn,
            publish_engine=self._published_engine,
            policy=policy,
            hang_s=hang_s,
            trials_s=trials_s,
        )
        self.service = EngineService(
            self.replicas,
            buffer,
            self.telemetry.metrics.gauge("inference_sessions"),
        )
        self.address = ""

    def _published(self, replica: common_pb2.Replica) -> None:
        self.published.append(replica)
        if self.on_publish is not None:
            self.on_publish(replica)

    def _published_engine(self) -> None:
        self.engine_records += 1

    def _withdrawn(self, deployment: str, replica_id: str) -> None:
        self.withdrawn.append(replica_id)
        if self.on_withdraw is not None:
            self.on_withdraw(deployment, replica_id)

    def replica(self, replica_id: str) -> common_pb2.Replica:
        """The present record."""
        return next(r for r in self.replicas.describe() if r.id == replica_id)

    def load(self, replica_id: str) -> common_pb2.ReplicaLoad:
        """The present load."""
        return next(x for x in self.replicas.loads() if x.replica_id == replica_id)

    async def host(self, a: common_pb2.Assignment) -> str:
        """Assign, and wait until it serves. Returns the replica's id."""
        self.replicas.assign(a)
        await until(lambda: self.replica(a.replica_id).state == common_pb2.REPLICA_STATE_SERVING, f"{a.replica_id} serves")
        return a.replica_id


def core_of(engine: EngineUnderTest, replica_id: str) -> EngineCore:
    """The core behind a replica."""
    core = engine.replicas._hosted[replica_id].core
    assert core is not None
    return core


@contextlib.asynccontextmanager
async def running_engine(
    buffer: int = 65_536,
    policy: RestartPolicy = NO_BACKOFF,
    hang_s: float = 30.0,
    trials_s: float = TRIALS_S,
    ready_s: float = READY_S,
    drain_timeout_s: float = 5.0,
    drain_notice_s: float = 0.0,
) -> AsyncIterator[EngineUnderTest]:
    """An engine, from start to an orderly end."""
    engine = EngineUnderTest(buffer, policy, hang_s, trials_s, ready_s, drain_timeout_s, drain_notice_s)
    server = RpcServer("127.0.0.1", 0, engine.telemetry)
    server.add(engine_service_pb2_grpc.add_EngineServiceServicer_to_server, engine.service, "inference_runtime.v1.EngineService")
    hosting = asyncio.ensure_future(engine.replicas.run())
    engine.address = engine.replicas.engine.address = await server.start()
    await server.set_serving(True)
    try:
        yield engine
    finally:
        await server.stop(0.5)
        hosting.cancel()
        await asyncio.wait([hosting])
        engine.telemetry.close()


@dataclass
class Answer:
    """What arrived for one stream, in order."""

    indexes: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None
    stop_sequence: str = ""
    frames: list[int] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.finish is not None or self.error is not None


class Gateway:
    """A gateway's end of one session."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
        self.call = call
        self.answers: dict[int, Answer] = {}
        self.frames: list[engine_service_pb2.ChunkFrame] = []
        #: Prompt tokens of what was admitted, by stream; each is told once.
        self.admitted: dict[int, int] = {}
        self.draining = self.accepting = False
        self.welcome: engine_service_pb2.SessionWelcome | None = None
        self.end: grpc.aio.AioRpcError | None = None
        self.on_row: Callable[[int], None] = lambda stream_id: None

    async def send(
        self,
        *submissions: engine_service_pb2.Submission,
        cancel: tuple[tuple[int, int], ...] = (),
        credit: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """Send one message."""
        for s in submissions:
            self.answers.setdefault(s.stream_id, Answer())
        await self.call.write(
            engine_service_pb2.SessionRequest(
                submissions=submissions,
                cancellations=[engine_service_pb2.Cancellation(stream_id=s, epoch=e) for s, e in cancel],
                credits=[engine_service_pb2.CreditGrant(stream_id=s, tokens=t) for s, t in credit],
            )
        )

    async def read(self) -> None:
        """Read until the session ends."""
        try:
            async for response in self.call:
                if response.HasField("welcome"):
                    self.welcome = response.welcome
                self.draining = self.draining or response.draining
                self.accepting = self.accepting or response.accepting
                if response.HasField("frame"):
                    self._take(response.frame)
        except grpc.aio.AioRpcError as err:
            self.end = err

    def _take(self, frame: engine_service_pb2.ChunkFrame) -> None:
        self.frames.append(frame)
        for stream_id, input_tokens in zip(frame.admitted_ids, frame.admitted_input_tokens, strict=True):
            assert stream_id not in self.admitted
            assert not self.answers[stream_id].indexes, "an admission is told before any row"
            self.admitted[stream_id] = input_tokens
        details = {d.row: d for d in frame.details}
        at = 0
        for row, stream_id in enumerate(frame.stream_ids):
            count = frame.token_counts[row] if frame.token_counts else 1
            answer = self.answers[stream_id]
            self.on_row(stream_id)
            assert not answer.over, "something followed the end of a stream"
            answer.frames.append(len(self.frames) - 1)
            answer.indexes.append(frame.indexes[row])
            answer.token_ids += frame.token_ids[at : at + count]
            answer.text += frame.texts[row] if frame.texts else ""
            at += count
            detail = details.get(row)
            if detail is not None:
                if detail.HasField("error"):
                    answer.error = error_from_status(detail.error)
                if detail.finish_reason:
                    answer.finish = FinishReason(int(detail.finish_reason))
                    answer.usage = usage_from_proto(detail.usage)
                    answer.stop_sequence = detail.stop_sequence
        assert at == len(frame.token_ids), "columns and tokens disagree"

    async def answer(self, stream_id: int) -> Answer:
        """Wait for the end of a stream."""
        await until(lambda: self.answers[stream_id].over, f"stream {stream_id} ends")
        return self.answers[stream_id]


@contextlib.asynccontextmanager
async def session(engine: EngineUnderTest, gateway_id: str = "gateway-1") -> AsyncIterator[Gateway]:
    """An open session; everything it still runs is cancelled at the end."""
    async with open_channel(engine.address) as channel:
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        gateway = Gateway(stub.Session())
        hello = engine_service_pb2.SessionHello(gateway_id=gateway_id, protocol_version=1)
        await gateway.call.write(engine_service_pb2.SessionRequest(hello=hello))
        reading = asyncio.ensure_future(gateway.read())
        try:
            await until(lambda: gateway.welcome is not None or gateway.end is not None, "the engine answers the hello")
            yield gateway
        finally:
            gateway.call.cancel()
            await asyncio.wait([reading])


def submission(
    stream_id: int,
    deployment: str,
    says: str = "hello",
    *,
    sampling: SamplingParams = TEN_TOKENS,
    epoch: int = 0,
    replica_id: str = "",
    revision: str = "",
    prefix: tuple[int, ...] = (),
    time_left_s: float | None = None,
    credits: int = 0,
    coalesce_tokens: int = 0,
    priority: Priority = Priority.NORMAL,
    choice: int = 0,
    context_deaths: int = 0,
) -> engine_service_pb2.Submission:
    """One generation as a gateway submits it."""
    request = GenerationRequest(f"request-{stream_id}", deployment, ChatPrompt(user_says(says)), sampling, priority)
    proto = engine_service_pb2.Submission(
        stream_id=stream_id,
        epoch=epoch,
        request=request_to_proto(request),
        replica_id=replica_id,
        revision=revision,
        credits=credits,
        coalesce_tokens=coalesce_tokens,
        choice=choice,
        context_deaths=context_deaths,
    )
    if prefix:
        proto.generated_prefix.add(choice=choice, token_ids=prefix)
    if time_left_s is not None:
        proto.time_left.CopyFrom(duration(time_left_s))
    return proto
