"""Journal and text assembly across engines that die: a network that drops, doubles, delays and mixes what they send.

Engines assemble text from tokens, silent up to what the journal has; the gateway accepts by epoch and index. Whatever arrives, in
whatever order, the client's tokens and text are those of an undisturbed answer, as far as it got.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inference_runtime.answers import ChoiceAssembler
from inference_runtime.generation import FinishReason, TokenChunk
from inference_runtime.runner import StepOutput
from services.gateway.journal import Journal, Verdict

TOKENS = 24


class Bytes:
    """Tokens that are bytes: characters are cut in the middle."""

    vocab_size = 256
    eos_token_ids: frozenset[int] = frozenset()
    max_token_bytes = 1

    def encode_chat(self, messages: object) -> list[int]:
        """No chat here."""
        raise AssertionError("nothing is a chat here")

    def encode(self, text: str) -> list[int]:
        """Its bytes."""
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        """The byte."""
        return bytes([token_id])


CODEC = Bytes()


@dataclass(frozen=True)
class Frame:
    """One chunk under way."""

    epoch: int
    chunk: TokenChunk


class Attempt:
    """An engine at work on the answer, from where the journal stood when it got it."""

    def __init__(self, epoch: int, prefix: tuple[int, ...], answer: bytes, stops: tuple[str, ...]) -> None:
        self.epoch, self._answer, self._at = epoch, answer, len(prefix)
        self._choice = ChoiceAssembler(CODEC, stop=stops, prompt_tokens=1, prefix=prefix)
        self.over = False

    def make(self, size: int) -> TokenChunk:
        """The next chunk."""
        tokens = tuple(self._answer[self._at : self._at + size])
        self._at += len(tokens)
        finish = FinishReason.LENGTH if self._at >= len(self._answer) else None
        if self._choice.stopped or not tokens:
            chunk = self._choice.end(FinishReason.STOP if self._choice.stopped else FinishReason.LENGTH)
        else:
            chunk = self._choice.take(StepOutput(1, tokens, finish))
        self.over = chunk.finish_reason is not None
        return chunk


class Relay(RuleBasedStateMachine):
    """One answer, from several engines to one client."""

    @initialize(
        text=st.text(st.sampled_from("aäb€🚀c"), min_size=1, max_size=TOKENS),
        stops=st.lists(st.sampled_from(("ab", "€c", "🚀🚀", "äb€")), max_size=2, unique=True),
    )
    def begin(self, text: str, stops: list[str]) -> None:
        """A request is sent to its first engine."""
        self.answer, self.stops = text.encode()[:TOKENS], tuple(stops)
        whole = Attempt(0, (), self.answer, self.stops)
        self.expected_text, self.expected_tokens = "", 0
        while not whole.over:
            chunk = whole.make(1)
            self.expected_text += chunk.text
            self.expected_tokens += len(chunk.token_ids)
        self.journal, self.text = Journal(), ""
        self.attempt = Attempt(0, (), self.answer, self.stops)
        self.old: list[Attempt] = []
        self.network: list[Frame] = []
        self.gaps = 0

    @precondition(lambda self: not self.attempt.over)
    @rule(size=st.integers(1, 4))
    def make(self, size: int) -> None:
        """The engine sends a chunk."""
        self.network.append(Frame(self.attempt.epoch, self.attempt.make(size)))

    @precondition(lambda self: any(not a.over for a in self.old))
    @rule(data=st.data(), size=st.integers(1, 4))
    def make_late(self, data: st.DataObject, size: int) -> None:
        """An engine that was given up does not know it."""
        late = data.draw(st.sampled_from([a for a in self.old if not a.over]))
        self.network.append(Frame(late.epoch, late.make(size)))

    @precondition(lambda self: self.network)
    @rule(data=st.data(), twice=st.booleans())
    def deliver(self, data: st.DataObject, twice: bool) -> None:
        """A frame arrives, perhaps before others that were sent before it, perhaps to arrive again."""
        at = data.draw(st.integers(0, min(2, len(self.network) - 1)))
        frame = self.network[at] if twice else self.network.pop(at)
        self._take(frame)

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """A frame never arrives."""
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    @rule()
    def give_up(self) -> None:
        """The engine dies, or is taken for dead."""
        if not self.journal.ended:
            self._move()

    def _take(self, frame: Frame) -> None:
        chunk = frame.chunk
        last = chunk.finish_reason is not None
        if len(chunk.token_ids) == 1 and not last:
            verdict = self.journal.accept_one(frame.epoch, chunk.index, chunk.token_ids[0])
        else:
            verdict = self.journal.accept(frame.epoch, chunk.index, list(chunk.token_ids), last=last)
        if verdict is Verdict.NEW:
            self.text += chunk.text
        elif verdict is Verdict.GAP:
            self.gaps += 1
            if not self.journal.ended:
                self._move()

    def _move(self) -> None:
        self.old.append(self.attempt)
        self.journal.begin_epoch()
        self.attempt = Attempt(self.journal.epoch, tuple(self.journal.tokens), self.answer, self.stops)

    @invariant()
    def the_client_has_a_beginning_of_the_answer(self) -> None:
        """Every token once, in its place; text that came never changes."""
        if hasattr(self, "journal"):
            assert bytes(self.journal.tokens) == self.answer[: len(self.journal.tokens)]
            assert self.expected_text.startswith(self.text)
            if self.journal.ended:
                assert (self.text, len(self.journal.tokens)) == (self.expected_text, self.expected_tokens)

    def teardown(self) -> None:
        """An engine that is left in peace brings it to its end."""
        if not hasattr(self, "journal") or self.journal.ended:
            return
        self._move()
        while not self.attempt.over:
            self._take(Frame(self.attempt.epoch, self.attempt.make(2)))
        assert self.journal.ended
        self.the_client_has_a_beginning_of_the_answer()


Relay.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestRelay = Relay.TestCase
