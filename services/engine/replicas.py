"""The replicas of this engine: started and stopped as assigned, found for each submission."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from inference_runtime.deployment import infer_runtime
from inference_runtime.errors import Draining, InferenceError, NoReplica
from inference_runtime.rpc import Drain, Stage
from inference_runtime.runner import Isolation, load_runtime
from inference_runtime.settings import environment
from inference_runtime.supervision import DEFAULT_POLICY, RestartPolicy
from inference_runtime.telemetry import Telemetry, get_logger
from inference_runtime.v1 import common_pb2, engine_service_pb2
from inference_runtime.wire import capabilities_to_proto, spec_from_proto
from services.engine.accelerators import mark_devices, why_broken
from services.engine.core import CoreState, EngineCore
from services.engine.hosting import choose_isolation, process_contexts, thread_contexts
from services.engine.measures import CoreMetrics
from services.engine.probation import TRIALS_S
from services.engine.process_context import HANG_S
from services.engine.quarantine import Quarantine
from services.engine.settings import EngineSettings
from services.engine.spawner import Spawner
from services.engine.stream import Outlet, Stream
from services.engine.submission import submission_from_proto

__all__ = ["Replicas"]

log = get_logger(__name__)

_STATES = {
    CoreState.LOADING: common_pb2.REPLICA_STATE_LOADING,
    CoreState.SERVING: common_pb2.REPLICA_STATE_SERVING,
    CoreState.NOT_READY: common_pb2.REPLICA_STATE_NOT_READY,
    CoreState.RESTARTING: common_pb2.REPLICA_STATE_RESTARTING,
    CoreState.DRAINING: common_pb2.REPLICA_STATE_DRAINING,
    CoreState.FAILED: common_pb2.REPLICA_STATE_FAILED,
}


@dataclass(slots=True)
class _Hosted:
    """One assignment and what became of it. `core` is None when it could not even begin; `fault` then says why."""

    assignment: common_pb2.Assignment
    core: EngineCore | None = None
    fault: str = ""
    task: asyncio.Task[None] | None = None
    #: It was taken back, or is being replaced.
    ending: bool = False


class Replicas:
    """Hosts replicas. `run` owns their tasks; everything else is called on the same event loop.

    Args:
        engine: This engine's record. Its address is set before the first assignment.
        settings: How to drain, and tokeniser threads.
        telemetry: Where metrics go.
        publish: Called with a replica whenever its record changed.
        withdraw: Called with deployment and id once a replica is gone.
        publish_engine: Called when the engine's own record changed.
        policy: When restarts of a context are too many.
        hang_s: Least time without a step after which a context in a process counts as hung, seconds.
        trials_s: Time that finding the cause of a context's death may keep other requests waiting, seconds.
    """

    def __init__(
        self,
        engine: common_pb2.Engine,
        settings: EngineSettings,
        telemetry: Telemetry,
        *,
        publish: Callable[[common_pb2.Replica], None],
        withdraw: Callable[[str, str], None],
        publish_engine: Callable[[], None] = lambda: None,
        policy: RestartPolicy = DEFAULT_POLICY,
        hang_s: float = HANG_S,
        trials_s: float = TRIALS_S,
    ) -> None:
        self.engine = engine
        #: Gateways that may still send requests here because they have not heard that something drains.
        self.callers: Callable[[], int] = lambda: 1
        #: Called with True once the engine drains, with False once it is back in service.
        self.on_draining: list[Callable[[bool], None]] = []
        self._settings = settings
        self._drain = self._new_drain()
        self._ends = False
        self._draining: asyncio.Task[None] | None = None
        self._deferred: dict[str, common_pb2.Assignment] = {}  # assigned while it drained
        self._publish, self._withdraw, self._publish_engine = publish, withdraw, publish_engine
        self._policy, self._hang_s, self._trials_s, self._spawner = policy, hang_s, trials_s, Spawner()
        self._ready_s = settings.ready_s
        self._metrics = CoreMetrics(telemetry)
        self._tokenisers = ThreadPoolExecutor(settings.tokenise_threads, thread_name_prefix="tokenise")
        #: Requests that killed contexts, of whichever replica.
        self.quarantine = Quarantine()
        self._hosted: dict[str, _Hosted] = {}
        self._group: asyncio.TaskGroup | None = None
        self._changed = asyncio.Event()  # set and replaced at each change of a core

    # --- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Host until cancelled. On cancel: every context is closed, requests that still run are cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await asyncio.Event().wait()
        finally:
            self._group = None
            self._spawner.close()
            self._tokenisers.shutdown(wait=False, cancel_futures=True)

    def assign(self, assignment: common_pb2.Assignment) -> None:
        """Host a replica as assigned. The same revision again takes over its bounds; another one replaces the replica."""
        if self.draining:
            log.info("assignment waits: the engine drains", replica=assignment.replica_id)
            self._deferred[assignment.replica_id] = assignment
            return
        known = self._hosted.get(assignment.replica_id)
        if known is None:
            self._start(assignment)
        elif known.assignment.revision == assignment.revision and known.core is not None:
            known.assignment = assignment
            known.core.reconfigure(spec_from_proto(assignment.spec))
            self._publish(self._record(known))
        elif known.assignment != assignment:
            self._stop(known, then=assignment)

    def unassign(self, replica_id: str) -> None:
        """Drain a replica, then stop it. Unknown ones are ignored."""
        self._deferred.pop(replica_id, None)
        hosted = self._hosted.get(replica_id)
        if hosted is not None:
            self._stop(hosted, then=None)

    def assigned(self) -> dict[str, common_pb2.Assignment]:
        """What is hosted, by replica."""
        return {replica_id: hosted.assignment for replica_id, hosted in self._hosted.items()}

    @property
    def draining(self) -> bool:
        """It closes, or has closed. Who has not heard of it is still served for a while."""
        return self._drain.stage is not Stage.OPEN

    @property
    def admits(self) -> bool:
        """Whether it takes requests."""
        return self._drain.admits

    @property
    def requests(self) -> int:
        """Requests that run or wait here."""
        return sum(core.running + core.queued for core in self._cores())

    def start_draining(self) -> None:
        """Say that it will end: in its record, in those of its replicas, and to whoever listens. `drain` does the rest."""
        self._ends = True
        self._announce()

    def _announce(self) -> None:
        if self.draining:
            return
        self._drain.begin(asyncio.get_running_loop().time())
        self._set_state(common_pb2.ENGINE_STATE_DRAINING)
        for core in self._cores():
            core.start_draining()
        for tell in self.on_draining:
            tell(True)

    def _set_state(self, state: common_pb2.EngineState) -> None:
        self.engine.state = state
        self._publish_engine()

    def close(self) -> None:
        """Drain, and stay: what `drain` does, in the background. What is assigned meanwhile waits."""
        self._announce()
        if self._draining is None:
            assert self._group is not None, "run() comes first"
            self._draining = self._group.create_task(self._close(self._drain, self._cores()), name="drain")

    def open(self) -> None:
        """Take requests again after `close`, and host what was assigned meanwhile. An engine that ends stays closed."""
        if self._draining is None or self._ends:
            return
        self._draining.cancel()
        self._draining, self._drain = None, self._new_drain()
        for hosted in self._hosted.values():
            if hosted.core is not None and not hosted.ending:
                hosted.core.stop_draining()
        self._set_state(common_pb2.ENGINE_STATE_READY)
        for tell in self.on_draining:
            tell(False)
        deferred, self._deferred = self._deferred, {}
        for assignment in deferred.values():
            self.assign(assignment)

    async def drain(self) -> None:
        """Let what runs end, and hand over what has not within the drain time-out.

        Requests are taken for as long as the notice lasts; then they are refused, and their gateways send them elsewhere.
        """
        self.start_draining()
        await self._close(self._drain, self._cores())

    def _new_drain(self) -> Drain:
        return Drain(self._settings.drain_timeout_s, self._settings.drain_notice_s)

    def _cores(self) -> list[EngineCore]:
        return [hosted.core for hosted in self._hosted.values() if hosted.core is not None]

    async def _close(self, drain: Drain, cores: Sequence[EngineCore]) -> None:
        """Drain these."""

        def running() -> int:
            return sum(core.running + core.queued for core in cores)

        await drain.until(Stage.CLOSED, running, self.callers)
        for core in cores:
            core.stop_admission()
        await drain.until(Stage.OVER, running, self.callers)
        for core in cores:
            core.hand_over()

    def _start(self, assignment: common_pb2.Assignment) -> None:
        hosted = self._hosted[assignment.replica_id] = _Hosted(assignment)
        assert self._group is not None, "run() comes first"
        try:
            spec, accelerators = spec_from_proto(assignment.spec), tuple(assignment.accelerators)
            runtime = load_runtime(infer_runtime(spec, environment(), []))
            if choose_isolation(spec, accelerators) is Isolation.THREAD:
                contexts = thread_contexts(runtime)
            else:
                contexts = process_contexts(self._spawner, runtime.name, accelerators, hang_s=self._hang_s)
            hosted.core = EngineCore(
                assignment.replica_id,
                spec,
                assignment.revision,
                runtime,
                contexts=contexts,
                policy=self._policy,
                accelerators=accelerators,
                tokenisers=self._tokenisers,
                metrics=self._metrics,
                ready_s=self._ready_s,
                hang_s=self._hang_s,
                trials_s=self._trials_s,
                quarantine=self.quarantine,
                on_change=lambda core: self._note(hosted),
            )
        except InferenceError as err:
            hosted.fault = err.message
            log.error("replica cannot start", replica=assignment.replica_id, deployment=assignment.deployment, reason=err.message)
            self._publish(self._record(hosted))
            return
        log.info("replica starts", replica=assignment.replica_id, deployment=assignment.deployment, revision=assignment.revision)
        self._publish(self._record(hosted))
        hosted.task = self._group.create_task(hosted.core.run(), name=f"replica-{assignment.replica_id}")

    def _stop(self, hosted: _Hosted, then: common_pb2.Assignment | None) -> None:
        if hosted.ending:
            if then is not None:
                log.info("assignment waits for the old replica to drain", replica=then.replica_id)
            hosted.assignment = then or hosted.assignment
            return
        hosted.ending = True
        if hosted.core is not None:
            hosted.core.start_draining()
        assert self._group is not None, "run() comes first"
        self._group.create_task(self._end(hosted, then), name=f"stop-{hosted.assignment.replica_id}")

    async def _end(self, hosted: _Hosted, then: common_pb2.Assignment | None) -> None:
        before = hosted.assignment
        if hosted.core is not None:
            await self._close(self._new_drain(), [hosted.core])
        if hosted.task is not None:
            hosted.task.cancel()
            await asyncio.wait([hosted.task])
        replica_id = before.replica_id
        del self._hosted[replica_id]
        log.info("replica stopped", replica=replica_id, deployment=before.deployment)
        self._withdraw(before.deployment, replica_id)
        if hosted.assignment is not before:
            then = hosted.assignment
        if then is not None:
            self.assign(then)

    def _note(self, hosted: _Hosted) -> None:
        """A core changed: publish it, and wake whoever waits for a state. A device that ended it takes nothing any more."""
        core, devices = hosted.core, hosted.assignment.accelerators
        why = why_broken(core.last_fault) if core is not None and core.last_fault is not None else ""
        if why and mark_devices(self.engine, devices, why):
            log.error("accelerators are broken", accelerators=list(devices), reason=why)
            self._publish_engine()
        self._publish(self._record(hosted))
        self._changed.set()
        self._changed = asyncio.Event()

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, proto: engine_service_pb2.Submission, outlet: Outlet) -> Stream:
        """Admit a generation on the replica it names, or on the least busy one of its deployment.

        Raises:
            InferenceError: A typed refusal: see EngineCore.submit.
        """
        if not self.admits:
            raise Draining("the engine drains; send the request to another one")
        return self._find(proto).submit(submission_from_proto(proto), outlet)

    def _find(self, proto: engine_service_pb2.Submission) -> EngineCore:
        deployment = proto.request.deployment
        if proto.replica_id:
            hosted = self._hosted.get(proto.replica_id)
            if hosted is not None and hosted.core is not None and hosted.assignment.deployment == deployment:
                return hosted.core
            raise NoReplica(f"this engine does not host replica {proto.replica_id!r} of deployment {deployment!r}")
        cores = [h.core for h in self._hosted.values() if h.core is not None and h.assignment.deployment == deployment]
        serving = [c for c in cores if c.state is CoreState.SERVING] or cores
        if not serving:
            raise NoReplica(f"this engine hosts no replica of deployment {deployment!r}")
        return min(serving, key=lambda core: core.running + core.queued)

    async def rebuild(self, replica_id: str) -> int:
        """Replace a replica's context, and wait until the new one serves. Returns its generation.

        Raises:
            NoReplica: It is not hosted here, or failed meanwhile.
        """
        hosted = self._hosted.get(replica_id)
        core = hosted.core if hosted is not None else None
        up = (CoreState.SERVING, CoreState.NOT_READY)  # a context that is silent is what an operator wants to replace
        if core is None or core.state not in (*up, CoreState.RESTARTING):
            raise NoReplica(f"replica {replica_id!r} does not serve on this engine")
        before = core.context_generation if core.state in up else core.context_generation - 1
        core.rebuild()
        while core.state is CoreState.RESTARTING or (core.state in up and core.context_generation <= before):
            await self._changed.wait()
        if core.state is not CoreState.SERVING:
            raise NoReplica(f"replica {replica_id!r} could not be rebuilt: {core.reason or 'it drains'}")
        return core.context_generation

    def reset(self, replica_id: str) -> None:
        """Arm a replica again that gave up: its faults are forgotten and a new context is started. Others are left as they are.

        Raises:
            NoReplica: It is not hosted here.
        """
        hosted = self._hosted.get(replica_id)
        if hosted is None or self.draining:
            raise NoReplica(f"this engine does not host replica {replica_id!r}, or it drains")
        if hosted.core is None:  # it could not even begin
            self._start(hosted.assignment)
        elif hosted.core.state is CoreState.FAILED:
            assert self._group is not None, "run() comes first"
            log.info("replica is reset", replica=replica_id, deployment=hosted.assignment.deployment)
            if mark_devices(self.engine, hosted.assignment.accelerators, ""):  # the operator says so
                self._publish_engine()
            hosted.core.reset()
            hosted.task = self._group.create_task(self._run_again(hosted.core, hosted.task), name=f"replica-{replica_id}")

    async def _run_again(self, core: EngineCore, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        await core.run()

    # --- facts -------------------------------------------------------------------------------------------------------

    def describe(self) -> list[common_pb2.Replica]:
        """The record of each replica."""
        return [self._record(hosted) for hosted in self._hosted.values()]

    def loads(self) -> list[common_pb2.ReplicaLoad]:
        """How busy each replica is. Also sets the gauges."""
        loads = []
        for replica_id, hosted in self._hosted.items():
            core = hosted.core
            if core is None:
                continue
            name = core.spec.name
            self._metrics.running.set(core.running, name, replica_id)
            self._metrics.queued.set(core.queued, name, replica_id)
            self._metrics.kv_use.set(core.kv_use, name, replica_id)
            loads.append(
                common_pb2.ReplicaLoad(
                    replica_id=replica_id,
                    running=core.running,
                    queued=core.queued,
                    pending_tokens=core.pending_tokens(),
                    kv_use=core.kv_use,
                )
            )
        return loads

    def _record(self, hosted: _Hosted) -> common_pb2.Replica:
        assignment, core = hosted.assignment, hosted.core
        record = common_pb2.Replica(
            id=assignment.replica_id,
            deployment=assignment.deployment,
            engine_id=self.engine.id,
            address=self.engine.address,
            generation=assignment.generation,
            revision=assignment.revision,
            state=common_pb2.REPLICA_STATE_FAILED,
            reason=hosted.fault,
        )
        if core is not None:
            record.state = _STATES[core.state]
            record.reason = core.reason
            record.revision = core.revision
            record.runtime = core.runtime.name
            record.max_concurrent = core.max_concurrent
            record.queue_capacity = core.spec.serving.queue_capacity
            record.restarts = core.restarts
            if core.info is not None:
                record.capabilities.CopyFrom(capabilities_to_proto(core.info.capabilities))
                record.max_context_tokens = core.info.max_context_tokens
        return record
