"""The table of names: metrics and span attributes. A new one is added here first."""

from __future__ import annotations

#: Metrics, by name: (unit, description). Everything that a service measures stands here.
METRICS: dict[str, tuple[str, str]] = {
    "inference_requests_total": ("", "Requests that ended, by deployment and outcome (ok, cancelled or the error's reason)"),
    "inference_requests_in_flight": ("", "Requests that are being answered, by deployment"),
    "inference_tokens_in_total": ("", "Prompt tokens, by deployment"),
    "inference_tokens_out_total": ("", "Generated tokens, by deployment"),
    "inference_cost_usd_total": ("", "Cost in US dollars, by deployment"),
    "gen_ai_server_time_to_first_token_seconds": ("s", "From acceptance to the first token, by deployment"),
    "gen_ai_server_time_per_output_token_seconds": ("s", "Mean time between tokens of a request, by deployment"),
    "gen_ai_server_request_duration_seconds": ("s", "From acceptance to the end, by deployment"),
    "inference_queue_seconds": ("s", "From admission to the first step, by deployment"),
    "inference_cancel_to_stop_seconds": ("s", "From a cancellation to the step that no longer holds the request"),
    "inference_route_table_revision": ("", "Revision of the routing table in use"),
    "inference_route_table_age_seconds": ("s", "Time since the routing table was last confirmed"),
    "inference_sessions": ("", "Open sessions between gateways and engines"),
    "inference_replicas_silent": ("", "Replicas whose engine answers nothing at present, by deployment"),
    "inference_replicas_ejected": ("", "Replicas that get few requests or none because they are slow, by deployment"),
    "inference_replica_ejections_total": ("", "Times a replica was put aside for being far slower than others, by deployment"),
    "inference_frames_dropped_total": ("", "Chunks that were dropped, by cause (old epoch, duplicate, gap)"),
    "inference_retries_total": ("", "Further attempts, by deployment and kind (retry: refused; move: lost; hand_over: closed)"),
    "inference_resumptions_total": ("", "Broken answers, by deployment and outcome (resumed: went on elsewhere; failed)"),
    "inference_gateway_peers": ("", "Other gateways that are known"),
    "inference_stream_copies": ("", "Streams of this gateway that another one is given a copy of"),
    "inference_stream_records": ("", "Streams kept for clients that may come back, copies for other gateways among them"),
    "inference_stream_returns_total": ("", "Clients that came back to a stream, by outcome (resumed, kept, over, or the reason)"),
    "inference_usage_records_lost_total": ("", "Usage records dropped because the metrics service was away for too long"),
    "inference_running": ("", "Requests that run on a replica"),
    "inference_queued": ("", "Requests that wait at a replica"),
    "inference_replica_ready": ("", "1 while a replica takes requests, 0 while it is loading, silent, failing or draining"),
    "inference_kv_use": ("", "Share of a replica's KV cache in use"),
    "inference_context_restarts_total": ("", "Context restarts, by deployment and cause"),
    "inference_step_seconds": ("s", "Duration of one engine step, by deployment"),
    "inference_leader": ("", "1 while this process leads its role"),
    "inference_leader_terms_total": ("", "Terms that this process began"),
    "inference_coordinator_degraded": ("", "1 while the coordinator that leads lacks something, by reason"),
    "inference_store_refused": ("", "1 while etcd is not the store that was followed, and waits to be acknowledged"),
    "inference_watch_restarts_total": ("", "Watches that had to be re-listed"),
    "inference_replicas": ("", "Replicas by deployment and state"),
    "inference_loop_blocked_seconds": ("s", "Times that the event loop of a process was blocked for 0.2 s or more"),
    "inference_rpc_seconds": ("s", "Duration of a unary call, by method"),
}

#: Gauges of which the largest counts where several processes show theirs as one. Of all others the sum does.
LARGEST = frozenset(
    {
        "inference_gateway_peers",
        "inference_replicas_ejected",
        "inference_replicas_silent",
        "inference_route_table_age_seconds",
        "inference_route_table_revision",
        "inference_store_refused",
    }
)

#: Span attributes of the GenAI conventions.
ATTR_OPERATION = "gen_ai.operation.name"
ATTR_MODEL = "gen_ai.request.model"
ATTR_SYSTEM = "gen_ai.provider.name"
ATTR_INPUT_TOKENS = "gen_ai.usage.input_tokens"
ATTR_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
ATTR_FINISH = "gen_ai.response.finish_reasons"
ATTR_REQUEST_ID = "inference.request_id"
ATTR_REPLICA = "inference.replica_id"
ATTR_RESUMPTIONS = "inference.resumptions"
