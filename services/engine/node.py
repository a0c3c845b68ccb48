"""The engine's side of the control plane: registered under a lease, told what to host, reporting how busy it is.

Nothing here stands in the way of a request. While etcd or the coordinator is away, replicas keep running on what was last known,
and what changed meanwhile is told once they are back.
"""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import time
from collections.abc import Iterable, Sequence

import grpc
from google.protobuf import timestamp_pb2
from google.protobuf.message import DecodeError

from inference_runtime.coordination import keys
from inference_runtime.coordination.election import LeaderObserver
from inference_runtime.coordination.etcd import EtcdClient
from inference_runtime.coordination.kv import KeyValue
from inference_runtime.coordination.registry import Registration
from inference_runtime.coordination.watch import WatchBatch, watch_prefix
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.runner import installed_runtimes
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import common_pb2, coordinator_service_pb2, coordinator_service_pb2_grpc
from services.engine.replicas import Replicas
from services.engine.settings import EngineSettings

__all__ = ["FencedAssignments", "LoadReporter", "Node", "engine_record"]

log = get_logger(__name__)

#: Time that etcd gets to take the first records before the engine is open without that, seconds.
SETTLE_S = 1.0
#: Deadline of one load report, seconds. It is out of date after that.
REPORT_TIMEOUT_S = 1.0

_ROLES = {
    "control": common_pb2.NODE_ROLE_CONTROL,
    "gpu": common_pb2.NODE_ROLE_GPU,
    "egress": common_pb2.NODE_ROLE_EGRESS,
    "edge": common_pb2.NODE_ROLE_EDGE,
}


def engine_record(settings: EngineSettings, accelerators: Sequence[common_pb2.Accelerator] = ()) -> common_pb2.Engine:
    """This engine as it registers itself, with the devices that it offers. The address follows once it is bound."""
    boot_id = secrets.token_hex(8)
    for device in accelerators:
        if device.index < len(settings.node.islands):
            device.island = settings.node.islands[device.index]
    return common_pb2.Engine(
        id=settings.engine_id or f"engine-{boot_id[:8]}",
        boot_id=boot_id,
        node=common_pb2.Node(
            hostname=platform.node(),
            roles=[_ROLES[role] for role in settings.node.roles],
            cpu_cores=os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            accelerators=accelerators,
            labels=settings.node.labels,
            taints=settings.node.taints,
        ),
        runtimes=installed_runtimes(),
        state=common_pb2.ENGINE_STATE_READY,
        pid=os.getpid(),
        started_at=timestamp_pb2.Timestamp(seconds=int(time.time())),
    )


class FencedAssignments:
    """Decides which assignments to follow. A leader that was replaced and does not know it writes with a lower token: refused.

    What a listing shows was accepted by etcd under a guard and is followed whatever its term; a change that arrives later must
    not come from a term before the highest one seen. Terms of different etcd clusters cannot be compared, and a new cluster
    starts anew.
    """

    def __init__(self) -> None:
        self._cluster_id = 0
        self._highest = 0

    def accept(self, assignment: common_pb2.Assignment, *, listed: bool) -> bool:
        """Whether to follow it."""
        token = assignment.fencing_token
        if token.cluster_id != self._cluster_id:
            self._cluster_id, self._highest = token.cluster_id, token.revision
            return True
        if token.revision < self._highest and not listed:
            log.warning(
                "assignment of a replaced leader ignored",
                replica=assignment.replica_id,
                revision=token.revision,
                highest=self._highest,
            )
            return False
        self._highest = max(self._highest, token.revision)
        return True


