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
    await etcd.connect()
    engine = engine_record(settings)
    records, leaders = Registration(etcd, ttl_s=s.lease_ttl_s), LeaderObserver(etcd, "coordinator")
    node = Node(etcd, records, engine)
    replicas = Replicas(
        engine,
        drain_timeout_s=settings.drain_timeout_s,
        tokenise_threads=settings.tokenise_threads,
        telemetry=telemetry,
        publish=node.publish,
        withdraw=node.withdraw,
    )
    service = EngineService(replicas, settings.session_buffer_chunks, telemetry.metrics.gauge("inference_sessions"))
    server = RpcServer(settings.rpc.host, settings.rpc.port, telemetry)
    server.add(add_EngineServiceServicer_to_server, service, "inference_runtime.v1.EngineService")
    bound = await server.start()
    engine.address = settings.rpc.advertise or bound
    async with asyncio.TaskGroup() as group:
        parts = [records.run(), leaders.run(), replicas.run(), node.write_records(), node.follow_assignments(replicas)]
        parts.append(LoadReporter(replicas, leaders, settings.load_interval_s, settings.load_refresh_s).run())
        tasks = [group.create_task(part) for part in parts]
        node.set_state(common_pb2.ENGINE_STATE_READY)
        await server.set_serving(True)
        log.info("serving", address=engine.address, engine=engine.id)
        await stop.wait()
        log.info("draining", timeout_s=settings.drain_timeout_s)  # not serving, deregister, drain, cancel, close, revoke
        await server.set_serving(False)
        node.set_state(common_pb2.ENGINE_STATE_DRAINING)
        service.notify_draining()
        await replicas.drain()
        await server.stop(GRACE_S)
        for task in tasks:
            task.cancel()
    await records.close()
    await etcd.close()


def main() -> None:
    """The console script. Exit status: 0 after a stop that was asked for, 2 for wrong settings, 1 for any other fault."""
    try:
        settings = load_settings(EngineSettings)
        telemetry = setup_telemetry(EngineSettings.service, settings.telemetry)
        with contextlib.closing(telemetry):
            uvloop.run(serve(settings, telemetry))
    except InferenceError as err:
        print(f"inference-engine: {err.message}", file=sys.stderr)  # noqa: T201 - the one line a person reads
        sys.exit(2 if isinstance(err, SettingsError) else 1)


if __name__ == "__main__":
    main()
