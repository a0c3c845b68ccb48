"""The StepRunner contract: resumption, batches, preemption, abort, limits, and one sequence's failure that stays its own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_runtime.errors import BadRequest, ContextLengthExceeded, Internal
from inference_runtime.generation import FinishReason, Message, Role, SamplingParams, TextPart
from inference_runtime.runner import Isolation, TransportKind
from inference_runtime.runners.torch_lm.checkpoint import DEMO_FOLDER

QUESTIONS = [(q["question"], q["answer"]) for q in json.loads((DEMO_FOLDER / "questions.json").read_text())]
GREEDY = SamplingParams(max_tokens=200, temperature=0.0)
DRAWN = SamplingParams(max_tokens=40, temperature=1.2, top_p=0.95, seed=42, ignore_eos=True)
Drive = Callable[..., Any]
MakeLlama = Callable[..., tuple[Path, Any]]


def chat(driver: Any, question: str) -> list[int]:
    ids: list[int] = driver.codec.encode_chat([Message(Role.USER, (TextPart(question),))])
    return ids


def text_of(driver: Any, ids: list[int]) -> str:
    return b"".join(driver.codec.token_bytes(i) for i in ids).decode()


@pytest.mark.parametrize(("question", "answer"), QUESTIONS)
def test_the_demo_model_answers_word_for_word(demo: Any, question: str, answer: str) -> None:
    got = demo.one(chat(demo, question), GREEDY)
    assert text_of(demo, got.token_ids) == answer
    assert got.finish_reason is FinishReason.STOP


def test_there_are_ten_questions_and_one_long_answer(demo: Any) -> None:
    assert len(QUESTIONS) == 10
    assert max(len(demo.codec.encode(answer)) for _, answer in QUESTIONS) >= 80


def test_ten_at_once_say_the_same_and_greedy_is_the_default(demo: Any) -> None:
    numbers = [demo.admit(chat(demo, q), SamplingParams(max_tokens=200)) for q, _ in QUESTIONS]
    answers = demo.drain()
    assert [text_of(demo, answers[n].token_ids) for n in numbers] == [a for _, a in QUESTIONS]


def test_the_runner_says_what_it_is(demo: Any) -> None:
    info = demo.info
    assert (info.runtime, info.transport, info.isolation) == ("torch", TransportKind.LOCAL_CPU, Isolation.THREAD)
    assert info.max_context_tokens == 4096
    assert info.capabilities.resume
    assert info.capabilities.seed
    assert info.capabilities.deterministic


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, replace(DRAWN, repetition_penalty=1.3, frequency_penalty=0.5)])
def test_an_answer_goes_on_the_same_from_every_token(demo: Any, sampling: SamplingParams) -> None:
    prompt = chat(demo, "What does the gateway do?")
    whole = demo.one(prompt, sampling)
    numbers = {split: demo.admit(prompt, sampling, prefix=whole.token_ids[:split]) for split in range(len(whole.token_ids) + 1)}
    answers = demo.drain()
    for split, number in numbers.items():
        assert answers[number].token_ids == whole.token_ids[split:], f"resumed after {split} tokens"
        assert answers[number].finish_reason is whole.finish_reason


def test_a_prefix_that_is_the_whole_answer_ends_at_once(demo: Any) -> None:
    prompt = chat(demo, "Say yes.")
    whole = demo.one(prompt, GREEDY)
    assert demo.one(prompt, GREEDY, prefix=whole.token_ids).finish_reason is FinishReason.STOP
    capped = demo.one(prompt, replace(GREEDY, max_tokens=1), prefix=whole.token_ids[:1])
    assert (capped.token_ids, capped.finish_reason) == ([], FinishReason.LENGTH)


def test_a_seed_draws_the_same_alone_and_among_others(demo: Any) -> None:
    prompt = chat(demo, "Tell me a joke.")
    alone = demo.one(prompt, DRAWN)
    numbers = []
    for seed in range(20):
        demo.admit(chat(demo, QUESTIONS[seed % 10][0]), replace(DRAWN, seed=seed, max_tokens=10 + seed))
        if seed in (3, 17):
            numbers.append(demo.admit(prompt, DRAWN))
            demo.step({})
    answers = demo.drain()
    missed = [len(alone.token_ids) - len(answers[n].token_ids) for n in numbers]  # tokens of the steps before the drain
    for number, skipped in zip(numbers, missed, strict=True):
        assert answers[number].token_ids == alone.token_ids[skipped:]
        assert skipped <= 2


def test_choices_and_seeds_differ(demo: Any) -> None:
    prompt = chat(demo, "asdf")
    hot = replace(DRAWN, temperature=2.0)
    drawn = {tuple(demo.one(prompt, replace(hot, seed=s), choice=c).token_ids) for s in (1, 2) for c in (0, 1)}
    assert len(drawn) == 4


def test_without_a_seed_two_draws_differ(demo: Any) -> None:
    hot = replace(DRAWN, temperature=3.0, seed=None)
    assert demo.one(chat(demo, "asdf"), hot).token_ids != demo.one(chat(demo, "asdf"), hot).token_ids


def test_a_tiny_cache_preempts_and_changes_nothing(demo: Any, drive: Drive) -> None:
    tiny = drive("demo", max_context_tokens=192, kv_cache_tokens=256, block_size=8)
    assert tiny.info.max_context_tokens == 192
    kinds = [GREEDY if i % 2 else replace(DRAWN, seed=i) for i in range(10)]
    prompts = [chat(demo, q) for q, _ in QUESTIONS]
    small = [tiny.admit(p, replace(k, max_tokens=110)) for p, k in zip(prompts, kinds, strict=True)]
    large = [demo.admit(p, replace(k, max_tokens=110)) for p, k in zip(prompts, kinds, strict=True)]
    of_tiny, of_demo = tiny.drain(), demo.drain()
    assert tiny.runner._scheduler.preemptions > 0
    assert [of_tiny[n].token_ids for n in small] == [of_demo[n].token_ids for n in large]


def test_the_context_is_no_longer_than_the_cache(drive: Drive) -> None:
    assert drive("demo", kv_cache_tokens=64).info.max_context_tokens == 64


def test_abort_frees_the_blocks_of_waiting_and_running_sequences(demo: Any) -> None:
    long = replace(GREEDY, ignore_eos=True, max_tokens=1000)
    numbers = [demo.admit(chat(demo, "Count to twenty."), long) for _ in range(40)]  # 32 run, 8 wait
    demo.step({})
    assert demo.runner.kv_use() > 0
    for number in numbers:
        demo.runner.abort(number)
        demo.runner.abort(number)
    demo.runner.abort(999_999)
    assert not demo.runner.has_work()
    assert demo.runner.kv_use() == 0.0
    assert demo.runner.step() == []


def test_aborting_one_leaves_the_others_as_they_are(demo: Any) -> None:
    question, answer = QUESTIONS[8]
    keep, drop = demo.admit(chat(demo, question), GREEDY), demo.admit(chat(demo, "Count."), GREEDY)
    seen: dict[int, Any] = {}
    for _ in range(5):
        demo.step(seen)
    demo.runner.abort(drop)
    before = list(seen[keep].token_ids)
    assert text_of(demo, before + demo.drain()[keep].token_ids) == answer


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_max_tokens_counts_the_prefix(demo: Any, max_tokens: int) -> None:
    prompt = chat(demo, "Explain how a request travels.")
    whole = demo.one(prompt, replace(GREEDY, max_tokens=max_tokens))
    assert (len(whole.token_ids), whole.finish_reason) == (max_tokens, FinishReason.LENGTH)
    rest = demo.one(prompt, replace(GREEDY, max_tokens=max_tokens), prefix=whole.token_ids[:1])
    assert rest.token_ids == whole.token_ids[1:]


def test_an_answer_ends_where_the_context_ends(drive: Drive) -> None:
    driver = drive("demo", max_context_tokens=50)
    prompt = chat(driver, "Count.")
    answer = driver.one(prompt, replace(GREEDY, ignore_eos=True))
    assert (len(prompt) + len(answer.token_ids), answer.finish_reason) == (50, FinishReason.LENGTH)


def test_positions_up_to_the_end_of_the_context_work(demo: Any) -> None:
    rng = random.Random(5)
    prompt = [rng.randrange(7, 1024) for _ in range(4090)]
    answer = demo.one(prompt, replace(GREEDY, ignore_eos=True))
    assert (len(answer.token_ids), answer.finish_reason, answer.error) == (6, FinishReason.LENGTH, None)


def test_stop_tokens_end_an_answer_and_are_part_of_it(demo: Any) -> None:
    prompt = chat(demo, "Count to twenty.")
    whole = demo.one(prompt, GREEDY).token_ids
    stop = whole[6]
    answer = demo.one(prompt, replace(GREEDY, stop_token_ids=(stop,), ignore_eos=True))
    assert answer.token_ids == whole[: whole.index(stop) + 1]
    assert answer.finish_reason is FinishReason.STOP


def test_ignore_eos_goes_on_and_min_tokens_holds_the_end_back(demo: Any) -> None:
    prompt = chat(demo, "Say yes.")
    eos = next(iter(demo.codec.eos_token_ids))
    assert len(demo.one(prompt, replace(GREEDY, ignore_eos=True, max_tokens=30)).token_ids) == 30
    held = demo.one(prompt, replace(GREEDY, min_tokens=12))
    assert eos not in held.token_ids[:12]
    assert len(held.token_ids) > 12


def test_a_prompt_without_room_for_an_answer_is_refused(demo: Any) -> None:
    with pytest.raises(ContextLengthExceeded, match="4096 tokens") as caught:
        demo.admit([9] * 4096, GREEDY)
    assert caught.value.metadata["tokens"] == "4096"


@pytest.mark.parametrize("prompt", [[], [1024], [-1], [5, 10**6]])
def test_a_prompt_that_is_no_prompt_is_refused(demo: Any, prompt: list[int]) -> None:
    with pytest.raises(BadRequest) as caught:
        demo.admit(prompt, GREEDY)
    assert caught.value.param == "prompt"
    assert not demo.runner.has_work()


def test_a_bias_on_an_unknown_token_is_refused(demo: Any) -> None:
    with pytest.raises(BadRequest, match="logit_bias"):
        demo.admit([9], replace(GREEDY, logit_bias={5000: 1.0}))


def test_logprobs_come_with_bytes(demo: Any) -> None:
    answer = demo.one(chat(demo, "Say yes."), replace(GREEDY, top_logprobs=2))
    first = answer.logprobs[0]
    assert len(answer.logprobs) == len(answer.token_ids)
    assert first.token == demo.codec.token_bytes(answer.token_ids[0])
    assert first.top[0].token_id == first.token_id
    assert 0 >= first.top[0].logprob >= first.top[1].logprob
    assert demo.one(chat(demo, "Say yes."), replace(GREEDY, top_logprobs=0)).logprobs[0].top == ()


def test_one_sequence_that_fails_fails_alone_and_leaves_nothing_behind(make_llama: MakeLlama, drive: Drive) -> None:
    folder, model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    model.save_pretrained(folder)
    driver = drive(folder, kv_cache_tokens=512, max_context_tokens=256)
    sampling = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logit_bias={7: -1e9})
    alone = driver.one([20, 21, 22], sampling)
    bad = driver.admit([20, 7, *[22] * 13], sampling)
    good = driver.admit([20, 21, 22], sampling)
    answers = driver.drain()
    assert isinstance(answers[bad].error, Internal)
    assert answers[good].error is None
    assert answers[good].token_ids == alone.token_ids
    driver.one([20, 7, *[22] * 13], sampling)
    short = driver.admit([20, 21, 22], sampling)  # it takes the block of the failed one, most of which it does not fill …
    driver.admit([20, 21, 22] * 5, sampling)  # … while it is padded to the length of this one
    assert driver.drain()[short].token_ids == alone.token_ids


def test_a_runner_is_closed_twice_and_before_it_was_loaded(drive: Drive) -> None:
    driver = drive("demo")
    driver.runner.close()
    driver.runner.close()
    assert not driver.runner.has_work()
    from inference_runtime.runner import RunnerConfig
    from inference_runtime.runners.torch_lm import RUNTIME

    RUNTIME.make_runner(RunnerConfig(model="demo")).close()


def test_loading_reports_its_bytes() -> None:
    from inference_runtime.runner import LoadProgress, RunnerConfig
    from inference_runtime.runners.torch_lm import RUNTIME

    seen: list[LoadProgress] = []
    runner = RUNTIME.make_runner(RunnerConfig(model="demo"))
    runner.load(seen.append)
    runner.close()
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    assert 0.9 < seen[-1].done_bytes / seen[-1].total_bytes <= 1.0
