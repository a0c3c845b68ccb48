"""Every error that a client can be told has a status line: one without would leave its client waiting for ever."""

from __future__ import annotations

import pytest

from inference_runtime.errors import InferenceError
from services.gateway.http.message import STATUS_LINES


def tree(cls: type[InferenceError]) -> list[type[InferenceError]]:
    """A class and all below it."""
    return [cls, *(c for sub in cls.__subclasses__() for c in tree(sub))]


@pytest.mark.parametrize("cls", tree(InferenceError), ids=lambda cls: cls.__name__)
def test_the_status_of_each_error_can_be_sent(cls: type[InferenceError]) -> None:
    """R-09: a quarantined prompt was refused with 422, and the gateway could not say so."""
    assert STATUS_LINES[cls.http_status].startswith(f"HTTP/1.1 {cls.http_status} ".encode())
