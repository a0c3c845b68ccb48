"""A request for several choices: each is a request of its own to the engines, and together they are one to everybody else.

A choice is placed, tried again and resumed by itself, with its own journal and epoch: its tokens are a function of (seed, choice,
index), so nothing of one matters to another. What a client, the ledger and the metrics see is one request: it ends with the last
choice, or with the first that cannot be saved, and is counted once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference_runtime.errors import InferenceError
from inference_runtime.v1 import engine_service_pb2
from services.gateway.needs import Need
from services.gateway.request import Request
from services.gateway.sink import NOBODY, Sink

if TYPE_CHECKING:
    from services.gateway.live import LiveRequests

__all__ = ["Choice", "Choices"]

Submission = engine_service_pb2.Submission


class Choice(Request):
    """One of several. Its end is the business of the request it belongs to."""

    def __init__(
        self,
        whole: Choices,
        live: LiveRequests,
        submission: Submission,
        sink: Sink,
        *,
        needs: Sequence[Need],
        idempotent: bool,
        time_limit_s: float,
    ) -> None:
        super().__init__(
            live,
            submission,
            sink,
            shows_at_once=whole.shows_at_once,
            needs=needs,
            idempotent=idempotent,
            traceparent=whole.traceparent,
            time_limit_s=time_limit_s,
        )
        self._whole: Choices | None = whole

    def _finish(self, error: InferenceError) -> None:
        whole = self._whole
        self._close(error.reason)
        if whole is not None:
            whole.abandon(error)

    def _settle(self, outcome: str, now: float) -> None:
        whole, self._whole = self._whole, None  # parted, as request and sink are
        if outcome == "ok" and whole is not None:
            whole.choice_ended(now)


class Choices:
    """A request for several choices, in flight. `begin` once; `cancel` at any time.

    Args:
        live: The requests it is one of.
        submission: What to generate. Owned by the request from here on.
        sinks: One for each choice. `fail` and `keep_alive` go to the first, for all of them.
        shows_at_once, needs, idempotent, traceparent, time_limit_s: As for a `Request`.
    """

    ended = False
    #: As LiveRequests saw them last: tokens of all choices, and since when there are no more.
    seen = 0
    #: Nothing goes on with it elsewhere: the ledger has it once.
    attempt = settled_input_tokens = settled_output_tokens = 0

    def __init__(
        self,
        live: LiveRequests,
        submission: Submission,
        sinks: Sequence[Sink],
        *,
        shows_at_once: bool,
        needs: Sequence[Need] = (),
        idempotent: bool = True,
        traceparent: str = "",
        time_limit_s: float = float("inf"),
    ) -> None:
        self._live, self.submission, self.shows_at_once, self.traceparent = live, submission, shows_at_once, traceparent
        request = submission.request
        self.request_id, self.model, self.tenant = request.request_id, request.deployment, request.tenant
        self.accepted_ns = time.time_ns()
        self.began = self.quiet_since = time.monotonic()
        self.sink = sinks[0]
        self.width = self._open = len(sinks)
        request.sampling.ClearField("n")
        self.choices = [
            Choice(
                self, live, _of_choice(submission, number), sink, needs=needs, idempotent=idempotent, time_limit_s=time_limit_s
            )
            for number, sink in enumerate(sinks)
        ]

    # --- what it amounts to ------------------------------------------------------------------------------------------------

    @property
    def known(self) -> bool:
        """There is a deployment of its name."""
        return any(choice.known for choice in self.choices)

    @property
    def first_at(self) -> float:
        """When the first token of any choice came (monotonic, seconds), 0.0 before it."""
        return min((choice.first_at for choice in self.choices if choice.first_at), default=0.0)

    @property
    def progress(self) -> int:
        """Tokens that have come."""
        return sum(choice.progress for choice in self.choices)

    @property
    def input_tokens(self) -> int:
        """Of the prompt, which every choice shares: counted once."""
        return max(choice.input_tokens for choice in self.choices)

    @property
    def cached_input_tokens(self) -> int:
        """Of those, what no choice had to compute."""
        return min(choice.cached_input_tokens for choice in self.choices)

    @property
    def output_tokens(self) -> int:
        """Of all choices."""
        return sum(choice.output_tokens for choice in self.choices)

    @property
    def reasoning_tokens(self) -> int:
        """Of all choices."""
        return sum(choice.reasoning_tokens for choice in self.choices)

    @property
    def resumptions(self) -> int:
        """Joints in all choices."""
        return sum(choice.resumptions for choice in self.choices)

    @property
    def finish_reason(self) -> int:
        """Why choice 0 ended: a record has room for one."""
        return self.choices[0].finish_reason

    @property
    def replica_id(self) -> str:
        """Where choice 0 ran: a record has room for one."""
        return self.choices[0].replica_id

    @property
    def revision(self) -> str:
        """Revision of the replicas that answer, "" where there is none yet or they differ."""
        revisions = {choice.revision for choice in self.choices} - {""}
        return revisions.pop() if len(revisions) == 1 else ""

    def place(self, index: int) -> bytes:
        """What follows the id of this request in the id of an event. Nobody comes back with it."""
        return b"%d" % index

    # --- its life ----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Send its choices off, or fail it. The sinks may be called before this returns."""
        for choice in self.choices:
            if self.ended:
                return  # one could not be sent: its error is the answer
            choice.begin()

    def expire(self, now: float) -> None:
        """Called by the sweeper: end it when the time of one choice is up."""
        for choice in self.choices:
            choice.expire(now)

    def cancel(self) -> None:
        """The client left: every engine stops within one step. Nothing is sent to the sinks any more."""
        if not self.ended:
            self._end("cancelled", time.monotonic())

    def abandon(self, error: InferenceError) -> None:
        """End it with an error, all its choices with it. The client is told, once."""
        if not self.ended:
            sink = self.sink
            self._end(error.reason, time.monotonic())
            sink.fail(error)

    def choice_ended(self, now: float) -> None:
        """Called by a choice that is complete."""
        self._open -= 1
        if not self._open and not self.ended:
            self._end("ok", now)

    def _end(self, outcome: str, now: float) -> None:
        self.ended = True
        for choice in self.choices:
            choice.cancel()
        self._live.end(self, outcome, now)
        self.sink = NOBODY


def _of_choice(submission: Submission, number: int) -> Submission:
    own = Submission()
    own.CopyFrom(submission)
    own.choice = number
    return own
