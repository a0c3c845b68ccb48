"""`inference-deployment-manager`: wiring of one deployment manager process."""

from __future__ import annotations

from inference_runtime.process import run_service, serve_singleton
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1.deployment_manager_service_pb2_grpc import add_DeploymentManagerServiceServicer_to_server
from services.deployment_manager.service import ROLE, DeploymentManagerService
from services.deployment_manager.settings import DeploymentManagerSettings


async def serve(settings: DeploymentManagerSettings, telemetry: Telemetry) -> None:
    """Campaign and serve until SIGTERM or SIGINT."""
    await serve_singleton(
        settings,
        telemetry,
        ROLE,
        lambda etcd, leaders: DeploymentManagerService(etcd, leaders, settings, telemetry.metrics),
        add_DeploymentManagerServiceServicer_to_server,
        "inference_runtime.v1.DeploymentManagerService",
        settings.grace_s,
    )


def main() -> None:
    """The console script."""
    run_service(DeploymentManagerSettings, serve)


if __name__ == "__main__":
    main()
