"""An engine that does what a test tells it to: a real gRPC EngineService whose Session is driven by hand.

Good behaviour is the engine service's business and is tested with it; this peer is for what a good engine never does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from inference_runtime.errors import InferenceError
from inference_runtime.rpc import RpcServer, status_from_error
from inference_runtime.settings import TelemetrySettings
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1 import common_pb2, coordinator_service_pb2, engine_service_pb2, engine_service_pb2_grpc, generation_pb2

__all__ = ["Peer", "Row", "deployment_route", "error_row", "last_row", "peer", "until"]

T = TypeVar("T")

DEADLINE_S = 5.0
POLL_S = 0.005


async def until(condition: Callable[[], T | None], what: str) -> T:
    """The first true value of a condition. Fails the test, naming `what`, when it does not come in time."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if value := condition():
                return value
            await asyncio.sleep(POLL_S)


class Row:
    """One row of a frame."""

    def __init__(
        self,
        submission: engine_service_pb2.Submission,
        index: int,
        tokens: Sequence[int] = (),
        text: str = "",
        *,
        epoch: int | None = None,
        detail: engine_service_pb2.ChunkDetail | None = None,
    ) -> None:
        self.stream_id = submission.stream_id
        self.epoch = submission.epoch if epoch is None else epoch
        self.index, self.tokens, self.text, self.detail = index, tokens, text, detail


def last_row(
    submission: engine_service_pb2.Submission,
    index: int,
    tokens: Sequence[int] = (),
    text: str = "",
    *,
    finish: generation_pb2.FinishReason = generation_pb2.FINISH_REASON_STOP,
    input_tokens: int = 3,
) -> Row:
    """The row that ends a generation."""
    usage = generation_pb2.Usage(input_tokens=input_tokens, output_tokens=index + len(tokens))
    return Row(submission, index, tokens, text, detail=engine_service_pb2.ChunkDetail(finish_reason=finish, usage=usage))


def error_row(submission: engine_service_pb2.Submission, error: InferenceError, index: int = 0) -> Row:
    """The row that ends a generation by an error."""
    return Row(submission, index, detail=engine_service_pb2.ChunkDetail(error=status_from_error(error)))


class Peer(engine_service_pb2_grpc.EngineServiceServicer):
    """The servicer and the levers to drive it with."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ""
        self.submissions: list[engine_service_pb2.Submission] = []
        self.cancellations: list[engine_service_pb2.Cancellation] = []
        self.messages: list[engine_service_pb2.SessionRequest] = []
        self.sessions = 0
        #: It answers pings. Switched off, it is as silent as a process that stands still.
        self.hears = True
        self.pings = 0
        self._out: asyncio.Queue[engine_service_pb2.SessionResponse | InferenceError] = asyncio.Queue()
        self.refuse = False
        #: Says so in its welcome.
        self.draining = False

    async def Session(self, request_iterator: object, context: object) -> None:
        """Welcome, note what comes, send what the test puts out."""
        read, write = context.read, context.write  # type: ignore[attr-defined]
        hello = await read()
        assert hello.HasField("hello")
        self.sessions += 1
        self._out = asyncio.Queue()
        welcome = engine_service_pb2.SessionWelcome(
            engine_id=self.name, boot_id=f"{self.name}-{self.sessions}", protocol_version=1, answers_pings=True
        )
        await write(engine_service_pb2.SessionResponse(welcome=welcome, draining=self.draining))
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self._read(read))
            try:
                while not isinstance(item := await self._out.get(), InferenceError):
                    await write(item)
            finally:
                reader.cancel()
        raise item

    async def _read(self, read: Callable[[], object]) -> None:
        while isinstance(message := await read(), engine_service_pb2.SessionRequest):  # type: ignore[misc]
            if message.ping:
                self.pings += 1
                if self.hears:
                    self.send_raw(engine_service_pb2.SessionResponse(pong=message.ping))
            self.messages.append(message)
            self.submissions.extend(message.submissions)
            self.cancellations.extend(message.cancellations)

    def send(self, *rows: Row) -> None:
        """Send one frame."""
        response = engine_service_pb2.SessionResponse()
        frame = response.frame
        for at, row in enumerate(rows):
            frame.stream_ids.append(row.stream_id)
            frame.indexes.append(row.index)
            frame.epochs.append(row.epoch)
            frame.token_ids.extend(row.tokens)
            frame.token_counts.append(len(row.tokens))
            frame.texts.append(row.text)
            if row.detail is not None:
                detail = frame.details.add()
                detail.CopyFrom(row.detail)
                detail.row = at
        self._out.put_nowait(response)

    def send_admitted(self, *admitted: tuple[engine_service_pb2.Submission, int]) -> None:
        """Tell of admissions, with the length of each prompt."""
        response = engine_service_pb2.SessionResponse()
        for submission, input_tokens in admitted:
            response.frame.admitted_ids.append(submission.stream_id)
            response.frame.admitted_input_tokens.append(input_tokens)
        self._out.put_nowait(response)

    def send_raw(self, response: engine_service_pb2.SessionResponse) -> None:
        """Send any message."""
        self._out.put_nowait(response)

    def cut(self, error: InferenceError) -> None:
        """End the stream with an error."""
        self._out.put_nowait(error)

    async def submission(self, count: int = 1) -> engine_service_pb2.Submission:
        """The count-th submission, once it is here."""
        await until(lambda: len(self.submissions) >= count, f"{count} submissions")
        return self.submissions[count - 1]

    async def cancelled(self, submission: engine_service_pb2.Submission) -> None:
        """Wait until the generation was cancelled."""
        await until(
            lambda: any(c.stream_id == submission.stream_id and c.epoch == submission.epoch for c in self.cancellations),
            "the cancellation",
        )

    def replica(self, deployment: str, revision: str = "r1", *, resume: bool = True) -> common_pb2.Replica:
        """A replica of a deployment on this peer."""
        return common_pb2.Replica(
            id=f"{deployment}-on-{self.name}",
            deployment=deployment,
            engine_id=self.name,
            address=self.address,
            revision=revision,
            state=common_pb2.REPLICA_STATE_SERVING,
            runtime="scripted",
            capabilities=common_pb2.Capabilities(chat=True, completion=True, resume=resume, seed=True, max_choices=8),
            max_context_tokens=4096,
        )


def deployment_route(*replicas: common_pb2.Replica, name: str = "") -> coordinator_service_pb2.DeploymentRoute:
    """A line of the routing table."""
    line = coordinator_service_pb2.DeploymentRoute(
        deployment=name or replicas[0].deployment, runtime="scripted", replicas=replicas
    )
    line.first_chunk_timeout.seconds, line.total_timeout.seconds = 5, 10
    return line


@asynccontextmanager
async def peer(name: str, port: int = 0) -> AsyncIterator[Peer]:
    """A peer that listens on loopback."""
    telemetry = Telemetry("peer", TelemetrySettings())
    server = RpcServer("127.0.0.1", port, telemetry)
    servicer = Peer(name)
    server.add(engine_service_pb2_grpc.add_EngineServiceServicer_to_server, servicer, "inference_runtime.v1.EngineService")
    servicer.address = await server.start()
    try:
        yield servicer
    finally:
        await server.stop(0)
        telemetry.close()
