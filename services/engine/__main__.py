"""`inference-engine`: wiring of one engine process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

import uvloop

from inference_runtime.coordination.election import LeaderObserver
from inference_runtime.coordination.etcd import EtcdClient
from inference_runtime.coordination.registry import Registration
from inference_runtime.errors import InferenceError
from inference_runtime.rpc import RpcServer
from inference_runtime.settings import SettingsError, load_settings
from inference_runtime.telemetry import Telemetry, get_logger, setup_telemetry
from inference_runtime.v1 import common_pb2
from inference_runtime.v1.engine_service_pb2_grpc import add_EngineServiceServicer_to_server
from services.engine.node import LoadReporter, Node, engine_record
from services.engine.replicas import Replicas
from services.engine.service import EngineService
from services.engine.settings import EngineSettings

log = get_logger(__name__)

#: Time that calls get to end once all requests have ended, seconds.
GRACE_S = 1.0


async def serve(settings: EngineSettings, telemetry: Telemetry) -> None:
    """Run one engine until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    s = settings.etcd
    etcd = EtcdClient(
        s.endpoints, username=s.username, password=s.password, ca_file=s.ca_file, cert_file=s.cert_file, key_file=s.key_file
    )
    async with etcd, Registration(etcd, ttl_s=s.lease_ttl_s) as records:  # the lease is revoked last
        engine, leaders = engine_record(settings), LeaderObserver(etcd, "coordinator")
        node = Node(etcd, records, engine)
        replicas = Replicas(engine, settings, telemetry, publish=node.publish, withdraw=node.withdraw)
        service = EngineService(replicas, settings.session_buffer_chunks, telemetry.metrics.gauge("inference_sessions"))
        loads = LoadReporter(replicas, leaders, settings.load_interval_s, settings.load_refresh_s)
        server = RpcServer(settings.rpc.host, settings.rpc.port, telemetry)
        server.add(add_EngineServiceServicer_to_server, service, "inference_runtime.v1.EngineService")
        bound = await server.start()
        engine.address = settings.rpc.advertise or bound
        async with asyncio.TaskGroup() as group:
            parts = (leaders.run(), replicas.run(), node.write_records(), node.follow_assignments(replicas), loads.run())
            tasks = [group.create_task(part) for part in parts]
            node.set_state(common_pb2.ENGINE_STATE_READY)
            await server.set_serving(True)
            log.info("serving", address=engine.address, engine=engine.id)
            await stop.wait()
            log.info("draining", timeout_s=settings.drain_timeout_s)
            await server.set_serving(False)
            node.set_state(common_pb2.ENGINE_STATE_DRAINING)
            service.notify_draining()
            await replicas.drain()
            await server.stop(GRACE_S)
            for task in tasks:
                task.cancel()


def main() -> None:
    """The console script. Exit status: 0 after a stop that was asked for, 2 for wrong settings, 1 for any other fault."""
    try:
        settings = load_settings(EngineSettings)
        with contextlib.closing(setup_telemetry(settings.service, settings.telemetry)) as telemetry:
            uvloop.run(serve(settings, telemetry))
    except (InferenceError, ExceptionGroup) as err:
        cause: Exception = err
        while isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[0]
        if not isinstance(cause, InferenceError):
            raise
        print(f"inference-engine: {cause.message}", file=sys.stderr)  # noqa: T201 - the one sentence a person reads
        sys.exit(2 if isinstance(cause, SettingsError) else 1)


if __name__ == "__main__":
    main()
