"""Where the contexts of a replica live: chosen from its deployment, made from what the engine process has."""

from __future__ import annotations

from collections.abc import Sequence

from inference_runtime.deployment import DeploymentSpec
from inference_runtime.runner import Isolation, RunnerConfig, Runtime
from services.engine.context import Context, ContextFactory, OnStep, ThreadContext
from services.engine.devices import find_devices
from services.engine.process_context import HANG_S, ProcessContext
from services.engine.spawner import Spawner

__all__ = ["choose_isolation", "process_contexts", "thread_contexts"]


def choose_isolation(spec: DeploymentSpec, accelerators: Sequence[int]) -> Isolation:
    """As deployed; left open, a process of its own for what uses a device, since no thread can heal a device's context."""
    if spec.isolation == "auto":
        return Isolation.PROCESS if accelerators else Isolation.THREAD
    return Isolation(spec.isolation)


def thread_contexts(runtime: Runtime) -> ContextFactory:
    """Contexts in threads of this process."""

    def make(config: RunnerConfig, name: str, generation: int, on_step: OnStep) -> Context:
        return ThreadContext(runtime, config, name=name, on_step=on_step)

    return make


def process_contexts(
    spawner: Spawner, runtime: str, accelerators: Sequence[int] = (), *, hang_s: float = HANG_S
) -> ContextFactory:
    """Contexts in child processes.

    Args:
        spawner: Starts them.
        runtime: Registered name, or "module:attribute", of the runtime.
        accelerators: Devices whose memory must be back before the next child starts.
        hang_s: Least time without a step that is taken for a hang, seconds.
    """
    devices = find_devices(accelerators)

    def make(config: RunnerConfig, name: str, generation: int, on_step: OnStep) -> Context:
        return ProcessContext(
            spawner, runtime, config, generation=generation, name=name, on_step=on_step, devices=devices, hang_s=hang_s
        )

    return make
