"""The cells: which fault, how it is injected and healed, and what is promised besides the zeros. One module for each part of the
system that is broken; one registry."""

from __future__ import annotations

from bench.faults.cells import control, engines, etcd, gateways, network, pressure
from bench.faults.scene import Cell

__all__ = ["CELLS"]

#: Every cell by its id, in the order of the table.
CELLS: dict[str, Cell] = {cell.id: cell for part in (engines, gateways, control, etcd, network, pressure) for cell in part.CELLS}
