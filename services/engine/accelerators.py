"""Which accelerators this engine offers to placement, and which of them take nothing any more.

NVML tells where nvidia-ml-py is installed (the extra `nvidia`). Without it torch is asked, in a process of its own: this one must
never load it. A machine without NVIDIA's driver is asked nothing.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inference_runtime.settings import environment
from inference_runtime.supervision import Fault
from inference_runtime.supervision.policy import BROKEN_DEVICE_CODES
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import common_pb2
from services.engine.devices import device_handle, needed_recovery, visible_devices
from services.engine.spawner import child_environment

__all__ = ["find_accelerators", "list_by_nvml", "list_by_torch", "mark_devices", "why_broken"]

log = get_logger(__name__)

#: What NVIDIA's driver shows while it is loaded.
DRIVER = Path("/proc/driver/nvidia/version")
#: Time torch gets to be imported and to answer, seconds.
TORCH_LIMIT_S = 60.0
TORCH_SCRIPT = """
import json, torch
found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[p.name, p.total_memory] for p in found]))
"""


def find_accelerators(driver: Path = DRIVER) -> list[common_pb2.Accelerator]:
    """The devices that this process may see, numbered as contexts number them. Blocks: for a thread."""
    if not driver.exists():
        return []
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return list_by_torch()
    return list_by_nvml(nvml)


def list_by_nvml(nvml: Any) -> list[common_pb2.Accelerator]:
    """The devices as NVML knows them. Those that the driver wants recovered first take nothing.

    Args:
        nvml: The module `pynvml`.
    """
    found = []
    try:
        nvml.nvmlInit()
        visible = visible_devices()
        count = int(nvml.nvmlDeviceGetCount()) if visible is None else len(visible)
        for index in range(count):
            handle = device_handle(nvml, visible or [], index)
            name = nvml.nvmlDeviceGetName(handle)
            action = needed_recovery(nvml, [handle])
            found.append(
                common_pb2.Accelerator(
                    index=index,
                    name=name.decode() if isinstance(name, bytes) else name,
                    memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
                    unschedulable=_demand(action) if action else "",
                )
            )
    except nvml.NVMLError as err:
        log.error("accelerators cannot be listed", error=str(err))
    return found


def list_by_torch(program: str = sys.executable, script: str = TORCH_SCRIPT) -> list[common_pb2.Accelerator]:
    """The devices as torch knows them, asked in another process; none where it is not installed."""
    try:
        answer = subprocess.run(
            [program, "-c", script], env=_environment(), capture_output=True, timeout=TORCH_LIMIT_S, check=True
        )
        devices = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as err:
        log.warning("an NVIDIA driver is here, and nobody to ask for its devices; install the extra nvidia", error=str(err))
        return []
    return [common_pb2.Accelerator(index=i, name=name, memory_bytes=size) for i, (name, size) in enumerate(devices)]


def _environment() -> dict[str, str]:
    """Without secrets, and with the devices that this process may see."""
    told = environment().get("CUDA_VISIBLE_DEVICES")
    env = {name: value for name, value in child_environment(environment(), ()).items() if name != "CUDA_VISIBLE_DEVICES"}
    return env if told is None else env | {"CUDA_VISIBLE_DEVICES": told}


def why_broken(fault: Fault) -> str:
    """Why a device will fail every context, when this fault says so; else ""."""
    if fault.nvml_action:
        return _demand(fault.nvml_action)
    return fault.sentence if fault.error_code in BROKEN_DEVICE_CODES else ""


def _demand(action: int) -> str:
    return f"its driver asks for recovery action {action}"


def mark_devices(engine: common_pb2.Engine, indexes: Iterable[int], why: str) -> bool:
    """Note in the engine's record why these devices take nothing; "" for devices that are well again. Returns whether that is
    news."""
    wanted = set(indexes)
    devices = [d for d in engine.node.accelerators if d.index in wanted and d.unschedulable != why]
    for device in devices:
        device.unschedulable = why
    return bool(devices)
