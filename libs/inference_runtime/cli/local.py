"""A whole cluster on one machine: which processes, with which settings, in which order they stop, and how each one is doing.

`LocalCluster` owns the processes, their ports and the state directory's `logs/`. What a process is doing is read from etcd, where
it registered, and from the gateways' `/readyz`: nobody is asked over a side channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inference_runtime.cli.cluster_file import make_private
from inference_runtime.cli.embedded_etcd import etcd_argv, find_etcd
from inference_runtime.cli.processes import Port, Process, ProcessSpec, stop_all
from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.errors import InferenceError, ServerError, Timeout
from inference_runtime.settings import environment
from inference_runtime.v1 import common_pb2

__all__ = ["SINGLETONS", "STOP_ORDER", "WORKING", "Counts", "LocalCluster", "Observation", "http_get"]

SINGLETONS = ("coordinator", "deployment_manager", "metrics")
#: Who stops before whom: first nobody asks, then nobody answers, then nobody decides, last nobody remembers.
STOP_ORDER = ("gateway", "engine", "deployment_manager", "coordinator", "metrics", "etcd")
#: What each is, for people.
WHAT = {
    "etcd": "the store: deployments, leases, elections",
    "coordinator": "routing table and load",
    "deployment_manager": "deployments and their placement",
    "metrics": "usage of every request",
    "engine": "hosts the models",
    "gateway": "OpenAI-compatible HTTP, and gRPC",
}
#: States of a process that does its work.
WORKING = frozenset({"serving", "leading", "standby", "waiting"})
#: Settings that suit one machine, by service. Who presses Ctrl-C waits: running answers get a second, and no load balancer needs
#: notice. An engine that is stopped alone lets its answers run on for a while before others go on with them.
DEFAULTS = {
    "engine": {"INFERENCE_ENGINE__DRAIN_TIMEOUT_S": "5", "INFERENCE_ENGINE__DRAIN_NOTICE_S": "0.5"},
    "gateway": {"INFERENCE_GATEWAY__DRAIN_TIMEOUT_S": "1", "INFERENCE_GATEWAY__DRAIN_NOTICE_S": "0"},
}
#: Seconds from SIGTERM to SIGKILL: the drain, and what comes after it.
STOP_GRACE_S = 8.0
#: Seconds for one look at a gateway's readiness.
PROBE_S = 1.0
#: Seconds between two looks while a cluster starts.
START_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Counts:
    """How many processes of each kind."""

    engines: int = 1
    singletons: int = 1
    gateways: int = 1


@dataclass(frozen=True, slots=True)
class Observation:
    """What etcd and the gateways say at one moment.

    `states` has, for each process by name, one of: serving, leading, standby, draining, waiting (a gateway that no replica can
    be reached through yet), starting, restarting, stopped.
    """

    states: Mapping[str, str]
    etcd: bool

    @property
    def ready(self) -> bool:
        """Whether every process does its work, as far as there are deployments to serve."""
        return self.etcd and all(state in WORKING for state in self.states.values())


class LocalCluster:
    """The processes of one cluster on this machine.

    Args:
        state_dir: Holds `etcd/` (data), `metrics/` (usage) and `logs/`, which only this user can read. Made when missing.
        host: Address that gateways' HTTP doors bind; everything else stays on 127.0.0.1.
        http_port: Port of the first gateway; 0 picks a free one.
        counts: How many of each.
        etcd: host:port of members to use; empty starts one here.
        gateway_workers: Processes that share one gateway's HTTP port.
        extra: More environment for the processes of a service, by service; "*" is for all.

    Raises:
        ServerError: The port is taken.
        RuntimeNotInstalled: There is no etcd program.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        counts: Counts | None = None,
        etcd: Sequence[str] = (),
        gateway_workers: int = 1,
        extra: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        counts = counts or Counts()
        self.state_dir = state_dir.absolute()
        self.logs, self._usage = self.state_dir / "logs", self.state_dir / "metrics"
        for folder in (self.logs, self._usage):
            make_private(folder)
        self.processes: dict[str, Process] = {}
        self._extra = extra or {}
        # Tells this cluster's engines from those of others that share its etcd.
        self._suffix = hashlib.sha256(f"{socket.gethostname()} {self.state_dir}".encode()).hexdigest()[:6]
        self._workers = gateway_workers
        self._ports: list[Port] = []
        try:
            self._http = [self._port(host, http_port if n == 0 else 0) for n in range(counts.gateways)]
            self.etcd_endpoints = list(etcd) or [self._port("127.0.0.1").address]
            self.has_own_etcd = not etcd
            if self.has_own_etcd:
                self._add_etcd()
            for service in SINGLETONS:
                for n in range(counts.singletons):
                    self._add_service(service, n)
            for n in range(counts.engines):
                self._add_service("engine", n)
            for n in range(counts.gateways):
                self._add_service("gateway", n)
        except BaseException:
            self._release()
            raise

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def http_urls(self) -> list[str]:
        """Base URL of each gateway. A gateway that binds every address is reached on 127.0.0.1."""
        return [f"http://{self._reachable(port)}" for port in self._http]

    @property
    def grpc_addresses(self) -> list[str]:
        """host:port of each gateway's gRPC door."""
        return [p.spec.address for p in self.of("gateway")]

    @property
    def data_dir(self) -> Path:
        """Data of the etcd that runs here."""
        return self.state_dir / "etcd"

    def of(self, service: str) -> list[Process]:
        """The processes of one service, first to last."""
        return [p for p in self.processes.values() if p.spec.service == service]

    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {name: process.pid for name, process in self.processes.items()}

    def description(self) -> dict[str, object]:
        """What scripts need: addresses and process ids."""
        etcd = self.etcd_endpoints
        return {
            "http": self.http_urls[0],
            "grpc": self.grpc_addresses[0],
            "etcd": ",".join(etcd),
            "pids": self.pids(),
        }

    # --- plan --------------------------------------------------------------------------------------------------------

    def _port(self, host: str, number: int = 0) -> Port:
        port = Port(host, number)
        self._ports.append(port)
        return port

    def _reachable(self, port: Port) -> str:
        return f"127.0.0.1:{port.number}" if port.host in {"0.0.0.0", ""} else port.address

    def _add_etcd(self) -> None:
        client = self.etcd_endpoints[0]
        argv = etcd_argv(find_etcd(environment()), self.data_dir, client, self._port("127.0.0.1").address)
        log = self.logs / "etcd.log"
        whole = {key: value for key, value in environment().items() if not key.startswith("ETCD_")}  # etcd reads them as flags
        self.processes["etcd"] = Process(ProcessSpec("etcd", "etcd", argv, whole, client, client, log, WHAT["etcd"]))

    def _add_service(self, service: str, number: int) -> None:
        name = service if number == 0 else f"{service}-{number + 1}"
        rpc = self._port("127.0.0.1")
        wiring = {"ETCD__ENDPOINTS": ",".join(self.etcd_endpoints), "RPC__HOST": rpc.host, "RPC__PORT": str(rpc.number)}
        if service == "gateway":
            http = self._http[number]
            wiring |= {"HTTP__HOST": http.host, "HTTP__PORT": str(http.number), "WORKERS": str(self._workers)}
        if service == "engine":
            # The same after a restart: an engine finds its assignments again at once, instead of when its old lease has run out.
            wiring |= {"ENGINE_ID": f"{name}-{self._suffix}"}
        prefix = f"INFERENCE_{service.upper()}__"
        defaults = dict(DEFAULTS.get(service, {}))
        if service == "metrics":
            defaults["INFERENCE_METRICS__STATE_DIR"] = str(self._usage)  # candidates share it: the leader writes
        if service == "gateway":
            defaults["INFERENCE_GATEWAY__STATE_DIR"] = str(self.state_dir / name)  # its routes outlive a restart
        # What a person exported wins over our defaults, and nothing over the wiring.
        whole = {**defaults, **environment(), **self._extra.get("*", {}), **self._extra.get(service, {})}
        whole |= {prefix + key: value for key, value in wiring.items()}
        # -P: a folder called "services" in the working directory is not ours.
        argv = [sys.executable, "-P", "-m", f"services.{service}"]
        log = self.logs / f"{name}.log"
        door = self._reachable(self._http[number]) if service == "gateway" else rpc.address
        self.processes[name] = Process(ProcessSpec(name, service, argv, whole, rpc.address, door, log, WHAT[service]))

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every process that does not run, all at once: each waits for what it needs."""
        for process in self.processes.values():
            if not process.running:
                process.start()

    async def start_clean(self, timeout_s: float) -> None:
        """Start everything; first end the leases that an earlier life of this state directory left behind.

        A cluster that was killed leaves leader keys and registrations in etcd's data until their leases run out. Nobody holds
        them any more, so they are ended at once instead of being waited for.

        Raises:
            ServerError: A process ended, or etcd does not answer.
        """
        if self.has_own_etcd and self.data_dir.exists():
            self.processes["etcd"].start()
            async with contextlib.AsyncExitStack() as stack:
                client = await self.connect(stack, timeout_s)
                prefixes = (keys.ELECTIONS, keys.ENGINES, keys.REPLICAS, keys.GATEWAYS)
                leased = [kv for prefix in prefixes for kv in (await client.list(prefix))[0]]
                for lease_id in {kv.lease_id for kv in leased if kv.lease_id}:
                    await client.revoke(lease_id)
        self.start()

    async def connect(self, stack: contextlib.AsyncExitStack, timeout_s: float, *, watch: bool = True) -> EtcdClient:
        """A client of this cluster's etcd, once it answers; closed by `stack`.

        Args:
            stack: Closes the client.
            timeout_s: Seconds that etcd gets.
            watch: Raise as soon as any process has ended.

        Raises:
            ServerError: It does not answer in time, or its process ended.
        """
        client = EtcdClient(self.etcd_endpoints)
        stack.push_async_callback(client.close)
        last = ""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if watch:
                        self.raise_if_ended()
                    try:
                        await client.connect()
                        return client
                    except InferenceError as err:
                        last = err.message
                    await asyncio.sleep(START_POLL_S)
        except TimeoutError as err:
            where = ", ".join(self.etcd_endpoints)
            raise ServerError(f"etcd at {where} does not answer within {timeout_s:g} s: {last}") from err

    def raise_if_ended(self) -> None:
        """Raise ServerError with its last words if a process that was started has ended."""
        for process in self.processes.values():
            if process.starts and not process.running:
                raise ServerError(process.ended_sentence())

    async def wait_ready(self, client: EtcdClient, timeout_s: float) -> Observation:
        """Wait until every process does its work.

        Raises:
            ServerError: A process ended.
            Timeout: It took too long; the message names who is missing.
        """
        seen = Observation({}, False)
        try:
            async with asyncio.timeout(timeout_s):
                while not seen.ready:
                    self.raise_if_ended()
                    await asyncio.sleep(START_POLL_S)
                    seen = await self.observe(client)
        except TimeoutError as err:
            late = [name for name, state in seen.states.items() if state in {"starting", "restarting", "stopped"}]
            words = "; ".join(f"{n}: {self.processes[n].explanation() or 'its log is silent'}" for n in late)
            raise Timeout(f"not ready after {timeout_s:g} s: {words or 'etcd'} (logs: {self.logs})") from err
        return seen

    async def observe(self, client: EtcdClient) -> Observation:
        """How each process is doing. Bounded in time, whatever is down."""
        registered, answers = await _registered(client)
        async with asyncio.TaskGroup() as tasks:
            probes = {
                process.spec.name: tasks.create_task(http_get(url.removeprefix("http://"), "/readyz"))
                for process, url in zip(self.of("gateway"), self.http_urls, strict=True)
            }
        doors = {name: {200: "serving", 0: "starting"}.get(probe.result()[0], "waiting") for name, probe in probes.items()}
        states = {
            name: self._state(process, registered, answers, doors.get(name, "")) for name, process in self.processes.items()
        }
        return Observation(states, answers)

    def _state(self, process: Process, registered: Mapping[str, str], etcd: bool, door: str) -> str:
        if not process.running:
            return "restarting" if process.starts else "stopped"
        match process.spec.service:
            case "etcd":
                return "serving" if etcd else "starting"
            case "gateway":
                return door
            case _ if not etcd:
                return "serving" if process.starts else "starting"  # nobody can say; it runs
            case _:
                return registered.get(process.spec.address, "starting")

    def stop(self, grace_s: float = STOP_GRACE_S, hurry: list[bool] | None = None) -> None:
        """Stop everything in order and give the ports back. Blocks until no process is left.

        Args:
            grace_s: Seconds that each stage gets before it is killed.
            hurry: Becomes non-empty when nobody wants to wait any more.
        """
        for service in STOP_ORDER:
            stop_all(self.of(service), grace_s, hurry)
        self._release()

    def kill(self) -> None:
        """End everything at once."""
        stop_all(self.processes.values(), 0)
        self._release()

    def _release(self) -> None:
        for port in self._ports:
            port.close()
        self._ports.clear()


async def _registered(client: EtcdClient) -> tuple[dict[str, str], bool]:
    """State by address of everything that stands in etcd; whether etcd answered."""
    try:
        candidates, _ = await client.list(keys.ELECTIONS)
        engines, _ = await client.list(keys.ENGINES)
    except InferenceError:
        return {}, False
    states: dict[str, str] = {}
    first: dict[str, int] = {}
    for kv in candidates:
        role = keys.segments(kv.key, keys.ELECTIONS)[0]
        first[role] = min(first.get(role, kv.create_revision), kv.create_revision)
    for kv in candidates:
        role = keys.segments(kv.key, keys.ELECTIONS)[0]
        states[common_pb2.Leader.FromString(kv.value).address] = "leading" if kv.create_revision == first[role] else "standby"
    for kv in engines:
        engine = common_pb2.Engine.FromString(kv.value)
        states[engine.address] = "draining" if engine.state == common_pb2.ENGINE_STATE_DRAINING else "serving"
    return states, True


async def http_get(address: str, path: str) -> tuple[int, bytes]:
    """Status and body of `GET path` at host:port; status 0 when there is no answer within a second."""
    host, _, port = address.rpartition(":")
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return int(head.split(maxsplit=2)[1]), body
    except (OSError, TimeoutError, IndexError, ValueError):
        return 0, b""
    finally:
        if writer is not None:
            writer.close()
