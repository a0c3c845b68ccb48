"""Runtimes for tests of process isolation. A child finds them by "tests.integration.engine.runtimes:NAME"."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from inference_runtime.runner import LoadProgress, RunnerConfig, RunnerInfo, StepOutput
from inference_runtime.runners.scripted import ScriptedRunner, ScriptedRuntime

PATH = "tests.integration.engine.runtimes:"


class DeviceError(RuntimeError):
    """A CUDA error with a code that a probe must judge."""

    error_code = 999


class Misbehaving(ScriptedRunner):
    """Does what its model is called, at load or in a step."""

    def load(self, report: Callable[[LoadProgress], None]) -> RunnerInfo:
        model = self._config.model
        if model == "exits-at-load":
            os._exit(3)
        if model == "leaves-a-process":
            grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            print(f"grandchild {grandchild.pid}", flush=True)
        if model == "reports":
            report(LoadProgress(5, 10, "half way"))
        return super().load(report)

    def step(self) -> Sequence[StepOutput]:
        outputs = super().step()
        model, third = self._config.model, self._steps == 3
        if third and model == "garbage":
            os.write(int(sys.argv[1]), b"\x00\x00\x00\x04what")
        if third and model == "announces-too-much":
            os.write(int(sys.argv[1]), b"\xff\xff\xff\xff")
        if third and model == "segfaults":
            os.kill(os.getpid(), signal.SIGSEGV)
        if third and model.startswith("probe-"):
            raise DeviceError("what this means, the probe must say")
        if model == "python-error" and self._steps % 3 == 0:
            raise ValueError("a shape does not fit")
        return outputs

    def probe(self) -> bool:
        if self._config.model == "probe-hangs":
            time.sleep(60)
        return self._config.model != "probe-fails" and super().probe()


class MisbehavingRuntime(ScriptedRuntime):
    """Makes them."""

    def make_runner(self, config: RunnerConfig) -> Misbehaving:
        return Misbehaving(config)


MISBEHAVING = MisbehavingRuntime()
