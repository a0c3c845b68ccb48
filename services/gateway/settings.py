"""Settings of the gateway."""

from __future__ import annotations

import ipaddress
from typing import ClassVar

from pydantic import Field

from inference_runtime.settings import Secret, SecretList, ServiceSettings, SettingsError, StrictModel

__all__ = ["GatewaySettings", "HttpSettings", "LimitSettings", "ResumeSettings", "Secret", "check_exposure", "is_loopback"]


class HttpSettings(StrictModel):
    """The HTTP door."""

    host: str = Field(default="127.0.0.1", description="address to bind; 127.0.0.1 keeps it on this machine")
    port: int = Field(default=8080, ge=0, le=65535, description="port; 0 picks a free one")
    max_body_bytes: int = Field(default=8 << 20, ge=1024, description="largest request body; larger ones are answered with 413")
    max_header_bytes: int = Field(
        default=32 << 10, ge=1024, description="largest request head; larger ones are answered with 431"
    )
    header_timeout_s: float = Field(default=10.0, gt=0, description="seconds a client may take to send a request's head")
    body_timeout_s: float = Field(default=60.0, gt=0, description="seconds a client may take to send a request's body")
    idle_timeout_s: float = Field(default=75.0, gt=0, description="seconds a connection may stay open without a request")
    stall_timeout_s: float = Field(default=10.0, gt=0, description="seconds a client may read nothing of what waits for it")
    max_unread_bytes: int = Field(
        default=1 << 20, ge=256 << 10, description="bytes that may wait for one client before it is cut"
    )
    max_connections: int = Field(default=16384, ge=1, description="connections of one worker")
    keepalive_s: float = Field(default=15.0, gt=0, description="seconds of silence in a stream before a comment is sent")


class LimitSettings(StrictModel):
    """Bounds of what one worker does for its requests."""

    max_requests: int = Field(default=8192, ge=1, description="requests in flight; more are answered with 429")
    route_wait_s: float = Field(default=5.0, ge=0, description="seconds a request waits for a replica before 503")
    max_retries: int = Field(default=2, ge=0, le=10, description="further attempts before the first chunk")
    max_resumptions: int = Field(default=2, ge=0, le=10, description="further attempts after the first chunk")
    retry_share: float = Field(default=0.1, ge=0, description="retries per accepted request, in a window, per deployment")
    retry_floor: int = Field(default=3, ge=0, description="retries that a window allows besides")
    moves_per_request: float = Field(
        default=2.0, ge=0, description="moves away from lost replicas, in a window, per request in flight"
    )
    move_floor: int = Field(default=10, ge=0, description="moves that a window allows besides")
    budget_window_s: float = Field(default=10.0, gt=0, description="seconds that retries and moves are counted over")
    unary_coalesce_tokens: int = Field(default=256, ge=1, description="tokens an engine holds back for an answer sent whole")


class ResumeSettings(StrictModel):
    """Streams that clients may come back to."""

    window_s: float = Field(
        default=60.0, ge=0, le=3600, description="seconds that a stream is kept for its client; 0 offers none"
    )
    max_streams: int = Field(default=16384, ge=1, description="streams that are kept, copies for other gateways among them")
    max_bytes: int = Field(default=64 << 20, ge=1 << 20, description="bytes that they may hold; then the oldest go")
    max_request_bytes: int = Field(
        default=256 << 10, ge=0, description="streams with a larger request are not copied to another gateway; 0 copies none"
    )


class GatewaySettings(ServiceSettings):
    """Settings of inference-gateway."""

    service: ClassVar[str] = "gateway"

    http: HttpSettings = HttpSettings()
    limits: LimitSettings = LimitSettings()
    resume: ResumeSettings = ResumeSettings()
    workers: int = Field(default=1, ge=1, le=256, description="processes that share the HTTP port")
    api_keys: SecretList = Field(default=[], description="keys clients may use; empty means open, on this machine only")
    insecure_allow_remote: bool = Field(default=False, description="allow other machines in without api_keys")
    drain_timeout_s: float = Field(default=120.0, ge=0, description="seconds that running requests get to end on SIGTERM")
    flush_s: float = Field(default=2.0, ge=0, description="seconds that the last usage records get to arrive, at the very end")
    drain_notice_s: float = Field(
        default=2.0, ge=0, description="seconds of these in which /readyz says 503 and new requests are still taken"
    )
    state_dir: str = Field(
        default="", description="directory of this gateway alone, where its routes outlive a restart; empty keeps none"
    )
    ready_file: str = Field(default="", description='file that gets {"http": "host:port", "grpc": "host:port"} once it serves')
    metrics_file: str = Field(
        default="", description="set by a gateway for its workers: where one keeps its metrics, beside those of the others"
    )
    parent_fd: int = Field(default=-1, description="set by a gateway for its workers: descriptor that closes when it is gone")


def check_exposure(settings: GatewaySettings) -> None:
    """Refuse to stand open to other machines by accident.

    Raises:
        SettingsError: A door is bound beyond loopback, there is no key, and nobody said that this is meant.
    """
    if settings.api_keys or settings.insecure_allow_remote:
        return
    for name, host in (("http.host", settings.http.host), ("rpc.host", settings.rpc.host)):
        if not is_loopback(host):
            raise SettingsError(
                f"{name} is {host}, which other machines reach, and api_keys is empty; set api_keys, or bind 127.0.0.1, "
                f"or set insecure_allow_remote = true if everyone may use this gateway",
                param=name,
            )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
