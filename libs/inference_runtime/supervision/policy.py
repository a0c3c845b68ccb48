"""What to do about a fault of a context, decided from structure: class names, codes, exit status, a probe. Never from text.

`RULES` is the table: the first rule that fits wins. `decide` is a pure function of a fault and of how often its rule fitted
lately; `Decider` remembers that. `RestartIntensity` says when restarts do not help any more. No clock, no device library.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = [
    "DEFAULT_POLICY",
    "RULES",
    "ContextFault",
    "Decider",
    "Directive",
    "Fault",
    "FaultClass",
    "FaultPhase",
    "Loss",
    "Probe",
    "RestartIntensity",
    "RestartPolicy",
    "Rule",
    "Verdict",
    "decide",
    "restart_delay_s",
]

#: CUDA errors whose text demands a new process: illegal address, launch timeout, asserts, traps, stack and instruction faults,
#: unspecified launch failure, ECC found late. (driver_types.h, cudaError)
STICKY_CODES = frozenset({226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911})
#: CUDA errors of the device or of the build, met again by any context: uncorrectable ECC, NVLink, no kernel or PTX for it.
DEVICE_CODES = frozenset({214, 220, 209, 222})
#: Of those, the device's own: no context of any build will work on it.
BROKEN_DEVICE_CODES = frozenset({214, 220})
#: CUDA errors that at the start mean that there is no usable device: no initialisation, driver too old, no device, wrong ordinal.
START_CODES = frozenset({3, 35, 100, 101})
#: CUDA errors that at the start may pass: device busy or unavailable, system not yet initialised.
START_RETRY_CODES = frozenset({46, 802})
#: CUDA errors of graph capture: the graph is lost, the context is not.
CAPTURE_CODES = frozenset(range(900, 909))
#: CUDA's out of memory, raised outside torch's allocator.
MEMORY_CODE = 2

#: Exit status with which a poisoned child ends itself: ordinary teardown would call the device again, which may hang or abort.
EXIT_POISONED = 70
#: Signals of a crash: NCCL watchdog and C++ abort, segmentation fault, bus error, illegal instruction.
CRASH_STATUSES = frozenset({-6, -11, -7, -4})
KILLED_STATUS = -9

#: Time over which most repetitions are counted, seconds.
WINDOW_S = 60.0
#: Time over which an unknown fault is remembered, seconds: longer than any model takes to load, so that an unknown fault
#: that comes back with every life is the same one.
UNKNOWN_WINDOW_S = 600.0


class Directive(enum.Enum):
    """What the owner of a context does after a fault."""

    RESUME = "resume"  #: the context is sound; what it was computing fails, nothing else
    RESTART = "restart"  #: a new context
    STOP = "stop"  #: no context on this device will work
    ESCALATE = "escalate"  #: unknown: one new context, and the next time stop


class FaultClass(enum.Enum):
    """What kind of fault it was."""

    UNRECOVERABLE = "unrecoverable"
    CONTEXT_POISONED = "context_poisoned"
    OUT_OF_MEMORY = "out_of_memory"
    RECOVERABLE = "recoverable"
    REQUEST_FAULT = "request_fault"
    UNKNOWN = "unknown"


class FaultPhase(enum.Enum):
    """When it came."""

    LOAD = "load"
    STEP = "step"


class Probe(enum.Enum):
    """What a small computation on the device said after the fault. Sticky errors repeat on every call, so it tells them apart."""

    NONE = "none"  #: there is none, or nobody asked
    OK = "ok"
    FAILED = "failed"
    HUNG = "hung"


class Loss(enum.Enum):
    """How a child was lost that did not report a fault."""

    NONE = ""
    EOF = "its connection closed"
    FRAME = "it sent a frame that cannot be read"
    HEARTBEAT = "its heartbeat stopped"
    HANG = "it made no step for too long"


@dataclass(frozen=True, slots=True)
class Fault:
    """Everything the decision is made from.

    Args:
        names: Class names of the exception, from its own to its bases. Empty without an exception.
        error_code: The device library's code that the exception carries.
        first_line: For people only.
        phase: When it came.
        probe: Of the context, after the fault.
        exit_status: Of a child process, as in `subprocess`: negative for a signal. None while it has none.
        loss: How a child was lost.
        nvml_action: NVML's recovery action for the device; 0 is none.
        oom_killed: Whether the kernel killed for memory in this control group while the child died.
    """

    names: tuple[str, ...] = ()
    error_code: int | None = None
    first_line: str = ""
    phase: FaultPhase = FaultPhase.STEP
    probe: Probe = Probe.NONE
    exit_status: int | None = None
    loss: Loss = Loss.NONE
    nvml_action: int = 0
    oom_killed: bool = False

    @classmethod
    def of(cls, err: BaseException, phase: FaultPhase = FaultPhase.STEP, probe: Probe = Probe.NONE) -> Fault:
        """The fault that an exception stands for."""
        if isinstance(err, ContextFault):
            return err.fault
        code = getattr(err, "error_code", None)
        lines = str(err).splitlines()
        return cls(
            names=tuple(c.__name__ for c in type(err).__mro__ if c is not object),
            error_code=code if isinstance(code, int) and not isinstance(code, bool) else None,
            first_line=lines[0][:500] if lines else "",
            phase=phase,
            probe=probe,
        )

    @property
    def sentence(self) -> str:
        """For people: what happened."""
        if self.names:
            if "InferenceError" in self.names:
                return self.first_line
            code = "" if self.error_code is None else f" (code {self.error_code})"
            return f"{self.names[0]}: {self.first_line}{code}"
        how = f"; {self.loss.value}" if self.loss is not Loss.NONE else ""
        if self.exit_status is None:
            return f"the context process was lost{how}"
        status = self.exit_status
        return (
            f"the context process ended by signal {-status}{how}" if status < 0 else f"the context process exited {status}{how}"
        )


class ContextFault(Exception):
    """The end of a context. Its text is the fault's sentence."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.sentence)
        self.fault = fault


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, and what it was."""

    directive: Directive
    fault_class: FaultClass


@dataclass(frozen=True, slots=True)
class Rule:
    """One row.

    Args:
        name: For logs and tests.
        fits: Whether it is about this fault.
        verdict: What holds then.
        times: For how many faults within the window; 0 is always.
        then: What holds after that.
        window_s: How long a fault is remembered, seconds.
    """

    name: str
    fits: Callable[[Fault], bool]
    verdict: Verdict
    times: int = 0
    then: Verdict | None = None
    window_s: float = WINDOW_S


_UNRECOVERABLE = Verdict(Directive.STOP, FaultClass.UNRECOVERABLE)
_POISONED = Verdict(Directive.RESTART, FaultClass.CONTEXT_POISONED)
_MEMORY = Verdict(Directive.RESUME, FaultClass.OUT_OF_MEMORY)
_MEMORY_AGAIN = Verdict(Directive.RESTART, FaultClass.OUT_OF_MEMORY)
_CAPTURE = Verdict(Directive.RESUME, FaultClass.RECOVERABLE)
_CAPTURE_AGAIN = Verdict(Directive.RESTART, FaultClass.RECOVERABLE)
_REQUEST = Verdict(Directive.RESUME, FaultClass.REQUEST_FAULT)
_UNKNOWN = Verdict(Directive.ESCALATE, FaultClass.UNKNOWN)
_UNKNOWN_AGAIN = Verdict(Directive.STOP, FaultClass.UNKNOWN)


def _loading(f: Fault) -> bool:
    return f.phase is FaultPhase.LOAD


def _is(f: Fault, *names: str) -> bool:
    return not set(names).isdisjoint(f.names)


def _out_of_memory(f: Fault) -> bool:
    return _is(f, "OutOfMemoryError")


def _probe_failed(f: Fault) -> bool:
    return f.probe in (Probe.FAILED, Probe.HUNG)


def _coded_or_plain(f: Fault) -> bool:
    return f.error_code is not None or _is(f, "RuntimeError")


#: First that fits wins. A fault without a probe falls through the rows that a probe decides, to the last one.
RULES: tuple[Rule, ...] = (
    Rule("device needs recovery", lambda f: f.nvml_action != 0, _UNRECOVERABLE),
    Rule("device or build is broken", lambda f: f.error_code in DEVICE_CODES, _UNRECOVERABLE),
    Rule("no device at start", lambda f: _loading(f) and f.error_code in START_CODES, _UNRECOVERABLE),
    Rule(
        "device not ready at start",
        lambda f: _loading(f) and f.error_code in START_RETRY_CODES,
        Verdict(Directive.RESTART, FaultClass.UNRECOVERABLE),
        times=3,
        then=_UNRECOVERABLE,
    ),
    Rule("sticky code", lambda f: f.error_code in STICKY_CODES, _POISONED),
    Rule("the runner says so", lambda f: _is(f, "ContextPoisoned"), _POISONED),
    Rule("killed for memory at load", lambda f: f.exit_status == KILLED_STATUS and f.oom_killed and _loading(f), _UNRECOVERABLE),
    Rule("killed for memory", lambda f: f.exit_status == KILLED_STATUS and f.oom_killed, _POISONED),
    Rule(
        "child crashed", lambda f: f.exit_status in CRASH_STATUSES or (not f.names and f.exit_status == EXIT_POISONED), _POISONED
    ),
    Rule("child lost", lambda f: f.loss is not Loss.NONE, _POISONED),
    Rule("out of memory at load", lambda f: _loading(f) and (_out_of_memory(f) or f.error_code == MEMORY_CODE), _UNRECOVERABLE),
    Rule(
        "out of memory, context gone",
        lambda f: (_out_of_memory(f) or f.error_code == MEMORY_CODE) and _probe_failed(f),
        _POISONED,
    ),
    Rule("out of memory", lambda f: _out_of_memory(f) or f.error_code == MEMORY_CODE, _MEMORY, times=2, then=_MEMORY_AGAIN),
    Rule("capture failed, context gone", lambda f: f.error_code in CAPTURE_CODES and _probe_failed(f), _POISONED),
    Rule("capture failed", lambda f: f.error_code in CAPTURE_CODES, _CAPTURE, times=1, then=_CAPTURE_AGAIN),
    Rule("wrong configuration", lambda f: _loading(f) and _is(f, "BadRequest", "Unsupported"), _UNRECOVERABLE),
    Rule("group of devices", lambda f: _is(f, "DistBackendError"), _POISONED),
    Rule("the probe fails", _probe_failed, _POISONED),
    Rule(
        "device error, the probe is well",
        lambda f: f.probe is Probe.OK and _coded_or_plain(f),
        _CAPTURE,
        times=2,
        then=_CAPTURE_AGAIN,
    ),
    Rule("error of Python, the probe is well", lambda f: f.probe is Probe.OK and bool(f.names), _REQUEST),
    Rule("unknown", lambda f: True, _UNKNOWN, times=1, then=_UNKNOWN_AGAIN, window_s=UNKNOWN_WINDOW_S),
)


def find_rule(fault: Fault) -> Rule:
    """The first rule that fits. Total: the last one always does."""
    return next(rule for rule in RULES if rule.fits(fault))


def decide(fault: Fault, earlier: int = 0) -> Verdict:
    """What to do about a fault.

    Args:
        fault: What happened.
        earlier: Faults under the same rule within its window, before this one.
    """
    rule = find_rule(fault)
    return rule.then if rule.then is not None and earlier >= rule.times else rule.verdict


class Decider:
    """`decide`, with a memory of what came before. One for each owner of contexts, and one in each context for its own life."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = {}

    def judge(self, fault: Fault, now_s: float) -> Verdict:
        """Count a fault at this time (monotonic seconds, never falling) and decide."""
        rule = find_rule(fault)
        if rule.then is None:
            return rule.verdict
        seen = self._seen.setdefault(rule.name, deque(maxlen=rule.times + 1))
        while seen and now_s - seen[0] >= rule.window_s:
            seen.popleft()
        verdict = decide(fault, len(seen))
        seen.append(now_s)
        return verdict

    def reset(self) -> None:
        """Forget everything."""
        self._seen.clear()


