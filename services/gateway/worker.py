"""One gateway worker: the parts, their wiring and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import time
from pathlib import Path
from typing import Generic

from inference_runtime.coordination import EtcdClient
from inference_runtime.errors import Draining
from inference_runtime.rpc import Drain, RpcServer, Stage
from inference_runtime.telemetry import Telemetry, get_logger
from inference_runtime.v1.gateway_peer_service_pb2_grpc import add_GatewayPeerServiceServicer_to_server
from inference_runtime.v1.gateway_service_pb2_grpc import add_GatewayServiceServicer_to_server
from services.gateway.auth import KeyRing
from services.gateway.http.app import HttpApp
from services.gateway.http.server import HttpServer
from services.gateway.http.streams import StreamDoor
from services.gateway.live import LiveRequests, new_id
from services.gateway.metric_share import MetricShare
from services.gateway.peer_registry import PeerRegistry
from services.gateway.peer_service import Copies, GatewayPeerService
from services.gateway.peers import PeerTable, own_record
from services.gateway.resume import Resumer
from services.gateway.routes import L, Leaders, RouteTable, RouteWatch
from services.gateway.service import GatewayService
from services.gateway.sessions import SessionPool
from services.gateway.settings import GatewaySettings, is_loopback
from services.gateway.table_store import TableStore
from services.gateway.usage import UsageReporter

__all__ = ["GatewayWorker", "write_ready_file"]

log = get_logger(__name__)

#: Objects made between two collections of the youngest generation. Requests and frames hold no cycles: a collection finds
#: nothing, so it runs seldom.
GC_THRESHOLDS = (50_000, 20, 50)
#: How often sessions to engines that left the table are looked at, seconds.
HOUSEKEEPING_S = 1.0
#: Time that clients get to read the end of what is cut off, seconds.
LAST_WORDS_S = 0.5


class GatewayWorker(Generic[L]):
    """A gateway in one process.

    Args:
        settings: As loaded.
        telemetry: Of this process.
        coordinators: Who leads the coordinators.
        metrics_leaders: Who leads the metrics services.
        sock: The bound socket of the HTTP door. Closed at the end.
        etcd: Knows which store is followed; None takes routes of any.
        store: Keeps the routes on disk; None keeps them nowhere.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        telemetry: Telemetry,
        coordinators: Leaders[L],
        metrics_leaders: Leaders[L],
        sock: socket.socket,
        etcd: EtcdClient | None = None,
        store: TableStore | None = None,
    ) -> None:
        self._settings, self._store = settings, store
        metrics = telemetry.metrics
        gateway_id = f"{socket.gethostname()}-{os.getpid()}-{new_id()[:8]}"
        self.sessions = SessionPool(gateway_id, self._changed, metrics)
        self.table = RouteTable(self.sessions.link_to, self._changed, metrics)
        self.usage = UsageReporter(metrics_leaders, metrics)
        self.live = LiveRequests(self.table, settings.limits, self.usage, telemetry, settings.http.keepalive_s)
        self._watch = RouteWatch(self.table, coordinators, gateway_id, metrics, etcd, store)
        keys = KeyRing(settings.api_keys)
        self.peers = PeerTable(own_record(gateway_id))
        self.resumer = Resumer(self.live, self.peers, settings.resume, metrics)
        self._registry = PeerRegistry(etcd, self.peers, settings.etcd.lease_ttl_s) if etcd and self.resumer.offered else None
        streams = StreamDoor(self.resumer)
        app = HttpApp(
            self.live,
            self.table,
            keys,
            metrics,
            int(time.time()),
            streams,
            loopback_only=keys.open and is_loopback(settings.http.host),
        )
        self._share = app.share = MetricShare(metrics, Path(settings.metrics_file)) if settings.metrics_file else None
        app.control_plane = lambda: {"routes": self._watch.source, "warnings": self._watch.warnings()}
        self.http = HttpServer(app, settings.http, sock)
        self.rpc = RpcServer(settings.rpc.host, settings.rpc.port, telemetry)
        self.rpc.add(
            add_GatewayServiceServicer_to_server,
            GatewayService(self.live, self.table, keys),
            "inference_runtime.v1.GatewayService",
        )
        self.rpc.add(
            add_GatewayPeerServiceServicer_to_server,
            GatewayPeerService(self.peers.own.peer_key, Copies(self.resumer.store), self.resumer),
            "inference_runtime.v1.GatewayPeerService",
        )

    def _changed(self) -> None:
        self.live.wake()

    async def start(self) -> None:
        """Open both doors and say so."""
        bound = await self.rpc.start()
        await self.http.start()
        if self._registry is not None:
            self._registry.bound(self._settings.rpc.advertise or bound)
        await self.rpc.set_serving(True)
        log.info("serving", http=self.http.address, grpc=self.rpc.address)
        if self._settings.ready_file:
            write_ready_file(self._settings.ready_file, self.http.address, self.rpc.address)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.sessions.run(), name="sessions")
            tasks.create_task(self._watch.run(), name="routes")
            if self._store is not None:
                tasks.create_task(self._store.run(), name="routes.disk")
            tasks.create_task(self.live.run(), name="requests")
            tasks.create_task(self.http.run(), name="http")
            tasks.create_task(self.usage.run(), name="usage")
            if self._share is not None:
                tasks.create_task(self._share.run(), name="metrics")
            tasks.create_task(self.resumer.run(), name="streams")
            if self._registry is not None:
                tasks.create_task(self._registry.run(), name="peers")
            while True:
                await asyncio.sleep(HOUSEKEEPING_S)
                self.sessions.keep(self.table.engines)
                self._watch.show_age()

    async def drain(self) -> None:
        """Give notice, take nothing new, let what runs end, for as long as the settings allow. `run` must still be running.

        While the notice lasts `/readyz` and health say that this gateway goes, answers close their connections, and everybody is
        served: a load balancer needs a moment to look elsewhere. What has not ended when the time is up ends with Draining.
        """
        drain = Drain(self._settings.drain_timeout_s, self._settings.drain_notice_s)
        await self.rpc.set_serving(False)
        self.live.draining = True
        self.resumer.drain()
        self.http.announce()
        log.info("draining", requests=len(self.live.requests))
        await drain.until(Stage.CLOSED, self._unsent, callers=lambda: 1)
        await self.http.drain()
        async with asyncio.TaskGroup() as tasks:
            left_s = drain.left_s(asyncio.get_running_loop().time())
            ending = tasks.create_task(self.rpc.stop(left_s + LAST_WORDS_S))  # clients go elsewhere, their calls go on
            left = await drain.until(Stage.OVER, self._unsent, callers=lambda: 0)
            self.live.closed = True
            if left:
                log.warning("requests cut off: the drain took too long", requests=len(self.live.requests))
                for request in tuple(self.live.requests):
                    request.abandon(Draining("this gateway shut down before the answer was complete; ask another one"))
                await Drain(LAST_WORDS_S, 0).until(Stage.OVER, self._unsent, callers=lambda: 0)
            await self.rpc.stop(0)
            await ending

    def _unsent(self) -> int:
        """Requests that run, and connections with something that their client has not read, or with a client about to ask."""
        return len(self.live.requests) + sum(c.unsent or c.fresh for c in self.http.connections)

    async def stop(self) -> None:
        """Close both doors and settle. The last thing, after `run` has ended."""
        await self.http.close()
        await self.rpc.stop(0)
        for request in tuple(self.live.requests):
            request.cancel()
        await self.resumer.close()
        await self.usage.flush(self._settings.flush_s)


def write_ready_file(path: str, http: str, grpc: str) -> None:
    """Write where the gateway listens; a reader sees the whole file or none."""
    target = Path(path)
    draft = target.with_name(f"{target.name}.{os.getpid()}")
    draft.write_text(json.dumps({"http": http, "grpc": grpc}) + "\n", encoding="utf-8")
    draft.replace(target)
