"""The scripted runtime: recomputable tokens, and options that do what they say."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.errors import BadRequest, ContextPoisoned, ServerError, Unsupported
from inference_runtime.generation import FinishReason, Media, Message, Role, SamplingParams
from inference_runtime.runner import RunnerConfig, StepOutput, StepRequest, load_runtime
from inference_runtime.runners.scripted import FIRST_WORD, RUNTIME, VOCAB_SIZE, ScriptedCodec, ScriptedRunner, scripted_tokens
from inference_runtime.runners.scripted_faults import HANG, confirmed, slow, write_orders
from inference_runtime.supervision import Directive, Fault, decide
from inference_runtime.testing.scripted import expected_text, expected_tokens, user_says


def runner(model: str = "m", **options: object) -> ScriptedRunner:
    """A loaded runner."""
    made = RUNTIME.make_runner(RunnerConfig(model, options))
    made.load(lambda progress: None)
    return made


def run(subject: ScriptedRunner, *requests: StepRequest) -> dict[int, list[StepOutput]]:
    """Step until nothing is left."""
    for request in requests:
        subject.admit(request)
    outputs: dict[int, list[StepOutput]] = {r.sequence_id: [] for r in requests}
    while subject.has_work():
        for output in subject.step():
            outputs[output.sequence_id].append(output)
    return outputs


def tokens(outputs: list[StepOutput]) -> list[int]:
    """All tokens, in order."""
    return [t for o in outputs for t in o.token_ids]


def request(number: int = 1, prompt: str = "hi", prefix: tuple[int, ...] = (), **sampling: object) -> StepRequest:
    """A sequence."""
    params = {"max_tokens": 8, **sampling}
    return StepRequest(number, list(prompt.encode()), SamplingParams(**params), generated_prefix=prefix)  # type: ignore[arg-type]


def test_it_is_registered() -> None:
    """Found by name, like any runtime."""
    assert load_runtime("scripted") is RUNTIME


def test_the_answer_is_fixed_for_all_time() -> None:
    """A change of the function would make old and new processes disagree in the middle of a stream."""
    assert expected_tokens("hello", seed=7, n=6) == [3594, 4058, 3257, 2210, 606, 3005]
    assert expected_tokens(user_says("hello"), n=3) == [2520, 3334, 1050]
    assert expected_text("hello", seed=7, n=2) == " word3338 word3802"


@given(st.text(max_size=20), st.integers(0, 2**64 - 1), st.integers(0, 70))
def test_a_stream_can_begin_anywhere(prompt: str, seed: int, start: int) -> None:
    """Resumption needs no state: token i is the same whoever computes it."""
    ids = list(prompt.encode())
    assert list(islice(scripted_tokens(ids, seed, 0, start), 5)) == list(islice(scripted_tokens(ids, seed, 0), start + 5))[start:]


def test_every_word_is_distinct_text() -> None:
    """So that text tells tokens apart."""
    codec = ScriptedCodec()
    words = {codec.token_bytes(t) for t in range(FIRST_WORD, VOCAB_SIZE)}
    assert len(words) == VOCAB_SIZE - FIRST_WORD
    assert all(word.decode().startswith(" word") for word in words)


def test_sequences_step_together_and_do_not_mix() -> None:
    """Each gets its own stream."""
    outputs = run(runner(), request(1, "a"), request(2, "b", seed=3))
    assert tokens(outputs[1]) == expected_tokens("a", n=8)
    assert tokens(outputs[2]) == expected_tokens("b", seed=3, n=8)


def test_a_prefix_is_continued() -> None:
    """With the tokens that the first part did not have, up to the same max_tokens."""
    whole = expected_tokens("hi", n=8)
    outputs = run(runner(), request(prefix=tuple(whole[:3])))
    assert tokens(outputs[1]) == whole[3:]
    assert outputs[1][-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("options", "sampling", "length", "finish"),
    [
        ({}, {"max_tokens": 8}, 8, FinishReason.LENGTH),
        ({}, {"max_tokens": 200}, 200, FinishReason.LENGTH),
        ({"max_context_tokens": 100}, {"max_tokens": 98}, 64, FinishReason.STOP),
        ({"tokens": 5}, {"max_tokens": 8}, 5, FinishReason.STOP),
        ({"tokens": 5}, {"max_tokens": 4}, 4, FinishReason.LENGTH),
        ({"tokens": 5}, {"max_tokens": 8, "ignore_eos": True}, 8, FinishReason.LENGTH),
        ({"tokens": 5}, {"max_tokens": 8, "min_tokens": 7}, 7, FinishReason.STOP),
        ({"tokens_per_step": 3}, {"max_tokens": 8}, 8, FinishReason.LENGTH),
    ],
)
def test_length(options: dict[str, object], sampling: dict[str, Any], length: int, finish: FinishReason) -> None:
    """How long an answer is, and why it ends. A limit at the context's end counts as none."""
    outputs = run(runner("length", **options), request(1, **sampling))[1]
    assert (len(tokens(outputs)), outputs[-1].finish_reason) == (length, finish)


