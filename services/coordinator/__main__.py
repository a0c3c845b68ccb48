"""`inference-coordinator`: wiring of one coordinator process."""

from __future__ import annotations

from inference_runtime.process import run_service, serve_singleton
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1.coordinator_service_pb2_grpc import add_CoordinatorServiceServicer_to_server
from services.coordinator.service import ROLE, CoordinatorService
from services.coordinator.settings import CoordinatorSettings


async def serve(settings: CoordinatorSettings, telemetry: Telemetry) -> None:
    """Campaign and serve until SIGTERM or SIGINT."""
    await serve_singleton(
        settings,
        telemetry,
        ROLE,
        lambda etcd, leaders: CoordinatorService(etcd, leaders, settings, telemetry.metrics),
        add_CoordinatorServiceServicer_to_server,
        "inference_runtime.v1.CoordinatorService",
        settings.grace_s,
    )


def main() -> None:
    """The console script."""
    run_service(CoordinatorSettings, serve)


if __name__ == "__main__":
    main()
