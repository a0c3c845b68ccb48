"""The block pool and the scheduler: pure decisions, so no torch and no model here."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_runtime.generation import SamplingParams
from inference_runtime.runner import StepRequest
from inference_runtime.runners.torch_lm.blocks import BlockPool, blocks_for
from inference_runtime.runners.torch_lm.checkpoint import GenerationDefaults
from inference_runtime.runners.torch_lm.scheduler import Chunk, Scheduler
from inference_runtime.runners.torch_lm.sequence import Sequence, make_sequence

DEFAULTS = GenerationDefaults(eos_token_ids=frozenset({0}), temperature=0.0, top_p=1.0, top_k=0)
BLOCK_SIZE = 4


def sequence(number: int, prompt: int, max_tokens: int = 100) -> Sequence:
    request = StepRequest(number, [1] * prompt, SamplingParams(max_tokens=max_tokens))
    return make_sequence(request, DEFAULTS, context_tokens=1000)


def scheduler(blocks: int, *, max_batch: int = 8, max_step_tokens: int = 16) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(blocks)
    return Scheduler(pool, BLOCK_SIZE, max_batch, max_step_tokens), pool


def advance(chunks: list[Chunk]) -> None:
    """What the runner does after the model ran: mark as computed, append a token where one is drawn."""
    for chunk in chunks:
        draws = chunk.draws
        chunk.sequence.computed = chunk.end
        if draws:
            chunk.sequence.append(1)


def test_a_block_is_never_owned_twice() -> None:
    pool = BlockPool(5)
    mine, yours = pool.take(2), pool.take(3)
    assert set(mine) | set(yours) == {1, 2, 3, 4, 5}
    assert pool.use == 1.0
    pool.give_back(mine)
    pool.give_back(yours)
    pool.check_idle()


def test_a_leaked_block_is_noticed_when_idle() -> None:
    pool = BlockPool(3)
    pool.take(1)
    with pytest.raises(AssertionError, match="1 of 3 KV blocks leaked"):
        pool.check_idle()


def test_a_block_returned_twice_is_noticed() -> None:
    pool = BlockPool(3)
    blocks = pool.take(1)
    pool.give_back(list(blocks))
    with pytest.raises(AssertionError, match="returned twice"):
        pool.give_back(blocks)


def test_a_long_prompt_is_read_in_chunks_within_the_budget_and_draws_only_at_its_end() -> None:
    plan, _ = scheduler(20, max_step_tokens=16)
    plan.add(sequence(1, 40))
    seen = []
    for _ in range(3):
        chunks = plan.schedule()
        seen += [(c.start, c.end, c.draws) for c in chunks]
        advance(chunks)
    assert seen == [(0, 16, False), (16, 32, False), (32, 40, True)]


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    plan, _ = scheduler(40, max_step_tokens=16)
    plan.add(sequence(1, 3))
    advance(plan.schedule())
    plan.add(sequence(2, 60))
    for _ in range(4):
        chunks = plan.schedule()
        assert chunks[0].sequence.sequence_id == 1
        assert sum(c.end - c.start for c in chunks) <= 16
        advance(chunks)


def test_no_more_sequences_run_than_the_batch_holds() -> None:
    plan, _ = scheduler(100, max_batch=2)
    for number in range(4):
        plan.add(sequence(number, 2))
    assert [c.sequence.sequence_id for c in plan.schedule()] == [0, 1]


def test_sequences_start_in_order_of_arrival_even_when_a_later_one_would_fit() -> None:
    plan, _ = scheduler(4)
    for number, prompt in ((1, 8), (2, 12), (3, 1)):
        plan.add(sequence(number, prompt))
    assert [c.sequence.sequence_id for c in plan.schedule()] == [1]


def test_the_youngest_gives_way_when_blocks_run_out_and_comes_back_first() -> None:
    plan, pool = scheduler(4)
    old, young, late = sequence(1, 4), sequence(2, 3), sequence(3, 1)
    for s in (old, young, late):
        plan.add(s)
    while not plan.preemptions:
        advance(plan.schedule())
    assert young.computed == 0
    assert young.block_ids == []
    plan.remove(old)
    assert plan.schedule()[0].sequence is young
    plan.remove(young)
    plan.remove(late)
    assert pool.use == 0.0


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12),
    blocks=st.integers(13, 30),
    budget=st.integers(1, 40),
)
def test_every_sequence_ends_and_every_block_returns(prompts: list[tuple[int, int]], blocks: int, budget: int) -> None:
    plan, pool = scheduler(blocks, max_step_tokens=budget)
    for number, (prompt, max_tokens) in enumerate(prompts):
        plan.add(sequence(number, prompt, max_tokens))
    ended = set()
    for _ in range(5000):
        if not plan.has_work():
            break
        chunks = plan.schedule()
        assert chunks, "work, and nothing scheduled"
        owned = [b for c in chunks for b in c.sequence.block_ids]
        assert len(owned) == len(set(owned))
        assert all(len(c.sequence.block_ids) >= blocks_for(c.end, BLOCK_SIZE) for c in chunks)
        advance(chunks)
        for chunk in chunks:
            if chunk.sequence.finish_reason() is not None and chunk.sequence.pending == 1:
                plan.remove(chunk.sequence)
                ended.add(chunk.sequence.sequence_id)
    assert ended == set(range(len(prompts)))
    pool.check_idle()
