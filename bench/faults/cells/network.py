"""Cells of networks between processes, and of providers."""

from __future__ import annotations

from bench.faults.scene import Cell

__all__ = ["CELLS"]

CELLS: tuple[Cell, ...] = ()
