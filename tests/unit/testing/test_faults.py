"""An experiment whose fault did not happen proves nothing: the injector says so."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field

import pytest

from inference_runtime.testing import faults
from inference_runtime.testing.faults import FaultNotVerified, injected, process_state


@dataclass
class Switch:
    """A fault that may be broken itself."""

    works: bool = True
    heals: bool = True
    name: str = "a switch"
    on: bool = False
    steps: list[str] = field(default_factory=list)

    def inject(self) -> None:
        """Switch on."""
        self.steps.append("inject")
        self.on = self.works

    def is_injected(self) -> bool:
        """On."""
        return self.on

    async def heal(self) -> None:
        """Switch off."""
        self.steps.append("heal")
        self.on = self.on and not self.heals

    def is_healed(self) -> bool:
        """Off."""
        return not self.on


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon: nothing slow happens here."""
    monkeypatch.setattr(faults, "VERIFY_S", 0.1)


async def test_the_body_runs_between_injection_and_cure() -> None:
    """Inject, verify, heal, verify."""
    switch = Switch()
    async with injected(switch):
        assert switch.on
        switch.steps.append("body")

    assert switch.steps == ["inject", "body", "heal"]


async def test_a_fault_that_does_not_show_raises_before_the_body_and_is_healed() -> None:
    """The body would prove nothing."""
    switch = Switch(works=False)
    with pytest.raises(FaultNotVerified, match="a switch did not take effect"):
        async with injected(switch):
            switch.steps.append("body")

    assert switch.steps == ["inject", "heal"]


async def test_a_fault_that_stays_raises_after_the_body() -> None:
    """What comes next would run under a fault that nobody knows of."""
    switch = Switch(heals=False)
    with pytest.raises(FaultNotVerified, match="a switch is not healed"):
        async with injected(switch):
            pass


async def test_a_failing_body_is_healed_and_its_failure_is_what_is_seen() -> None:
    """The first error is not hidden by the cure."""
    switch = Switch()
    with pytest.raises(ZeroDivisionError):
        async with injected(switch):
            raise ZeroDivisionError

    assert not switch.on


def test_the_state_of_a_process_is_the_kernels_word() -> None:
    """Running or sleeping, dead and not yet reaped, gone."""
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    zombie = process_state(child.pid)
    child.wait()

    assert process_state(os.getpid()) in {"R", "S"}
    assert zombie == "Z"
    assert process_state(child.pid) == ""
