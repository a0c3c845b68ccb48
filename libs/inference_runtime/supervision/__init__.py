"""Supervision of a restartable child: what to do about a fault (`policy`, pure), and the loop that does it (`supervisor`)."""

from inference_runtime.supervision.policy import (
    DEFAULT_POLICY,
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
    Verdict,
    decide,
)
from inference_runtime.supervision.supervisor import Child, GaveUp, Supervisor

__all__ = [
    "DEFAULT_POLICY",
    "Child",
    "ContextFault",
    "Decider",
    "Directive",
    "Fault",
    "FaultClass",
    "FaultPhase",
    "GaveUp",
    "Loss",
    "Probe",
    "RestartIntensity",
    "RestartPolicy",
    "Supervisor",
    "Verdict",
    "decide",
]
