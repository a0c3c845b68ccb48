"""Random Llama checkpoints made by transformers, and a driver that runs requests to their end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from inference_runtime.generation import FinishReason, SamplingParams, TokenLogprob  # noqa: E402
from inference_runtime.runner import RunnerConfig, RunnerInfo, StepRequest, StepRunner  # noqa: E402
from inference_runtime.runners.torch_lm import RUNTIME  # noqa: E402
from inference_runtime.runners.torch_lm.checkpoint import DEMO_FOLDER  # noqa: E402


@dataclass
class Answer:
    """What came out for one sequence."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    error: Exception | None = None


class Driver:
    """A loaded runner with numbers given to sequences for us."""

    def __init__(self, model: str, *, max_batch: int = 8, max_context_tokens: int = 0, **options: object) -> None:
        options = {"threads": 1, **options}
        config = RunnerConfig(model=model, options=options, max_batch=max_batch, max_context_tokens=max_context_tokens)
        RUNTIME.validate(config)
        self.codec = RUNTIME.make_codec(config)
        self.runner: StepRunner = RUNTIME.make_runner(config)
        self.info: RunnerInfo = self.runner.load(lambda progress: None)
        self._next = 0

    def admit(self, prompt: Sequence[int], sampling: SamplingParams, *, prefix: Sequence[int] = (), choice: int = 0) -> int:
        self._next += 1
        self.runner.admit(StepRequest(self._next, prompt, sampling, choice=choice, generated_prefix=prefix))
        return self._next

    def step(self, answers: dict[int, Answer]) -> None:
        for output in self.runner.step():
            answer = answers.setdefault(output.sequence_id, Answer())
            assert answer.finish_reason is None, "output after the end"
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs
            answer.finish_reason, answer.error = output.finish_reason, output.error

    def drain(self) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        while self.runner.has_work():
            self.step(answers)
        assert self.runner.kv_use() == 0.0, "blocks leaked"
        return answers

    def one(self, prompt: Sequence[int], sampling: SamplingParams, *, prefix: Sequence[int] = (), choice: int = 0) -> Answer:
        number = self.admit(prompt, sampling, prefix=prefix, choice=choice)
        return self.drain()[number]


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """Makes drivers and closes their runners."""
    made: list[Driver] = []

    def make(model: str | Path, **settings: Any) -> Driver:
        made.append(Driver(str(model), **settings))
        return made[-1]

    yield make
    for driver in made:
        driver.runner.close()


@pytest.fixture(scope="module")
def demo() -> Iterator[Driver]:
    """The demo model, loaded once per module: every test leaves it idle."""
    driver = Driver("demo", max_batch=32)
    yield driver
    driver.runner.close()


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Writes a random Llama checkpoint with the demo model's tokenizer; returns its folder and transformers' model."""

    def make(*, seed: int = 0, shard_size: str = "5GB", **values: Any) -> tuple[Path, Any]:
        torch.manual_seed(seed)
        fields = {
            "vocab_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.25,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "tie_word_embeddings": False,
            **values,
        }
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:  # transformers starts them at 0 and 1, which would hide a mistake
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        folder = tmp_path / f"llama-{seed}"
        model.save_pretrained(folder, max_shard_size=shard_size)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO_FOLDER / name, folder / name)
        return folder, model

    return make
