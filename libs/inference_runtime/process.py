"""What every service process does the same way: start, stop on a signal, say one sentence when it cannot go on.

`run_service` is the body of each console script; `serve_singleton` is the whole life of a service that campaigns for a role.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NoReturn, Protocol, TypeVar

import uvloop

from inference_runtime.coordination import Candidate, Election, EtcdClient, LeaderObserver, StoreGuard, StoreMark, Term
from inference_runtime.errors import InferenceError
from inference_runtime.rpc import RpcServer
from inference_runtime.settings import EtcdSettings, ServiceSettings, SettingsError, load_settings
from inference_runtime.telemetry import MetricSet, Telemetry, get_logger, setup_telemetry
from inference_runtime.telemetry.loop import watched

__all__ = ["Singleton", "etcd_client", "leave", "run_service", "serve_singleton", "speak", "stop_signal"]

log = get_logger(__name__)

S = TypeVar("S", bound=ServiceSettings)


def etcd_client(settings: EtcdSettings, metrics: MetricSet, mark: StoreMark | None = None) -> EtcdClient:
    """The client of a service, not yet connected. It follows one store and refuses every other until an operator acknowledges it.

    Args:
        settings: Where etcd is.
        metrics: Where a refusal is published.
        mark: The store that an earlier life of this service followed, where it wrote that down.
    """
    refused = metrics.gauge("inference_store_refused")
    refused.set(0)
    return EtcdClient(
        settings.endpoints,
        username=settings.username,
        password=settings.password,
        ca_file=settings.ca_file,
        cert_file=settings.cert_file,
        key_file=settings.key_file,
        guard=StoreGuard(mark),
        on_store=lambda refusal: refused.set(int(bool(refusal))),
    )


def stop_signal(*, interrupt: bool = True) -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets. Call it on the running loop, once.

    The second one ends the process at once, with status 128 + its number: nothing is waited for and nobody is told. Its children
    end with it, since each of them watches its parent; its leases run out.

    Args:
        interrupt: Hear SIGINT too. False ignores it: for a process whose parent hears the same Ctrl-C and decides.
    """
    stop = asyncio.Event()
    heard: list[int] = []

    def hear(signum: int) -> None:
        if heard:
            log.warning("stopped at once by a second signal", signal=signal.Signals(signum).name)
            sys.stderr.flush()
            os._exit(128 + signum)
        heard.append(signum)
        stop.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, hear, signal.SIGTERM)
    if interrupt:
        loop.add_signal_handler(signal.SIGINT, hear, signal.SIGINT)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return stop


@contextlib.contextmanager
def speak(program: str) -> Iterator[None]:
    """Turn a known failure into one sentence on stderr. Exit status: 2 for wrong settings, 1 for any other fault."""
    try:
        yield
    except (InferenceError, ExceptionGroup) as err:
        cause: Exception = err
        while isinstance(cause, ExceptionGroup):
            cause = next((e for e in cause.exceptions if isinstance(e, InferenceError)), cause.exceptions[0])
        if not isinstance(cause, InferenceError):
            raise
        print(f"{program}: {cause.message}", file=sys.stderr)  # noqa: T201 - the one sentence a person reads
        sys.exit(2 if isinstance(cause, SettingsError) else 1)


def run_service(cls: type[S], serve: Callable[[S, Telemetry], Awaitable[None]], argv: Sequence[str] | None = None) -> None:
    """The console script of a service: settings, telemetry, `serve` on a uvloop, until it returns. Ends the process.

    Exit status: 0 after a stop that was asked for, 2 for wrong settings, 1 for any other known fault.
    """
    with speak(f"inference-{cls.service.replace('_', '-')}"):
        settings = load_settings(cls, argv)
        with contextlib.closing(setup_telemetry(cls.service, settings.telemetry)) as telemetry:
            uvloop.run(_main(settings, telemetry, serve))
        leave()


def leave() -> NoReturn:
    """End the process, now that everything in it is closed. Teardown of the interpreter would visit each object of torch, for two
    seconds, and wait for threads that still load a model; the kernel does all of it at once."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


async def _main(settings: S, telemetry: Telemetry, serve: Callable[[S, Telemetry], Awaitable[None]]) -> None:
    await watched(telemetry.metrics, serve(settings, telemetry))


class Singleton(Protocol):
    """A servicer that leads its role for a term at a time."""

    async def lead(self, term: Term) -> None:
        """Do the leader's work until cancelled."""
        ...


async def serve_singleton(
    settings: ServiceSettings,
    telemetry: Telemetry,
    role: str,
    make: Callable[[EtcdClient, LeaderObserver], Singleton],
    register: Callable[[object, object], None],
    name: str,
    grace_s: float,
) -> None:
    """Campaign for a role and serve, as leader or follower, until SIGTERM or SIGINT.

    Args:
        settings: The service's.
        telemetry: The process's.
        role: What to campaign for.
        make: Makes the servicer.
        register: The generated `add_…Servicer_to_server`.
        name: Full name of the gRPC service.
        grace_s: Time that running calls get to end, seconds.

    The stop has an order: not serving, resign (the next leader begins, and callers can be told who it is), let calls end. What a
    call wanted to write after that is refused, and its caller asks the next leader.
    """
    stop = stop_signal()
    async with etcd_client(settings.etcd, telemetry.metrics) as etcd:
        leaders = LeaderObserver(etcd, role)
        service = make(etcd, leaders)
        server = RpcServer(settings.rpc.host, settings.rpc.port, telemetry)
        server.add(register, service, name)
        bound = await server.start()
        address = settings.rpc.advertise or bound
        election = Election(etcd, role, Candidate.here(address), ttl_s=settings.etcd.lease_ttl_s)
        async with asyncio.TaskGroup() as group:
            observing, campaign = group.create_task(leaders.run()), group.create_task(election.run(service.lead))
            try:
                await server.set_serving(True)  # leading or not: a follower answers with the leader's address
                log.info("serving", address=address)
                await stop.wait()
                log.info("stopping", role=role)
            finally:
                await server.set_serving(False)
                campaign.cancel()
                await asyncio.wait([campaign])
                await server.stop(grace_s)
                observing.cancel()
