"""`inferctl acknowledge-store`: says that the etcd that answers is the one to follow from now on."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from inference_runtime.coordination import Compare, EtcdClient, EtcdOutcomeUnknown, Op, StoreRecord, keys
from inference_runtime.errors import BadRequest, ServerError

__all__ = ["Acknowledged", "acknowledge"]


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What is followed from now on, and what it holds."""

    store_id: str
    deployments: int
    assignments: int
    revision: int


async def acknowledge(client: EtcdClient, *, allow_empty: bool = False) -> Acknowledged:
    """Give the store a new id, marked as acknowledged: every process that refuses it follows it within seconds.

    Args:
        client: One that follows whatever answers.
        allow_empty: Also when it holds no deployment.

    Raises:
        BadRequest: It holds no deployment. Acknowledging it ends the service of everything that runs.
        ServerError: Somebody else acknowledged it at the same moment.
    """
    deployments, _ = await client.list(keys.DEPLOYMENTS)
    assignments, revision = await client.list(keys.ASSIGNMENTS)
    if not deployments and not allow_empty:
        raise BadRequest(
            f"etcd at {', '.join(client.endpoints)} holds no deployment: acknowledging it takes every route away."
            " Restore a snapshot first, or say --allow-empty and apply the deployments again."
        )
    stored = await client.get(keys.STORE)
    record = StoreRecord.from_bytes(stored.value) if stored is not None else None
    name = uuid.uuid4().hex
    following = record.acknowledged_as(name) if record is not None else StoreRecord(name, True)
    unchanged = Compare.mod_revision(keys.STORE, "==", stored.mod_revision if stored is not None else 0)
    try:
        written = (await client.txn(compare=[unchanged], success=[Op.put(keys.STORE, following.to_bytes())])).succeeded
    except EtcdOutcomeUnknown:
        now = await client.get(keys.STORE)
        written = now is not None and now.value == following.to_bytes()
    if not written:
        raise ServerError("the store's id changed meanwhile; look whether somebody else acknowledges it, then try again")
    return Acknowledged(name, len(deployments), len(assignments), revision)
