"""Streams as clients see them, and gateways that know each other."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx

from inference_runtime.rpc import RpcServer
from inference_runtime.settings import TelemetrySettings
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1 import engine_service_pb2, gateway_peer_service_pb2, gateway_peer_service_pb2_grpc
from services.gateway.peer_service import Copies
from services.gateway.records import RecordStore
from tests.integration.gateway.conftest import Gateway, start_gateway
from tests.integration.gateway.peer import DEADLINE_S, Peer, deployment_route, until

BODY = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
WITH_USAGE = BODY | {"stream_options": {"include_usage": True}}


class Answer:
    """A stream as an EventSource reads it, on a connection of its own."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()
        self.events: list[tuple[str, str]] = []
        self.comments: list[str] = []
        self.ended = False

    async def next(self) -> bool:
        """Read one event. False at the end, or where the connection breaks."""
        event_id = ""
        try:
            async for line in self._lines:
                if line.startswith("id: "):
                    event_id = line[4:]
                elif line.startswith(": "):
                    self.comments.append(line[2:])
                elif line.startswith("data: "):
                    self.events.append((event_id, line[6:]))
                    return True
        except httpx.RemoteProtocolError:
            return False
        self.ended = True
        return False

    async def until_text(self, text: str) -> str:
        """Read until this text is here. Returns the id of the event that brought it."""
        async with asyncio.timeout(DEADLINE_S):
            while self.text != text:
                assert await self.next(), f"the stream ended with {self.text!r}"
        return self.last_id

    async def rest(self) -> str:
        """Read to the end. Returns all text."""
        async with asyncio.timeout(DEADLINE_S):
            while await self.next():
                pass
        return self.text

    @property
    def last_id(self) -> str:
        """Id of the last event that had one."""
        return next(event_id for event_id, _ in reversed(self.events) if event_id)

    @property
    def places(self) -> list[str]:
        """Ids, without that of the request."""
        return [event_id.partition(":")[2] for event_id, _ in self.events]

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The JSON of each event."""
        return [json.loads(data) for _, data in self.events if data != "[DONE]"]

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(c["delta"].get("content") or "" for d in self.documents for c in d.get("choices", []))

    @property
    def finish(self) -> list[str]:
        """Finish reasons that were told."""
        return [c["finish_reason"] for d in self.documents for c in d.get("choices", []) if c["finish_reason"]]

    @property
    def done(self) -> int:
        """How often [DONE] was told."""
        return [data for _, data in self.events].count("[DONE]")


@asynccontextmanager
async def stream(
    gateway: Gateway, last_id: str = "", body: dict[str, Any] = BODY, *, key: str = "", url: str = "/v1/chat/completions"
) -> AsyncIterator[Answer]:
    """Ask for a stream, or for the rest of one."""
    headers = {"last-event-id": last_id} if last_id else {}
    if key:
        headers["authorization"] = f"Bearer {key}"
    method, payload = ("POST", body) if url.endswith("completions") else ("GET", None)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=10) as client:
        async with client.stream(method, url, json=payload, headers=headers) as response:
            yield Answer(response)


async def refusal(answer: Answer) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer that is none."""
    return answer.response.status_code, json.loads(await answer.response.aread())["error"]


def route(engine: Peer, *, deterministic: bool = False, disconnected_s: float = 0.0) -> Any:
    """The routing table's line of `demo`."""
    replica = engine.replica("demo")
    replica.capabilities.deterministic = deterministic
    line = deployment_route(replica)
    line.disconnected_timeout.FromMilliseconds(int(disconnected_s * 1000))
    return line


def prefix(submission: engine_service_pb2.Submission) -> list[int]:
    """The tokens that a submission goes on behind."""
    return [token for part in submission.generated_prefix for token in part.token_ids]


@asynccontextmanager
async def gateways(
    *engines: Peer, deterministic: bool = False, acquainted: bool = True, **overrides: Any
) -> AsyncIterator[list[Gateway]]:
    """Gateways that know each other, each with an engine of its own, all of one revision."""
    async with AsyncExitStack() as stack:
        all_of_them = [await stack.enter_async_context(start_gateway(**overrides)) for _ in engines]
        for gateway, engine in zip(all_of_them, engines, strict=True):
            gateway.worker.peers.own.address = gateway.worker.rpc.address
            await gateway.route(route(engine, deterministic=deterministic))
        for gateway in all_of_them if acquainted else ():
            gateway.worker.peers.apply(other.worker.peers.own for other in all_of_them)
        yield all_of_them


async def copied(gateway: Gateway, tokens: int) -> None:
    """Wait until another gateway has so many tokens of the one stream of this one."""
    requests = gateway.worker.live.requests
    await until(lambda: any(getattr(r, "copied", -1) >= tokens for r in requests), f"a copy of {tokens} tokens")


def records(gateway: Gateway) -> int:
    """Streams that it keeps."""
    return len(gateway.worker.resumer.store)


class Keeper(gateway_peer_service_pb2_grpc.GatewayPeerServiceServicer):
    """A gateway that only keeps copies, and only while it is told to."""

    def __init__(self) -> None:
        self.store = RecordStore(60, 100, 1 << 20)
        self.takes = asyncio.Event()
        self.takes.set()
        self.gateway = gateway_peer_service_pb2.Gateway(id="keeper", hostname="another machine")
        self._copies = Copies(self.store)

    async def Replicate(self, request: gateway_peer_service_pb2.ReplicateRequest, context: object) -> object:
        """Keep copies, in time or not."""
        await self.takes.wait()
        return gateway_peer_service_pb2.ReplicateResponse(refused=self._copies.take(request, time.monotonic()))

    async def TakeStream(self, request: gateway_peer_service_pb2.TakeStreamRequest, context: object) -> object:
        """Hand one over."""
        record = self.store.get(request.request_id, time.monotonic())
        return gateway_peer_service_pb2.TakeStreamResponse(record=record.to_proto(time.monotonic()) if record else None)


@asynccontextmanager
async def keeper() -> AsyncIterator[Keeper]:
    """One that listens on loopback and says that it is on another machine, so that it is asked first."""
    telemetry = Telemetry("keeper", TelemetrySettings())
    server, servicer = RpcServer("127.0.0.1", 0, telemetry), Keeper()
    register = gateway_peer_service_pb2_grpc.add_GatewayPeerServiceServicer_to_server
    server.add(register, servicer, "inference_runtime.v1.GatewayPeerService")
    servicer.gateway.address = await server.start()
    try:
        yield servicer
    finally:
        await server.stop(0)
        telemetry.close()
