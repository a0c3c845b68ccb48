"""The `torch` runtime: our own engine for Llama checkpoints, on the CPU or one CUDA device.

A step is schedule → run → post-process: `scheduler.py` decides without a tensor, `model.py` computes, `sampler.py` draws and
`runner.py` holds the three together. Importing this package imports neither torch nor tokenizers.
"""

from __future__ import annotations

import importlib.util

from inference_runtime.errors import BadRequest, RuntimeNotInstalled
from inference_runtime.runner import Codec, RunnerConfig, StepRunner
from inference_runtime.runners.torch_lm.checkpoint import find_checkpoint
from inference_runtime.runners.torch_lm.config import read_model_config
from inference_runtime.runners.torch_lm.options import parse_options

__all__ = ["RUNTIME", "TorchRuntime"]

PACKAGES = ("torch", "safetensors", "tokenizers", "jinja2", "numpy")


class TorchRuntime:
    """A `Runtime`. Models: "demo", a folder, or a Hugging Face id in the local cache. Options: see `Options`."""

    name = "torch"

    def check_installed(self) -> None:
        """Raise RuntimeNotInstalled, naming the extra, when packages are missing."""
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            raise RuntimeNotInstalled(
                f"runtime 'torch' needs {', '.join(missing)}; install: pip install 'inference-runtime[torch]'",
                runtime=self.name,
                missing=",".join(missing),
            )

    def validate(self, config: RunnerConfig) -> None:
        """Refuse options, a checkpoint or an architecture that cannot work. Reads JSON and headers, no tensor."""
        options = parse_options(config.options)
        if len(config.accelerators) > 1:
            raise BadRequest("runtime 'torch' runs a model on one device; give it one accelerator", param="accelerators")
        checkpoint = find_checkpoint(config.model, options.revision)
        read_model_config(checkpoint)
        checkpoint.generation_defaults()
        checkpoint.path("tokenizer.json")
        checkpoint.weight_files()

    def make_codec(self, config: RunnerConfig) -> Codec:
        """The checkpoint's tokenizer and chat template."""
        from inference_runtime.runners.torch_lm.codec import make_codec

        return make_codec(find_checkpoint(config.model, parse_options(config.options).revision))

    def make_runner(self, config: RunnerConfig) -> StepRunner:
        """The runner; imports torch, loads nothing yet."""
        from inference_runtime.runners.torch_lm.runner import TorchRunner

        return TorchRunner(config)


RUNTIME = TorchRuntime()
