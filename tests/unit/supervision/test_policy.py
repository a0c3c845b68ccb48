"""What is done about a fault is decided by its structure (R05, trap 12)."""

from __future__ import annotations

import pytest

from inference_runtime.errors import BadRequest, ContextPoisoned, EngineLost
from inference_runtime.supervision import Directive, RestartIntensity, decide


class AcceleratorError(RuntimeError):
    """As torch raises it: a code beside a text."""

    def __init__(self, error_code: int) -> None:
        super().__init__("CUDA error: out of memory")  # a misleading text on purpose: it must not matter
        self.error_code = error_code


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class DeviceOutOfMemory(OutOfMemoryError):
    """A class derived from it."""


@pytest.mark.parametrize("code", [226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911])
def test_a_sticky_code_restarts_the_context(code: int) -> None:
    """Nothing works in a context after one of these."""
    assert decide(AcceleratorError(code)) is Directive.RESTART


@pytest.mark.parametrize("code", [214, 220])
def test_a_broken_device_stops(code: int) -> None:
    """A new context would meet the same device."""
    assert decide(AcceleratorError(code)) is Directive.STOP


@pytest.mark.parametrize(
    ("err", "directive"),
    [
        (ContextPoisoned("x"), Directive.RESTART),
        (EngineLost("x"), Directive.RESTART),
        (OutOfMemoryError(), Directive.RESUME),
        (DeviceOutOfMemory(), Directive.RESUME),
        (AcceleratorError(1), Directive.ESCALATE),
        (BadRequest("x"), Directive.ESCALATE),
        (RuntimeError("CUDA error: an illegal memory access was encountered (700)"), Directive.ESCALATE),
        (ValueError("context poisoned"), Directive.ESCALATE),
    ],
)
def test_class_and_code_decide_and_text_does_not(err: Exception, directive: Directive) -> None:
    """The words of a message are never read."""
    assert decide(err) is directive


def test_three_restarts_in_a_minute_are_allowed_and_the_fourth_is_not() -> None:
    """Trap 12: the intensity binds."""
    intensity = RestartIntensity()
    assert [intensity.allow(now) for now in (0, 1, 2, 3)] == [True, True, True, False]


def test_restarts_that_are_far_apart_are_allowed_for_ever() -> None:
    """Only those within the window count."""
    intensity = RestartIntensity()
    assert all(intensity.allow(20.0 * n) for n in range(100))


def test_a_restart_leaves_the_window_after_a_minute() -> None:
    """The window slides: what is exactly its length ago is out."""
    intensity = RestartIntensity(max_restarts=1, window_s=60)
    assert [intensity.allow(now) for now in (0, 60, 119)] == [True, True, False]
