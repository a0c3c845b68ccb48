"""What an engine says of its devices: found without loading torch, and marked when one of them is broken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from inference_runtime.supervision import Fault
from inference_runtime.supervision.policy import BROKEN_DEVICE_CODES, STICKY_CODES
from inference_runtime.v1 import common_pb2
from services.engine.accelerators import find_accelerators, list_by_nvml, list_by_torch, mark_devices, why_broken

GIB = 2**30


class Nvml:
    """As much of pynvml as is used. It stands for the driver, which this machine may lack."""

    NVML_SUCCESS = 0
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230

    class NVMLError(Exception):
        """Its base class."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.actions: dict[int, int] = {}

    def nvmlInit(self) -> None:
        """Nothing to do."""

    def nvmlDeviceGetCount(self) -> int:
        """All of the machine."""
        return self.devices

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        """The index."""
        if index >= self.devices:
            raise self.NVMLError("invalid argument")
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        """By number."""
        return f"device {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:
        """Bytes."""
        return SimpleNamespace(total=(handle + 1) * GIB)

    def nvmlDeviceGetFieldValues(self, handle: int, ids: list[int]) -> list[object]:
        """The recovery action."""
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=self.actions.get(handle, 0)))]


def test_a_machine_without_the_driver_has_none_and_nothing_is_asked(tmp_path: Path) -> None:
    """The base needs no GPU package."""
    assert find_accelerators(tmp_path / "no-driver") == []


def test_devices_are_numbered_as_contexts_number_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their place among those that this process may see."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [(a.index, a.name, a.memory_bytes) for a in list_by_nvml(Nvml(2))] == [(0, "device 0", GIB), (1, "device 1", 2 * GIB)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert [(a.index, a.name) for a in list_by_nvml(Nvml(4))] == [(0, "device 3"), (1, "device 1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list_by_nvml(Nvml(4)) == []


def test_a_driver_that_answers_with_an_error_costs_the_devices_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts and hosts what needs none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert list_by_nvml(Nvml(1)) == []


def test_a_device_that_its_driver_wants_recovered_takes_nothing_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """We never reset a device."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml(2)
    nvml.actions[1] = 4
    assert [a.unschedulable for a in list_by_nvml(nvml)] == ["", "its driver asks for recovery action 4"]


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    """A process that has loaded torch can be poisoned with it. Whatever goes wrong there leaves an engine without devices."""
    found = list_by_torch(script='print(\'[["a device", 1024], ["another", 2048]]\')')
    assert [(a.index, a.name, a.memory_bytes) for a in found] == [(0, "a device", 1024), (1, "another", 2048)]
    assert list_by_torch(script="import sys; sys.exit(3)") == []
    assert list_by_torch(script="print('what')") == []
    assert list_by_torch(program="/no/such/program") == []


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        (Fault(nvml_action=1), True),
        *((Fault(names=("AcceleratorError",), error_code=code), True) for code in sorted(BROKEN_DEVICE_CODES)),
        *((Fault(names=("AcceleratorError",), error_code=code), False) for code in sorted(STICKY_CODES)),
        (Fault(names=("AcceleratorError",), error_code=209), False),  # no kernel for this device: the build's fault
        (Fault(names=("BadRequest",)), False),
    ],
)
def test_only_what_no_context_can_survive_breaks_a_device(fault: Fault, broken: bool) -> None:
    """A new process heals the others."""
    assert bool(why_broken(fault)) is broken


def test_marks_are_news_once_and_can_be_taken_back() -> None:
    """Each device of the replica, and no other."""
    engine = common_pb2.Engine(node=common_pb2.Node(accelerators=[common_pb2.Accelerator(index=i) for i in range(3)]))
    assert mark_devices(engine, (0, 2), "broken")
    assert not mark_devices(engine, (0, 2), "broken")
    assert [a.unschedulable for a in engine.node.accelerators] == ["broken", "", "broken"]
    assert mark_devices(engine, (2,), "")
    assert [a.unschedulable for a in engine.node.accelerators] == ["broken", "", ""]
    assert not mark_devices(engine, (9,), "not ours")
