"""The state of one sequence: its tokens, how many of them are computed, its blocks, how it is drawn and when it ends."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from inference_runtime.generation import FinishReason
from inference_runtime.runner import StepRequest
from inference_runtime.runners.torch_lm.checkpoint import GenerationDefaults

__all__ = ["Drawing", "Sequence", "make_sequence"]

#: Below it a temperature means greedy: dividing by less leaves float32's range.
LEAST_TEMPERATURE = 1e-5
SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens of one sequence are drawn, defaults filled in. `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 are off."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    choice: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    top_logprobs: int | None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, whatever the random numbers say."""
        return self.temperature < LEAST_TEMPERATURE

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


@dataclass(slots=True, eq=False)
class Sequence:
    """One running or waiting sequence. `tokens` is prompt and output; keys and values exist for the first `computed` of them."""

    sequence_id: int
    tokens: list[int]
    prompt_tokens: int
    drawing: Drawing
    stop_token_ids: frozenset[int]
    min_tokens: int
    max_tokens: int
    context_tokens: int
    block_ids: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far, here and elsewhere: the index of the next one."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens without keys and values yet: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def barred_token_ids(self) -> frozenset[int]:
        """Tokens that may not be drawn next, because the output is shorter than `min_tokens`."""
        return self.stop_token_ids if self.output_tokens < self.min_tokens else frozenset()

    def append(self, token_id: int) -> FinishReason | None:
        """Take a drawn token. Returns why the sequence ends, if it does."""
        self.tokens.append(token_id)
        return self.finish_reason()

    def finish_reason(self) -> FinishReason | None:
        """Why no further token follows the last one; None while it goes on."""
        if self.output_tokens and self.tokens[-1] in self.stop_token_ids:
            return FinishReason.STOP
        if self.output_tokens >= self.max_tokens or len(self.tokens) >= self.context_tokens:
            return FinishReason.LENGTH
        return None


def make_sequence(request: StepRequest, defaults: GenerationDefaults, context_tokens: int) -> Sequence:
    """The state of a request that was just admitted; one without a seed gets a random one here."""
    sampling = request.sampling
    eos = frozenset() if sampling.ignore_eos else defaults.eos_token_ids
    drawing = Drawing(
        temperature=defaults.temperature if sampling.temperature is None else sampling.temperature,
        top_p=defaults.top_p if sampling.top_p is None else sampling.top_p,
        top_k=sampling.top_k or defaults.top_k,
        min_p=sampling.min_p or 0.0,
        seed=secrets.randbits(SEED_BITS) if sampling.seed is None else sampling.seed,
        choice=request.choice,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        logit_bias=dict(sampling.logit_bias),
        top_logprobs=sampling.top_logprobs,
    )
    return Sequence(
        sequence_id=request.sequence_id,
        tokens=[*request.prompt_token_ids, *request.generated_prefix],
        prompt_tokens=len(request.prompt_token_ids),
        drawing=drawing,
        stop_token_ids=eos | frozenset(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        max_tokens=sampling.max_tokens or context_tokens,
        context_tokens=context_tokens,
    )
