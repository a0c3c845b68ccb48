"""Admission over real gRPC: who may wait, who goes first, who is refused at once and what it is told (Q01-Q04, E10)."""

from __future__ import annotations

import asyncio

from inference_runtime.errors import Backpressure, RevisionMismatch, Timeout
from inference_runtime.generation import Priority, SamplingParams
from tests.integration.engine.kit import EngineUnderTest, assignment, running_engine, session, submission, until
from tests.integration.engine.test_session import check_exact

FEW = SamplingParams(max_tokens=2)


async def test_a_tenant_with_a_long_queue_does_not_delay_another() -> None:
    """Q04: the single request of the second tenant is served next."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("fair", {"pace_s": 0.002}, {"max_concurrent": 1}))
        many = [submission(i, "fair", f"{i}", sampling=FEW) for i in range(1, 101)]
        for s in many:
            s.request.tenant = "many"
        await gateway.send(*many)
        await until(lambda: engine.load("fair-0").queued > 50, "the queue of the first tenant is long")
        other = submission(500, "fair", sampling=FEW)
        other.request.tenant = "other"
        await gateway.send(other)
        check_exact(await gateway.answer(500), "hello", 2)
        left = engine.load("fair-0").queued
        for i in range(1, 101):
            check_exact(await gateway.answer(i), f"{i}", 2)
        assert left > 20  # the two answers and what the scheduler of this machine makes of them, not the queue


async def test_trap_10_rejecting_means_at_once_and_tells_when_a_place_is_free() -> None:
    """Q01: `reject` has no queue; the wait is measured from the replica's own turnover."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("reject", {"pace_s": 0.005}, {"max_concurrent": 2, "on_capacity_exhausted": "reject"}))
        number, told = 0, 0.0
        for _ in range(12):
            await gateway.send(*(submission(number + i, "reject") for i in range(3)))
            error = (await gateway.answer(number + 2)).error
            assert isinstance(error, Backpressure)
            assert error.retry_after_s is not None
            told = error.retry_after_s
            for i in (0, 1):
                check_exact(await gateway.answer(number + i), "hello", 10)
            number += 3
        # Ten steps of 5 ms make 50 ms for each pair; before the first turnover the answer was 1 s.
        assert 0 < told < 0.5
        assert (engine.load("reject-0").running, engine.load("reject-0").queued) == (0, 0)


async def test_q03_admission_counts_tokens() -> None:
    """Few long requests fill the room as many short ones do."""
    async with running_engine() as engine, session(engine) as gateway:
        bounds = {"max_concurrent": 1, "max_context_tokens": 1000}
        await engine.host(assignment("tokens", {"pace_s": 0.05}, bounds))
        long = SamplingParams(max_tokens=900)
        await gateway.send(submission(0, "tokens", sampling=long))
        await until(lambda: engine.load("tokens-0").running == 1, "one runs")
        await gateway.send(*(submission(i, "tokens", sampling=long) for i in range(1, 8)))
        error = (await gateway.answer(5)).error  # four contexts of work may wait
        assert isinstance(error, Backpressure)
        assert "tokens of work waiting" in error.message
        assert engine.load("tokens-0").queued == 4
        await gateway.send(submission(9, "tokens", sampling=FEW))
        await until(lambda: engine.load("tokens-0").queued == 5, "a short one still fits")


async def fill(engine: EngineUnderTest, name: str) -> None:
    """A replica that serves one request in 50 ms."""
    await engine.host(assignment(name, {"pace_s": 0.005}, {"max_concurrent": 1}))


async def test_a_request_that_would_wait_longer_than_it_has_time_is_refused_on_arrival() -> None:
    """It learns at once what it would learn at its deadline, and can go elsewhere."""
    async with running_engine() as engine, session(engine) as gateway:
        await fill(engine, "late")
        await gateway.send(*(submission(i, "late", f"{i}") for i in range(60)))
        await gateway.answer(12)  # the rate is known now
        begin = asyncio.get_running_loop().time()
        await gateway.send(submission(100, "late", time_left_s=0.5), submission(101, "late", time_left_s=30.0))
        error = (await gateway.answer(100)).error
        assert isinstance(error, Backpressure)
        assert asyncio.get_running_loop().time() - begin < 0.4
        assert error.retry_after_s is not None
        assert 0.5 < error.retry_after_s < 30
        high = submission(102, "late", time_left_s=0.5, priority=Priority.HIGH)  # nothing is ahead of it
        await gateway.send(high)
        check_exact(await gateway.answer(102), "hello", 10)
        check_exact(await gateway.answer(101), "hello", 10)


async def test_trap_08_what_expires_in_the_queue_is_never_run() -> None:
    """The deadline counts while waiting; the place in the queue is given back."""
    async with running_engine() as engine, session(engine) as gateway:
        await fill(engine, "expire")
        await gateway.send(submission(1, "expire", sampling=SamplingParams(max_tokens=60)))
        await gateway.send(*(submission(i, "expire", time_left_s=0.1) for i in range(2, 10)))
        for i in range(2, 10):
            answer = await gateway.answer(i)
            assert isinstance(answer.error, Timeout)
            assert not answer.token_ids
        load = engine.load("expire-0")
        assert (load.running, load.queued) == (1, 0)
        check_exact(await gateway.answer(1), "hello", 60)


async def test_a_revision_that_is_not_here_has_an_error_of_its_own() -> None:
    """The replica is well and takes others; only this prefix must go elsewhere."""
    async with running_engine() as engine, session(engine) as gateway:
        a = assignment("revision", {})
        await engine.host(a)
        await gateway.send(submission(1, "revision", revision="0000"), submission(2, "revision", revision=a.revision))
        error = (await gateway.answer(1)).error
        assert isinstance(error, RevisionMismatch)
        assert error.metadata["revision"] == a.revision
        check_exact(await gateway.answer(2), "hello", 10)
