"""`inference-gateway`: wiring of one gateway process, or of the parent of several."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from pathlib import Path

import uvloop

from inference_runtime.coordination import EtcdClient, EtcdUnavailable
from inference_runtime.coordination.election import LeaderObserver
from inference_runtime.process import etcd_client, speak, stop_signal
from inference_runtime.settings import load_settings
from inference_runtime.telemetry import Telemetry, get_logger, setup_telemetry
from inference_runtime.telemetry.loop import watched
from services.gateway.http.server import listen
from services.gateway.parent import parent_gone, run_workers
from services.gateway.settings import GatewaySettings, check_exposure
from services.gateway.table_store import TableStore
from services.gateway.worker import GatewayWorker

log = get_logger(__name__)

#: What etcd gets to answer a gateway that has routes from disk and could serve, seconds. A member without a quorum never answers.
CONNECT_S = 1.0


def _store(settings: GatewaySettings) -> TableStore | None:
    return TableStore(Path(settings.state_dir).expanduser(), settings.etcd.endpoints) if settings.state_dir else None


async def _look_for(etcd: EtcdClient) -> None:
    """Say when etcd is away or another; with routes from disk that keeps nobody waiting for long."""
    try:
        async with asyncio.timeout(CONNECT_S):
            await etcd.connect()
    except (EtcdUnavailable, TimeoutError) as err:
        cause = err.message if isinstance(err, EtcdUnavailable) else f"no answer within {CONNECT_S:g} s"
        log.warning("serving with routes from disk: etcd is away or another", cause=cause)


async def serve(settings: GatewaySettings, telemetry: Telemetry) -> None:
    """Run one worker until SIGTERM, SIGINT or the end of its parent."""
    stop = stop_signal(interrupt=settings.parent_fd < 0)
    sock = listen(settings.http.host, settings.http.port, shared=settings.parent_fd >= 0)
    store = _store(settings)
    stored = await asyncio.to_thread(store.load) if store is not None else None
    async with contextlib.AsyncExitStack() as stack:
        etcd = etcd_client(settings.etcd, telemetry.metrics, stored.mark if stored is not None else None)
        stack.push_async_callback(etcd.close)
        if stored is None:
            await etcd.connect()
        else:
            await _look_for(etcd)
        coordinators, ledgers = LeaderObserver(etcd, "coordinator"), LeaderObserver(etcd, "metrics")
        worker = GatewayWorker(settings, telemetry, coordinators, ledgers, sock, etcd, store)
        if stored is not None:
            worker.table.apply(stored.table)
        async with asyncio.TaskGroup() as group:
            parts = (coordinators.run(), ledgers.run(), worker.run(), parent_gone(settings.parent_fd, stop))
            tasks = [group.create_task(part) for part in parts]
            await worker.start()
            await stop.wait()
            await worker.drain()  # not serving, nothing new, let what runs end; then cancel, close, settle
            for task in tasks:
                task.cancel()
        await worker.stop()


def main() -> None:
    """The console script. A known failure is one sentence on stderr and an exit status above 0."""
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--workers", type=int, metavar="N", help="processes that share the HTTP port")
    given, argv = flags.parse_known_args()
    with speak("inference-gateway"):
        settings = load_settings(GatewaySettings, argv, flags)
        settings = settings.model_copy(update={"workers": given.workers or settings.workers})
        check_exposure(settings)
        if settings.workers > 1 and settings.parent_fd < 0:
            run_workers(settings, argv)
            return
        with contextlib.closing(setup_telemetry(GatewaySettings.service, settings.telemetry)) as telemetry:
            uvloop.run(watched(telemetry.metrics, serve(settings, telemetry)))


if __name__ == "__main__":
    main()
