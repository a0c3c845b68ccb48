"""A gateway worker in this process, on a free port, with a routing table that the test hands it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
import uvloop

from inference_runtime.telemetry import Telemetry
from inference_runtime.v1 import coordinator_service_pb2
from services.gateway.http.server import listen
from services.gateway.settings import GatewaySettings
from services.gateway.worker import GatewayWorker
from tests.integration.gateway.peer import Peer, deployment_route, peer, until


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run on the gateway's own loop."""
    return {"uvloop": uvloop.new_event_loop}


class NobodyLeads:
    """A role without a leader: the gateway lives on what it knows."""

    current: None = None

    async def changed(self, seen: None) -> None:
        """Never."""
        await asyncio.Event().wait()


class Gateway:
    """A worker and a client to it."""

    def __init__(self, worker: GatewayWorker[Any], telemetry: Telemetry) -> None:
        self.worker, self.telemetry = worker, telemetry
        self.address = worker.http.address
        self.url = f"http://{self.address}"
        self.client = httpx.AsyncClient(base_url=self.url, timeout=10)
        self.revision = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def route(self, *lines: coordinator_service_pb2.DeploymentRoute, wait: bool = True) -> None:
        """Hand it a routing table; wait until it reaches every engine in it."""
        self.revision += 1
        self.worker.table.apply(
            coordinator_service_pb2.WatchRoutesResponse(revision=self.revision, snapshot=True, deployments=lines)
        )
        if wait:
            await until(lambda: all(t.usable for t in self.worker.table.targets.values()), "sessions")

    async def chat(self, model: str = "demo", **fields: Any) -> httpx.Response:
        """A chat completion."""
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own, closed with the gateway at the latest."""
        host, port = self.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        self._writers.append(writer)
        return reader, writer

    async def close(self) -> None:
        """Close every client."""
        await self.client.aclose()
        for writer in self._writers:
            writer.close()

    def metric(self, line: str) -> float:
        """The value of a series in /metrics' text."""
        text = self.telemetry.metrics.prometheus_text().decode()
        return next((float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith(line)), 0.0)


Start = Callable[..., AbstractAsyncContextManager[Gateway]]


@asynccontextmanager
async def start_gateway(**overrides: Any) -> AsyncIterator[Gateway]:
    """A running gateway with these settings."""
    settings = GatewaySettings(**{"flush_s": 0.0, **overrides})  # nobody takes usage here
    telemetry = Telemetry("gateway", settings.telemetry)
    worker: GatewayWorker[Any] = GatewayWorker(
        settings, telemetry, NobodyLeads(), NobodyLeads(), listen("127.0.0.1", 0, shared=False)
    )
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(worker.run())
        await worker.start()
        gateway = Gateway(worker, telemetry)
        try:
            yield gateway
        finally:
            await gateway.close()
            running.cancel()
            await worker.stop()
    telemetry.close()


@pytest.fixture
def start() -> Start:
    """Start gateways with settings of one's own."""
    return start_gateway


@pytest.fixture
async def engine() -> AsyncIterator[Peer]:
    """One engine that the test drives."""
    async with peer("engine-1") as servicer:
        yield servicer


@pytest.fixture
async def gateway(engine: Peer) -> AsyncIterator[Gateway]:
    """A gateway with deployment `demo` on that engine."""
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(start_gateway())
        await running.route(deployment_route(engine.replica("demo")))
        yield running
