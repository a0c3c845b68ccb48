"""Weights of a checkpoint by name, read from mapped safetensors files one at a time. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from inference_runtime.errors import BadRequest
from inference_runtime.runner import LoadProgress
from inference_runtime.runners.torch_lm.checkpoint import Checkpoint

__all__ = ["WeightFiles"]


class WeightFiles:
    """The open files of one checkpoint. A context manager: leaving it closes the maps.

    Args:
        checkpoint: Where the files are.
        dtype: Type that tensors are converted to.
        device: Where they go.
        report: Told how many bytes were read so far, after every tensor.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, report: Callable[[LoadProgress], None]
    ) -> None:
        self._folder = checkpoint.folder
        self._paths = checkpoint.weight_files()
        self._dtype, self._device, self._report = dtype, device, report
        self._total_bytes = sum(path.stat().st_size for path in self._paths)
        self._done_bytes = 0
        self._stack = ExitStack()
        self._file_of: dict[str, tuple[Path, Any]] = {}

    def __enter__(self) -> WeightFiles:
        for path in self._paths:
            try:
                file = self._stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            except (SafetensorError, OSError) as err:
                raise BadRequest(f"{path} is not readable as safetensors: {err}", param="model", file=str(path)) from err
            self._file_of.update(dict.fromkeys(file.keys(), (path, file)))  # not a mapping
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor `name` with this shape, in our dtype on our device. Raises BadRequest when it is missing or differs."""
        if name not in self._file_of:
            raise BadRequest(f"the checkpoint in {self._folder} has no tensor {name}", param="model", tensor=name)
        path, file = self._file_of[name]
        tensor: torch.Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise BadRequest(
                f"tensor {name} in {path} is {list(tensor.shape)} and config.json says {list(shape)}", param="model", tensor=name
            )
        self._done_bytes += tensor.nbytes
        self._report(LoadProgress(self._done_bytes, self._total_bytes, "weights"))
        return tensor.to(device=self._device, dtype=self._dtype)
