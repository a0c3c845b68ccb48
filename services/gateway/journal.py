"""What a choice has been given so far, and which chunk comes next. Pure.

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
    """Tokens accepted of one choice, and the epoch they may come from."""

    __slots__ = ("ended", "epoch", "tokens")

    def __init__(self) -> None:
        self.epoch = 0
        self.tokens: list[int] = []
        self.ended = False

    def accept_one(self, epoch: int, index: int, token: int) -> Verdict:
        """`accept` for one token: the row that nearly every frame is made of."""
        taken = self.tokens
        if epoch == self.epoch and index == len(taken) and not self.ended:
            taken.append(token)
            return NEW
        return self._refuse(epoch, index)

    def accept(self, epoch: int, index: int, tokens: Sequence[int], *, last: bool = False) -> Verdict:
        """Judge a chunk and, when it is new, enter it.

        Args:
            epoch: Attempt it belongs to.
            index: Position of its first token in the choice's output.
            tokens: Its tokens. Empty for a chunk that only ends the choice.
            last: It ends the choice. Nothing of the choice is accepted after it.
        """
        if epoch != self.epoch or index != len(self.tokens) or self.ended:
            return self._refuse(epoch, index)
        self.tokens.extend(tokens)
        self.ended = last
        return NEW

    def _refuse(self, epoch: int, index: int) -> Verdict:
        if epoch < self.epoch:
            return OLD_EPOCH
        # An epoch that was never begun is no better than a gap.
        return DUPLICATE if epoch == self.epoch and (index < len(self.tokens) or self.ended) else GAP

    def begin_epoch(self) -> None:
        """Give the current attempt up and expect the next one to continue after what is here."""
        self.epoch += 1

    def forget(self) -> None:
        """Drop the tokens, for an attempt from the start. Only for a request that has shown nothing yet."""
        self.tokens.clear()
        self.ended = False
