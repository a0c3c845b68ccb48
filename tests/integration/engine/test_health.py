"""Health that tells the truth: a replica is ready while it works, and a canary finds out what nobody asked for yet (§2.15.2)."""

from __future__ import annotations

import asyncio
import time

import pytest

from inference_runtime.errors import ContextPoisoned, NoReplica, ServerError
from inference_runtime.generation import SamplingParams
from inference_runtime.v1 import common_pb2
from tests.integration.engine.kit import assignment, core_of, running_engine, session, submission, until
from tests.integration.engine.test_session import check_exact

SERVING, NOT_READY = common_pb2.REPLICA_STATE_SERVING, common_pb2.REPLICA_STATE_NOT_READY


async def test_i12_a_replica_that_fails_everything_for_five_seconds_is_not_ready() -> None:
    """Judged by what its users got: there is no canary here. It refuses by type, and its record says why."""
    async with running_engine(ready_s=1.0) as engine, session(engine) as gateway:
        await engine.host(assignment("fails", {"fail_admit": 1}))
        core_of(engine, "fails-0")._health.canary_prompt = ()
        begin = time.monotonic()
        sent = 0
        while engine.replica("fails-0").state == SERVING:
            assert time.monotonic() - begin < 9.0, "it still says that it is ready"
            sent += 1
            await gateway.send(submission(sent, "fails"))
            error = (await gateway.answer(sent)).error
            assert isinstance(error, ServerError | NoReplica)
            await asyncio.sleep(0.1)  # the pace of its clients
        assert time.monotonic() - begin > 5.0, "two or three failures prove nothing"
        assert engine.replica("fails-0").state == NOT_READY
        assert "failed" in engine.replica("fails-0").reason
        await gateway.send(submission(9999, "fails"))
        assert isinstance((await gateway.answer(9999)).error, NoReplica)
        assert "inference_replica_ready" in engine.telemetry.metrics.prometheus_text().decode()


async def test_a_replica_that_fails_some_requests_stays_ready() -> None:
    """Every other one is refused, for longer than five seconds."""
    async with running_engine(ready_s=1.0) as engine, session(engine) as gateway:
        await engine.host(assignment("some", {"fail_admit": 2}))
        begin = time.monotonic()
        sent = 0
        while time.monotonic() - begin < 6.0:
            sent += 1
            await gateway.send(submission(sent, "some", f"{sent}"))
            await gateway.answer(sent)
            await asyncio.sleep(0.05)
        assert {r.state for r in engine.published} == {common_pb2.REPLICA_STATE_LOADING, SERVING}


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_a_context_that_hangs_while_idle_is_found_by_the_canary_and_replaced(isolation: str) -> None:
    """No user was needed. The replica is not ready before the hang is certain, and serves exactly after it."""
    async with running_engine(ready_s=0.5, hang_s=1.0) as engine, session(engine) as gateway:
        config = {"hang_at_step": 3, "hang_s": 4.0}
        await engine.host(assignment(f"idle-{isolation}", config, isolation=isolation))
        replica = f"idle-{isolation}-0"
        await until(lambda: any(r.state == NOT_READY for r in engine.published), "it is not ready")
        assert "no answer" in next(r.reason for r in engine.published if r.state == NOT_READY)
        await until(lambda: engine.replica(replica).restarts == 1, "it is replaced")
        await until(lambda: engine.replica(replica).state == SERVING, "it is ready again")
        await gateway.send(submission(1, f"idle-{isolation}", sampling=SamplingParams(max_tokens=2)))
        check_exact(await gateway.answer(1), "hello", 2)


async def test_the_canary_counts_nowhere_and_there_is_one_at_a_time() -> None:
    """No load, no step, no usage: whoever looks at the figures sees an idle replica."""
    async with running_engine(ready_s=0.5) as engine:
        await engine.host(assignment("quiet", {"pace_s": 0.05}))
        core = core_of(engine, "quiet-0")
        seen = most = 0
        out = False
        begin = time.monotonic()
        while seen < 4:
            assert time.monotonic() - begin < 10.0, "no canaries"
            most = max(most, len(core._worker._flights))
            seen, out = seen + (core._health._canary.out and not out), core._health._canary.out
            load = engine.load("quiet-0")
            assert (load.running, load.queued, load.pending_tokens, load.kv_use) == (0, 0, 0, 0)
            await asyncio.sleep(0.005)
        assert most == 1
        text = engine.telemetry.metrics.prometheus_text().decode()
        assert "inference_step_seconds_count" not in text
        assert "inference_queue_seconds_count" not in text
        assert {r.state for r in engine.published} == {common_pb2.REPLICA_STATE_LOADING, SERVING}


