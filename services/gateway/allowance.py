"""How often one request may be tried again, and what that costs its deployment. The request decides nothing about it but when.

Three kinds. A retry follows a failure before anything was shown, a resumption one after it: both are few, and paid from the
budget of the deployment (budget.py). A hand-over by an engine that closes in order is free, since nothing failed.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable

from inference_runtime.errors import ContextPoisoned, Draining, InferenceError, Retry
from services.gateway.budget import AttemptBudget
from services.gateway.settings import LimitSettings

__all__ = ["NEXT_CHUNK", "Again", "Allowance"]

#: Phase of a time-out between two chunks.
NEXT_CHUNK = "next_chunk"
#: Code of an error that is not tried again because its deployment has tried too much, and when the client may, seconds.
EXHAUSTED = "retry_budget_exhausted"
EXHAUSTED_RETRY_S = 1.0
#: Hand-overs of one request by engines that close in order. They are free, since nothing failed: an upgrade of many engines must
#: not use up what is meant for deaths. A bound all the same, for an engine that says so without end.
MAX_HAND_OVERS = 16


class Again(enum.Enum):
    """What another attempt would be."""

    NO = "no"  #: there is none
    GO_ON = "go_on"  #: it continues behind the tokens that are there
    START_OVER = "start_over"  #: it begins anew: nobody can continue, and nothing was shown


class Allowance:
    """Of one request. Made with its first failure, so that requests without one do not pay for it.

    Args:
        limits: Bounds of one request.
        budget: Of its deployment.
        count: Told the kind of each attempt that is taken: "retry", "move" or "hand_over".
    """

    __slots__ = ("_budget", "_count", "_hand_overs", "_limits", "_resumptions", "_retries")

    def __init__(self, limits: LimitSettings, budget: AttemptBudget, count: Callable[[str], None]) -> None:
        self._limits, self._budget, self._count = limits, budget, count
        self._retries = self._resumptions = self._hand_overs = 0

    @property
    def failures(self) -> int:
        """Attempts that were made because one before them failed."""
        return self._retries + self._resumptions

    def left(self, *, shown: bool, resumable: bool) -> bool:
        """Whether there may be another attempt after a failure.

        Args:
            shown: The client has seen a part of the answer.
            resumable: A replica of this kind can continue one.
        """
        if shown:
            return self._resumptions < self._limits.max_resumptions and resumable
        return self._retries < self._limits.max_retries

    def take(
        self, error: InferenceError, *, shown: bool, begun: bool, resumable: bool, now: float
    ) -> tuple[Again, InferenceError]:
        """Take another attempt, if there is one.

        Args:
            error: What ended the last one.
            shown: The client has seen a part of the answer.
            begun: There are tokens of it.
            resumable: A replica of this kind can continue one.
            now: Any clock that never goes back, seconds.

        Returns:
            What the attempt is, and the error that the client gets where there is none.
        """
        again = Again.START_OVER if begun and not resumable else Again.GO_ON
        if isinstance(error, Draining):
            if self._hand_overs >= MAX_HAND_OVERS or (shown and again is Again.START_OVER):
                return Again.NO, error
            self._hand_overs += 1
            self._count("hand_over")
            return again, error
        if error.retry is not Retry.ELSEWHERE or not self.left(shown=shown, resumable=resumable):
            return Again.NO, error
        if shown:
            self._resumptions += 1
        else:
            self._retries += 1
        lost = isinstance(error, ContextPoisoned) or error.metadata.get("phase") == NEXT_CHUNK
        if self._budget.take_move(now) if lost else self._budget.take_retry(now):
            self._count("move" if lost else "retry")
            return again, error
        refused = copy.copy(error)  # the same error may go to other requests
        refused.metadata = {**error.metadata, "retry_budget_exhausted": "moves" if lost else "retries", "code": EXHAUSTED}
        refused.retry_after_s = max(error.retry_after_s or 0.0, EXHAUSTED_RETRY_S)
        return Again.NO, refused
