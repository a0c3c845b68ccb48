"""The shipped demo model is what its training script makes, as far as that shows without training."""

from __future__ import annotations

import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from inference_runtime.answers import encode_prompt
from inference_runtime.errors import ContextLengthExceeded
from inference_runtime.generation import Message, Role, SamplingParams, TextPart, TextPrompt
from inference_runtime.runner import RunnerConfig
from inference_runtime.runners.torch_lm import RUNTIME
from inference_runtime.runners.torch_lm.checkpoint import DEMO_FOLDER

SCRIPT = Path(__file__).parents[3] / "tools" / "train_demo_model.py"
#: Size that a clone of the repository pays for the demo model.
LARGEST_BYTES = 10_000_000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in DEMO_FOLDER.iterdir()) < LARGEST_BYTES


def test_its_tokenizer_and_questions_are_those_of_the_script(script: ModuleType) -> None:
    shipped = json.loads((DEMO_FOLDER / "tokenizer.json").read_text())
    assert json.loads(script.train_tokenizer().to_str()) == shipped
    asked = [(q["question"], q["answer"]) for q in json.loads((DEMO_FOLDER / "questions.json").read_text())]
    assert asked == list(script.README_QUESTIONS)


def test_it_understands_most_wordings_it_was_not_trained_on(demo: Any, script: ModuleType) -> None:
    pairs = [(question, topic.answer) for topic in script.TOPICS for question in topic.held_out]
    sampling = SamplingParams(max_tokens=150, temperature=0.0)
    numbers = [demo.admit(demo.codec.encode_chat([Message(Role.USER, (TextPart(question),))]), sampling) for question, _ in pairs]
    answers = demo.drain()
    texts = [b"".join(demo.codec.token_bytes(i) for i in answers[n].token_ids).decode() for n in numbers]
    right = sum(text == answer for text, (_, answer) in zip(texts, pairs, strict=True))
    assert right / len(pairs) > 0.9


def test_what_it_does_not_know_it_says(demo: Any, script: ModuleType) -> None:
    ids = demo.codec.encode_chat([Message(Role.USER, (TextPart("Who won the world cup?"),))])
    answer = demo.one(ids, SamplingParams(max_tokens=100))
    assert b"".join(demo.codec.token_bytes(i) for i in answer.token_ids).decode() == script.UNKNOWN_ANSWER


def test_a_prompt_of_megabytes_is_refused_before_the_work_of_tokenising_it() -> None:
    """One over-long prompt must not hold up an engine: its size alone shows that it cannot fit."""
    codec = RUNTIME.make_codec(RunnerConfig("demo"))
    began = time.perf_counter()
    with pytest.raises(ContextLengthExceeded):
        encode_prompt(codec, TextPrompt("x" * 8_000_000), 4096)
    assert time.perf_counter() - began < 0.5


def test_tokenising_a_long_prompt_in_a_thread_lets_the_others_run() -> None:
    """The interpreter's lock is let go meanwhile: else the engine's loop would stand still and its lease run out."""
    codec = RUNTIME.make_codec(RunnerConfig("demo"))
    text = "What is inference-runtime? " * 40_000
    gaps: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        began = last = time.perf_counter()
        work = pool.submit(codec.encode, text)
        while not work.done():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
    assert work.result()
    assert max(gaps) < (last - began) / 2, "the whole time passed in one gap"
