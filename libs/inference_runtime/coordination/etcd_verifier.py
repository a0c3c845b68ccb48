"""Asks etcd which store it is, and stands between a client and a store that is not followed. `identity` has the rule."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from inference_runtime.coordination import keys
from inference_runtime.coordination.errors import EtcdDenied, EtcdOutcomeUnknown, EtcdUnavailable, StoreReplaced
from inference_runtime.coordination.etcd_api import rpc_pb2
from inference_runtime.coordination.etcd_codec import compare_proto, op_proto
from inference_runtime.coordination.identity import ACKNOWLEDGE, StoreGuard, StoreRecord
from inference_runtime.coordination.kv import Compare, Op
from inference_runtime.telemetry import get_logger

if TYPE_CHECKING:
    from inference_runtime.coordination.etcd import EtcdClient

__all__ = ["Verifier"]

log = get_logger(__name__)


class Verifier:
    """The guard of one client, with the calls that it needs.

    Args:
        client: Makes the calls.
        guard: Decides.
        on_store: Called with `guard.refusal` when that has changed.
    """

    def __init__(self, client: EtcdClient, guard: StoreGuard, on_store: Callable[[str], None]) -> None:
        self._client, self.guard, self._on_store = client, guard, on_store
        self._met = False

    async def admit(self) -> None:
        """Lets a call through when the store is known to be the followed one; else looks first, so that an acknowledgement is
        seen by whoever asks next.

        Raises: as `verify`.
        """
        if self.guard.refusal or not self._met:
            await self.verify()

    async def check(self, cluster_id: int, revision: int, before: tuple[int, int], *, written: bool) -> None:
        """Never lets an answer through that cannot be of the followed store.

        Args:
            cluster_id: The answer's.
            revision: The answer's.
            before: `guard.era` and `guard.revision` as they were before the call was sent.
            written: The call may have changed something.

        Raises:
            StoreReplaced: It is of another store.
            EtcdOutcomeUnknown: It is, and the call was a write: that store may hold it now.
            EtcdUnavailable: It was, and an operator has acknowledged that store meanwhile: ask again.
        """
        era, floor = before
        if self.guard.era != era or self.guard.plausible(cluster_id, revision, floor):
            return
        try:
            await self.verify()
        except EtcdUnavailable as err:
            if not written:
                raise
            raise EtcdOutcomeUnknown(f"A write may have reached a store that is not followed. {err.message}") from err
        raise (EtcdOutcomeUnknown if written else EtcdUnavailable)("etcd is not the store it was a moment ago; ask again.")

    async def verify(self) -> None:
        """Reads which store this is; gives a store without an id one, when nothing was followed before.

        Raises:
            StoreReplaced: It is not the followed one.
            EtcdUnavailable: Nobody said.
        """
        guard = self.guard
        era, floor = guard.era, guard.revision
        try:
            record, cluster_id, revision = await self._read()
            if record is None and guard.mark is None and not guard.revision:
                await self._christen()
                record, cluster_id, revision = await self._read()
        except EtcdDenied as err:  # an etcd user without rights to this key: cluster id and revision have to do
            log.debug("the store's id may not be read", cause=err.message)
            self._met = True
            return
        if guard.era != era:
            return  # a call beside this one was faster
        self._met = True
        known, refused = guard.mark, guard.refusal
        followed = guard.judge(record, cluster_id, revision, floor)
        if bool(guard.refusal) != bool(refused):
            self._on_store(guard.refusal)
        if followed:
            self._say(refused, acknowledged=known is not None and guard.era != era)
            return
        if not refused:
            log.error(
                "etcd is not the store that was followed; it is neither read nor written until it is acknowledged",
                why=guard.refusal,
                command=ACKNOWLEDGE,
                etcd=", ".join(self._client.endpoints),
            )
        raise StoreReplaced(
            f"etcd at {', '.join(self._client.endpoints)} is not the store that was followed: {guard.refusal}."
            f" Bring that one back, or run `{ACKNOWLEDGE}` to follow this one."
        )

    def _say(self, refused: str, *, acknowledged: bool) -> None:
        if acknowledged and self.guard.mark is not None:
            log.warning("store acknowledged; following it from now on", store=self.guard.mark.store_id)
        elif refused:
            log.warning("the store that was followed is back", refused=refused)

    async def _read(self) -> tuple[StoreRecord | None, int, int]:
        """The record, and cluster id and revision of the answer."""
        request = rpc_pb2.RangeRequest(key=keys.STORE.encode())
        response: Any = await self._client._ask_unguarded(request)
        record = StoreRecord.from_bytes(response.kvs[0].value) if response.kvs else None
        return record, response.header.cluster_id, response.header.revision

    async def _christen(self) -> None:
        """Writes a record unless there is one. Of many processes that do so at once, the first succeeds."""
        record = StoreRecord(uuid.uuid4().hex)
        request = rpc_pb2.TxnRequest(
            compare=[compare_proto(Compare.create_revision(keys.STORE, "==", 0))],
            success=[op_proto(Op.put(keys.STORE, record.to_bytes()))],
        )
        await self._client._ask_unguarded(request)
