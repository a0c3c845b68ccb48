"""Which tokens the next step computes. Pure Python: no tensor, no device, no clock.

Decoding goes first, then prompts that are half read, then new sequences in order of arrival, within a budget of tokens. When the
blocks run out, the youngest running sequence gives up its blocks and waits; it is computed again later and draws the same tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from inference_runtime.runners.torch_lm.blocks import BlockPool, blocks_for
from inference_runtime.runners.torch_lm.sequence import Sequence

__all__ = ["Chunk", "Scheduler"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` … `end` - 1 of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def draws(self) -> bool:
        """Whether a new token follows from it: it reaches the end of what is known."""
        return self.end == len(self.sequence.tokens)


class Scheduler:
    """Owns the waiting and the running sequences and the blocks they hold."""

    def __init__(self, blocks: BlockPool, block_size: int, max_batch: int, max_step_tokens: int) -> None:
        """Start empty.

        Args:
            blocks: All blocks of the KV cache; enough for the longest sequence alone, or it could never run.
            block_size: Tokens of a block.
            max_batch: Sequences that run at once.
            max_step_tokens: Tokens of one step. Decoding is never held back by it.
        """
        self._blocks = blocks
        self._block_size = block_size
        self._max_batch = max_batch
        self._max_step_tokens = max_step_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest admission first
        self.preemptions = 0

    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks, wherever it is."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._blocks.give_back(sequence.block_ids)
        if not self.has_work():
            self._blocks.check_idle()

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, with their blocks taken. Empty only when there is no work."""
        chunks = [
            Chunk(sequence, sequence.computed, sequence.computed + 1)
            for sequence in tuple(self._running)
            if sequence.pending == 1 and self._grow(sequence)
        ]
        budget = self._max_step_tokens - len(chunks)
        for sequence in self._running:
            if sequence.pending > 1 and budget > 0:
                budget -= self._read(sequence, budget, chunks)
        while budget > 0 and (sequence_in := self._admit()) is not None:
            budget -= self._read(sequence_in, budget, chunks)
        return chunks

    def _read(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add the next chunk of a prompt; returns its tokens."""
        tokens = min(sequence.pending, budget)
        chunks.append(Chunk(sequence, sequence.computed, sequence.computed + tokens))
        return tokens

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones, if there are blocks for all its tokens.

        Every running sequence keeps one block in reserve, so that taking one in does not push another out at once.
        """
        if not self._waiting or len(self._running) >= self._max_batch:
            return None
        need = blocks_for(len(self._waiting[0].tokens), self._block_size)
        if self._blocks.free < need + len(self._running):
            return None
        sequence = self._waiting.popleft()
        sequence.block_ids = self._blocks.take(need)
        self._running.append(sequence)
        return sequence

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the sequence's next token, at the cost of younger ones. False when it had to give way itself."""
        need = blocks_for(len(sequence.tokens), self._block_size)
        while sequence.block_ids and need > len(sequence.block_ids):
            if self._blocks.free:
                sequence.block_ids += self._blocks.take(1)
            else:
                self._preempt(self._running[-1])
        return bool(sequence.block_ids)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks away and let it wait in front."""
        self._running.remove(sequence)
        self._blocks.give_back(sequence.block_ids)
        sequence.computed = 0
        self._waiting.appendleft(sequence)
        self.preemptions += 1