# --- how often -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Bounds of a supervisor.

    Args:
        max_restarts: Restarts allowed within the window.
        window_s: The window, seconds.
        short_lives: Consecutive lives shorter than `short_life_s` that end it.
        short_life_s: Time in which a child works, seconds, from which on its life counts as a success.
        backoff_s: Pause before the first, second, … restart in a row, seconds; the last one holds for all that follow.
        jitter: Largest part that is added to a pause at random, so that the replicas of a machine do not load at once.
    """

    max_restarts: int = 3
    window_s: float = WINDOW_S
    short_lives: int = 3
    short_life_s: float = 60.0
    backoff_s: Sequence[float] = (0.0, 1.0, 4.0)
    jitter: float = 0.25


DEFAULT_POLICY = RestartPolicy()


class RestartIntensity:
    """Says when restarts do not help any more. Two rules:

    A. More than `max_restarts` faults within the window: three pass, the fourth stops.
    B. `short_lives` consecutive lives that worked for less than `short_life_s` each, when their deaths are too far apart for the
       window to hold them all. This is what rule A cannot see: a model that takes longer than the window to load and dies at
       once would be restarted for ever. While the window does hold them, rule A alone counts: otherwise its fourth death, which
       always has three short lives before it, could not be reached.
    """

    def __init__(self, policy: RestartPolicy = DEFAULT_POLICY) -> None:
        self._policy = policy
        self._deaths: deque[float] = deque(maxlen=policy.max_restarts + 1)
        self._short = 0

    @property
    def in_a_row(self) -> int:
        """Faults that followed each other closely, the last one included: what the pause before a restart grows with."""
        return max(len(self._deaths), self._short)

    def note(self, now_s: float, worked_s: float) -> str:
        """Count a fault. Returns "" when a restart is allowed, else why it is not.

        Args:
            now_s: Monotonic time, seconds. Must not fall from call to call.
            worked_s: How long the child had worked, seconds; 0 for one that never did.
        """
        policy = self._policy
        while self._deaths and now_s - self._deaths[0] >= policy.window_s:
            self._deaths.popleft()
        self._deaths.append(now_s)
        self._short = self._short + 1 if worked_s < policy.short_life_s else 0
        if len(self._deaths) > policy.max_restarts:
            return f"died more than {policy.max_restarts} times within {policy.window_s:g} s"
        if self._short >= policy.short_lives and len(self._deaths) < self._short:
            return f"{self._short} lives in a row worked for less than {policy.short_life_s:g} s"
        return ""

    def reset(self) -> None:
        """Forget everything."""
        self._deaths.clear()
        self._short = 0


def restart_delay_s(policy: RestartPolicy, in_a_row: int, random: float) -> float:
    """Pause before a restart, seconds. `random` lies in [0, 1)."""
    if in_a_row < 1 or not policy.backoff_s:
        return 0.0
    pause = policy.backoff_s[min(in_a_row, len(policy.backoff_s)) - 1]
    return pause * (1.0 + policy.jitter * random)
