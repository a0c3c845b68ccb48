"""The cells: which fault, how it is injected and healed, and what is promised besides the zeros. One module for each part of the
system that is broken; one registry."""

from __future__ import annotations

from bench.faults.cells import clocks, control, engines, etcd, gateways, network, pressure, reconnect
from bench.faults.scene import Cell

__all__ = ["CELLS"]

_PARTS = (engines, gateways, control, etcd, network, clocks, pressure, reconnect)
#: Every cell by its id, in the order of the table.
CELLS: dict[str, Cell] = {cell.id: cell for part in _PARTS for cell in part.CELLS}
