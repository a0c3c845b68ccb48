"""The openai SDK, unchanged, asks for several choices: of `inferctl up`, to the word."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import openai
import pytest

from inference_runtime.testing.history import History
from inference_runtime.testing.scripted import expected_text, user_says
from tests.e2e.kit import Up

PROMPT, SEED, TOKENS, N = "hello", 7, 40, 3


@pytest.fixture
def client(up: Up) -> Iterator[openai.OpenAI]:
    """A client that does not retry: what fails shall be seen."""
    with openai.OpenAI(base_url=f"{up.http}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_a_whole_answer_has_each_choice_word_for_word(client: openai.OpenAI) -> None:
    """Each choice is what its number and the seed make of the prompt; the prompt is counted once."""
    one = client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": PROMPT}], seed=SEED, max_tokens=TOKENS
    )
    answer = client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": PROMPT}], seed=SEED, max_tokens=TOKENS, n=N
    )

    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (k, expected_text(user_says(PROMPT), SEED, k, TOKENS), "length") for k in range(N)
    ]
    assert len({c.message.content for c in answer.choices}) == N
    assert answer.choices[0].message.content == one.choices[0].message.content
    assert answer.usage is not None
    assert one.usage is not None
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens == N * TOKENS


def test_a_stream_carries_every_word_of_each_choice_once(client: openai.OpenAI) -> None:
    """Told apart by index, each in order, as they are made: no choice waits for another."""
    history = History()
    records = [history.begin(PROMPT, seed=SEED, choice=k, tokens=TOKENS, name=f"choice {k}") for k in range(2)]
    chunks = list(
        client.chat.completions.create(
            model="slow",
            messages=[{"role": "user", "content": PROMPT}],
            seed=SEED,
            max_tokens=TOKENS,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    order: list[int] = []
    for chunk in chunks:
        for choice in chunk.choices:
            records[choice.index].text(choice.delta.content or "")
            order.append(choice.index)
            if choice.finish_reason:
                records[choice.index].end()

    history.check()
    assert sum(a != b for a, b in pairwise(order)) > TOKENS / 2
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * TOKENS


def test_a_stop_string_ends_the_choice_that_says_it(client: openai.OpenAI) -> None:
    """Choices end for reasons of their own."""
    second = expected_text(user_says(PROMPT), SEED, 1, TOKENS)
    stop = second[len(second) // 2 :][:12]
    first = expected_text(user_says(PROMPT), SEED, 0, TOKENS)
    assert stop not in first

    answer = client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": PROMPT}], seed=SEED, max_tokens=TOKENS, n=2, stop=[stop]
    )

    assert [(c.message.content, c.finish_reason) for c in answer.choices] == [
        (first, "length"),
        (second.partition(stop)[0], "stop"),
    ]


def test_text_completions_have_choices(client: openai.OpenAI) -> None:
    """The older door."""
    answer = client.completions.create(model="echo", prompt=PROMPT, seed=SEED, max_tokens=8, n=2)

    assert [(c.index, c.text) for c in answer.choices] == [(k, expected_text(PROMPT, SEED, k, 8)) for k in range(2)]


def test_the_demo_model_draws_different_choices_again_and_again(client: openai.OpenAI) -> None:
    """A real model: hot, with a seed, the choices differ, and are the same ones the next time."""
    asked = [
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Count from 1 upwards."}],
            seed=7,
            temperature=2,
            max_tokens=12,
            n=4,
        )
        for _ in range(2)
    ]
    first, second = [[c.message.content for c in answer.choices] for answer in asked]

    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("change", "param"), [({"n": 9}, "n"), ({"n": 0}, "n"), ({"stop": ["a", "b", "c", "d", "e"]}, "stop")], ids=str
)
def test_too_much_is_refused_by_name(client: openai.OpenAI, change: dict[str, object], param: str) -> None:
    """400, and the field at fault."""
    body: dict[str, object] = {"model": "echo", "messages": [{"role": "user", "content": "x"}], **change}

    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)

    assert isinstance(caught.value.body, dict)
    assert caught.value.body["param"] == param
