"""The history checker: what clients received, held against what a scripted deployment must have said.

The scripted runtime's words are a function of (prompt, seed, choice, index), so every answer can be recomputed. Record what each
client saw, then ask `findings`: a token that is lost, doubled, out of order or not of this answer is named, with the answer it
belongs to when it is another one of the same history.

    history = History()
    stream = history.begin("Hello", seed=7, tokens=64)
    stream.text(" word17")          # an HTTP client sees text …
    stream.chunk(0, [273])          # … a gRPC client tokens and their place
    stream.end()
    history.check()
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from inference_runtime.generation import Message
from inference_runtime.runners.scripted import FIRST_WORD
from inference_runtime.testing.scripted import expected_tokens, user_says

__all__ = ["Finding", "History", "HistoryError", "Stream"]

_WORD = re.compile(r" word(\d+)")
#: Findings that an error message lists.
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: `kind` is lost, doubled, reordered, foreign, misplaced or cut; `position` counts tokens of the answer."""

    kind: str
    stream: str
    position: int
    detail: str

    def __str__(self) -> str:
        return f"{self.stream}: {self.kind} at token {self.position}: {self.detail}"


class HistoryError(AssertionError):
    """The history holds faults. The message lists the first of them."""


@dataclass(slots=True)
class Stream:
    """What one client received for one choice. Made by `History.begin`."""

    name: str
    messages: tuple[Message, ...] | str
    seed: int | None
    choice: int
    tokens: int
    received: list[int] = field(default_factory=list)
    ended: bool = False
    error: str = ""
    _text: str = ""
    _misplaced: list[tuple[int, int]] = field(default_factory=list)

    def chunk(self, index: int, token_ids: Sequence[int]) -> None:
        """Tokens came, the first of them said to stand at `index`."""
        if index != len(self.received):
            self._misplaced.append((index, len(self.received)))
        self.received += token_ids

    def text(self, piece: str) -> None:
        """Text came; a piece may end within a word."""
        self._text += piece

    def end(self) -> None:
        """The answer was said to be complete."""
        self.ended = True

    def fail(self, error: str) -> None:
        """The answer ended in a typed error: what came before it must be right, the rest may be missing."""
        self.error = error or "failed"

    def words(self) -> tuple[list[int], str]:
        """Every token received, and text that is no word of the scripted runtime's."""
        spoken = [FIRST_WORD + int(n) for n in _WORD.findall(self._text)]
        return self.received + spoken, _WORD.sub("", self._text)

    def expected(self) -> list[int]:
        """Every token there must be."""
        return expected_tokens(self.messages, self.seed, self.choice, self.tokens)


class History:
    """The streams of one experiment. Record from any task of one event loop; ask when all have ended."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def begin(
        self, prompt: str | Sequence[Message], *, seed: int | None = None, choice: int = 0, tokens: int = 64, name: str = ""
    ) -> Stream:
        """A new stream.

        Args:
            prompt: One user message as text, or a conversation.
            seed: The request's seed.
            choice: Number of the choice.
            tokens: Tokens the whole answer has.
            name: For findings; made up when empty.
        """
        messages = user_says(prompt) if isinstance(prompt, str) else tuple(prompt)
        stream = Stream(name or f"stream {len(self.streams)}", messages, seed, choice, tokens)
        self.streams.append(stream)
        return stream

    def findings(self) -> list[Finding]:
        """Every fault of every stream."""
        return [finding for stream in self.streams for finding in self._of(stream)]

    def check(self) -> None:
        """Raise HistoryError when there is a fault, or when nothing was recorded."""
        if not self.streams:
            raise HistoryError("the history is empty: nothing was checked")
        found = self.findings()
        if found:
            lines = "\n".join(str(f) for f in found[:SHOWN])
            raise HistoryError(f"{len(found)} faults in {len(self.streams)} streams:\n{lines}")

    def _of(self, stream: Stream) -> Iterator[Finding]:
        received, rest = stream.words()
        expected = stream.expected()
        for said, true in stream._misplaced:
            yield Finding("misplaced", stream.name, true, f"its chunk says index {said}")
        if rest:
            yield Finding("foreign", stream.name, len(received), f"text that no scripted answer holds: {rest[:80]!r}")
        if not stream.ended and not stream.error:
            yield Finding("cut", stream.name, len(received), "the answer neither ended nor failed")
        if received != expected:
            yield from self._differences(stream, expected, received)

    def _differences(self, stream: Stream, expected: list[int], received: list[int]) -> Iterator[Finding]:
        matcher = SequenceMatcher(None, expected, received, autojunk=False)
        missing: list[tuple[int, int]] = []
        surplus: list[tuple[int, int]] = []
        reached = max((block.a + block.size for block in matcher.get_matching_blocks() if block.size), default=0)
        if not stream.ended:
            expected = expected[:reached]  # what would have come after an honest end is not lost
        for tag, e0, e1, r0, r1 in matcher.get_opcodes():
            if tag != "equal":
                missing += [(i, expected[i]) for i in range(e0, min(e1, len(expected)))]
                surplus += [(i, received[i]) for i in range(r0, r1)]
        lacking = Counter(token for _, token in missing)
        whole = set(expected)
        for position, token in surplus:
            if lacking[token] > 0:
                lacking[token] -= 1
                yield Finding("reordered", stream.name, position, f"token {token} belongs elsewhere in this answer")
            elif token in whole:
                yield Finding("doubled", stream.name, position, f"token {token} came before")
            else:
                yield Finding(
                    "foreign", stream.name, position, f"token {token} is not of this answer{self._owner(stream, token)}"
                )
        for position, token in missing:
            if lacking[token] > 0:
                lacking[token] -= 1
                yield Finding("lost", stream.name, position, f"token {token} never came")

    def _owner(self, stream: Stream, token: int) -> str:
        others = [s.name for s in self.streams if s is not stream and token in s.expected()]
        return f"; it may be of {others[0]}" if others else ""
