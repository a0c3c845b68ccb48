"""Elections: one leader, quick hand-over, fenced writes, and every way to lose office."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from inference_runtime.coordination import (
    Candidate,
    Compare,
    Election,
    EtcdClient,
    EtcdUnavailable,
    LeaderObserver,
    Lease,
    Op,
    Term,
    keys,
)
from inference_runtime.coordination.watchdog import EXIT_STATUS
from inference_runtime.errors import NotLeader, StaleLeader
from inference_runtime.testing.etcd import EtcdProcess

Eventually = Callable[[Callable[[], Awaitable[bool]], float], Awaitable[None]]

#: Long enough that a busy machine renews in time (2 s of validity), short enough to wait for.
TTL_S = 4.0


@dataclass
class Office:
    """Counts who leads, in this process."""

    terms: list[tuple[str, Term]] = field(default_factory=list)
    leading: set[str] = field(default_factory=set)
    most_at_once: int = 0
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    empty: asyncio.Event = field(default_factory=asyncio.Event)

    def body(self, name: str) -> Callable[[Term], Awaitable[None]]:
        async def lead(term: Term) -> None:
            self.terms.append((name, term))
            self.leading.add(name)
            self.most_at_once = max(self.most_at_once, len(self.leading))
            self.entered.set()
            self.empty.clear()
            try:
                await asyncio.Event().wait()
            finally:
                self.leading.discard(name)
                self.empty.set()

        return lead

    async def next_term(self, timeout_s: float) -> tuple[str, Term]:
        async with asyncio.timeout(timeout_s):
            await self.entered.wait()
        self.entered.clear()
        return self.terms[-1]


@asynccontextmanager
async def observing(client: EtcdClient, role: str) -> AsyncIterator[LeaderObserver]:
    observer = LeaderObserver(client, role)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(observer.run())
        yield observer
        task.cancel()


@asynccontextmanager
async def campaigning(
    client: EtcdClient, role: str, office: Office, *names: str, ttl_s: float = 10.0
) -> AsyncIterator[dict[str, asyncio.Task[None]]]:
    async with asyncio.TaskGroup() as group:
        tasks = {}
        for name in names:
            election = Election(client, role, Candidate(name, f"10.0.0.1:{ord(name)}", 1), ttl_s=ttl_s)
            tasks[name] = group.create_task(election.run(office.body(name)))
        yield tasks
        for task in tasks.values():
            task.cancel()


async def test_one_of_three_leads_and_each_resignation_hands_over_within_a_second(shared: EtcdClient, role: str) -> None:
    """R-05: leader hand-over ≤ 1 s. M-02: tokens strictly rise."""
    office = Office()
    async with campaigning(shared, role, office, "a", "b", "c") as tasks:
        name, term = await office.next_term(5)
        revisions = [term.token.revision]
        for _ in range(2):
            await all_stand(shared, role, len(tasks))
            began = time.monotonic()
            tasks.pop(name).cancel()
            name, term = await office.next_term(5)
            assert time.monotonic() - began < 1.0
            revisions.append(term.token.revision)

    assert office.most_at_once == 1
    assert len({name for name, _ in office.terms}) == 3
    assert revisions == sorted(set(revisions))
    assert term.token.cluster_id == shared.cluster_id


async def all_stand(client: EtcdClient, role: str, number: int) -> None:
    async with asyncio.timeout(5):
        while len((await client.list(keys.election_prefix(role)))[0]) != number:  # noqa: ASYNC110 - in etcd
            await asyncio.sleep(0.01)


async def test_a_body_that_returns_resigns_and_stands_again_behind_the_others(shared: EtcdClient, role: str) -> None:
    terms: list[int] = []
    done = asyncio.Event()

    async def lead(term: Term) -> None:
        assert term.valid()
        terms.append(term.token.revision)
        if len(terms) == 3:
            done.set()

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(Election(shared, role, Candidate.here("h:1")).run(lead))
        await done.wait()
        task.cancel()

    assert terms == sorted(set(terms))
    assert (await shared.list(keys.election_prefix(role)))[0] == []


async def test_an_error_of_the_body_resigns_and_is_raised(shared: EtcdClient, role: str) -> None:
    async def lead(term: Term) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await Election(shared, role, Candidate.here("h:1")).run(lead)

    assert caught.group_contains(ZeroDivisionError)
    assert (await shared.list(keys.election_prefix(role)))[0] == []


async def test_a_cancelled_body_still_holds_its_lease_while_it_ends(shared: EtcdClient, role: str) -> None:
    entered = asyncio.Event()
    at_the_end: list[bool] = []

    async def lead(term: Term) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            at_the_end.append((await term.txn([Op.put(f"/last-words/{role}", b"bye")])).succeeded)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(Election(shared, role, Candidate.here("h:1")).run(lead))
        await entered.wait()
        task.cancel()

    assert at_the_end == [True]


async def test_followers_know_who_leads_and_where_it_answers(shared: EtcdClient, role: str) -> None:
    office = Office()
    async with observing(shared, role) as observer:
        with pytest.raises(NotLeader) as caught:
            await observer.wait(0.1)
        assert caught.value.address == ""
        async with campaigning(shared, role, office, "a") as tasks:
            first = await observer.wait(5)
            _, term = await office.next_term(5)
            assert (first.candidate_id, first.address, first.pid, first.token) == ("a", "10.0.0.1:97", 1, term.token)
            async with campaigning(shared, role, office, "b"):
                await all_stand(shared, role, 2)
                assert observer.current == first
                tasks["a"].cancel()
                async with asyncio.timeout(5):
                    second = await observer.changed(first)
                    while second is None:
                        second = await observer.changed(None)
                assert second.address == "10.0.0.1:98"
                assert second.token.revision > first.token.revision
        async with asyncio.timeout(5):
            while observer.current is not None:
                await observer.changed(observer.current)


async def test_a_replaced_leader_cannot_write_even_while_it_believes_to_lead(shared: EtcdClient, role: str) -> None:
    """M-02: the guard in etcd refuses, not our own clock: this term keeps the belief of a lease that is still valid."""
    office = Office()
    key = f"/fenced/{role}"
    async with campaigning(shared, role, office, "a"), Lease(shared) as trusted:
        _, term = await office.next_term(5)
        believer = Term(term.token, term.leader_key, term.candidate, shared, trusted)
        assert (await believer.txn([Op.put(key, b"mine")])).succeeded
        await shared.delete(term.leader_key)
        _, successor = await office.next_term(5)

        assert believer.valid()
        with pytest.raises(StaleLeader):
            await believer.txn([Op.put(key, b"stale")])

        assert not believer.valid()
        assert (await successor.txn([Op.get(key)])).results[0].kvs[0].value == b"mine"


async def test_a_failed_comparison_of_the_leader_itself_is_an_answer_and_no_loss_of_office(shared: EtcdClient, role: str) -> None:
    office = Office()
    async with campaigning(shared, role, office, "a"):
        _, term = await office.next_term(5)
        key = f"/fenced/{role}"

        result = await term.txn(
            [Op.put(key, b"1")], compare=[Compare.create_revision(key, ">", 0)], failure=[Op.get(term.leader_key)]
        )

        assert not result.succeeded
        assert len(result.results) == 1
        assert result.results[0].kvs[0].create_revision == term.token.revision
        assert term.valid()


async def test_deleting_the_leader_key_deposes_the_leader_at_once(shared: EtcdClient, role: str) -> None:
    office = Office()
    async with campaigning(shared, role, office, "a"):
        _, first = await office.next_term(5)
        began = time.monotonic()
        await shared.delete(first.leader_key)
        _, second = await office.next_term(5)

        assert time.monotonic() - began < 2.0
        assert second.token.revision > first.token.revision
        assert not first.valid()
        with pytest.raises(StaleLeader):
            await first.txn([Op.put(f"/fenced/{role}", b"stale")])


async def test_a_leader_cut_from_etcd_steps_down_before_its_lease_ends_and_leads_again_later(
    etcd: EtcdProcess, client: EtcdClient
) -> None:
    """M-04: validity counts from when the renewal was sent, so the leader is out before etcd could elect another."""
    office = Office()
    async with campaigning(client, "r", office, "a", ttl_s=TTL_S):
        _, first = await office.next_term(5)
        etcd.pause()
        cut = time.monotonic()
        async with asyncio.timeout(TTL_S):
            await first.lost()
            await office.empty.wait()
        assert time.monotonic() - cut < TTL_S - 1
        with pytest.raises(StaleLeader):
            await first.txn([Op.put("/fenced", b"stale")])
        etcd.resume()

        _, second = await office.next_term(10)
        assert second.token.revision > first.token.revision


async def test_a_leader_stays_in_office_through_a_quick_restart_of_etcd(etcd: EtcdProcess, client: EtcdClient) -> None:
    office = Office()
    async with campaigning(client, "r", office, "a"):
        _, term = await office.next_term(5)
        await asyncio.to_thread(etcd.restart)
        while True:
            try:
                assert (await term.txn([Op.put("/fenced", b"1")])).succeeded
                break
            except EtcdUnavailable:
                continue
        assert term.valid()
        assert len(office.terms) == 1


class CandidateProcess:
    """candidate.py, with its lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, etcd: EtcdProcess, role: str, name: str, ttl_s: float, mode: str) -> CandidateProcess:
        script = Path(__file__).with_name("candidate.py")
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, str(script), etcd.endpoint, role, name, str(ttl_s), mode), stdout=subprocess.PIPE
            )
        )

    async def line(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            return (await self._process.stdout.readline()).decode().strip()

    async def wait(self, timeout_s: float) -> int:
        async with asyncio.timeout(timeout_s):
            return await self._process.wait()

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


Spawn = Callable[..., Awaitable[CandidateProcess]]


@pytest.fixture
async def spawn(shared_etcd: EtcdProcess, role: str) -> AsyncIterator[Spawn]:
    """Starts candidates, and ends those that still run after the test."""
    started: list[CandidateProcess] = []

    async def start(name: str, ttl_s: float = TTL_S, mode: str = "lead") -> CandidateProcess:
        started.append(await CandidateProcess.start(shared_etcd, role, name, ttl_s, mode))
        return started[-1]

    yield start
    for process in started:
        await process.kill()


async def test_a_killed_leader_is_replaced_within_its_lease(spawn: Spawn, shared: EtcdClient, role: str) -> None:
    """M-01: kill -9; another leads within TTL + 2 s, with a higher token."""
    office = Office()
    leader = await spawn("leader")
    first = int((await leader.line(20)).removeprefix("leads "))
    async with campaigning(shared, role, office, "b"):
        await all_stand(shared, role, 2)
        assert office.terms == []
        began = time.monotonic()
        await leader.kill()
        _, term = await office.next_term(TTL_S + 2)

        assert time.monotonic() - began > 1  # it waited for the lease, not for nothing
        assert term.token.revision > first


async def test_a_leader_that_was_frozen_finds_itself_replaced_and_writes_nothing(
    spawn: Spawn, shared: EtcdClient, role: str
) -> None:
    """M-02: SIGSTOP until another leads, then SIGCONT: no write of the old term lands after the new one began."""
    office = Office()
    leader = await spawn("leader")
    old = int((await leader.line(20)).removeprefix("leads "))
    async with campaigning(shared, role, office, "b"):
        await all_stand(shared, role, 2)
        os.kill(leader.pid, signal.SIGSTOP)
        _, term = await office.next_term(TTL_S + 2)
        mark = (await term.txn([Op.put(f"/fenced/{role}", str(term.token.revision).encode())])).revision
        os.kill(leader.pid, signal.SIGCONT)

        said = {await leader.line(5)}
        if "stale" in said:
            said.add(await leader.line(5))
        assert f"lost {old}" in said or said == {""}  # it stepped down, or its watchdog ended it

        kv = await shared.get(f"/fenced/{role}")
        assert kv is not None
        assert (kv.mod_revision, kv.value) == (mark, str(term.token.revision).encode())
        assert term.valid()


async def test_a_leader_whose_event_loop_is_stuck_is_ended_by_the_watchdog(spawn: Spawn) -> None:
    """M-03: no code in the loop can step down, so a thread ends the process a second after the lease's validity."""
    leader = await spawn("leader", 2.0, "block")  # valid for 1 s
    assert (await leader.line(20)).startswith("leads")
    began = time.monotonic()

    assert await leader.wait(10) == EXIT_STATUS
    assert 0.5 < time.monotonic() - began < 4
