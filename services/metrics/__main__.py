"""`inference-metrics`: wiring of one metrics service process."""

from __future__ import annotations

from inference_runtime.process import run_service, serve_singleton
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1.metrics_service_pb2_grpc import add_MetricsServiceServicer_to_server
from services.metrics.service import ROLE, MetricsService
from services.metrics.settings import MetricsSettings


async def serve(settings: MetricsSettings, telemetry: Telemetry) -> None:
    """Campaign and serve until SIGTERM or SIGINT."""
    await serve_singleton(
        settings,
        telemetry,
        ROLE,
        lambda etcd, leaders: MetricsService(leaders, settings, telemetry.metrics),
        add_MetricsServiceServicer_to_server,
        "inference_runtime.v1.MetricsService",
        settings.grace_s,
    )


def main() -> None:
    """The console script."""
    run_service(MetricsSettings, serve)


if __name__ == "__main__":
    main()
