"""What the machine says about a dead child: NVML for its devices, the control group for its memory.

Both are optional: without NVIDIA's library or without control groups there is nothing to ask, and nothing to wait for.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from inference_runtime.settings import environment
from inference_runtime.telemetry import get_logger

__all__ = [
    "Devices",
    "NoDevices",
    "NvmlDevices",
    "device_handle",
    "find_devices",
    "needed_recovery",
    "oom_kills",
    "visible_devices",
]

log = get_logger(__name__)

#: Time that a device gets to give a dead process's memory back, seconds.
RELEASE_LIMIT_S = 30.0
RELEASE_POLL_S = 0.1
#: Memory that may stay in use beyond what was in use before the child, bytes: drivers round, other processes breathe.
RELEASE_SLACK_BYTES = 256 * 1024 * 1024


class Devices(Protocol):
    """The accelerators of one replica, seen from outside its child."""

    def note_use(self) -> None:
        """Remember how much memory is in use, before a child starts."""
        ...

    async def recovery_action(self) -> int:
        """What the driver says must be done before the devices can be used again; 0 is nothing."""
        ...

    async def released(self, pid: int) -> bool:
        """Wait until the process is off the devices and its memory is back. False when that took too long."""
        ...


class NoDevices:
    """For replicas on the CPU, and machines without NVML."""

    def note_use(self) -> None:
        """Nothing."""

    async def recovery_action(self) -> int:
        """None needed."""
        return 0

    async def released(self, pid: int) -> bool:
        """At once."""
        return True


class NvmlDevices:
    """Devices that NVML knows.

    Args:
        nvml: The module `pynvml`, initialised.
        handles: Of the devices.
        limit_s: How long `released` waits, seconds.
    """

    def __init__(self, nvml: Any, handles: Sequence[Any], limit_s: float = RELEASE_LIMIT_S) -> None:
        self._nvml, self._handles, self._limit_s = nvml, handles, limit_s
        self._before = [0] * len(handles)

    def note_use(self) -> None:
        """Remember the memory in use."""
        self._before = self._used()

    async def recovery_action(self) -> int:
        """The first device's action that is not none."""
        return await asyncio.to_thread(self._recovery_action)

    async def released(self, pid: int) -> bool:
        """Poll until no device lists the process and the memory is back."""
        deadline = time.monotonic() + self._limit_s
        while not await asyncio.to_thread(self._free_of, pid):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(RELEASE_POLL_S)
        return True

    def _used(self) -> list[int]:
        return [int(self._nvml.nvmlDeviceGetMemoryInfo(h).used) for h in self._handles]

    def _free_of(self, pid: int) -> bool:
        for handle in self._handles:  # in a container the ids may be the host's, so that the memory is what really counts
            if any(p.pid == pid for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)):
                return False
        return all(now <= before + RELEASE_SLACK_BYTES for now, before in zip(self._used(), self._before, strict=True))

    def _recovery_action(self) -> int:
        return needed_recovery(self._nvml, self._handles)


def needed_recovery(nvml: Any, handles: Sequence[Any]) -> int:
    """The first action of these devices that is not none; 0 where the driver asks for nothing or does not know the question."""
    field = getattr(nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", None)
    if field is None:
        return 0
    for handle in handles:
        try:
            value = nvml.nvmlDeviceGetFieldValues(handle, [field])[0]
        except nvml.NVMLError as err:
            log.warning("recovery action cannot be read", error=str(err))
            continue
        if value.nvmlReturn == nvml.NVML_SUCCESS and value.value.uiVal:
            return int(value.value.uiVal)
    return 0


def find_devices(accelerators: Sequence[int]) -> Devices:
    """The devices with these indexes, as far as this machine can tell about them."""
    if not accelerators:
        return NoDevices()
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        log.info("nvidia-ml-py is not installed: devices are not watched while contexts restart")
        return NoDevices()
    try:
        nvml.nvmlInit()
        visible = visible_devices() or []
        return NvmlDevices(nvml, [device_handle(nvml, visible, index) for index in accelerators])
    except nvml.NVMLError as err:
        log.warning("devices cannot be watched", error=str(err))
        return NoDevices()


def visible_devices() -> list[str] | None:
    """What this process may see, as it was told; None when it may see everything."""
    told = environment().get("CUDA_VISIBLE_DEVICES")
    return None if told is None else [name for name in told.split(",") if name]


def device_handle(nvml: Any, visible: Sequence[str], index: int) -> Any:
    """NVML's handle of a device by its index among those that are visible."""
    name = visible[index] if index < len(visible) else str(index)
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)


def oom_kills() -> int:
    """Processes that the kernel killed for memory in this process's control group so far; 0 where nobody counts."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").rpartition("0::")[2].splitlines()[0]
        events = Path("/sys/fs/cgroup", group.lstrip("/"), "memory.events").read_text(encoding="ascii")
    except (OSError, IndexError):
        return 0
    counts = dict(line.split() for line in events.splitlines())
    return int(counts.get("oom_kill", 0))
