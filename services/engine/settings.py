"""Settings of an engine process."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from inference_runtime.settings import ServiceSettings, StrictModel, StringList

__all__ = ["EngineSettings", "NodeSettings"]


class NodeSettings(StrictModel):
    """What this machine offers to placement."""

    roles: StringList = Field(default=[], description="control, gpu, egress, edge; empty means everything")
    labels: dict[str, str] = Field(default_factory=dict, description="labels that deployments may ask for")
    taints: StringList = Field(default=[], description='"key=value": only deployments that tolerate it are placed here')
    islands: list[int] = Field(
        default=[], description="for each accelerator by index, which group of a fast link (NVLink) it is in; empty says nothing"
    )


class EngineSettings(ServiceSettings):
    """An engine hosts replicas of deployments and runs generations on them."""

    service: ClassVar[str] = "engine"

    engine_id: str = Field(default="", pattern=r"^[A-Za-z0-9._-]{0,128}$", description="id in the cluster; empty makes one up")
    node: NodeSettings = NodeSettings()
    drain_timeout_s: float = Field(
        default=120.0, ge=0, description="seconds that requests get to end on SIGTERM, before others go on with them"
    )
    drain_notice_s: float = Field(
        default=2.0, ge=0, description="seconds of these in which gateways that have not heard of it are still served"
    )
    load_interval_s: float = Field(default=0.25, gt=0, description="seconds between two load reports while load changes")
    load_refresh_s: float = Field(default=2.0, gt=0, description="seconds between two load reports while it does not")
    tokenise_threads: int = Field(default=2, ge=1, le=64, description="threads that tokenise long prompts")
    hang_s: float = Field(
        default=30.0, gt=0, description="least seconds without a step after which a context in a process of its own is killed"
    )
    ready_s: float = Field(
        default=5.0, gt=0, description="age of a replica's last step or canary, seconds, beyond which it is not ready"
    )
    session_buffer_chunks: int = Field(
        default=65_536, ge=1, description="chunks that may wait for the reader of one session before the session is ended"
    )
