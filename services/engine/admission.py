"""What a replica takes in: who is refused, who waits and for how long, how many run at once. No I/O; the core owns it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from inference_runtime.errors import Backpressure, Quarantined
from inference_runtime.generation import GenerationRequest, SamplingParams
from inference_runtime.runner import RunnerInfo
from services.engine.quarantine import Quarantine, fingerprint
from services.engine.queue import WaitingRoom, cost_tokens
from services.engine.stream import Stream
from services.engine.turnover import Turnover
from services.engine.worker import Flight

__all__ = ["Admission", "Watermark"]

#: Work that may wait, as a multiple of what the runner can hold: a batch of requests as long as the context. Four batches take
#: longer than most callers wait; with answers of common length the bound by requests comes first.
WAITING_BATCHES = 4
#: Bounds of what a caller is told to wait, seconds, and what it is told while the rate is unknown.
LEAST_RETRY_S, MOST_RETRY_S, UNKNOWN_RETRY_S = 0.1, 60.0, 1.0
#: After a step that was too large for the device, this part of its sequences may run, for this long, seconds.
WATERMARK_PART, WATERMARK_S = 0.9, 60.0


class Watermark:
    """How many sequences the device's memory has shown to be too many, for a while. Pure: times are passed in."""

    def __init__(self) -> None:
        self._most, self._until_s = 0, float("-inf")

    def lower(self, sequences: int, now_s: float) -> None:
        """A step with this many did not fit."""
        self._most = max(1, int(WATERMARK_PART * sequences))
        self._until_s = now_s + WATERMARK_S

    def limit(self, places: int, now_s: float) -> int:
        """Of so many places, those that may be used now."""
        return min(places, self._most) if now_s < self._until_s else places


class Admission:
    """The waiting room of a replica, with what is known of how fast it empties and of who must not enter.

    Args:
        name: Of the replica, in sentences.
        revision: Of the deployment.
        quarantine: Who must not enter.
    """

    def __init__(self, name: str, revision: str, quarantine: Quarantine) -> None:
        self._name, self._revision = name, revision
        #: Of the admitted, those that are ready to run.
        self.room: WaitingRoom[Stream] = WaitingRoom(0, 0)
        self.watermark = Watermark()
        self._turnover = Turnover()
        self._quarantine = quarantine

    def resize(self, info: RunnerInfo, most_streams: int) -> None:
        """Bound the room. While the context is away, those that would run wait too: it holds everybody."""
        self.room.max_requests = most_streams
        self.room.max_tokens = WAITING_BATCHES * info.max_batch * info.max_context_tokens

    # --- refusals ----------------------------------------------------------------------------------------------------

    def check(
        self,
        request: GenerationRequest,
        tokens: Sequence[int],
        sampling: SamplingParams,
        done: int,
        *,
        waits: bool,
        left_s: float,
    ) -> None:
        """Refuse what is in quarantine, and what would have to wait and may not, or for longer than it has time.

        Args:
            request: Who asks.
            tokens: Its prompt.
            sampling: As it will run.
            done: Output that it already has.
            waits: It cannot start at once.
            left_s: Time in which it must begin, seconds.

        Raises:
            Quarantined, Backpressure: With retry_after_s.
        """
        if self._quarantine:
            left_there_s = self._quarantine.left_s(fingerprint(self._revision, tokens, sampling), time.monotonic())
            if left_there_s:
                raise Quarantined(
                    "this request was on the device context at two of its deaths and is refused for now; change the prompt",
                    retry_after_s=left_there_s,
                )
        if not waits and not self.room:
            return
        cost = cost_tokens(len(tokens), sampling, done)
        if not self.room.fits(cost):
            raise Backpressure(
                f"{self._name} has {self.room.tokens} tokens of work waiting; {cost} more are too many; try another replica, "
                "or later",
                retry_after_s=self.retry_after_s(),
            )
        rate = self._turnover.tokens_per_s(time.monotonic())
        wait_s = self.room.ahead(request.tenant, request.priority, cost) / rate if rate else 0.0
        if wait_s > left_s:
            raise Backpressure(
                f"{self._name} would begin this in about {wait_s:.1f} s and {left_s:.1f} s are left; try another replica, "
                "or later",
                retry_after_s=_bounded(wait_s),
            )

    def retry_after_s(self) -> float:
        """When trying again may help: once what waits now is served, or, where nothing waits, once a place is free."""
        now = time.monotonic()
        rate, ends = self._turnover.tokens_per_s(now), self._turnover.ends_per_s(now)
        if not rate:
            return UNKNOWN_RETRY_S
        return _bounded(self.room.tokens / rate if self.room else 1.0 / ends)

    # --- in and out --------------------------------------------------------------------------------------------------

    def enter(self, stream: Stream, request: GenerationRequest, cost: int) -> None:
        """Let a stream wait for its turn."""
        stream.place = self.room.put(
            stream,
            tenant=request.tenant,
            priority=request.priority,
            tokens=cost,
            now_s=time.monotonic(),
            deadline_s=stream.first_chunk_by_s,
        )

    def leave(self, stream: Stream, *, ran: bool, places: int) -> None:
        """A place in the batch or in the room is free, and what it was used for is known.

        Args:
            stream: Whose it was.
            ran: It was in the batch.
            places: Of the batch.
        """
        place, flight = stream.place, stream.flight
        if place is None or flight is None:
            return
        if place.inside:
            self.room.drop(place)
        elif ran:
            used = len(flight.prompt_token_ids) + len(flight.generated)
            self.room.settle(place, used)
            self._turnover.note_end(time.monotonic(), place.tokens, places)

    def note_full(self, full: bool) -> None:
        """Say whether all places are taken from now on."""
        self._turnover.note_full(time.monotonic(), full)

    def forget_rate(self) -> None:
        """What was measured says nothing about what comes."""
        self._turnover.forget()

    def quarantine(self, guilty: Flight, admitted: Iterable[Stream]) -> list[Stream]:
        """Refuse this request from now on. Returns those admitted that are the same to a device, as its other choices are: they
        would kill as it did. None when it was refused before: then they are known."""
        key, now = fingerprint(self._revision, guilty.prompt_token_ids, guilty.sampling), time.monotonic()
        known = self._quarantine.left_s(key, now) > 0
        self._quarantine.add(key, now)
        if known:
            return []
        return [
            stream
            for stream in admitted
            if (flight := stream.flight) is not None
            and flight.prompt_token_ids == guilty.prompt_token_ids
            and fingerprint(self._revision, flight.prompt_token_ids, flight.sampling) == key
        ]


def _bounded(seconds: float) -> float:
    """A wait as a caller is told it."""
    return min(max(seconds, LEAST_RETRY_S), MOST_RETRY_S)
