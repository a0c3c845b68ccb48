"""Shows this gateway to the others in etcd, and follows who is there. Nothing on a request's path waits for it."""

from __future__ import annotations

import asyncio

from google.protobuf.message import DecodeError

from inference_runtime.coordination import EtcdClient, EtcdError, Registration, keys, watch_prefix
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import gateway_peer_service_pb2
from services.gateway.peers import PeerTable

__all__ = ["PeerRegistry"]

log = get_logger(__name__)


class PeerRegistry:
    """One gateway's place in etcd.

    Args:
        etcd: Connected; not closed here.
        table: Of the others.
        ttl_s: Time to live of the lease, seconds.
    """

    def __init__(self, etcd: EtcdClient, table: PeerTable, ttl_s: float) -> None:
        self._etcd, self._table, self._ttl_s = etcd, table, ttl_s
        self._bound = asyncio.Event()
        table.complete = False

    def bound(self, address: str) -> None:
        """This gateway can be reached here from now on."""
        self._table.own.address = address
        self._bound.set()

    async def run(self) -> None:
        """Stay registered and follow the others, until cancelled; then the registration goes.

        Where etcd does not allow it, this gateway stays alone: clients can come back to it, but not to another one.
        """
        await self._bound.wait()
        own = self._table.own
        registration = Registration(self._etcd, ttl_s=self._ttl_s)
        await registration.set(keys.gateway(own.id), own.SerializeToString())
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(registration.run(), name="gateway registration")
                await self._follow()
        except* EtcdError as errors:
            self._table.complete = True  # as far as it ever will be
            log.error("other gateways are not known: etcd refuses to list them", cause=str(errors.exceptions[0]))

    async def _follow(self) -> None:
        seen: dict[str, gateway_peer_service_pb2.Gateway] = {}
        async with watch_prefix(self._etcd, keys.GATEWAYS) as watch:
            async for batch in watch:
                if batch.snapshot:
                    seen.clear()
                for key in batch.deletes:
                    seen.pop(key, None)
                for kv in batch.puts:
                    try:
                        seen[kv.key] = gateway_peer_service_pb2.Gateway.FromString(kv.value)
                    except DecodeError as err:
                        log.error("record is not readable", key=kv.key, exc_info=err)
                self._table.apply(seen.values())
