"""A prompt that kills contexts is found once and refused by every engine (PP-1, R-09), with a real etcd."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.errors import Quarantined
from inference_runtime.testing.etcd import EtcdProcess
from services.engine.quarantine import QUARANTINE_S, Quarantine
from services.engine.shared_quarantine import SharedQuarantine
from tests.integration.engine.kit import assignment, running_engine, session, submission, until
from tests.integration.engine.test_session import check_exact

KEY = b"\x01" * 32


@pytest.fixture
def etcd() -> Iterator[EtcdProcess]:
    """An etcd that the test may stop."""
    with EtcdProcess(fsync=False) as process:
        yield process


@asynccontextmanager
async def shared(etcd: EtcdProcess, quarantine: Quarantine) -> AsyncIterator[EtcdClient]:
    """A quarantine in step with etcd's."""
    async with EtcdClient([etcd.endpoint]) as client:
        running = asyncio.ensure_future(SharedQuarantine(client, quarantine, "engine-1").run())
        try:
            yield client
        finally:
            running.cancel()
            await asyncio.wait([running])


def refused(quarantine: Quarantine) -> bool:
    """Whether it knows the key."""
    return quarantine.left_s(KEY, time.monotonic()) > 0


async def test_what_killed_contexts_here_is_refused_there_without_a_death(etcd: EtcdProcess) -> None:
    """R-09: the second engine loses nothing to it, and answers others."""
    poison = {"pace_s": 0.002, "poison_on": "divide by zero"}
    async with running_engine() as one, running_engine() as two:
        async with shared(etcd, one.replicas.quarantine), shared(etcd, two.replicas.quarantine):
            for engine in (one, two):
                await engine.host(assignment("pill", poison))
            async with session(one) as first, session(two) as second:
                await first.send(submission(1, "pill", "please divide by zero"))
                assert isinstance((await first.answer(1)).error, Quarantined)
                await until(lambda: len(two.replicas.quarantine) == 1, "the other engine knows")
                await second.send(submission(1, "pill", "please divide by zero"), submission(2, "pill"))
                assert isinstance((await second.answer(1)).error, Quarantined)
                check_exact(await second.answer(2), "hello", 10)
            assert (one.replica("pill-0").restarts, two.replica("pill-0").restarts) == (2, 0)


async def test_a_quarantine_ends_with_its_lease_and_when_a_person_lifts_it(etcd: EtcdProcess) -> None:
    """Leases last as long as quarantines do; nothing stays in etcd for ever."""
    mine, theirs = Quarantine(), Quarantine()
    async with shared(etcd, mine), shared(etcd, theirs) as client:
        mine.add(KEY, time.monotonic())
        await until(lambda: refused(theirs), "the other one knows")
        (kv,), _ = await client.list(keys.QUARANTINE)
        left_s = await client.time_to_live(kv.lease_id)
        assert left_s is not None
        assert QUARANTINE_S - 60 < left_s <= QUARANTINE_S
        assert kv.value == b"engine-1"
        await client.delete(kv.key)
        await until(lambda: not refused(mine) and not refused(theirs), "it is lifted everywhere")


async def test_what_is_found_while_etcd_is_away_is_told_afterwards(etcd: EtcdProcess) -> None:
    """An outage costs no request: what is known here is refused here, at once."""
    mine, theirs = Quarantine(), Quarantine()
    async with shared(etcd, mine), shared(etcd, theirs):
        etcd.stop()
        mine.add(KEY, time.monotonic())
        assert refused(mine)
        etcd.start()
        await until(lambda: refused(theirs), "the other one knows")


async def test_keys_that_are_no_fingerprints_are_passed_over(etcd: EtcdProcess) -> None:
    """Somebody else's mistake in etcd stops nobody."""
    mine = Quarantine()
    async with shared(etcd, mine) as client:
        await client.put(keys.quarantined("nonsense"), b"")
        await client.put(keys.quarantined(KEY.hex()), b"")
        await until(lambda: refused(mine), "the one that is a fingerprint")
        assert len(mine) == 1
