"""What a request asks of a runner, and what its steps make of the answer: prompts to tokens, limits, chunks of one choice.

The stable tier's half of a runner: pure functions of prompt and tokens, no device, no thread. `stepping.py` is the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from inference_runtime.errors import BadRequest, ContextLengthExceeded, Unsupported
from inference_runtime.generation import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    Prompt,
    SamplingParams,
    TextPart,
    TextPrompt,
    TokenChunk,
    Usage,
)
from inference_runtime.runner import Codec, RunnerInfo, StepOutput
from inference_runtime.text import TextAssembler

__all__ = ["ChoiceAssembler", "check_supported", "encode_prompt", "fit_context"]

# --- requests --------------------------------------------------------------------------------------------------------


def encode_prompt(codec: Codec, prompt: Prompt, max_context_tokens: int) -> Sequence[int]:
    """Token ids of a prompt. May take milliseconds for a long one.

    Raises:
        BadRequest: It has no tokens, or ids that the vocabulary lacks.
        ContextLengthExceeded: Its size alone shows that it cannot fit.
        Unsupported: It has content that the model cannot read.
    """
    tokens: Sequence[int]
    longest = codec.max_token_bytes
    if longest and (least := -(-_prompt_bytes(prompt) // longest)) > max_context_tokens:
        raise ContextLengthExceeded(
            f"the prompt has {least} tokens or more; the context of this model holds {max_context_tokens}; shorten the prompt",
            tokens=str(least),
            max_tokens=str(max_context_tokens),
            param="messages",
        )
    if isinstance(prompt, ChatPrompt):
        tokens = codec.encode_chat(prompt.messages)
    elif isinstance(prompt, TextPrompt):
        tokens = codec.encode(prompt.text)
    else:
        tokens = prompt.token_ids
        if tokens and not 0 <= min(tokens) <= max(tokens) < codec.vocab_size:
            raise BadRequest(f"a prompt token id lies outside 0 to {codec.vocab_size - 1}", param="prompt")
    if not tokens:
        raise BadRequest("the prompt is empty; give it at least one token", param="prompt")
    return tokens


def _prompt_bytes(prompt: Prompt) -> int:
    """Size of a prompt's text in UTF-8, at least: a character counts as one byte, since counting the rest costs as much as
    refusing saves."""
    if isinstance(prompt, ChatPrompt):
        return sum(len(part.text) for message in prompt.messages for part in message.content if isinstance(part, TextPart))
    return len(prompt.text) if isinstance(prompt, TextPrompt) else 0


def check_supported(info: RunnerInfo, request: GenerationRequest, prefix: Sequence[int] = (), choice: int = 0) -> None:
    """Refuse what the runner cannot do, by name. Raises Unsupported with `feature` and `runtime`."""
    can, sampling = info.capabilities, request.sampling
    chat = isinstance(request.prompt, ChatPrompt)
    wanted = (
        ("chat", chat, can.chat),
        ("completion", not chat, can.completion),
        ("logprobs", sampling.top_logprobs is not None, can.logprobs),
        ("seed", sampling.seed is not None, can.seed),
        ("penalties", _has_penalties(sampling), can.penalties),
        ("logit_bias", bool(sampling.logit_bias), can.logit_bias),
        ("min_p", bool(sampling.min_p), can.min_p),
        ("n", sampling.n > 1 or choice > 0, can.max_choices >= max(sampling.n, choice + 1)),
        ("resume", len(prefix) > 0, can.resume),
    )
    for feature, asked, able in wanted:
        if asked and not able:
            raise Unsupported(
                f"runtime {info.runtime!r} of deployment {request.deployment!r} does not support {feature}; leave it out, "
                "or use a deployment that has it",
                feature=feature,
                runtime=info.runtime,
                param=feature,
            )


def _has_penalties(s: SamplingParams) -> bool:
    return bool(s.presence_penalty or s.frequency_penalty) or s.repetition_penalty not in (0.0, 1.0)


def fit_context(info: RunnerInfo, prompt_tokens: int, sampling: SamplingParams) -> SamplingParams:
    """The sampling parameters with `max_tokens` > 0: as asked for, or the rest of the context for 0.

    Raises:
        ContextLengthExceeded: Prompt and output together are more than the context holds.
    """
    room = info.max_context_tokens - prompt_tokens
    if room <= 0 or sampling.max_tokens > room:
        asked = f" and {sampling.max_tokens} of output" if sampling.max_tokens else ""
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens{asked}; the context of this model holds {info.max_context_tokens}; "
            "shorten the prompt or lower max_tokens",
            tokens=str(prompt_tokens + sampling.max_tokens),
            max_tokens=str(info.max_context_tokens),
            param="messages",
        )
    return sampling if sampling.max_tokens else replace(sampling, max_tokens=room)


# --- answers ---------------------------------------------------------------------------------------------------------


class ChoiceAssembler:
    """Makes the chunks of one choice from what steps produce.

    Args:
        codec: Of the model.
        stop: Stop strings.
        prompt_tokens: For the usage.
        choice: Number of the choice.
        prefix: Tokens that were generated elsewhere. Their text is not repeated; the first chunk's index follows them.
    """

    __slots__ = ("_cached", "_choice", "_prompt_tokens", "_text", "index")

    def __init__(
        self, codec: Codec, *, stop: Sequence[str], prompt_tokens: int, choice: int = 0, prefix: Sequence[int] = ()
    ) -> None:
        self._text = TextAssembler(codec, stop)
        self._text.replay(prefix)
        self._choice, self._prompt_tokens, self._cached = choice, prompt_tokens, 0
        #: Index of the next chunk: tokens so far.
        self.index = len(prefix)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the choice."""
        return self._text.stopped

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._prompt_tokens, self.index, cached_input_tokens=self._cached)

    def take(self, output: StepOutput) -> TokenChunk:
        """The chunk for one step's output. Tokens after the one that completed a stop string are dropped.

        The chunk has a finish reason when the output has one, or when a stop string is complete; the caller then drops the
        sequence from the runner where the output had none.
        """
        text, tokens, finish, logprobs = self._text, output.token_ids, output.finish_reason, output.logprobs
        index = self.index
        if output.cached_tokens:
            self._cached = output.cached_tokens
        if len(tokens) == 1:
            certain = text.feed(tokens[0])
        else:
            certain, used = text.feed_all(tokens)
            if used < len(tokens):
                tokens, logprobs = tokens[:used], logprobs[:used]
        self.index = index + len(tokens)
        if text.stop_sequence:
            finish = FinishReason.STOP
        if finish is None:
            return TokenChunk(self._choice, index, tokens, certain, None, None, logprobs)
        certain += text.finish()
        return TokenChunk(self._choice, index, tokens, certain, finish, self.usage(), logprobs, text.stop_sequence)

    def end(self, finish: FinishReason) -> TokenChunk:
        """A last chunk without tokens: the choice ends where it stands."""
        return self.take(StepOutput(0, (), finish))
