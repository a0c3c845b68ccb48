"""One generation as values: prompt, sampling parameters, chunks, usage. Frozen, without behaviour, the same on every hop."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "MAX_CHOICES",
    "ChatPrompt",
    "ContentPart",
    "FinishReason",
    "GenerationRequest",
    "Media",
    "Message",
    "Priority",
    "Prompt",
    "Role",
    "SamplingParams",
    "TextPart",
    "TextPrompt",
    "TokenChunk",
    "TokenLogprob",
    "TokenPrompt",
    "Tokens",
    "TopLogprob",
    "Usage",
]


class Role(enum.IntEnum):
    """Author of a message. Values are those of the wire enum."""

    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4


class FinishReason(enum.IntEnum):
    """Why a choice ended. Values are those of the wire enum."""

    STOP = 1
    LENGTH = 2
    TOOL_CALLS = 3
    CONTENT_FILTER = 4
    CANCELLED = 5
    BUDGET = 6


class Priority(enum.IntEnum):
    """Order among waiting requests. Values are those of the wire enum."""

    BACKGROUND = 1
    NORMAL = 2
    HIGH = 3
    CRITICAL = 4


@dataclass(frozen=True, slots=True)
class TextPart:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Media:
    """A picture, a sound or a file (`kind` = "image", "audio" or "file"), by value or by URL."""

    kind: str
    mime_type: str = ""
    data: bytes = b""
    url: str = ""
    hint: str = ""


ContentPart = TextPart | Media


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: tuple[ContentPart, ...]
    name: str = ""

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(p.text for p in self.content if isinstance(p, TextPart))


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation to continue, oldest turn first."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text to continue."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue."""

    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


#: Choices of one request at most, at every door. Each is generated on its own: a request for n costs as much as n requests.
MAX_CHOICES = 8


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. None means the model's default.

    `max_tokens` 0 means up to the context's end. `temperature` 0 is greedy. Draws are a function of (seed, choice, index) alone.
    """

    max_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    n: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a client asks for."""

    request_id: str
    deployment: str
    prompt: Prompt
    sampling: SamplingParams = SamplingParams()
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    idempotent: bool = True
    idempotency_key: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted."""

    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cached_input_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a position: token, its bytes, its natural log-probability."""

    token_id: int
    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one generated token, with the most likely alternatives, best first."""

    token_id: int
    token: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """A piece of one choice. `index` is the position of its first token in the choice's output.

    `text` is what became certain with these tokens: it may be empty (half a character, a possible stop string) and may hold
    text of earlier tokens. `usage` comes with the last chunk of the request.
    """

    choice: int
    index: int
    token_ids: Sequence[int]
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_sequence: str = ""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A whole answer to a request with one choice: its chunks, put together."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
