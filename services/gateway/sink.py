"""Where the chunks of one choice go: the seam between a request and the doors that answer for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inference_runtime.errors import InferenceError
from inference_runtime.v1 import engine_service_pb2

__all__ = ["NOBODY", "Follower", "Sink"]

ChunkDetail = engine_service_pb2.ChunkDetail


class Sink(Protocol):
    """Where one choice of an answer goes. An answer of several has a sink for each; what concerns all of them (`fail`,
    `keep_alive`) then goes to that of choice 0."""

    def token(self, index: int, token: int, text: str) -> None:
        """One token, with the text that became certain."""
        ...

    def chunk(self, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None, done: bool) -> None:
        """Any other chunk. `done`: the choice is complete with it."""
        ...

    def fail(self, error: InferenceError) -> None:
        """The answer ends here, with an error."""
        ...

    def hold(self) -> None:
        """Several chunks follow at once."""
        ...

    def release(self) -> None:
        """That was all of them."""
        ...

    def keep_alive(self) -> None:
        """Nothing has come for a while."""
        ...

    def resumed(self, count: int) -> None:
        """The choice goes on, for the count-th time, from another attempt."""
        ...


class Follower(Protocol):
    """Who hears of a request's end."""

    def ended(self, outcome: str) -> None:
        """It is over, like this (see `LiveRequests.end`)."""
        ...


class _Nobody:
    """The sink of a request that is over."""

    def token(self, index: int, token: int, text: str) -> None:
        """Nothing."""

    def chunk(self, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None, done: bool) -> None:
        """Nothing."""

    def fail(self, error: InferenceError) -> None:
        """Nothing."""

    def hold(self) -> None:
        """Nothing."""

    def release(self) -> None:
        """Nothing."""

    def keep_alive(self) -> None:
        """Nothing."""

    def resumed(self, count: int) -> None:
        """Nothing."""


NOBODY = _Nobody()
