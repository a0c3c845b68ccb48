"""Settings of the coordinator."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from inference_runtime.settings import ServiceSettings

__all__ = ["CoordinatorSettings"]


class CoordinatorSettings(ServiceSettings):
    """The coordinator: pushes the routing table to the gateways."""

    service: ClassVar[str] = "coordinator"

    keep_alive_s: float = Field(default=2.0, gt=0, description="seconds after which a watcher that heard nothing hears that")
    load_interval_s: float = Field(default=0.25, gt=0, description="least seconds between two messages that carry only load")
    load_ttl_s: float = Field(default=10.0, gt=0, description="seconds for which a load report counts")
    registration_ttl_s: float = Field(
        default=15.0, ge=2, description="seconds for which an engine that registers by call is kept without a report"
    )
    freeze_s: float = Field(
        default=60.0, ge=0, description="seconds for which routes outlive a mass loss of leases; 0 switches that off"
    )
    settle_s: float = Field(
        default=15.0,
        ge=0,
        description="seconds for which a new leader leaves the gateways their routes while most engines are missing; 0 for none",
    )
    grace_s: float = Field(default=1.0, ge=0, description="seconds that running calls may take to end at shutdown")
