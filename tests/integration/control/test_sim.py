"""The simulation of the control plane, small: everything is placed, replaced after deaths, and kept over a loss of all leases."""

from __future__ import annotations

from bench.sim.__main__ import Size, simulate
from bench.sim.world import run_in_virtual_time


def test_e_06_all_leases_lost_at_once_move_nothing_and_cost_no_route() -> None:
    """E-06, R12, over the services' own code in virtual time; engines that really die are replaced."""
    found = run_in_virtual_time(lambda: simulate(Size(engines=40, deployments=40, gateways=2), seed=7))

    assert found.replicas > 40
    assert found.herd_kept_share == 1
    assert found.herd_moved == 0
    assert not found.missed
    assert found.failover_max_s < 20