def test_a_stop_token_ends_the_sequence() -> None:
    """It is the last token."""
    whole = expected_tokens("hi", n=8)
    outputs = run(runner(tokens_per_step=8), request(stop_token_ids=(whole[2],)))[1]
    assert tokens(outputs) == whole[:3]
    assert outputs[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("options", "param", "hint"),
    [
        ({"pace": 0.02}, "runtime_config.pace", "did you mean 'pace_s'"),
        ({"zzz": 1}, "runtime_config.zzz", "known are"),
        ({"pace_s": "fast"}, "runtime_config.pace_s", "number"),
        ({"pace_s": -1}, "runtime_config.pace_s", "0 or more"),
        ({"tokens": 1.5}, "runtime_config.tokens", "whole"),
        ({"load_fails": 1}, "runtime_config.load_fails", "true or false"),
        ({"poison_on": 1}, "runtime_config.poison_on", "a text"),
        ({"tokens_per_step": 0}, "runtime_config.tokens_per_step", "too small"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, object], param: str, hint: str) -> None:
    """A setting that looks set is set (trap 34)."""
    with pytest.raises(BadRequest, match=hint) as caught:
        RUNTIME.validate(RunnerConfig("m", options))
    assert caught.value.param == param


def test_poison_comes_at_the_token_asked_for_and_as_often() -> None:
    """Counted over the lives of one model and options."""
    options = {"poison_at_token": 5, "poison_times": 2}
    for _ in range(2):
        subject = runner("poison-token", **options)
        subject.admit(request(1))
        assert [len(subject.step()) for _ in range(4)] == [1, 1, 1, 1]
        with pytest.raises(ContextPoisoned):
            subject.step()
    assert len(tokens(run(runner("poison-token", **options), request(1))[1])) == 8


def test_poison_at_a_step_hits_every_life_without_a_limit() -> None:
    """poison_times 0."""
    for _ in range(3):
        subject = runner("poison-step", poison_at_step=2, poison_times=0)
        subject.admit(request(1))
        subject.step()
        with pytest.raises(ContextPoisoned):
            subject.step()


def test_poison_on_a_text_hits_every_life_that_has_such_a_prompt() -> None:
    """The others are well by themselves."""
    for _ in range(3):
        subject = runner("poison-prompt", poison_on="déjà")
        subject.admit(request(1))
        assert len(subject.step()) == 1
        subject.admit(request(2, "again: déjà vu"))
        with pytest.raises(ContextPoisoned):
            subject.step()
        subject.abort(2)
        assert len(subject.step()) == 1


def test_faults_at_admission_and_load() -> None:
    """A refused sequence concerns that sequence; a failed load is the deployment's fault."""
    subject = runner(fail_admit=2)
    subject.admit(request(1))
    with pytest.raises(ServerError):
        subject.admit(request(2))
    with pytest.raises(BadRequest, match="load_fails"):
        runner(load_fails=True)


def test_running_out_of_memory_is_known_by_its_class() -> None:
    """As the decider sees it."""
    subject = runner(oom_at_step=1)
    subject.admit(request(1))
    with pytest.raises(RuntimeError) as caught:
        subject.step()
    assert decide(Fault.of(caught.value)).directive is Directive.RESUME


def test_a_prompt_that_is_too_large_runs_out_of_memory_each_time_and_others_do_not() -> None:
    """R-07: it is the prompt's doing, in every batch that it is part of."""
    subject = runner(oom_prompt_tokens=4)
    subject.admit(request(1, "1234"))
    assert len(subject.step()) == 1
    subject.admit(request(2, "12345"))
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            subject.step()
        assert decide(Fault.of(caught.value)).directive is Directive.RESUME
    subject.abort(2)
    assert len(subject.step()) == 1


def test_a_process_is_told_to_be_slow_and_to_hang_while_it_runs(tmp_path: Path) -> None:
    """R-06, R-08: it confirms what it has, for as long as it has it, and others are not concerned."""
    told, pid = tmp_path / "faults", os.getpid()
    subject = runner(faults_file=str(told), pace_s=0.01)
    subject.admit(request(1))

    def step() -> float:
        begin = time.monotonic()
        assert len(subject.step()) == 1
        return time.monotonic() - begin

    write_orders(told, {pid + 1: HANG})
    step()
    assert confirmed(told, pid) == ""
    write_orders(told, {pid: slow(20)})
    assert step() >= 0.2 - 0.01
    assert confirmed(told, pid) == "slow 20"

    write_orders(told, {pid: HANG})
    with ThreadPoolExecutor(1) as thread:
        stepping = thread.submit(step)
        deadline = time.monotonic() + 10
        while confirmed(told, pid) != HANG:
            assert time.monotonic() < deadline
        assert not stepping.done()
        write_orders(told, {})
        stepping.result(10)
    assert confirmed(told, pid) == ""


def test_media_are_refused() -> None:
    """Never ignored."""
    with pytest.raises(Unsupported) as caught:
        ScriptedCodec().encode_chat([Message(Role.USER, (Media("image", url="http://x"),))])
    assert caught.value.metadata["feature"] == "image"
