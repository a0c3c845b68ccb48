"""gRPC as every service uses it: one server builder, one channel, one translation between errors and status."""

from inference_runtime.rpc.channel import open_channel
from inference_runtime.rpc.drain import Drain, Stage
from inference_runtime.rpc.server import RpcServer
from inference_runtime.rpc.status import error_from_rpc, error_from_status, remaining_s, status_from_error

__all__ = [
    "Drain",
    "RpcServer",
    "Stage",
    "error_from_rpc",
    "error_from_status",
    "open_channel",
    "remaining_s",
    "status_from_error",
]
