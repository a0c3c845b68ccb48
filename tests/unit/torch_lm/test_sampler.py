"""Draws: what each parameter does, and that randomness is a function of its key alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from inference_runtime.generation import SamplingParams  # noqa: E402
from inference_runtime.runner import StepRequest  # noqa: E402
from inference_runtime.runners.torch_lm.checkpoint import GenerationDefaults  # noqa: E402
from inference_runtime.runners.torch_lm.randomness import uniform  # noqa: E402
from inference_runtime.runners.torch_lm.sampler import draw_tokens, top_logprobs  # noqa: E402
from inference_runtime.runners.torch_lm.sequence import Sequence, make_sequence  # noqa: E402

DEFAULTS = GenerationDefaults(eos_token_ids=frozenset({0}), temperature=1.0, top_p=1.0, top_k=0)
LOGITS = [1.0, 3.0, 2.0, 0.0, -1.0]


def state(sampling: SamplingParams, *, output: tuple[int, ...] = (), choice: int = 0) -> Sequence:
    request = StepRequest(1, [4], replace(sampling, max_tokens=100), choice=choice, generated_prefix=output)
    return make_sequence(request, DEFAULTS, context_tokens=1000)


def draws(sampling: SamplingParams, count: int = 2000) -> Counter[int | None]:
    """Tokens drawn from LOGITS with seeds 0 … count - 1, all in one batch."""
    rows = torch.tensor([LOGITS] * count)
    return Counter(draw_tokens(rows, [state(replace(sampling, seed=seed)) for seed in range(count)]))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(draws(SamplingParams(temperature=0.0), 10)) == {1}


def test_frequencies_follow_the_distribution() -> None:
    weights = [math.exp(x) for x in LOGITS]
    seen = draws(SamplingParams(temperature=1.0), 4000)
    for token, weight in enumerate(weights):
        assert seen[token] / 4000 == pytest.approx(weight / sum(weights), abs=0.03)


def test_a_high_temperature_flattens_and_a_low_one_sharpens() -> None:
    assert draws(SamplingParams(temperature=100.0))[4] > 300
    assert draws(SamplingParams(temperature=0.1))[1] > 1990


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (SamplingParams(top_k=1), {1}),
        (SamplingParams(top_k=2), {1, 2}),
        (SamplingParams(top_p=0.01), {1}),
        (SamplingParams(top_p=0.7), {1, 2}),
        (SamplingParams(min_p=0.3), {1, 2}),
        (SamplingParams(top_k=3, top_p=0.99), {0, 1, 2}),
        (SamplingParams(logit_bias={3: 100.0}), {3}),
        (SamplingParams(logit_bias={1: -100.0, 2: -100.0}), {0, 3, 4}),
    ],
)
def test_what_can_be_drawn(sampling: SamplingParams, possible: set[int]) -> None:
    assert set(draws(sampling)) == possible


def test_a_draw_depends_on_seed_choice_and_index_and_on_nothing_else() -> None:
    keys = [(s, c, i) for s in range(5) for c in range(3) for i in range(5)]
    assert len({uniform(*key) for key in keys}) == len(keys)
    assert uniform(7, 0, 3) == uniform(7, 0, 3)
    assert all(0.0 <= uniform(*key) < 1.0 for key in keys)


def test_negative_and_huge_seeds_are_fine() -> None:
    assert uniform(-1, 0, 0) != uniform(1, 0, 0)
    assert 0.0 <= uniform(2**80 + 1, 0, 0) < 1.0


def test_neighbouring_keys_give_independent_numbers() -> None:
    numbers = [uniform(1, 0, i) for i in range(2000)]
    assert sum(numbers) / 2000 == pytest.approx(0.5, abs=0.02)
    correlation = sum((a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(numbers)) / 2000
    assert abs(correlation) < 0.01


def test_a_row_is_drawn_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(3)
    rows = torch.randn(16, 500) * 3
    states = [state(SamplingParams(seed=i, temperature=0.9, top_p=0.95, top_k=40), output=(1,) * i) for i in range(16)]
    together = draw_tokens(rows.clone(), states)
    alone = [draw_tokens(rows[i : i + 1].clone(), [states[i]])[0] for i in range(16)]
    assert together == alone


def test_greedy_and_drawn_rows_share_a_batch() -> None:
    rows = torch.tensor([LOGITS, LOGITS, LOGITS])
    kinds = [SamplingParams(temperature=0.0), SamplingParams(top_k=1, seed=1), SamplingParams(temperature=0.0)]
    assert draw_tokens(rows, [state(k) for k in kinds]) == [1, 1, 1]


def test_ends_of_text_are_barred_until_min_tokens() -> None:
    rows = torch.tensor([[9.0, 1.0, 0.0, 0.0, 0.0]])
    sampling = SamplingParams(temperature=0.0, min_tokens=2)
    assert draw_tokens(rows.clone(), [state(sampling, output=(3,))]) == [1]
    assert draw_tokens(rows.clone(), [state(sampling, output=(3, 3))]) == [0]


def test_penalties_count_the_tokens_so_far() -> None:
    greedy = SamplingParams(temperature=0.0)
    cases = {
        "frequency": (replace(greedy, frequency_penalty=0.6), (1, 1), 2),
        "presence": (replace(greedy, presence_penalty=1.5), (1,), 2),
        "presence of another": (replace(greedy, presence_penalty=1.5), (3,), 1),
        "repetition": (replace(greedy, repetition_penalty=2.0), (1,), 2),
    }
    for name, (sampling, output, expected) in cases.items():
        assert draw_tokens(torch.tensor([LOGITS]), [state(sampling, output=output)]) == [expected], name


def test_repetition_counts_the_prompt_and_the_others_do_not() -> None:
    rows = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.2]])  # the prompt of `state` is token 4
    assert draw_tokens(rows.clone(), [state(SamplingParams(temperature=0.0, repetition_penalty=2.0))]) == [1]
    assert draw_tokens(rows.clone(), [state(SamplingParams(temperature=0.0, presence_penalty=2.0))]) == [4]


def test_logits_that_are_not_numbers_fail_their_row_only() -> None:
    rows = torch.tensor([LOGITS, [float("nan")] * 5, LOGITS])
    kinds = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0), SamplingParams(seed=1, top_k=1)]
    assert draw_tokens(rows, [state(k) for k in kinds]) == [1, None, 1]


def test_logprobs_are_those_of_the_whole_vocabulary() -> None:
    own, others = top_logprobs(torch.tensor(LOGITS), 2, 3)
    total = math.log(sum(math.exp(x) for x in LOGITS))
    assert own == pytest.approx(2.0 - total, abs=1e-5)
    assert [token for token, _ in others] == [1, 2, 0]
    assert others[0][1] == pytest.approx(3.0 - total, abs=1e-5)
