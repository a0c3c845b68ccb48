"""What a child may see of the machine, and what the machine says after its death."""

from __future__ import annotations

from types import SimpleNamespace

from services.engine.devices import NoDevices, NvmlDevices, find_devices, oom_kills
from services.engine.spawner import child_environment

GIB = 2**30


class Nvml:
    """As much of pynvml as is used. It stands for the driver, which this machine may lack."""

    NVML_SUCCESS = 0
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230

    class NVMLError(Exception):
        """Its base class."""

    def __init__(self) -> None:
        self.used = GIB
        self.pids: list[int] = []
        self.action = 0
        self.polls = 0
        self.frees_after = 10**9

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> object:
        """Bytes in use."""
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[object]:
        """Who uses it."""
        self.polls += 1
        if self.polls > self.frees_after:
            self.pids, self.used = [], GIB
        return [SimpleNamespace(pid=p) for p in self.pids]

    def nvmlDeviceGetFieldValues(self, handle: object, ids: list[int]) -> list[object]:
        """The recovery action."""
        assert ids == [230]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=self.action))]


async def test_a_device_is_released_once_the_process_is_off_it_and_its_memory_is_back() -> None:
    """Both: in a container the process may be listed under another number."""
    nvml = Nvml()
    devices = NvmlDevices(nvml, ["gpu"], limit_s=5.0)
    devices.note_use()
    nvml.used, nvml.pids, nvml.frees_after = 30 * GIB, [77], 2
    assert await devices.released(77)
    assert nvml.polls == 3


async def test_memory_that_does_not_come_back_is_reported() -> None:
    """Another process cannot use it."""
    nvml = Nvml()
    devices = NvmlDevices(nvml, ["gpu"], limit_s=0.15)
    devices.note_use()
    nvml.used = 30 * GIB
    assert not await devices.released(77)


async def test_the_drivers_recovery_action_is_read() -> None:
    """What it is called on any device of the replica."""
    nvml = Nvml()
    devices = NvmlDevices(nvml, ["a", "b"])
    assert await devices.recovery_action() == 0
    nvml.action = 2
    assert await devices.recovery_action() == 2


async def test_a_machine_without_devices_waits_for_nothing() -> None:
    """Nobody is asked."""
    devices = find_devices(())
    assert isinstance(devices, NoDevices)
    assert await devices.released(1)
    assert await devices.recovery_action() == 0
    assert oom_kills() >= 0


def test_a_child_gets_no_secrets_and_its_devices_only() -> None:
    """Its runner runs code of models and plug-ins."""
    base = {
        "PATH": "/bin",
        "OPENAI_API_KEY": "x",
        "HF_TOKEN": "x",
        "AWS_SECRET": "x",
        "PGPASSWORD": "x",
        "db_password": "x",
        "INFERENCE_ENGINE__ETCD__USERNAME": "x",
        "INFERENCE_ENGINE__RPC__PORT": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "4,GPU-5",
    }
    env = child_environment(base, (1,))
    assert {k for k in env if k not in ("PYTHONUNBUFFERED", "CUDA_VISIBLE_DEVICES")} == {
        "PATH",
        "INFERENCE_ENGINE__RPC__PORT",
        "TOKENIZERS_PARALLELISM",
    }
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-5"
    assert child_environment({}, (0, 3))["CUDA_VISIBLE_DEVICES"] == "0,3"
    assert child_environment(base, ())["CUDA_VISIBLE_DEVICES"] == ""
