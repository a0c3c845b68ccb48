"""Answers of several choices, in OpenAI's shape: what a sink writes for one choice, put together to one answer.

Each choice has the sink it would have alone. They share where the answer begins and where it ends, and nothing on a token's way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inference_runtime.errors import InferenceError
from services.gateway.http.openai import Asked
from services.gateway.http.sse import Shape, StreamSink, UnarySink

if TYPE_CHECKING:
    from services.gateway.http.server import Connection

__all__ = ["StreamChoice", "UnaryChoice", "choice_sinks"]


class _Joint:
    """What the choices of one answer share."""

    __slots__ = ("_left", "parts", "started")

    def __init__(self, choices: int) -> None:
        self._left = choices
        #: The head of a stream is out.
        self.started = False
        #: Choices of a whole answer, by number, as they are complete.
        self.parts = [b""] * choices

    def one_ends(self) -> bool:
        """Count a choice that is complete. Returns whether it was the last one."""
        self._left -= 1
        return not self._left


class StreamChoice(StreamSink):
    """Writes one of several choices into the one stream."""

    __slots__ = ("_joint", "_label")

    def __init__(self, connection: Connection, asked: Asked, shape: Shape, number: int, joint: _Joint) -> None:
        super().__init__(connection, asked, shape)
        self._joint = joint
        self._label = _label(number)

    def _start(self) -> bytes:
        if self._joint.started:
            return b""
        self._joint.started = True
        return super()._start()

    def _position(self) -> bytes:
        return b": "  # a comment and no id: a place in one choice is none in the stream, and nobody can come back with it

    def _ending(self) -> bytes:
        return super()._ending() if self._joint.one_ends() else b""

    def fail(self, error: InferenceError) -> None:
        """See `Sink`. For all choices."""
        self._started = self._joint.started
        super().fail(error)


class UnaryChoice(UnarySink):
    """Gathers one of several choices; the one that is complete last sends them all."""

    __slots__ = ("_joint", "_label", "_number")

    def __init__(self, connection: Connection, asked: Asked, shape: Shape, number: int, joint: _Joint) -> None:
        super().__init__(connection, asked, shape)
        self._joint, self._number = joint, number
        self._label = _label(number)

    def _complete(self, choice: bytes) -> None:
        self._joint.parts[self._number] = choice
        if self._joint.one_ends():
            super()._complete(b",".join(self._joint.parts))


def _label(number: int) -> bytes:
    return b'{"index":%d,' % number


def choice_sinks(connection: Connection, asked: Asked, shape: Shape, choices: int) -> list[StreamChoice] | list[UnaryChoice]:
    """A sink for each choice of one answer."""
    joint = _Joint(choices)
    if asked.stream:
        return [StreamChoice(connection, asked, shape, number, joint) for number in range(choices)]
    return [UnaryChoice(connection, asked, shape, number, joint) for number in range(choices)]
