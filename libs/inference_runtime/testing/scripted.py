"""What the "scripted" runtime answers, recomputed by the client: the truth to hold a stream against."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from inference_runtime.generation import Message, Role, TextPart
from inference_runtime.runners.scripted import ScriptedCodec, scripted_tokens

__all__ = ["expected_text", "expected_tokens", "user_says"]

_CODEC = ScriptedCodec()


def user_says(text: str) -> tuple[Message, ...]:
    """A conversation of one user message."""
    return (Message(Role.USER, (TextPart(text),)),)


def _prompt(messages: Sequence[Message] | str) -> list[int]:
    return _CODEC.encode(messages) if isinstance(messages, str) else _CODEC.encode_chat(messages)


def expected_tokens(messages: Sequence[Message] | str, seed: int | None = None, choice: int = 0, n: int = 64) -> list[int]:
    """The first `n` tokens of the answer.

    Args:
        messages: The conversation; a string is a plain text prompt.
        seed: The request's seed; None for none.
        choice: Number of the choice.
        n: Number of tokens.
    """
    return list(islice(scripted_tokens(_prompt(messages), seed or 0, choice), n))


def expected_text(messages: Sequence[Message] | str, seed: int | None = None, choice: int = 0, n: int = 64) -> str:
    """The text of the first `n` tokens of the answer."""
    return b"".join(_CODEC.token_bytes(t) for t in expected_tokens(messages, seed, choice, n)).decode()
