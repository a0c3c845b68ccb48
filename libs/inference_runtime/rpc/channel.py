"""Channels with the presets that were measured: dead peers are found in seconds, stalled readers are not run ahead of."""

from __future__ import annotations

import grpc

__all__ = ["MAX_MESSAGE_BYTES", "PRESETS", "open_channel"]

#: Largest message either side accepts; a frame of a busy step is a few hundred KiB.
MAX_MESSAGE_BYTES = 16 << 20

#: A frozen peer is found after 2-4 s instead of 60 (keep-alive and ping timeouts), and a stalled reader holds 90 KiB of ours
#: instead of 4 MiB (no bandwidth probe).
PRESETS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

_CLIENT: list[tuple[str, int]] = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_retries", 0),  # only the gateway retries
    ("grpc.use_local_subchannel_pool", 1),
]


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port. Connects lazily, reconnects by itself. The caller closes it."""
    return grpc.aio.insecure_channel(address, options=[*PRESETS, *_CLIENT])
