"""The catalogue: what was asked for, one record for each deployment.

The rules are pure functions. `Catalog` keeps the records in etcd and nowhere else, so that they survive every leader: each write
is guarded by the leader's term and by the revision of the record it replaces.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

from google.protobuf import json_format, timestamp_pb2

from inference_runtime.coordination import Compare, EtcdClient, EtcdOutcomeUnknown, KeyValue, Op, Term, keys
from inference_runtime.deployment import infer_runtime, revision_of
from inference_runtime.errors import BadRequest, DeploymentNotFound, ServerError, Unsupported
from inference_runtime.runner import RunnerConfig, load_runtime
from inference_runtime.v1 import deployment_pb2
from inference_runtime.wire import spec_from_proto, spec_to_proto

__all__ = ["Catalog", "accept", "check_options", "mark_deleting", "with_status"]

#: Attempts at a write that others race with. Each loss means that somebody else got on, so more than a few is not a race.
MAX_RACES = 8


def accept(
    asked: deployment_pb2.DeploymentSpec,
    before: deployment_pb2.Deployment | None,
    environment: Mapping[str, str],
    registered: Sequence[str],
    now: datetime.datetime,
) -> tuple[deployment_pb2.Deployment, bool]:
    """The record that a specification makes, and whether it changes anything.

    Asking again for a deployment that is being deleted brings it back.

    Args:
        asked: The specification as it came in; defaults are filled in here.
        before: The record so far.
        environment: Where credentials of providers are looked for, to infer the runtime.
        registered: Names of installed runtimes, to infer the runtime.
        now: The present, for `created_at` and `changed_at`.

    Raises:
        BadRequest: The specification is wrong; `param` names the field.
    """
    try:
        spec = spec_from_proto(asked)
    except (json_format.Error, ValueError) as err:  # a Struct holds NaN and infinity, JSON does not
        raise BadRequest(f"deployment {asked.name!r}: runtime_config is not JSON: {err}", param="runtime_config") from err
    runtime = infer_runtime(spec, environment, list(registered))
    proto = spec_to_proto(spec)
    if before is not None and before.spec == proto and before.runtime == runtime and not before.deleting:
        return before, False
    record = deployment_pb2.Deployment(
        spec=proto,
        generation=before.generation + 1 if before is not None else 1,
        runtime=runtime,
        revision=revision_of(spec, runtime),
        created_at=before.created_at if before is not None else _timestamp(now),
    )
    # The status keeps speaking of the generation that it observed; only a new deployment starts from nothing.
    if before is not None and not before.deleting:
        record.status.CopyFrom(before.status)
        return record, True
    return with_status(record, deployment_pb2.DEPLOYMENT_STATE_PENDING, "not yet placed", 0, now, observed=0), True


def check_options(record: deployment_pb2.Deployment) -> None:
    """Refuse a `runtime_config` that the runtime does not know, where the runtime is installed beside this process too.

    What else may be wrong (a checkpoint that is not here) is for the engine that loads it to judge.

    Raises:
        BadRequest: with `param` = "runtime_config.<key>".
    """
    spec = spec_from_proto(record.spec)
    try:
        load_runtime(record.runtime).validate(RunnerConfig(spec.model, spec.runtime_config))
    except BadRequest as err:
        if (err.param or "").startswith("runtime_config"):
            raise
    except Unsupported:
        return


def mark_deleting(before: deployment_pb2.Deployment, now: datetime.datetime) -> deployment_pb2.Deployment:
    """The record of a deployment that is on its way out."""
    record = deployment_pb2.Deployment()
    record.CopyFrom(before)
    record.deleting = True
    return with_status(record, deployment_pb2.DEPLOYMENT_STATE_DRAINING, "being deleted", 0, now)


def with_status(
    before: deployment_pb2.Deployment,
    state: deployment_pb2.DeploymentState,
    reason: str,
    ready: int,
    now: datetime.datetime,
    observed: int | None = None,
) -> deployment_pb2.Deployment:
    """The record with another status. `changed_at` moves when the state does.

    Args:
        observed: The generation that the status speaks of; None for the record's own.
    """
    record = deployment_pb2.Deployment()
    record.CopyFrom(before)
    changed_at = before.status.changed_at if before.status.state == state else _timestamp(now)
    record.status.CopyFrom(
        deployment_pb2.DeploymentStatus(
            state=state,
            reason=reason,
            observed_generation=before.generation if observed is None else observed,
            ready_replicas=ready,
            changed_at=changed_at,
        )
    )
    return record


def _timestamp(now: datetime.datetime) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(now)
    return stamp


class Catalog:
    """The records in etcd, under one leader's term.

    Args:
        client: etcd.
        term: The term; every write is guarded by it.
    """

    def __init__(self, client: EtcdClient, term: Term) -> None:
        self._client, self._term = client, term

    async def get(self, name: str) -> deployment_pb2.Deployment:
        """One record.

        Raises:
            DeploymentNotFound: There is none.
        """
        stored = await self._read(name)
        if stored is None:
            raise _not_found(name)
        return _parse(stored)

    async def list(self) -> list[deployment_pb2.Deployment]:
        """All records, by name."""
        stored, _ = await self._client.list(keys.DEPLOYMENTS)
        return sorted((_parse(kv) for kv in stored), key=lambda record: record.spec.name)

    async def apply(
        self,
        asked: deployment_pb2.DeploymentSpec,
        environment: Mapping[str, str],
        registered: Sequence[str],
        *,
        dry_run: bool,
        expected_generation: int = 0,
    ) -> tuple[deployment_pb2.Deployment, bool]:
        """Store what is asked for. Returns the record and whether it changed. Asking twice is safe, also after a cancel.

        Args:
            asked: The specification.
            environment: Where credentials of providers are looked for, to infer the runtime.
            registered: Names of installed runtimes, to infer the runtime.
            dry_run: Check, and store nothing.
            expected_generation: Change it only while the record is of this generation; 0 for whatever it is.

        Raises:
            BadRequest: The specification is wrong, or the generation is another one; `param` names the field.
            StaleLeader: Another process leads by now. Nothing was changed.
        """
        sent: deployment_pb2.Deployment | None = None
        for _ in range(MAX_RACES):
            stored = await self._read(asked.name)
            before = _parse(stored) if stored is not None else None
            record, changed = accept(asked, before, environment, registered, _now())
            if not changed:
                return record, sent is not None and sent.generation == record.generation
            generation = before.generation if before is not None else 0
            if expected_generation and generation != expected_generation:
                raise BadRequest(
                    f"deployment {asked.name!r} is of generation {generation}, not {expected_generation}: somebody changed it"
                    " meanwhile; look at it, then ask again",
                    param="expected_generation",
                )
            check_options(record)
            if dry_run or await self._write(record, stored):
                return record, True
            sent = record
        raise _raced(asked.name)

    async def delete(self, name: str) -> None:
        """Mark a deployment as being deleted. The reconciler drains and removes it.

        Raises:
            DeploymentNotFound: There is none.
            StaleLeader: Another process leads by now. Nothing was changed.
        """
        for _ in range(MAX_RACES):
            stored = await self._read(name)
            if stored is None:
                raise _not_found(name)
            before = _parse(stored)
            if before.deleting or await self._write(mark_deleting(before, _now()), stored):
                return
        raise _raced(name)

    async def _read(self, name: str) -> KeyValue | None:
        return await self._client.get(keys.deployment(name)) if name else None

    async def _write(self, record: deployment_pb2.Deployment, stored: KeyValue | None) -> bool:
        """Replace `stored`. False when somebody was faster, or when nobody knows: the caller reads again either way."""
        key = keys.deployment(record.spec.name)
        unchanged = Compare.mod_revision(key, "==", stored.mod_revision if stored is not None else 0)
        try:
            result = await self._term.txn([Op.put(key, record.SerializeToString())], compare=[unchanged])
        except EtcdOutcomeUnknown:
            return False
        return result.succeeded


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _parse(stored: KeyValue) -> deployment_pb2.Deployment:
    return deployment_pb2.Deployment.FromString(stored.value)


def _not_found(name: str) -> DeploymentNotFound:
    return DeploymentNotFound(f"no deployment is called {name!r}; list them to see which there are", deployment=name)


def _raced(name: str) -> ServerError:
    return ServerError(f"deployment {name!r} is being changed by others all the time; try again", retry_after_s=1.0)
