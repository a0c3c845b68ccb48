"""What is done about a fault is decided by its structure, row by row (R05, trap 12)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inference_runtime.errors import BadRequest, ContextPoisoned, EngineLost, RuntimeNotInstalled, ServerError
from inference_runtime.supervision import (
    ContextFault,
    Decider,
    Directive,
    Fault,
    FaultClass,
    FaultPhase,
    Loss,
    Probe,
    RestartIntensity,
    RestartPolicy,
    decide,
)
from inference_runtime.supervision.policy import RULES, STICKY_CODES, find_rule, restart_delay_s

LOAD, STEP = FaultPhase.LOAD, FaultPhase.STEP
STOP, RESTART, RESUME, ESCALATE = Directive.STOP, Directive.RESTART, Directive.RESUME, Directive.ESCALATE
UNRECOVERABLE, POISONED, MEMORY = FaultClass.UNRECOVERABLE, FaultClass.CONTEXT_POISONED, FaultClass.OUT_OF_MEMORY
RECOVERABLE, REQUEST, UNKNOWN = FaultClass.RECOVERABLE, FaultClass.REQUEST_FAULT, FaultClass.UNKNOWN


class AcceleratorError(RuntimeError):
    """As torch raises it: a code beside a text."""

    def __init__(self, error_code: int) -> None:
        super().__init__("CUDA error: out of memory")  # a misleading text on purpose: it must not matter
        self.error_code = error_code


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class DeviceOutOfMemory(OutOfMemoryError):
    """A class derived from it."""


class DistBackendError(RuntimeError):
    """As torch.distributed names it."""


def code(number: int, phase: FaultPhase = STEP, probe: Probe = Probe.NONE) -> Fault:
    """A CUDA error."""
    return Fault.of(AcceleratorError(number), phase, probe)


def raised(err: Exception, phase: FaultPhase = STEP, probe: Probe = Probe.NONE) -> Fault:
    """An exception."""
    return Fault.of(err, phase, probe)


def exited(status: int, phase: FaultPhase = STEP, *, oom: bool = False, loss: Loss = Loss.NONE) -> Fault:
    """The end of a child."""
    return Fault(exit_status=status, phase=phase, oom_killed=oom, loss=loss)


#: fault, faults of its rule before it, directive, class. In the order of the rules.
TABLE: list[tuple[str, Fault, int, Directive, FaultClass]] = [
    *((f"1 nvml {n}", Fault(exit_status=70, nvml_action=n), 0, STOP, UNRECOVERABLE) for n in range(1, 8)),
    ("1 wins over a sticky code", Fault(("AcceleratorError",), 710, nvml_action=1), 0, STOP, UNRECOVERABLE),
    *((f"2 code {n}", code(n), 0, STOP, UNRECOVERABLE) for n in (214, 220, 209, 222)),
    *((f"2 code {n} at start", code(n, LOAD), 0, STOP, UNRECOVERABLE) for n in (3, 35, 100, 101)),
    *((f"2 code {n} at start, tried again", code(n, LOAD), 2, RESTART, UNRECOVERABLE) for n in (46, 802)),
    *((f"2 code {n} at start, three times tried again", code(n, LOAD), 3, STOP, UNRECOVERABLE) for n in (46, 802)),
    *((f"3 code {n}", code(n, probe=Probe.OK), 9, RESTART, POISONED) for n in sorted(STICKY_CODES)),
    ("3 code at load", code(710, LOAD), 0, RESTART, POISONED),
    ("3 the runner says so", raised(ContextPoisoned("x")), 9, RESTART, POISONED),
    ("3 a class derived from it", raised(EngineLost("x")), 0, RESTART, POISONED),
    *((f"4 signal {n}", exited(n), 9, RESTART, POISONED) for n in (-6, -11, -7, -4)),
    ("4 exit 70", exited(70), 9, RESTART, POISONED),
    *((f"4 {loss.name}", Fault(loss=loss), 9, RESTART, POISONED) for loss in (Loss.EOF, Loss.HEARTBEAT, Loss.HANG, Loss.FRAME)),
    ("4 killed by someone", exited(-9, loss=Loss.EOF), 9, RESTART, POISONED),
    ("5 killed for memory at load", exited(-9, LOAD, oom=True), 0, STOP, UNRECOVERABLE),
    ("5 killed for memory", exited(-9, oom=True), 9, RESTART, POISONED),
    ("6 out of memory", raised(OutOfMemoryError()), 0, RESUME, MEMORY),
    ("6 a class derived from it", raised(DeviceOutOfMemory()), 1, RESUME, MEMORY),
    ("6 the third in a minute", raised(OutOfMemoryError(), probe=Probe.OK), 2, RESTART, MEMORY),
    ("6 at load", raised(OutOfMemoryError(), LOAD), 0, STOP, UNRECOVERABLE),
    ("7 code 2", code(2, probe=Probe.OK), 0, RESUME, MEMORY),
    ("7 code 2, the probe fails", code(2, probe=Probe.FAILED), 0, RESTART, POISONED),
    ("7 code 2 at load", code(2, LOAD), 0, STOP, UNRECOVERABLE),
    *((f"8 code {n}", code(n, probe=Probe.OK), 0, RESUME, RECOVERABLE) for n in range(900, 909)),
    ("8 twice", code(900), 1, RESTART, RECOVERABLE),
    ("8 the probe hangs", code(901, probe=Probe.HUNG), 0, RESTART, POISONED),
    ("9 plain, the probe is well", raised(RuntimeError("CUDNN_STATUS"), probe=Probe.OK), 0, RESUME, RECOVERABLE),
    ("9 plain, the third in a minute", raised(RuntimeError("x"), probe=Probe.OK), 2, RESTART, RECOVERABLE),
    ("9 plain, the probe fails", raised(RuntimeError("x"), probe=Probe.FAILED), 0, RESTART, POISONED),
    ("9 plain, the probe hangs", raised(RuntimeError("x"), probe=Probe.HUNG), 0, RESTART, POISONED),
    ("9 a group of devices", raised(DistBackendError(), probe=Probe.OK), 0, RESTART, POISONED),
    *((f"10 code {n}, the probe is well", code(n, probe=Probe.OK), 0, RESUME, RECOVERABLE) for n in (999, 304, 1)),
    *((f"10 code {n}, the probe fails", code(n, probe=Probe.FAILED), 0, RESTART, POISONED) for n in (999, 304, 1)),
    ("11 Python's, the probe is well", raised(ValueError("shape"), probe=Probe.OK), 99, RESUME, REQUEST),
    ("11 Python's, the probe fails", raised(ValueError("shape"), probe=Probe.FAILED), 0, RESTART, POISONED),
    ("12 no probe", raised(RuntimeError("CUDA error: an illegal memory access (700)")), 0, ESCALATE, UNKNOWN),
    ("12 again", raised(ValueError("context poisoned")), 1, STOP, UNKNOWN),
    ("12 a code without a probe", code(999), 0, ESCALATE, UNKNOWN),
    ("12 an exit that means nothing", exited(1, LOAD), 0, ESCALATE, UNKNOWN),
    ("12 a provider at load", raised(ServerError("x"), LOAD), 0, ESCALATE, UNKNOWN),
    ("a wrong configuration", raised(BadRequest("no such checkpoint"), LOAD), 0, STOP, UNRECOVERABLE),
    ("a missing package", raised(RuntimeNotInstalled("x"), LOAD), 0, STOP, UNRECOVERABLE),
]


@pytest.mark.parametrize(("fault", "earlier", "directive", "fault_class"), [r[1:] for r in TABLE], ids=[r[0] for r in TABLE])
def test_trap_12_the_table(fault: Fault, earlier: int, directive: Directive, fault_class: FaultClass) -> None:
    """First rule that fits wins; the words of a message are never read."""
    verdict = decide(fault, earlier)
    assert (verdict.directive, verdict.fault_class) == (directive, fault_class)


def test_every_rule_has_a_row_of_the_table() -> None:
    """No rule is hidden behind those before it."""
    assert {find_rule(row[1]).name for row in TABLE} == {r.name for r in RULES}


def test_a_fault_that_crossed_a_process_is_the_same_fault() -> None:
    """The exception that the parent rebuilds is read as the one that was raised."""
    fault = code(710)
    assert Fault.of(ContextFault(fault)) is fault
    assert str(ContextFault(fault)) == "AcceleratorError: CUDA error: out of memory (code 710)"


def test_a_code_that_is_no_number_is_none() -> None:
    """`error_code` of a foreign exception may be anything."""
    err = ValueError("x")
    err.error_code = "rate_limited"  # type: ignore[attr-defined]
    assert Fault.of(err).error_code is None


@given(
    st.builds(
        Fault,
        names=st.lists(st.sampled_from(["AcceleratorError", "OutOfMemoryError", "RuntimeError", "ValueError"])).map(tuple),
        error_code=st.none() | st.integers(0, 1000),
        first_line=st.text(max_size=20),
        phase=st.sampled_from(FaultPhase),
        probe=st.sampled_from(Probe),
        exit_status=st.none() | st.integers(-15, 80),
        loss=st.sampled_from(Loss),
        nvml_action=st.integers(0, 7),
        oom_killed=st.booleans(),
    ),
    st.text(),
    st.integers(0, 5),
)
def test_every_fault_has_a_verdict_that_its_text_does_not_change(fault: Fault, text: str, earlier: int) -> None:
    """Total, and structure alone."""
    other = Fault(
        fault.names, fault.error_code, text, fault.phase, fault.probe, fault.exit_status, fault.loss, fault.nvml_action,
        fault.oom_killed,
    )  # fmt: skip
    assert decide(fault, earlier) == decide(other, earlier)
    assert fault.sentence or fault.names


def test_the_decider_counts_within_the_window() -> None:
    """Out of memory: two in a minute pass, the third restarts; a minute later they pass again."""
    decider = Decider()
    fault = raised(OutOfMemoryError())
    assert [decider.judge(fault, t).directive for t in (0, 10, 59)] == [RESUME, RESUME, RESTART]
    assert decider.judge(fault, 119).directive is RESUME
    decider.reset()
    assert [decider.judge(fault, t).directive for t in (120, 121)] == [RESUME, RESUME]


# --- how often -------------------------------------------------------------------------------------------------------


def allowed(*deaths: tuple[float, float]) -> list[bool]:
    """Whether a restart is allowed after each (time of death, time it had worked)."""
    intensity = RestartIntensity()
    return [not intensity.note(*death) for death in deaths]


def test_trap_12_three_restarts_in_a_minute_pass_and_the_fourth_does_not() -> None:
    """Rule A, whatever the first life was: the window is what counts."""
    assert allowed((0, 0), (1, 0.5), (2, 0.5), (3, 0.5)) == [True, True, True, False]
    assert allowed((100, 100), (101, 1), (102, 1), (103, 1)) == [True, True, True, False]


def test_lives_that_worked_for_long_may_end_for_ever() -> None:
    """Neither rule counts a success."""
    assert all(allowed(*((60.0 * n, 60.0) for n in range(100))))


def test_a_restart_leaves_the_window_after_a_minute() -> None:
    """The window slides: what is exactly its length ago is out."""
    intensity = RestartIntensity(RestartPolicy(max_restarts=1, short_lives=9))
    assert [not intensity.note(t, 0) for t in (0, 60, 119)] == [True, True, False]


def test_three_short_lives_that_the_window_cannot_hold_end_it() -> None:
    """Rule B: a model that loads for 90 s and dies at once would be restarted for ever."""
    assert allowed((90, 0.1), (180, 0.1), (270, 0.1)) == [True, True, False]
    assert allowed((90, 0.1), (180, 59.9), (270, 60.0), (360, 0.1), (450, 1), (540, 1)) == [True, True, True, True, True, False]


def test_the_pause_grows_and_is_jittered() -> None:
    """0, 1, 4 s, and up to a quarter more."""
    policy = RestartPolicy()
    assert [restart_delay_s(policy, n, 0.0) for n in range(6)] == [0, 0, 1, 4, 4, 4]
    assert restart_delay_s(policy, 3, 0.999) == pytest.approx(5.0, abs=0.01)
    assert restart_delay_s(RestartPolicy(backoff_s=()), 3, 0.5) == 0


class Intensity(RuleBasedStateMachine):
    """Decider and intensity together, against the plain reading of both rules."""

    def __init__(self) -> None:
        super().__init__()
        self.intensity, self.decider = RestartIntensity(), Decider()
        self.now_s = 0.0
        self.deaths: list[tuple[float, float]] = []
        self.unknown: list[float] = []
        self.stopped = False

    @precondition(lambda self: not self.stopped)
    @rule(worked_s=st.sampled_from([0.0, 0.5, 10.0, 59.0, 60.0, 200.0]), load_s=st.sampled_from([0.0, 0.5, 20.0, 90.0]))
    def poisoned(self, worked_s: float, load_s: float) -> None:
        """A life that ends by a sticky error."""
        self.now_s += load_s + worked_s
        assert self.decider.judge(code(710), self.now_s).directive is RESTART
        self.deaths.append((self.now_s, worked_s))
        self.stopped = self.intensity.note(self.now_s, worked_s) != ""
        recent = [t for t, _ in self.deaths if self.now_s - t < 60]
        shorts = 0
        for _, worked in reversed(self.deaths):
            if worked >= 60:
                break
            shorts += 1
        assert self.stopped == (len(recent) > 3 or (shorts >= 3 and len(recent) < shorts))

    @precondition(lambda self: not self.stopped)
    @rule(worked_s=st.sampled_from([0.5, 100.0, 700.0]))
    def unknown_fault(self, worked_s: float) -> None:
        """A life that ends for no known reason: one of those is forgiven within ten minutes."""
        self.now_s += worked_s
        before = [t for t in self.unknown if self.now_s - t < 600]
        directive = self.decider.judge(raised(ValueError()), self.now_s).directive
        assert directive is (STOP if before else ESCALATE)
        self.unknown.append(self.now_s)
        self.stopped = directive is STOP

    @precondition(lambda self: self.stopped)
    @rule()
    def reset(self) -> None:
        """An operator arms it again: everything is forgotten."""
        self.intensity.reset()
        self.decider.reset()
        self.deaths.clear()
        self.unknown.clear()
        self.stopped = False

    @invariant()
    def the_row_is_never_longer_than_the_history(self) -> None:
        """Nothing is counted twice."""
        assert self.intensity.in_a_row <= len(self.deaths)


TestIntensity = Intensity.TestCase
