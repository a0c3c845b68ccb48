"""Prompts that kill contexts: found with one more death, refused afterwards, and nobody else pays (poison pills)."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest

from inference_runtime.errors import ContextPoisoned, Quarantined
from inference_runtime.generation import SamplingParams
from inference_runtime.supervision import DEFAULT_POLICY, RestartPolicy
from inference_runtime.v1 import common_pb2
from tests.integration.engine.kit import Gateway, assignment, running_engine, session, submission, until
from tests.integration.engine.test_session import check_exact

LONG = SamplingParams(max_tokens=60)
KILLER = "please divide by zero"
POISON = {"pace_s": 0.002, "poison_on": "divide by zero"}


class Silences:
    """The longest time between two chunks of each stream, as its client sees it."""

    def __init__(self, gateway: Gateway) -> None:
        self.longest_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        gateway.on_row = self._seen

    def watch(self, streams: Iterable[int]) -> None:
        """From now on."""
        now = time.monotonic()
        self._last_s = dict.fromkeys(streams, now)
        self.longest_s = dict.fromkeys(streams, 0.0)

    def _seen(self, stream_id: int) -> None:
        if stream_id in self._last_s:
            now = time.monotonic()
            self.longest_s[stream_id] = max(self.longest_s[stream_id], now - self._last_s[stream_id])
            self._last_s[stream_id] = now


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


@pytest.mark.parametrize("places", [128, 10])
async def test_pp_1_a_killer_asked_for_in_several_choices_kills_as_often_as_one(places: int) -> None:
    """PP-1: what is found guilty is the prompt. Its other choices end with it, those that wait for a place included."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("choices", POISON, {"max_concurrent": places}))
        await gateway.send(*(submission(i, "choices", f"{i}", sampling=LONG) for i in range(1, 9)))
        await until(lambda: all(len(gateway.answers[i].token_ids) > 3 for i in range(1, 9)), "all run")
        await gateway.send(*(submission(500 + k, "choices", KILLER, sampling=LONG, choice=k) for k in range(6)))
        for k in range(6):
            await check_quarantined(gateway, 500 + k)
        for i in range(1, 9):
            check_exact(await gateway.answer(i), f"{i}", 60)
        assert engine.replica("choices-0").restarts <= 2


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_pp_1_nobody_waits_long_for_the_killer_to_be_found(isolation: str) -> None:
    """PP-1, R-01: with 150 streams at 20 ms a token, the 99th percentile of their longest silence is at most 1.5 s. Trying each
    of them alone would take 6 s. The better of two runs counts, for the machine has other work too."""
    stalls = [await longest_silence_p99_s(isolation)]
    if stalls[0] > 1.5:
        stalls.append(await longest_silence_p99_s(isolation))
    assert min(stalls) <= 1.5, stalls


async def longest_silence_p99_s(isolation: str) -> float:
    """Of 150 streams, one killer among them; all but the killer end exactly."""
    sampling = SamplingParams(max_tokens=100)
    streams = range(1, 151)
    async with running_engine(policy=DEFAULT_POLICY) as engine, session(engine) as gateway:
        config = POISON | {"pace_s": 0.02}
        await engine.host(assignment("stall", config, {"max_concurrent": 256}, isolation=isolation))
        silences = Silences(gateway)
        await gateway.send(*(submission(i, "stall", f"{i}", sampling=sampling) for i in streams))
        await until(lambda: all(len(gateway.answers[i].token_ids) > 3 for i in streams), "all run")
        await gateway.send(submission(500, "stall", KILLER, sampling=sampling))
        silences.watch(streams)
        await check_quarantined(gateway, 500)
        for i in streams:
            check_exact(await gateway.answer(i), f"{i}", 100)
        assert engine.replica("stall-0").restarts == 2
        longest = sorted(silences.longest_s.values())
        return longest[int(0.99 * len(longest))]


async def test_a_death_by_chance_does_not_keep_a_hundred_streams_waiting_either() -> None:
    """Nobody can be blamed: those that are not tried in time go on together, and end exactly."""
    sampling = SamplingParams(max_tokens=60)
    streams = range(1, 121)
    async with running_engine() as engine, session(engine) as gateway:
        config = {"pace_s": 0.02, "poison_at_step": 20, "poison_times": 1}
        await engine.host(assignment("lightning", config, {"max_concurrent": 256}))
        silences = Silences(gateway)
        await gateway.send(*(submission(i, "lightning", f"{i}", sampling=sampling) for i in streams))
        await until(lambda: all(len(gateway.answers[i].token_ids) > 3 for i in streams), "all run")
        silences.watch(streams)
        for i in streams:
            check_exact(await gateway.answer(i), f"{i}", 60)
        assert engine.replica("lightning-0").restarts == 1
        longest = sorted(silences.longest_s.values())
        assert longest[int(0.99 * len(longest))] <= 1.5, longest[-5:]


async def test_a_killer_that_was_present_at_a_death_elsewhere_kills_here_once() -> None:
    """PP-1: two deaths in the whole fleet. It comes with its count, is tried beside the others, and ends with the first death."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("moved", POISON))
        await gateway.send(*(submission(i, "moved", f"{i}", sampling=LONG) for i in range(1, 9)))
        await until(lambda: all(len(gateway.answers[i].token_ids) > 3 for i in range(1, 9)), "all run")
        await gateway.send(submission(9, "moved", KILLER, sampling=LONG, context_deaths=1))
        error = await check_quarantined(gateway, 9)
        assert error.metadata["context_deaths"] == "2"
        for i in range(1, 9):
            check_exact(await gateway.answer(i), f"{i}", 60)
        assert engine.replica("moved-0").restarts == 1


async def test_innocents_that_come_from_a_death_elsewhere_are_served_beside_those_that_run() -> None:
    """Forty of them at once, with what they have; the replica stays in service and nobody who runs waits for them."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("refuge", POISON | {"pace_s": 0.01}, {"max_concurrent": 64}))
        await gateway.send(submission(100, "refuge", "100", sampling=SamplingParams(max_tokens=150)))
        await until(lambda: len(gateway.answers[100].token_ids) > 3, "it runs")
        engine.published.clear()
        await gateway.send(*(submission(i, "refuge", f"{i}", sampling=LONG, context_deaths=1) for i in range(40)))
        for i in range(40):
            check_exact(await gateway.answer(i), f"{i}", 60)
        check_exact(await gateway.answer(100), "100", 150)
        assert engine.published == []
        assert engine.replica("refuge-0").restarts == 0


async def test_the_count_of_deaths_comes_with_the_end_of_a_replica() -> None:
    """What goes on elsewhere must say how often a context died on it."""
    async with running_engine(policy=RestartPolicy(max_restarts=1)) as engine, session(engine) as gateway:
        await engine.host(assignment("ends", {"pace_s": 0.005, "poison_at_step": 25, "poison_times": 0}))
        await gateway.send(*(submission(i, "ends", f"{i}", sampling=LONG) for i in range(1, 4)))
        for i in range(1, 4):
            error = (await gateway.answer(i)).error
            assert isinstance(error, ContextPoisoned)
            assert error.metadata["context_deaths"] == "2"


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
    async with running_engine(trials_s=5.0) as engine, session(engine) as gateway:
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
