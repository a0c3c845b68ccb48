"""`inference-gateway`: wiring of one gateway process, or of the parent of several."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

import uvloop

from inference_runtime.coordination.election import LeaderObserver
from inference_runtime.coordination.etcd import EtcdClient
from inference_runtime.errors import InferenceError
from inference_runtime.settings import SettingsError, load_settings
from inference_runtime.telemetry import Telemetry, setup_telemetry
from services.gateway.http.server import listen
from services.gateway.parent import parent_gone, run_workers
from services.gateway.settings import GatewaySettings, check_exposure
from services.gateway.worker import GatewayWorker


async def serve(settings: GatewaySettings, telemetry: Telemetry) -> None:
    """Run one worker until SIGTERM, SIGINT or the end of its parent."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    sock = listen(settings.http.host, settings.http.port, shared=settings.parent_fd >= 0)
    s = settings.etcd
    async with EtcdClient(
        s.endpoints, username=s.username, password=s.password, ca_file=s.ca_file, cert_file=s.cert_file, key_file=s.key_file
    ) as etcd:
        await etcd.connect()
        coordinators, ledgers = LeaderObserver(etcd, "coordinator"), LeaderObserver(etcd, "metrics")
        worker = GatewayWorker(settings, telemetry, coordinators, ledgers, sock)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part.run()) for part in (coordinators, ledgers, worker)]
            tasks.append(group.create_task(parent_gone(settings.parent_fd, stop)))
            await worker.start()
            await stop.wait()
            await worker.drain()  # not serving, nothing new, let what runs end; then cancel, close, settle
            for task in tasks:
                task.cancel()
        await worker.stop()


def main() -> None:
    """The console script. A known failure is one sentence on stderr and an exit status above 0."""
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--workers", type=int, help="processes that share the HTTP port")
    given, argv = flags.parse_known_args()
    try:
        settings = load_settings(GatewaySettings, argv)
        settings = settings.model_copy(update={"workers": given.workers or settings.workers})
        check_exposure(settings)
        if settings.workers > 1 and settings.parent_fd < 0:
            run_workers(settings, argv)
            return
        telemetry = setup_telemetry("gateway", settings.telemetry)
        try:
            uvloop.run(serve(settings, telemetry))
        finally:
            telemetry.close()
    except (InferenceError, ExceptionGroup) as err:
        known = (
            err if isinstance(err, InferenceError) else next((e for e in err.exceptions if isinstance(e, InferenceError)), None)
        )
        if known is None:
            raise
        print(f"inference-gateway: {known.message}", file=sys.stderr)  # noqa: T201 - the sentence a person reads
        sys.exit(2 if isinstance(known, SettingsError) else 1)


if __name__ == "__main__":
    main()
