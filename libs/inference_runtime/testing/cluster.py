"""A whole cluster for a test: every service a real process on a port of its own, a real etcd, a temporary folder.

    async with Cluster(engines=2) as cluster:
        await cluster.apply({"name": "echo", "model": "scripted", "runtime": "scripted"})
        await cluster.wait_serving("echo")
        cluster.kill((await cluster.leader("coordinator")))

Nothing restarts by itself here: a test that kills a process decides what comes next. After a failure the ends of all logs are
written to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from inference_runtime.cli.local import SINGLETONS, WORKING, Counts, LocalCluster, http_get
from inference_runtime.cli.processes import Process
from inference_runtime.client import InferenceClient
from inference_runtime.errors import ServerError, Timeout
from inference_runtime.testing.etcd import EtcdCluster
from inference_runtime.testing.proxy import TcpProxy
from inference_runtime.v1 import common_pb2, deployment_pb2

__all__ = ["Cluster"]

#: Seconds that processes and deployments get, on a machine that may be busy.
PATIENCE_S = 60.0
#: Pause between two looks.
POLL_S = 0.05
#: A gateway that is stopped alone lets its answers end; `up` stops all, and does not wait for that.
GATEWAY_DRAIN = {"INFERENCE_GATEWAY__DRAIN_TIMEOUT_S": "30", "INFERENCE_GATEWAY__DRAIN_NOTICE_S": "0.5"}
#: Lines of each log that are shown after a failure.
SHOWN_LINES = 40


class Cluster:
    """All services as processes of this one. Use it as (async) context manager.

    Args:
        engines: Number of engines.
        singletons: Candidates of each singleton role.
        gateways: Number of gateways.
        lease_ttl_s: Time to live of leases: how soon a death is noticed.
        settings: More environment by service ("*" for all), for example
            {"gateway": {"INFERENCE_GATEWAY__LIMITS__MAX_REQUESTS": "4"}}.
        ready: Wait until every process does its work before the body begins.
        etcd_members: Members of etcd. Three are a cluster of its own, `store`, and not among the processes.
        etcd_doors: Services whose processes reach etcd through proxies of their own, `etcd_doors`.
        rpc_doors: Services whose processes are reached through proxies of their own, `rpc_doors`.
        hooked: Services whose processes take orders for faults, see `testing.inside`.

    Doors need the event loop that opened them: with those, use it as an async context manager.
    """

    def __init__(
        self,
        *,
        engines: int = 1,
        singletons: int = 1,
        gateways: int = 1,
        lease_ttl_s: float = 3.0,
        settings: Mapping[str, Mapping[str, str]] | None = None,
        ready: bool = True,
        etcd_members: int = 1,
        etcd_doors: Collection[str] = (),
        rpc_doors: Collection[str] = (),
        hooked: Collection[str] = (),
    ) -> None:
        extra = {name: dict(values) for name, values in (settings or {}).items()}
        for service in (*SINGLETONS, "engine", "gateway"):
            key = f"INFERENCE_{service.upper()}__ETCD__LEASE_TTL_S"
            extra.setdefault(service, {}).setdefault(key, str(lease_ttl_s))
        for key, value in GATEWAY_DRAIN.items():
            extra["gateway"].setdefault(key, value)
        self.folder = Path(tempfile.mkdtemp(prefix="inference-cluster-"))
        self._ready = ready
        self.store = EtcdCluster(size=etcd_members) if etcd_members > 1 else None
        #: By process: the way to each member of etcd, and the way to the process's own gRPC server.
        self.etcd_doors: dict[str, list[TcpProxy]] = {}
        self.rpc_doors: dict[str, TcpProxy] = {}
        #: By process: the folder through which it takes orders.
        self.hooks: dict[str, Path] = {}
        self._doors = contextlib.AsyncExitStack()
        self._behind_doors = frozenset(etcd_doors), frozenset(rpc_doors)
        members = self.store.endpoints if self.store else ()
        try:
            self._local = LocalCluster(self.folder, counts=Counts(engines, singletons, gateways), etcd=members, extra=extra)
            for service in hooked:
                self._hook(service)
        except BaseException:
            if self.store is not None:
                self.store.stop()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    # --- life --------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            await self._open_doors()
            if self.store is not None:
                await asyncio.to_thread(self.store.__enter__)
            self._local.start()
            if self._ready:
                await self.wait_ready()
        except BaseException as err:
            await self.__aexit__(type(err), err, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        try:
            await asyncio.to_thread(self._leave, err)
        finally:
            await self._doors.aclose()

    def __enter__(self) -> Self:
        if any(self._behind_doors):
            raise RuntimeError("a cluster with doors is an async context manager only")
        return asyncio.run(self.__aenter__())

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        self._leave(err)

    def _leave(self, err: BaseException | None) -> None:
        self._local.kill()
        if self.store is not None:
            self.store.stop()
        if err is not None:
            sys.stderr.write(self.logs())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _hook(self, service: str) -> None:
        for process in self._local.of(service):
            folder = self.hooks[process.spec.name] = self.folder / "hooks" / process.spec.name
            folder.mkdir(parents=True)
            *python, module = process.spec.argv
            process.spec = replace(process.spec, argv=[*python, "inference_runtime.testing.hooked", str(folder), module])

    async def _open_doors(self) -> None:
        to_etcd, to_us = self._behind_doors
        for service in to_etcd:
            for process in self._local.of(service):
                doors = [await self._doors.enter_async_context(TcpProxy(member)) for member in self.etcd]
                self.etcd_doors[process.spec.name] = doors
                _rewire(process, "ETCD__ENDPOINTS", ",".join(door.address for door in doors))
        for service in to_us:
            for process in self._local.of(service):
                door = self.rpc_doors[process.spec.name] = await self._doors.enter_async_context(TcpProxy(process.spec.address))
                _rewire(process, "RPC__ADVERTISE", door.address)
                process.spec = replace(process.spec, address=door.address)  # what it registers

    async def wait_ready(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until every process does its work. Raises ServerError when one has ended, Timeout when it takes too long."""
        async with contextlib.AsyncExitStack() as stack:
            client = await self._local.connect(stack, timeout_s)
            await self._local.wait_ready(client, timeout_s)

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def http(self) -> str:
        """Base URL of the first gateway."""
        return self._local.http_urls[0]

    @property
    def grpc(self) -> str:
        """host:port of the first gateway's gRPC door."""
        return self._local.grpc_addresses[0]

    @property
    def etcd(self) -> list[str]:
        """host:port of etcd."""
        return list(self._local.etcd_endpoints)

    @property
    def local(self) -> LocalCluster:
        """The processes themselves."""
        return self._local

    def pids(self) -> dict[str, int]:
        """Process ids by name: "etcd", "coordinator", "engine-2" …"""
        return self._local.pids()

    def logs(self) -> str:
        """The end of every log."""
        parts = []
        for path in sorted(self._local.logs.glob("*.log")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts) + "\n"

    def client(self) -> InferenceClient:
        """A client of this cluster. Close it, or use it as a context manager."""
        return InferenceClient(gateway=self.grpc, etcd=self.etcd)

    # --- deployments -------------------------------------------------------------------------------------------------

    async def apply(self, spec: Mapping[str, Any]) -> deployment_pb2.Deployment:
        """Create or change a deployment."""
        async with self.client() as client:
            return (await client.apply(spec)).deployment

    async def wait_serving(self, name: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until every replica of a deployment serves and every gateway that runs offers it."""
        async with self.client() as client:
            await client.wait_serving(name, timeout_s)
        for process, url in zip(self._local.of("gateway"), self._local.http_urls, strict=True):
            if process.running:
                await self._offered(url, name, timeout_s)

    async def _offered(self, url: str, name: str, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    status, body = await http_get(url.removeprefix("http://"), "/v1/models")
                    if status == 200 and f'"{name}"'.encode() in body:
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError as err:
            raise Timeout(f"{url} does not offer {name!r} after {timeout_s:g} s") from err

    async def leader(self, role: str, *, other_than: str = "", timeout_s: float = PATIENCE_S) -> str:
        """Name of the process that leads a role.

        Args:
            role: "coordinator", "deployment_manager" or "metrics".
            other_than: Wait until it is not this process.
            timeout_s: Seconds to wait.
        """
        by_address = {p.spec.address: name for name, p in self._local.processes.items()}
        found: common_pb2.Leader | None = None
        async with self.client() as client:
            try:
                async with asyncio.timeout(timeout_s):
                    while True:
                        found = (await client.leaders())[role]
                        name = by_address.get(found.address, "") if found is not None else ""
                        if name and name != other_than:
                            return name
                        await asyncio.sleep(POLL_S)
            except TimeoutError as err:
                raise Timeout(f"{found.address if found else 'nobody'} leads {role} after {timeout_s:g} s") from err

    # --- faults ------------------------------------------------------------------------------------------------------

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal (SIGKILL) to one process and, if that ends it, wait until it is gone. Nothing restarts it."""
        process = self._local.processes[name]
        if number == signal.SIGKILL:
            process.kill()
        else:
            process.signal(number)

    def pause(self, name: str) -> None:
        """Freeze one process (SIGSTOP)."""
        os.kill(self.pids()[name], signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let it go on (SIGCONT)."""
        os.kill(self.pids()[name], signal.SIGCONT)

    async def restart(self, name: str, timeout_s: float = PATIENCE_S) -> None:
        """Start a process that ended, on its old address, and wait until everything that runs does its work."""
        process = self._local.processes[name]
        if not process.running:
            process.start()
        async with contextlib.AsyncExitStack() as stack:
            client = await self._local.connect(stack, timeout_s, watch=False)  # others may be dead on purpose
            try:
                async with asyncio.timeout(timeout_s):
                    while (await self._local.observe(client)).states[name] not in WORKING:
                        if not process.running:
                            raise ServerError(process.ended_sentence())
                        await asyncio.sleep(POLL_S)
            except TimeoutError as err:
                raise Timeout(f"{name} does not work {timeout_s:g} s after its restart: {process.explanation()}") from err


def _rewire(process: Process, setting: str, value: str) -> None:
    """Change one setting of a process that has not been started."""
    name = f"INFERENCE_{process.spec.service.upper()}__{setting}"
    process.spec = replace(process.spec, environment={**process.spec.environment, name: value})