class Node:
    """Registers the engine and its replicas, and follows its assignments.

    Args:
        client: etcd.
        records: Keeps leased records, and puts them back after a lost lease.
        engine: The engine's record.
    """

    def __init__(self, client: EtcdClient, records: Registration, engine: common_pb2.Engine) -> None:
        self._client, self._records, self.engine = client, records, engine
        self._fence = FencedAssignments()
        self._dirty: dict[str, bytes | None] = {}  # key -> record, None to remove; the latest wins
        self._wake = asyncio.Event()
        #: Set once the assignments of this engine were read and its records say what it hosts. Until then nobody can be answered:
        #: gateways may still have it in their routes from an earlier life.
        self.caught_up = asyncio.Event()

    # --- records: called by Replicas ---------------------------------------------------------------------------------

    def publish(self, replica: common_pb2.Replica) -> None:
        """Note a replica's record for writing."""
        self._note(keys.replica(replica.deployment, replica.id), replica.SerializeToString())

    def withdraw(self, deployment: str, replica_id: str) -> None:
        """Note a replica's record for removal."""
        self._note(keys.replica(deployment, replica_id), None)

    def set_state(self, state: common_pb2.EngineState) -> None:
        """Change the engine's own record."""
        self.engine.state = state
        self.publish_engine()

    def publish_engine(self) -> None:
        """Note the engine's own record for writing, as it is now."""
        self._note(keys.engine(self.engine.id), self.engine.SerializeToString())

    def _note(self, key: str, value: bytes | None) -> None:
        self._dirty[key] = value
        self._wake.set()

    async def write_records(self) -> None:
        """Hand noted records to the registration, which keeps them in etcd through every outage. Runs until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.flush()

    async def flush(self) -> None:
        """Hand over what is noted now."""
        while self._dirty:
            key = next(iter(self._dirty))
            value = self._dirty.pop(key)
            if value is None:
                await self._records.remove(key)
            else:
                await self._records.set(key, value)

    async def settled(self, timeout_s: float) -> bool:
        """Wait until etcd holds what was noted so far; False when it does not after `timeout_s`."""
        await self.flush()
        return await self._records.flush(timeout_s)

    # --- assignments -------------------------------------------------------------------------------------------------

    async def follow_assignments(self, replicas: Replicas) -> None:
        """Start and stop replicas as assigned, until cancelled. Outages of etcd change nothing."""
        async with watch_prefix(self._client, keys.assignments_of(self.engine.id)) as watch:
            async for batch in watch:
                self.apply(batch, replicas)
                if not self.caught_up.is_set():
                    await self.settled(SETTLE_S)
                    self.caught_up.set()

    def apply(self, batch: WatchBatch, replicas: Replicas) -> None:
        """Follow one batch of changes.

        Only a deletion stops a replica. A listing that lacks it comes from an etcd that was replaced, or restored from an older
        state: that somebody lost the data is no order to stop serving.
        """
        listed = dict(self._parse(batch.puts))
        if batch.snapshot and (lacking := replicas.assigned().keys() - listed.keys()):
            log.warning("replicas kept that etcd does not know any more", replicas=", ".join(sorted(lacking)))
        for key in batch.deletes:
            replicas.unassign(keys.segments(key, keys.assignments_of(self.engine.id))[0])
        for assignment in listed.values():
            if self._fence.accept(assignment, listed=batch.snapshot):
                replicas.assign(assignment)

    def _parse(self, puts: list[KeyValue]) -> Iterable[tuple[str, common_pb2.Assignment]]:
        for kv in puts:
            try:
                assignment = common_pb2.Assignment.FromString(kv.value)
            except DecodeError:
                log.error("assignment is not readable", key=kv.key)
                continue
            yield assignment.replica_id, assignment


class LoadReporter:
    """Tells the coordinator's leader how busy the replicas are.

    Args:
        replicas: What is hosted.
        leaders: Who leads the coordinator role.
        interval_s: Between two reports while load changes.
        refresh_s: Between two reports while it does not.
    """

    def __init__(self, replicas: Replicas, leaders: LeaderObserver, interval_s: float, refresh_s: float) -> None:
        self._replicas, self._leaders = replicas, leaders
        self._interval_s, self._refresh_s = interval_s, refresh_s

    async def run(self) -> None:
        """Report until cancelled. A coordinator that does not answer is tried again at the next turn."""
        address, channel = "", None
        sent: list[common_pb2.ReplicaLoad] = []
        sent_at = 0.0
        try:
            while True:
                await asyncio.sleep(self._interval_s)
                loads = self._replicas.loads()
                leader = self._leaders.current
                if leader is None:
                    continue
                if leader.address != address:
                    if channel is not None:
                        await channel.close(None)
                    address, channel, sent = leader.address, open_channel(leader.address), []
                now = time.monotonic()
                if loads == sent and now - sent_at < self._refresh_s:
                    continue
                assert channel is not None
                if await self._report(channel, loads):
                    sent, sent_at = loads, now
        finally:
            if channel is not None:
                await channel.close(None)

    async def _report(self, channel: grpc.aio.Channel, loads: list[common_pb2.ReplicaLoad]) -> bool:
        stub = coordinator_service_pb2_grpc.CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
        request = coordinator_service_pb2.ReportLoadRequest(engine_id=self._replicas.engine.id, loads=loads)
        try:
            await stub.ReportLoad(request, timeout=REPORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as err:
            log.debug("load not reported", reason=error_from_rpc(err).reason)
            return False
        return True
