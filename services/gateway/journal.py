"""What a request has been given so far, and which chunk comes next. Pure.

A chunk enters the journal before a client sees it, so a client sees every token once, in order, whatever an engine or a network
does: an old epoch or a known index is dropped, a gap means that the sender cannot be trusted any more.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

__all__ = ["Journal", "Verdict"]


class Verdict(enum.Enum):
    """What to do with a chunk."""

    NEW = "new"  #: entered; show it
    OLD_EPOCH = "old_epoch"  #: of an attempt that was given up; drop it
    DUPLICATE = "duplicate"  #: known; drop it
    GAP = "gap"  #: something before it is missing; give the attempt up


NEW, OLD_EPOCH, DUPLICATE, GAP = Verdict.NEW, Verdict.OLD_EPOCH, Verdict.DUPLICATE, Verdict.GAP


class Journal:
    """Tokens accepted, by choice, and the epoch they may come from."""

    __slots__ = ("choices", "ended", "epoch", "first")

    def __init__(self, choices: int = 1) -> None:
        self.epoch = 0
        #: Tokens of choice 0: nearly every request has no other.
        self.first: list[int] = []
        self.choices: list[list[int]] = [self.first]
        if choices > 1:
            self.choices += [[] for _ in range(1, choices)]
        self.ended = 0

    def accept_one(self, epoch: int, index: int, token: int) -> Verdict:
        """`accept` for one token of choice 0: the row that nearly every frame is made of."""
        first = self.first
        if epoch == self.epoch and index == len(first) and not self.ended & 1:
            first.append(token)
            return NEW
        return self._refuse(epoch, index, first, 1)

    def accept(self, epoch: int, choice: int, index: int, tokens: Sequence[int], *, last: bool = False) -> Verdict:
        """Judge a chunk and, when it is new, enter it.

        Args:
            epoch: Attempt it belongs to.
            choice: Choice it belongs to; one that was not asked for is a GAP.
            index: Position of its first token in that choice's output.
            tokens: Its tokens. Empty for a chunk that only ends the choice.
            last: It ends the choice. Nothing of the choice is accepted after it.
        """
        if choice >= len(self.choices):
            return OLD_EPOCH if epoch < self.epoch else GAP
        taken, bit = self.choices[choice], 1 << choice
        if epoch != self.epoch or index != len(taken) or self.ended & bit:
            return self._refuse(epoch, index, taken, bit)
        taken.extend(tokens)
        if last:
            self.ended |= bit
        return NEW

    def _refuse(self, epoch: int, index: int, taken: list[int], bit: int) -> Verdict:
        if epoch < self.epoch:
            return OLD_EPOCH
        # An epoch that was never begun is no better than a gap.
        return DUPLICATE if epoch == self.epoch and (index < len(taken) or self.ended & bit) else GAP

    @property
    def complete(self) -> bool:
        """Every choice has ended."""
        return self.ended == (1 << len(self.choices)) - 1

    @property
    def output_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(map(len, self.choices))

    def begin_epoch(self) -> None:
        """Give the current attempt up and expect the next one to continue after what is here."""
        self.epoch += 1

    def forget(self) -> None:
        """Drop the tokens, for an attempt from the start. Only for a request that has shown nothing yet."""
        for tokens in self.choices:
            tokens.clear()
        self.ended = 0
