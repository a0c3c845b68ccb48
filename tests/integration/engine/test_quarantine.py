"""Prompts that kill contexts: found with one more death, refused afterwards, and nobody else pays (poison pills)."""

from __future__ import annotations

import pytest

from inference_runtime.errors import Quarantined
from inference_runtime.generation import SamplingParams
from inference_runtime.v1 import common_pb2
from tests.integration.engine.kit import Gateway, assignment, running_engine, session, submission, until
from tests.integration.engine.test_session import check_exact

LONG = SamplingParams(max_tokens=60)
KILLER = "please divide by zero"
POISON = {"pace_s": 0.002, "poison_on": "divide by zero"}


async def check_quarantined(gateway: Gateway, stream_id: int) -> Quarantined:
    error = (await gateway.answer(stream_id)).error
    assert isinstance(error, Quarantined)
    assert error.http_status == 422
    return error


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_pp_1_one_killer_prompt_among_a_hundred_streams(isolation: str) -> None:
    """PP-1: two deaths at most, the killer is refused with 422, and all others are exact to the token."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("pill", POISON, {"max_concurrent": 128}, isolation=isolation))
        await gateway.send(*(submission(i, "pill", f"{i}", sampling=LONG) for i in range(1, 101)))
        await until(lambda: all(len(gateway.answers[i].token_ids) > 3 for i in range(1, 101)), "all run")
        await gateway.send(submission(500, "pill", KILLER, sampling=LONG))
        error = await check_quarantined(gateway, 500)
        assert error.metadata["context_deaths"] == "2"
        for i in range(1, 101):
            check_exact(await gateway.answer(i), f"{i}", 60)
        assert engine.replica("pill-0").restarts <= 2
        assert engine.replica("pill-0").state == common_pb2.REPLICA_STATE_SERVING
        load = engine.load("pill-0")
        assert (load.running, load.queued, load.pending_tokens) == (0, 0, 0)


async def test_a_quarantined_prompt_is_refused_on_arrival_whatever_its_seed() -> None:
    """No third death; other prompts are served."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("again", POISON))
        await gateway.send(submission(1, "again", KILLER, sampling=LONG))
        await check_quarantined(gateway, 1)
        await until(lambda: engine.replica("again-0").state == common_pb2.REPLICA_STATE_SERVING, "it serves again")
        await gateway.send(
            submission(2, "again", KILLER, sampling=SamplingParams(max_tokens=5, seed=3)), submission(3, "again", sampling=LONG)
        )
        error = await check_quarantined(gateway, 2)
        assert error.retry_after_s is not None
        assert 500 < error.retry_after_s <= 600
        check_exact(await gateway.answer(3), "hello", 60)
        assert engine.replica("again-0").restarts == 2


async def test_two_killers_among_others_cost_one_death_more() -> None:
    """The trials go on after the first is found."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("two", POISON | {"first_token_delay_s": 0.05}))
        await gateway.send(
            *(submission(i, "two", f"{i}", sampling=LONG) for i in range(1, 11)),
            submission(21, "two", KILLER, sampling=LONG),
            submission(22, "two", f"{KILLER} twice", sampling=LONG),
            *(submission(i, "two", f"{i}", sampling=LONG) for i in range(11, 16)),
        )
        for i in (21, 22):
            await check_quarantined(gateway, i)
        for i in range(1, 16):
            check_exact(await gateway.answer(i), f"{i}", 60)
        assert engine.replica("two-0").restarts == 3


async def test_requests_that_wait_during_the_trials_are_served_after_them() -> None:
    """Nobody joins a suspect, and the queue is not lost; a cancelled suspect is passed over."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("joins", POISON | {"first_token_delay_s": 0.1}, {"max_concurrent": 8}))
        await gateway.send(*(submission(i, "joins", f"{i}") for i in range(6)), submission(7, "joins", KILLER))
        await until(lambda: engine.replica("joins-0").restarts == 1, "the first death")
        await gateway.send(*(submission(i, "joins", f"{i}") for i in range(10, 20)), cancel=((2, 0), (5, 0)))
        await check_quarantined(gateway, 7)
        for i in (0, 1, 3, 4, *range(10, 20)):
            check_exact(await gateway.answer(i), f"{i}", 10)
        assert engine.replica("joins-0").restarts == 2
        await until(lambda: engine.load("joins-0").running == 0, "all places are free")


async def test_a_fault_that_is_nobodys_fault_costs_no_answer() -> None:
    """Two deaths by the clock, not by a prompt: everyone was cleared in between, everyone ends exactly."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("chance", {"pace_s": 0.001, "poison_at_step": 70, "poison_times": 2}))
        sampling = SamplingParams(max_tokens=150)
        await gateway.send(*(submission(i, "chance", f"{i}", sampling=sampling) for i in range(8)))
        for i in range(8):
            check_exact(await gateway.answer(i), f"{i}", 150)
        assert engine.replica("chance-0").restarts == 2


async def test_a_replica_rebuilt_by_hand_during_the_trials_goes_on_with_them() -> None:
    """A rebuild is held against nobody."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("hand", POISON | {"first_token_delay_s": 0.05}))
        await gateway.send(*(submission(i, "hand", f"{i}") for i in range(4)), submission(7, "hand", KILLER))
        await check_quarantined(gateway, 7)
        core = engine.replicas._hosted["hand-0"].core
        assert core is not None
        await until(lambda: core.context_generation == 3 and core._worker._context is not None, "the trials go on")
        assert engine.replica("hand-0").state == common_pb2.REPLICA_STATE_RESTARTING
        core.rebuild()
        for i in range(4):
            check_exact(await gateway.answer(i), f"{i}", 10)
        assert engine.replica("hand-0").restarts == 3
