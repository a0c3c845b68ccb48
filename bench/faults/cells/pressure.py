"""Cells of overload, slowness and full disks."""

from __future__ import annotations

from bench.faults.scene import Cell

__all__ = ["CELLS"]

CELLS: tuple[Cell, ...] = ()
