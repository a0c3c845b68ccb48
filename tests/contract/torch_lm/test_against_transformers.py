"""The same numbers as transformers, which shares no code with us: prefill, decode, batches, chunks, every shape of Llama."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from inference_runtime.errors import BadRequest
from inference_runtime.generation import Message, Role, SamplingParams, TextPart
from inference_runtime.runners.torch_lm.checkpoint import DEMO_FOLDER

VOCABULARY = 1024
TOLERANCE = 1e-3
MakeLlama = Callable[..., tuple[Path, Any]]
Drive = Callable[..., Any]
#: Every logprob of the vocabulary, greedy: a black box that shows all logits, up to the constant that softmax removes.
EVERYTHING = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, top_logprobs=VOCABULARY)

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one head per key": {"num_key_value_heads": 8},
    "one key head": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "another base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3 scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def prompts(count: int, longest: int = 70, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(7, VOCABULARY) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@torch.inference_mode()
def reference(model: Any, tokens: list[int], outputs: int) -> torch.Tensor:
    """Logprobs [outputs, vocabulary] before each of the last `outputs` tokens, computed without a cache."""
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits[len(tokens) - outputs - 1 : -1].log_softmax(-1)


def their_chat(tokenizer: Any, turns: list[tuple[str, str]]) -> list[int]:
    """Token ids of a conversation, by transformers."""
    messages = [{"role": role, "content": text} for role, text in turns]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ids: list[int] = encoded["input_ids"]
    return ids


def assert_same_numbers(model: Any, prompt: list[int], answer: Any) -> None:
    expected = reference(model, prompt + answer.token_ids, len(answer.token_ids))
    for step, logprob in enumerate(answer.logprobs):
        ours = torch.empty(VOCABULARY)
        ours[torch.tensor([t.token_id for t in logprob.top])] = torch.tensor([t.logprob for t in logprob.top])
        assert (ours - expected[step]).abs().max() < TOLERANCE, f"token {step} of the answer"
        assert logprob.logprob == pytest.approx(float(expected[step][logprob.token_id]), abs=TOLERANCE)


@pytest.mark.parametrize("linear", ["packed", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_prefill_and_decode_in_a_batch_of_unequal_requests(
    make_llama: MakeLlama, drive: Drive, shape: str, linear: str
) -> None:
    folder, model = make_llama(**SHAPES[shape])
    driver = drive(folder, linear=linear, block_size=8)
    asked = prompts(5)
    numbers = [driver.admit(prompt, EVERYTHING) for prompt in asked]
    answers = driver.drain()
    for number, prompt in zip(numbers, asked, strict=True):
        assert len(answers[number].token_ids) == 12
        assert_same_numbers(model, prompt, answers[number])


@pytest.mark.parametrize(
    "options", [{"max_step_tokens": 7}, {"max_step_tokens": 20, "block_size": 1}, {"kv_cache_tokens": 168, "block_size": 4}]
)
def test_logits_stay_the_same_in_chunks_and_after_preemption(
    make_llama: MakeLlama, drive: Drive, options: dict[str, int]
) -> None:
    folder, model = make_llama()
    driver = drive(folder, max_context_tokens=128, **options)
    asked = prompts(6, seed=2)
    numbers = [driver.admit(prompt, EVERYTHING) for prompt in asked]
    answers = driver.drain()
    for number, prompt in zip(numbers, asked, strict=True):
        assert_same_numbers(model, prompt, answers[number])


def test_greedy_text_is_that_of_generate(make_llama: MakeLlama, drive: Drive) -> None:
    folder, model = make_llama(seed=3)
    driver = drive(folder)
    asked = prompts(6, seed=3)
    numbers = [driver.admit(p, SamplingParams(max_tokens=40, temperature=0.0)) for p in asked]
    answers = driver.drain()
    for number, prompt in zip(numbers, asked, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        assert answers[number].token_ids == out[0, len(prompt) :].tolist()


def test_the_demo_model_loads_in_transformers_and_says_the_same(demo: Any) -> None:
    model: Any = transformers.LlamaForCausalLM.from_pretrained(DEMO_FOLDER)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER)
    assert model.dtype == torch.float32
    for asked in ("Explain how a request travels.", "What is a banana doing in my engine?", "What is 3 + 4?"):
        prompt = their_chat(tokenizer, [("user", asked)])
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=150)
        answer = demo.one(prompt, SamplingParams(max_tokens=150))
        assert answer.token_ids == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "Hello")],
        [("system", "Be brief."), ("user", "What is 2 + 2?")],
        [("user", "Hi"), ("assistant", "Hello!"), ("user", "  spaces, ünï¢ødé 🚀\n\nand lines  ")],
        [("user", "call it"), ("tool", '{"a": 1}'), ("user", "")],
    ],
)
def test_a_conversation_has_the_tokens_that_transformers_gives_it(demo: Any, turns: list[tuple[str, str]]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER)
    theirs = their_chat(tokenizer, turns)
    ours = demo.codec.encode_chat([Message(Role[r.upper()], (TextPart(t),)) for r, t in turns])
    assert ours == theirs


@pytest.mark.parametrize("text", ["", "The capital of France", "naïve 🚀 text", " leading"])
def test_plain_text_has_the_tokens_that_transformers_gives_it(demo: Any, text: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER)
    assert demo.codec.encode(text) == tokenizer(text)["input_ids"]


def test_a_checkpoint_in_several_files_is_read_whole(make_llama: MakeLlama, drive: Drive) -> None:
    folder, model = make_llama(shard_size="300KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    answer = drive(folder).one([9, 8, 7], EVERYTHING)
    assert_same_numbers(model, [9, 8, 7], answer)
    files[1].unlink()
    with pytest.raises(BadRequest, match=files[1].name):
        drive(folder)


def test_a_tensor_of_another_shape_is_named(make_llama: MakeLlama, drive: Drive) -> None:
    folder, _ = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(BadRequest, match=r"gate_proj\.weight.*\[112, 64\].*\[96, 64\]"):
        drive(folder)


def test_a_missing_tensor_is_named(make_llama: MakeLlama, drive: Drive) -> None:
    folder, _ = make_llama(tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(BadRequest, match=r"no tensor lm_head\.weight"):
        drive(folder)


def test_bfloat16_stays_close_to_float32(make_llama: MakeLlama, drive: Drive) -> None:
    folder, model = make_llama(initializer_range=0.05)
    answer = drive(folder, dtype="bfloat16").one([11, 12, 13, 14], EVERYTHING)
    expected = reference(model, [11, 12, 13, 14, *answer.token_ids], len(answer.token_ids))
    for step, logprob in enumerate(answer.logprobs):
        assert logprob.logprob == pytest.approx(float(expected[step][logprob.token_id]), abs=0.1)


@pytest.mark.gpu
def test_logits_on_a_gpu(make_llama: MakeLlama) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the GPU path of the torch runtime is NOT tested here")
    from inference_runtime.runner import RunnerConfig, StepRequest, TransportKind
    from inference_runtime.runners.torch_lm import RUNTIME

    folder, model = make_llama()
    runner = RUNTIME.make_runner(RunnerConfig(model=str(folder), accelerators=(0,)))
    info = runner.load(lambda progress: None)
    assert info.transport is TransportKind.LOCAL_GPU
    asked = prompts(4)
    answers: dict[int, list[int]] = {i: [] for i in range(len(asked))}
    for i, prompt in enumerate(asked):
        runner.admit(StepRequest(i, prompt, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)))
    while runner.has_work():
        for output in runner.step():
            answers[output.sequence_id] += output.token_ids
    runner.close()
    for i, prompt in enumerate(asked):
        expected = reference(model, prompt + answers[i], 8)
        chosen = expected.gather(1, torch.tensor(answers[i]).unsqueeze(1)).squeeze(1)
        assert ((expected.max(-1).values - chosen) < TOLERANCE).all()