async def test_a_slow_model_is_not_kept_busy_by_its_canary() -> None:
    """A token that takes 0.2 s is asked for every four seconds at most, and the replica is ready in between."""
    async with running_engine(ready_s=0.5) as engine:
        await engine.host(assignment("slow-idle", {"pace_s": 0.2}))
        core = core_of(engine, "slow-idle-0")
        await until(lambda: core._health._canary.out, "the first canary")
        first_s = core._health._canary.sent_s
        await until(lambda: not core._health._canary.out, "it was answered")
        await until(lambda: core._health._canary.out, "the second canary")
        assert core._health._canary.sent_s - first_s >= 4.0
        assert {r.state for r in engine.published} == {common_pb2.REPLICA_STATE_LOADING, SERVING}


async def test_the_canary_makes_way_for_the_first_request() -> None:
    """It leaves before the request's first step, whatever it was waiting for."""
    async with running_engine(ready_s=0.5) as engine, session(engine) as gateway:
        await engine.host(assignment("way", {"pace_s": 0.002, "first_token_delay_s": 0.3}))
        core = core_of(engine, "way-0")
        await until(lambda: core._health._canary.out, "the canary is out")
        await gateway.send(submission(1, "way", sampling=SamplingParams(max_tokens=20)))
        await until(lambda: engine.load("way-0").running == 1, "the request runs")
        assert not core._health._canary.out
        assert len(core._worker._flights) == 1
        check_exact(await gateway.answer(1), "hello", 20)


async def test_a_context_that_dies_of_the_canary_is_replaced_and_no_request_is_blamed() -> None:
    """The next one is served, with no death to its name."""
    async with running_engine(ready_s=0.5) as engine, session(engine) as gateway:
        await engine.host(assignment("fragile", {"poison_at_step": 2, "poison_times": 1}))
        await until(lambda: engine.replica("fragile-0").restarts == 1, "a canary killed it")
        await until(lambda: engine.replica("fragile-0").state == SERVING, "it serves again")
        await gateway.send(submission(1, "fragile"))
        check_exact(await gateway.answer(1), "hello", 10)


async def test_a_replica_whose_steps_give_nothing_for_long_is_ready() -> None:
    """What counts is that it steps: a first token may take longer than a silence may."""
    async with running_engine(ready_s=0.3) as engine, session(engine) as gateway:
        await engine.host(assignment("slow", {"pace_s": 0.01, "first_token_delay_s": 1.5}))
        await gateway.send(submission(1, "slow"))
        check_exact(await gateway.answer(1), "hello", 10)
        assert NOT_READY not in {r.state for r in engine.published}


async def test_a_silent_replica_is_rebuilt_by_hand() -> None:
    """An operator who sees NOT_READY need not wait until the hang is certain; what was asked for meanwhile is answered."""
    async with running_engine(ready_s=2.5) as engine, session(engine) as gateway:
        config = {"pace_s": 0.002, "hang_at_step": 20, "hang_s": 600.0}
        await engine.host(assignment("by-hand", config, isolation="process"))
        await gateway.send(submission(1, "by-hand", sampling=SamplingParams(max_tokens=30)))
        await until(lambda: engine.replica("by-hand-0").state == NOT_READY, "it is silent")
        begin = time.monotonic()
        assert await engine.replicas.rebuild("by-hand-0") == 2
        assert time.monotonic() - begin < 8.0, "it was given the time of one that works"
        check_exact(await gateway.answer(1), "hello", 30)


async def test_a_step_that_hangs_in_the_middle_of_answers_makes_the_replica_not_ready() -> None:
    """New requests are refused while nobody knows how it ends; those that run go on after it."""
    async with running_engine(ready_s=0.4) as engine, session(engine) as gateway:
        await engine.host(assignment("stuck", {"pace_s": 0.002, "hang_at_step": 20, "hang_s": 2.0}))
        await gateway.send(submission(1, "stuck", sampling=SamplingParams(max_tokens=40)))
        await until(lambda: engine.replica("stuck-0").state == NOT_READY, "it is silent")
        await gateway.send(submission(2, "stuck"))
        error = (await gateway.answer(2)).error
        assert isinstance(error, ContextPoisoned)
        assert error.retry_after_s == 1.0
        check_exact(await gateway.answer(1), "hello", 40)
        await until(lambda: engine.replica("stuck-0").state == SERVING, "it is ready again")
        assert engine.replica("stuck-0").restarts == 0
