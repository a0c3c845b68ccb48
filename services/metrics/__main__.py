"""`inference-metrics`: wiring of one metrics service process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

import uvloop

from inference_runtime.coordination import Candidate, Election, EtcdClient, LeaderObserver
from inference_runtime.errors import InferenceError
from inference_runtime.rpc import RpcServer
from inference_runtime.settings import SettingsError, load_settings
from inference_runtime.telemetry import Telemetry, get_logger, setup_telemetry
from inference_runtime.v1.metrics_service_pb2_grpc import add_MetricsServiceServicer_to_server
from services.metrics.service import ROLE, MetricsService
from services.metrics.settings import MetricsSettings

log = get_logger(__name__)


async def serve(settings: MetricsSettings, telemetry: Telemetry) -> None:
    """Campaign and serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    s = settings.etcd
    etcd = EtcdClient(
        s.endpoints, username=s.username, password=s.password, ca_file=s.ca_file, cert_file=s.cert_file, key_file=s.key_file
    )
    async with etcd:
        leaders = LeaderObserver(etcd, ROLE)
        service = MetricsService(leaders, settings, telemetry.metrics)
        server = RpcServer(settings.rpc.host, settings.rpc.port, telemetry)
        server.add(add_MetricsServiceServicer_to_server, service, "inference_runtime.v1.MetricsService")
        bound = await server.start()
        address = settings.rpc.advertise or bound
        election = Election(etcd, ROLE, Candidate.here(address), ttl_s=s.lease_ttl_s)
        async with asyncio.TaskGroup() as group:
            observing, campaign = group.create_task(leaders.run()), group.create_task(election.run(service.lead))
            try:
                await server.set_serving(True)  # leading or not: a follower answers with the leader's address
                log.info("serving", address=address)
                await stop.wait()
            finally:
                await server.set_serving(False)
                campaign.cancel()
                await asyncio.wait([campaign])  # it resigns: the next leader begins, and callers can be told who it is
                await server.stop(settings.grace_s)
                observing.cancel()


def main() -> None:
    """The console script. Exit status: 0 after a stop that was asked for, 2 for wrong settings, 1 for any other fault."""
    try:
        settings = load_settings(MetricsSettings)
        with contextlib.closing(setup_telemetry(settings.service, settings.telemetry)) as telemetry:
            uvloop.run(serve(settings, telemetry))
    except (InferenceError, ExceptionGroup) as err:
        cause: Exception = err
        while isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[0]
        if not isinstance(cause, InferenceError):
            raise
        print(f"inference-metrics: {cause.message}", file=sys.stderr)  # noqa: T201 - the one sentence a person reads
        sys.exit(2 if isinstance(cause, SettingsError) else 1)


if __name__ == "__main__":
    main()
