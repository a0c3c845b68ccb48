"""Faults of a scripted deployment's steps, in one process, as injectors: its device hangs, or is slow.

The deployment's `runtime_config` names a file, `faults_file`; the process that steps confirms what it was told (and so does
nothing that only looks like it): see `runners.scripted_faults`.
"""

from __future__ import annotations

from pathlib import Path

from inference_runtime.runners.scripted_faults import confirmed, write_orders
from inference_runtime.testing.faults import process_state

__all__ = ["TellSteps"]


class TellSteps:
    """Steps of some processes fare as ordered (HANG, slow(20)); those of all others are well.

    Args:
        path: The deployment's `faults_file`.
        pids: The processes that step: engines, or context processes.
        order: What they are to have.
    """

    def __init__(self, path: Path, pids: list[int], order: str) -> None:
        self._path, self._pids, self._order = path, pids, order

    @property
    def name(self) -> str:
        """What it is."""
        return f"telling {', '.join(map(str, self._pids))} to {self._order}"

    def inject(self) -> None:
        """Tell them."""
        write_orders(self._path, dict.fromkeys(self._pids, self._order))

    def is_injected(self) -> bool:
        """Each of them said that it has it. What it said last stands when it was killed for it."""
        return all(confirmed(self._path, pid) == self._order for pid in self._pids)

    async def heal(self) -> None:
        """Tell them that nothing is wrong."""
        write_orders(self._path, {})

    def is_healed(self) -> bool:
        """Each of them said that it is over, or is gone."""
        return all(confirmed(self._path, pid) == "" or process_state(pid) in {"", "Z"} for pid in self._pids)
