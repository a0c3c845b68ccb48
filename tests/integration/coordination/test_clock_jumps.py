"""C-01, C-02: clocks jump under a leader. The jump is made in the clock that Python reads; etcd's own goes on."""

from __future__ import annotations

import asyncio
import sys
import time
import types
from collections.abc import Callable

import pytest

from inference_runtime.coordination import Candidate, Election, EtcdClient, Lease, Op, Registration, Term
from inference_runtime.coordination.clock import boottime
from inference_runtime.errors import StaleLeader
from tests.integration.coordination.conftest import Eventually

Jump = Callable[[float], None]
BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Leaves gRPC the kernel's clocks: it converts `time.time()` to them at once, so with one end changed every deadline would be
    wrong, which no jump of a real clock does."""
    real = types.ModuleType("time")
    real.__dict__.update(time.__dict__)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "grpc" and getattr(module, "time", None) is time:
            monkeypatch.setattr(module, "time", real)
    return monkeypatch


@pytest.fixture
def suspend(patch: pytest.MonkeyPatch) -> Jump:
    """As after a suspend: boot time and wall clock are ahead, the monotonic clock, and with it every timer, is not."""
    off = [0.0]
    gettime, wall = time.clock_gettime, time.time
    patch.setattr(time, "clock_gettime", lambda clock: gettime(clock) + (off[0] if clock == BOOTTIME else 0.0))
    patch.setattr(time, "time", lambda: wall() + off[0])

    def jump(seconds: float) -> None:
        before = boottime(), time.monotonic()
        off[0] += seconds
        assert boottime() - before[0] >= seconds, "the clock did not jump"
        assert time.monotonic() - before[1] < 1

    return jump


@pytest.fixture
def wall_clock(patch: pytest.MonkeyPatch) -> Jump:
    off = [0.0]
    wall = time.time
    patch.setattr(time, "time", lambda: wall() + off[0])

    def jump(seconds: float) -> None:
        off[0] += seconds

    return jump


class Office:
    """Counts terms, and tells when each begins."""

    def __init__(self) -> None:
        self.terms: asyncio.Queue[Term] = asyncio.Queue()
        self.left = asyncio.Event()

    async def lead(self, term: Term) -> None:
        self.left.clear()
        self.terms.put_nowait(term)
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


async def test_a_leader_that_was_suspended_steps_down_before_its_first_effect(
    shared: EtcdClient, role: str, suspend: Jump
) -> None:
    """C-02: 60 s. The very next look says that the term is over; nothing is written; the body ends although its timers have not
    moved; and the process, which is well, stands again with a higher token."""
    office = Office()
    async with asyncio.TaskGroup() as group:
        campaign = group.create_task(Election(shared, role, Candidate.here("h:1"), ttl_s=10).run(office.lead))
        async with asyncio.timeout(10):
            term = await office.terms.get()
        mark = (await term.txn([Op.put(f"/fenced/{role}", b"before")])).revision

        suspend(60.0)
        assert not term.valid()
        with pytest.raises(StaleLeader):
            await term.txn([Op.put(f"/fenced/{role}", b"after")])
        began = time.monotonic()
        async with asyncio.timeout(3):
            await office.left.wait()
        assert time.monotonic() - began < 1.5, "a renewal is due every 3.3 s, and its timer did not move"

        kv = await shared.get(f"/fenced/{role}")
        assert kv is not None
        assert kv.mod_revision == mark
        async with asyncio.timeout(15):
            later = await office.terms.get()
        assert later.token.revision > term.token.revision
        assert (await later.txn([Op.put(f"/fenced/{role}", b"later")])).succeeded
        campaign.cancel()


async def test_a_registration_comes_back_after_a_suspend(
    shared: EtcdClient, role: str, suspend: Jump, eventually: Eventually
) -> None:
    async with Registration(shared, ttl_s=4, jitter_s=0.1) as registration:
        await registration.set(f"/here/{role}", b"1")
        assert await registration.flush(5)
        before = registration.lease_id
        suspend(60.0)

        async def again() -> bool:
            kv = await shared.get(f"/here/{role}")
            return kv is not None and kv.lease_id == registration.lease_id != before and bool(registration.lease_id)

        await eventually(again, 10)


@pytest.mark.parametrize("seconds", [3600.0, -3600.0, 86400.0, -86400.0], ids=["+1h", "-1h", "+1d", "-1d"])
async def test_the_wall_clock_means_nothing_to_leases_and_terms(
    shared: EtcdClient, role: str, wall_clock: Jump, seconds: float
) -> None:
    """C-01."""
    office = Office()
    async with Lease(shared, ttl_s=4) as lease, asyncio.TaskGroup() as group:
        campaign = group.create_task(Election(shared, role, Candidate.here("h:1"), ttl_s=4).run(office.lead))
        async with asyncio.timeout(10):
            term = await office.terms.get()
        wall_clock(seconds)
        renewed = lease.valid_until
        async with asyncio.timeout(10):
            while lease.valid_until == renewed:
                await term.txn([Op.put(f"/fenced/{role}", b"")])
                await asyncio.sleep(0.05)
        assert term.valid()
        assert lease.valid()
        assert office.terms.empty()
        campaign.cancel()
