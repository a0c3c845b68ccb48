"""`inference-engine`: wiring of one engine process."""

from __future__ import annotations

import asyncio

from inference_runtime.coordination.election import LeaderObserver
from inference_runtime.coordination.registry import Registration
from inference_runtime.process import etcd_client, run_service, stop_signal
from inference_runtime.rpc import RpcServer
from inference_runtime.telemetry import Telemetry, get_logger
from inference_runtime.v1 import common_pb2
from inference_runtime.v1.engine_service_pb2_grpc import add_EngineServiceServicer_to_server
from services.engine.accelerators import find_accelerators
from services.engine.node import LoadReporter, Node, engine_record
from services.engine.replicas import Replicas
from services.engine.service import EngineService
from services.engine.settings import EngineSettings
from services.engine.shared_quarantine import SharedQuarantine

log = get_logger(__name__)

#: Time that etcd gets to take the news that the engine drains, seconds. It may be away; sessions are told directly.
ANNOUNCE_S = 1.0
#: Time that gateways get to read the last frames, and calls to end, once all requests have ended, seconds.
FLUSH_S, GRACE_S = 2.0, 1.0


async def serve(settings: EngineSettings, telemetry: Telemetry) -> None:
    """Run one engine until SIGTERM or SIGINT."""
    stop = stop_signal()
    etcd = etcd_client(settings.etcd, telemetry.metrics)
    async with etcd, Registration(etcd, ttl_s=settings.etcd.lease_ttl_s) as records:  # the lease is revoked last
        engine = engine_record(settings, await asyncio.to_thread(find_accelerators))
        leaders = LeaderObserver(etcd, "coordinator")
        node = Node(etcd, records, engine)
        replicas = Replicas(
            engine,
            settings,
            telemetry,
            publish=node.publish,
            withdraw=node.withdraw,
            publish_engine=node.publish_engine,
            hang_s=settings.hang_s,
        )
        sessions = telemetry.metrics.gauge("inference_sessions")
        service = EngineService(replicas, settings.session_buffer_chunks, sessions, node.caught_up)
        loads = LoadReporter(replicas, leaders, settings.load_interval_s, settings.load_refresh_s)
        quarantine = SharedQuarantine(etcd, replicas.quarantine, engine.id)
        server = RpcServer(settings.rpc.host, settings.rpc.port, telemetry)
        server.add(add_EngineServiceServicer_to_server, service, "inference_runtime.v1.EngineService")
        bound = await server.start()
        engine.address = settings.rpc.advertise or bound
        async with asyncio.TaskGroup() as group:
            control = (leaders.run(), node.write_records(), node.follow_assignments(replicas), quarantine.run())
            tasks = [group.create_task(part) for part in (replicas.run(), *control, loads.run())]
            node.set_state(common_pb2.ENGINE_STATE_READY)
            await server.set_serving(True)
            log.info("serving", address=engine.address, engine=engine.id)
            await stop.wait()
            log.info("draining", timeout_s=settings.drain_timeout_s, notice_s=settings.drain_notice_s)
            await server.set_serving(False)
            replicas.start_draining()
            await node.settled(ANNOUNCE_S)  # before anything of it goes: nobody shall take this for a death
            await replicas.drain()
            await service.end_sessions(FLUSH_S)
            await server.stop(GRACE_S)
            for task in tasks:
                task.cancel()


def main() -> None:
    """The console script."""
    run_service(EngineSettings, serve)


if __name__ == "__main__":
    main()
