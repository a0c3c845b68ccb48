"""Supervision of a restartable child: what to do about a fault (`policy`, pure), and the loop that does it (`supervisor`)."""

from inference_runtime.supervision.policy import Directive, RestartIntensity, decide
from inference_runtime.supervision.supervisor import Child, GaveUp, Supervisor

__all__ = ["Child", "Directive", "GaveUp", "RestartIntensity", "Supervisor", "decide"]
