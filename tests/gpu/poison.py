"""A small runtime on a real device, for tests: it computes its tokens there, and one kind of prompt makes the device assert.

A child finds it by "tests.gpu.poison:RUNTIME". torch is imported in the child alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from inference_runtime.generation import FinishReason
from inference_runtime.runner import (
    Capabilities,
    Isolation,
    LoadProgress,
    RunnerConfig,
    RunnerInfo,
    StepOutput,
    StepRequest,
    TransportKind,
)
from inference_runtime.runners.scripted import ScriptedRuntime

__all__ = ["KILLER", "PATH", "RUNTIME", "expected"]

PATH = "tests.gpu.poison:RUNTIME"
VOCABULARY = 997
#: A prompt that begins with this makes the device assert at its sixth token, unless it was begun elsewhere.
KILLER = 666
FATAL_TOKEN = 5
#: Memory that the runner holds, MiB, so that it is seen to come back.
BALLAST_MIB = 512


def _table() -> list[int]:
    return [(31 * i + 7) % VOCABULARY for i in range(VOCABULARY)]


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens for a prompt, computed without a device."""
    table, tokens, last = _table(), [], sum(prompt) % VOCABULARY
    for position in range(count):
        last = table[(last + position) % VOCABULARY]
        tokens.append(last)
    return tokens


class PoisonRunner:
    """A StepRunner. Its whole model is a table on the device."""

    def __init__(self, config: RunnerConfig) -> None:
        import torch

        self._torch: Any = torch
        self._config = config
        self._device = torch.device("cuda", 0) if config.accelerators else torch.device("cpu")
        self._sequences: dict[int, tuple[StepRequest, list[int]]] = {}

    def load(self, report: Callable[[LoadProgress], None]) -> RunnerInfo:
        """Put the table, and some ballast, on the device."""
        self._table = self._torch.tensor(_table(), device=self._device)
        if self._config.accelerators:
            self._ballast = self._torch.zeros(BALLAST_MIB << 20, dtype=self._torch.uint8, device=self._device)
        return RunnerInfo(
            runtime="poison",
            model=self._config.model,
            transport=TransportKind.LOCAL_GPU if self._config.accelerators else TransportKind.LOCAL_CPU,
            isolation=Isolation.PROCESS,
            capabilities=Capabilities(resume=True, deterministic=True),
            max_context_tokens=100_000,
            max_batch=self._config.max_batch,
        )

    def admit(self, request: StepRequest) -> None:
        """Take a sequence in."""
        self._sequences[request.sequence_id] = (request, list(request.generated_prefix))

    def abort(self, sequence_id: int) -> None:
        """Drop one."""
        self._sequences.pop(sequence_id, None)

    def has_work(self) -> bool:
        """Whether there is one."""
        return bool(self._sequences)

    def kv_use(self) -> float:
        """Nothing is cached."""
        return 0.0

    def step(self) -> Sequence[StepOutput]:
        """The next token of each, all in one look-up on the device."""
        time.sleep(0.002)
        rows = []
        for request, tokens in self._sequences.values():
            last = tokens[-1] if tokens else sum(request.prompt_token_ids) % VOCABULARY
            row = (last + len(tokens)) % VOCABULARY
            killer = request.prompt_token_ids[0] == KILLER and not request.generated_prefix
            rows.append(10**9 if killer and len(tokens) >= FATAL_TOKEN else row)
        drawn = self._table[self._torch.tensor(rows, device=self._device)].tolist()
        outputs = []
        for (sequence_id, (request, tokens)), token in zip(list(self._sequences.items()), drawn, strict=True):
            tokens.append(token)
            ended = len(tokens) >= request.sampling.max_tokens
            if ended:
                del self._sequences[sequence_id]
            outputs.append(StepOutput(sequence_id, (token,), FinishReason.LENGTH if ended else None))
        return outputs

    def probe(self) -> bool:
        """Whether the device still computes."""
        torch = self._torch
        if self._config.accelerators:
            torch.cuda.synchronize()
        return bool((torch.ones(4, device=self._device) + 1).sum().item() == 8)

    def close(self) -> None:
        """Nothing to do that the end of the process does not."""
        self._sequences.clear()


class PoisonRuntime(ScriptedRuntime):
    """Makes them; the codec is not used."""

    def validate(self, config: RunnerConfig) -> None:
        """Anything goes."""

    def make_runner(self, config: RunnerConfig) -> PoisonRunner:  # type: ignore[override]
        """The runner."""
        return PoisonRunner(config)


RUNTIME = PoisonRuntime()
