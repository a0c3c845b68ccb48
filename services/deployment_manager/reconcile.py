"""The leader's loop: looks at what is registered, takes the next step for each deployment, writes down where it stands.

It starts from what etcd holds, at every change and in every term; nothing it knows exists only here. Each step is one transaction
that holds only if this process still leads and the deployment's record is the one the step was planned for.
"""

from __future__ import annotations

import asyncio
import datetime
import time
import uuid
from collections.abc import Collection, Sequence

from inference_runtime.coordination import Compare, EtcdOutcomeUnknown, EtcdUnavailable, Op, Term, TxnResult, keys
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import common_pb2, deployment_pb2
from services.deployment_manager.catalog import with_status
from services.deployment_manager.rollout import Plan, plan_deployment
from services.deployment_manager.view import View

__all__ = ["Reconciler"]

log = get_logger(__name__)

#: Places and removals of one transaction; etcd takes 128 operations. What is left over follows in the next.
MAX_STEPS = 50
#: Deployments looked at in one turn of the loop.
LOOKS_PER_TURN = 100
#: Pause before a write is tried again while etcd does not answer, seconds.
RETRY_S = 0.2


class Reconciler:
    """Makes the world follow the catalogue, for one term.

    Args:
        view: What is registered; somebody else runs it.
        term: The term; every write is guarded by it.
        settle_s: How long a new leader waits for engines that assignments name and nobody has seen yet.
        engine_gone_s: How long an engine may be missing before its replicas get another place.
    """

    def __init__(self, view: View, term: Term, settle_s: float, engine_gone_s: float) -> None:
        self._view, self._term = view, term
        self._settle_s, self._engine_gone_s = settle_s, engine_gone_s
        #: Deployments that something changed for, and those that are not yet where they should be.
        self._open: set[str] = set()
        self._gone: Collection[str] = ()

    async def run(self) -> None:
        """Reconcile until cancelled.

        Raises:
            StaleLeader: Another process leads by now. Nothing was changed after that.
        """
        await self._settle()
        while True:
            looked_s = time.monotonic()
            try:
                await self._look()
            except EtcdUnavailable as err:
                log.warning("etcd does not take a write; trying again", cause=err.message)
                await asyncio.sleep(RETRY_S)
                continue
            await self._view.changed(self._due_s(looked_s))

    async def _settle(self) -> None:
        """Read first, act after everybody who is expected is back, or after a while."""
        while not self._view.revision:
            await self._view.changed()
        until_s = time.monotonic() + self._settle_s
        while self._view.missing_since and (left_s := until_s - time.monotonic()) > 0:
            await self._view.changed(left_s)

    def _due_s(self, looked_s: float) -> float | None:
        """Seconds until an engine that was missing at the last look, and not yet gone, counts as gone; None without one."""
        ends_s = self._view.gone_at(self._engine_gone_s).values()
        next_s = min((end_s for end_s in ends_s if end_s > looked_s), default=None)
        return None if next_s is None else max(0.0, next_s - time.monotonic())

    async def _look(self) -> None:
        """One step for each deployment that needs one. Those that nothing changed for since they were settled are not looked at:
        with thousands of them a look at all would take longer than changes are apart."""
        self._open |= self._view.take_touched()
        gone = self._view.world(self._engine_gone_s).gone
        if gone != self._gone:
            self._gone = gone
            self._open |= self._view.deployments.keys()
        for count, name in enumerate(sorted(self._open)):
            if count % LOOKS_PER_TURN == LOOKS_PER_TURN - 1:
                await asyncio.sleep(0)  # the lease is kept alive on this loop, too
            record = self._view.deployments.get(name)
            if record is None or await self._follow(name, record):
                self._open.discard(name)
        await self._sweep()

    async def _follow(self, name: str, record: deployment_pb2.Deployment) -> bool:
        """Take the next step for a deployment. Returns whether it is where it should be."""
        plan = plan_deployment(record, self._view.world(self._engine_gone_s))
        now = datetime.datetime.now(datetime.UTC)
        updated = with_status(record, plan.state, plan.reason, plan.ready, now)
        key = keys.deployment(name)
        if plan.forget:
            result = await self._commit(name, [Op.delete(key)])
        elif plan.place or plan.remove:
            # The record is written with every step, changed or not: a step planned on the same record is then refused.
            result = await self._commit(name, [*self._steps(updated, plan), Op.put(key, updated.SerializeToString())])
        elif updated != record:
            result = await self._commit(name, [Op.put(key, updated.SerializeToString())])
        else:
            return plan.state == deployment_pb2.DEPLOYMENT_STATE_SERVING
        if not result.succeeded:  # somebody changed the record; the view is about to say so
            return False
        if plan.place or plan.remove:
            log.info("deployment moved on", deployment=name, placed=len(plan.place), removed=len(plan.remove))
        if updated.status.state != record.status.state:
            state = deployment_pb2.DeploymentState.Name(plan.state).removeprefix("DEPLOYMENT_STATE_").lower()
            log.info("deployment changed state", deployment=name, state=state, reason=plan.reason)
        await self._view.reach(result.revision)
        return False  # looked at once more, after this change

    async def _sweep(self) -> None:
        """Take back assignments whose deployment does not exist."""
        catalogue = self._view.deployments
        stray = [a for a in self._view.world(0).assignments.values() if a.deployment not in catalogue][:MAX_STEPS]
        for assignment in stray:
            key = keys.assignment(assignment.engine_id, assignment.replica_id)
            result = await self._commit(assignment.deployment, [Op.delete(key)])
            if result.succeeded:
                await self._view.reach(result.revision)

    def _steps(self, record: deployment_pb2.Deployment, plan: Plan) -> list[Op]:
        ops = [Op.delete(keys.assignment(assignment.engine_id, assignment.replica_id)) for assignment in plan.remove[:MAX_STEPS]]
        for booking in plan.place[:MAX_STEPS]:
            assignment = common_pb2.Assignment(
                replica_id=f"{record.spec.name.replace('/', '-')}-{uuid.uuid4().hex[:10]}",
                engine_id=booking.engine_id,
                deployment=record.spec.name,
                spec=record.spec,
                generation=record.generation,
                revision=record.revision,
                fencing_token=self._term.token.to_proto(),
                accelerators=booking.accelerators,
            )
            ops.append(Op.put(keys.assignment(assignment.engine_id, assignment.replica_id), assignment.SerializeToString()))
        return ops

    async def _commit(self, name: str, ops: Sequence[Op]) -> TxnResult:
        """Write, if the deployment's record is still the one in the view.

        A write whose answer was lost is sent again as it is until an answer comes: if it took effect, the record has changed and
        the repetition is refused, so it takes effect at most once.
        """
        unchanged = Compare.mod_revision(keys.deployment(name), "==", self._view.mod_revisions.get(name, 0))
        while True:
            try:
                return await self._term.txn(ops, compare=[unchanged])
            except EtcdOutcomeUnknown as err:
                log.warning("etcd did not say whether it took a write; asking again", deployment=name, cause=err.message)
                await asyncio.sleep(RETRY_S)
