"""What one engine found to kill contexts, told to all: a prompt kills two contexts, not two on each engine.

Fingerprints stand in etcd under leases that last as long as a quarantine does. They are digests: nobody learns a prompt from
them. While etcd is away each engine keeps to what it knows, and what it found meanwhile is told afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from inference_runtime.coordination import EtcdClient, EtcdError, keys, watch_prefix
from inference_runtime.coordination.clock import Backoff
from inference_runtime.telemetry import get_logger
from services.engine.quarantine import MAX_FINGERPRINTS, Quarantine

__all__ = ["SharedQuarantine"]

log = get_logger(__name__)


class SharedQuarantine:
    """Keeps an engine's quarantine and etcd's in step.

    Args:
        client: etcd.
        quarantine: Of this engine.
        engine_id: Written beside each fingerprint, for people.
    """

    def __init__(self, client: EtcdClient, quarantine: Quarantine, engine_id: str) -> None:
        self._client, self._quarantine, self._value = client, quarantine, engine_id.encode()
        self._found: deque[bytes] = deque(maxlen=MAX_FINGERPRINTS)
        self._wake = asyncio.Event()
        quarantine.on_found = self._note

    def _note(self, key: bytes) -> None:
        self._found.append(key)
        self._wake.set()

    async def run(self) -> None:
        """Tell and listen until cancelled. Outages of etcd are waited for."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tell())
            tasks.create_task(self._listen())

    async def _tell(self) -> None:
        backoff = Backoff()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._found:
                try:
                    await self._put(self._found[0])
                except EtcdError as err:
                    log.debug("quarantine not told to others yet", reason=err.reason)
                    await asyncio.sleep(backoff.next_s())
                else:
                    backoff.reset()
                    self._found.popleft()

    async def _put(self, key: bytes) -> None:
        left_s = self._quarantine.left_s(key, time.monotonic())
        if left_s:
            lease = await self._client.grant(left_s)
            await self._client.put(keys.quarantined(key.hex()), self._value, lease.lease_id)

    async def _listen(self) -> None:
        async with watch_prefix(self._client, keys.QUARANTINE) as watch:
            async for batch in watch:
                for kv in batch.puts:
                    if (key := _fingerprint(kv.key)) is not None:
                        self._quarantine.learn(key, time.monotonic())
                for name in batch.deletes:  # its time is over, or a person has lifted it
                    if (key := _fingerprint(name)) is not None:
                        self._quarantine.forget(key)


def _fingerprint(key: str) -> bytes | None:
    """The fingerprint that a key names; None for a key that somebody else has put there."""
    try:
        return bytes.fromhex(keys.segments(key, keys.QUARANTINE)[0])
    except (ValueError, IndexError):
        log.warning("no fingerprint", key=key)
        return None
