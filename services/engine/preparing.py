"""From a submission to what a runner takes: the prompt as tokens, the limits as the context allows."""

from __future__ import annotations

from collections.abc import Sequence

from inference_runtime.answers import encode_prompt, fit_context
from inference_runtime.errors import BadRequest, InferenceError
from inference_runtime.generation import ChatPrompt, SamplingParams, TextPart, TextPrompt
from inference_runtime.runner import Codec, RunnerInfo
from inference_runtime.telemetry import get_logger
from services.engine.submission import Submission

__all__ = ["Prepared", "Preparer", "is_short"]

log = get_logger(__name__)

#: Prompts up to this size are tokenised where they arrive: a hop to a thread and back costs more.
INLINE_PROMPT_CHARS = 1024

#: The prompt's tokens, and the sampling with its limits.
Prepared = tuple[Sequence[int], SamplingParams]


class Preparer:
    """Prepares submissions for one model. Thread-safe.

    Args:
        codec: Of the model.
        replica_id: For logs.
    """

    def __init__(self, codec: Codec, replica_id: str) -> None:
        self.codec, self._replica_id = codec, replica_id

    def prepare(self, submission: Submission, info: RunnerInfo) -> Prepared:
        """Tokenise and fit into the context. May take milliseconds for a long prompt.

        Raises:
            BadRequest, ContextLengthExceeded, Unsupported: The prompt is wrong, too long, or not text.
        """
        try:
            tokens = encode_prompt(self.codec, submission.request.prompt, info.max_context_tokens)
        except InferenceError:
            raise
        except Exception as err:
            log.error("tokenising failed", replica=self._replica_id, request_id=submission.request.request_id, exc_info=err)
            raise BadRequest("the prompt cannot be tokenised by this model", param="messages") from err
        if submission.prefix and max(submission.prefix) >= self.codec.vocab_size:  # clients bring tokens back, or make them up
            raise BadRequest("the answer so far holds a token that this model does not have", param="generated_prefix")
        return tokens, fit_context(info, len(tokens), submission.request.sampling)


def is_short(submission: Submission) -> bool:
    """Whether its prompt is tokenised in no time."""
    prompt = submission.request.prompt
    if isinstance(prompt, ChatPrompt):
        return sum(len(p.text) for m in prompt.messages for p in m.content if isinstance(p, TextPart)) <= INLINE_PROMPT_CHARS
    return not isinstance(prompt, TextPrompt) or len(prompt.text) <= INLINE_PROMPT_CHARS
