"""Settings of the deployment manager."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from inference_runtime.settings import ServiceSettings

__all__ = ["DeploymentManagerSettings"]


class DeploymentManagerSettings(ServiceSettings):
    """The deployment manager: keeps the catalogue and makes engines serve it."""

    service: ClassVar[str] = "deployment_manager"

    settle_s: float = Field(
        default=1.0, ge=0, description="seconds that a new leader waits for engines that assignments name and nobody has seen yet"
    )
    engine_gone_s: float = Field(
        default=3.0, ge=0, description="seconds after an engine's lease ended until its replicas get another place"
    )
    mass_loss_s: float = Field(
        default=15.0, ge=0, description="seconds that engines which vanished many at once get to come back; 0 for none"
    )
    grace_s: float = Field(default=1.0, ge=0, description="seconds that running calls may take to end at shutdown")
