"""What stands behind each URL."""

from __future__ import annotations

import asyncio
import functools
import re
import time
import urllib.parse
from collections.abc import Callable

import msgspec

from inference_runtime.errors import BadRequest, DeploymentNotFound, Forbidden, InferenceError, Internal, PayloadTooLarge
from inference_runtime.telemetry import PROMETHEUS_CONTENT_TYPE, MetricSet, get_logger
from services.gateway.auth import KeyRing
from services.gateway.choices import Choices
from services.gateway.http.choices import choice_sinks
from services.gateway.http.errors import error_body, error_headers
from services.gateway.http.openai import Asked, parse_chat, parse_completion
from services.gateway.http.server import Connection, HttpRequest
from services.gateway.http.sse import CHAT, COMPLETION, Shape, StreamSink, UnarySink
from services.gateway.http.streams import LAST_EVENT_ID, STREAMS, StreamDoor
from services.gateway.live import LiveRequests, new_id
from services.gateway.metric_share import MetricShare
from services.gateway.needs import needs_of
from services.gateway.request import Request
from services.gateway.routes import Route, RouteTable

__all__ = ["HttpApp"]

log = get_logger(__name__)

Handler = Callable[[Connection, HttpRequest], None]
MODELS = b"/v1/models"


class _UnknownUrl(BadRequest):
    """There is nothing at this URL."""

    reason = "UNKNOWN_URL"
    http_status = 404
    http_code = "unknown_url"


class _WrongMethod(BadRequest):
    """There is something at this URL, for another method."""

    reason = "WRONG_METHOD"
    http_status = 405
    http_code = "method_not_allowed"


class HttpApp:
    """Dispatches requests by URL; the `App` of an `HttpServer`."""

    def __init__(
        self,
        live: LiveRequests,
        table: RouteTable,
        keys: KeyRing,
        metrics: MetricSet,
        started_s: int,
        streams: StreamDoor,
        *,
        loopback_only: bool,
    ) -> None:
        self._streams = streams
        self._live, self._table, self._keys, self._metrics, self._started_s = live, table, keys, metrics, started_s
        #: There are no keys, so that this machine's own programs need none. A web page in a browser is not one of them.
        self._loopback_only = loopback_only
        #: The other workers' metrics, where there are others: /metrics shows them all.
        self.share: MetricShare | None = None
        #: What /readyz says of the control plane besides: where the routes come from, and what an operator should know.
        self.control_plane: Callable[[], dict[str, object]] = dict
        self._posts: dict[bytes, tuple[Callable[[bytes], Asked], Shape]] = {
            b"/v1/chat/completions": (parse_chat, CHAT),
            b"/v1/completions": (parse_completion, COMPLETION),
        }
        self._gets: dict[bytes, Handler] = {
            MODELS: self._list_models,
            b"/healthz": self._healthz,
            b"/readyz": self._readyz,
            b"/metrics": self._show_metrics,
        }

    def handle(self, connection: Connection, request: HttpRequest) -> None:
        """Answer a request, now or later. Every failure becomes an OpenAI error body."""
        try:
            if self._loopback_only:
                _check_origin(request)
            entry = self._posts.get(request.path)
            if entry is not None and request.method == b"POST":
                self._generate(connection, request, *entry)
            else:
                self._get(connection, request)
        except InferenceError as err:
            connection.respond(err.http_status, error_body(err), extra=_id_line() + error_headers(err))
        except Exception as err:
            log.error("request failed by a fault of ours", exc_info=err)
            if connection.busy:
                connection.respond(500, error_body(Internal(str(err))), extra=_id_line())

    def error_body(self, status: int, message: str) -> bytes:
        """Body of an error that the server itself found."""
        if status == 413:
            return error_body(PayloadTooLarge(message))
        return error_body(BadRequest(message, code="unsupported_content_encoding" if status == 415 else "invalid_http"))

    def _generate(self, connection: Connection, request: HttpRequest, parse: Callable[[bytes], Asked], shape: Shape) -> None:
        headers = request.headers
        tenant = "" if self._keys.open else self._keys.check(headers.get(b"authorization", b""), headers.get(b"x-api-key", b""))
        asked = parse(request.body)
        submission = asked.submission
        generation = submission.request
        generation.request_id = new_id()
        if tenant:
            generation.tenant = tenant
        if headers.get(LAST_EVENT_ID):
            self._streams.again(connection, tenant, request, asked, shape)
            return
        sink: StreamSink | UnarySink
        if not asked.stream:
            submission.coalesce_tokens = self._live.limits.unary_coalesce_tokens
        traceparent = (headers.get(b"traceparent") or b"").decode("latin-1")
        needs = () if asked.plain else needs_of(generation.sampling)
        live: Request | Choices
        if asked.plain or generation.sampling.n <= 1:
            sink = StreamSink(connection, asked, shape) if asked.stream else UnarySink(connection, asked, shape)
            live = self._live.begin(submission, sink, shows_at_once=asked.stream, needs=needs, traceparent=traceparent)
            sink.request = live
            if asked.stream:
                self._streams.follow(connection, live, asked, shape)
            else:
                connection.on_disconnect = live.cancel
        else:
            sinks = choice_sinks(connection, asked, shape, generation.sampling.n)
            live = self._live.begin_choices(submission, sinks, shows_at_once=asked.stream, needs=needs, traceparent=traceparent)
            for sink in sinks:
                sink.request = live
            connection.on_disconnect = live.cancel
        live.begin()

    # --- the rest ------------------------------------------------------------------------------------------------------------

    def _get(self, connection: Connection, request: HttpRequest) -> None:
        path = request.path
        handler = self._gets.get(path)
        if handler is None and path.startswith(MODELS + b"/"):
            handler = self._show_model
        elif handler is None and path.startswith(STREAMS):
            handler = self._show_stream
        if handler is None and path not in self._posts:
            raise _UnknownUrl(f"there is nothing at {_shown(path)}; see /v1/models, /v1/chat/completions, /v1/completions")
        if handler is None or request.method not in (b"GET", b"HEAD"):
            allowed = "POST" if handler is None else "GET"
            raise _WrongMethod(f"{_shown(path)} takes {allowed}, not {_shown(request.method)}")
        handler(connection, request)

    def _reply(
        self, connection: Connection, request: HttpRequest, document: object, status: int = 200, extra: bytes = b""
    ) -> None:
        connection.respond(status, msgspec.json.encode(document), extra=_id_line() + extra, head_only=request.method == b"HEAD")

    def _check_key(self, request: HttpRequest) -> None:
        self._keys.check(request.headers.get(b"authorization", b""), request.headers.get(b"x-api-key", b""))

    def _model(self, route: Route) -> dict[str, object]:
        return {
            "id": route.deployment,
            "object": "model",
            "created": self._started_s,
            "owned_by": route.runtime or "inference-runtime",
        }

    def _list_models(self, connection: Connection, request: HttpRequest) -> None:
        self._check_key(request)
        routes = sorted(self._table.routes.values(), key=lambda r: r.deployment)
        self._reply(connection, request, {"object": "list", "data": [self._model(r) for r in routes]})

    def _show_model(self, connection: Connection, request: HttpRequest) -> None:
        self._check_key(request)
        name = urllib.parse.unquote(request.path[len(MODELS) + 1 :].decode("latin-1"))
        route = self._table.routes.get(name)
        if route is None:
            raise DeploymentNotFound(f"no deployment is called {name!r}; GET /v1/models lists them", param="model")
        self._reply(connection, request, self._model(route))

    def _show_stream(self, connection: Connection, request: HttpRequest) -> None:
        headers = request.headers
        tenant = self._keys.check(headers.get(b"authorization", b""), headers.get(b"x-api-key", b""))
        if request.method == b"HEAD":
            raise _WrongMethod(f"{_shown(request.path)} takes GET, not HEAD")
        self._streams.show(connection, tenant, request)

    def _healthz(self, connection: Connection, request: HttpRequest) -> None:
        self._reply(connection, request, {"status": "alive"})

    def _readyz(self, connection: Connection, request: HttpRequest) -> None:
        if self._live.draining:
            reason = "this gateway is shutting down"
        elif not self._table.known:
            reason = "no routing table has arrived yet; is a coordinator running?"
        elif not self._table.ready:
            reason = "no replica of any deployment can be reached"
        elif not self._table.well(time.monotonic()):
            reason = "every replica that can be reached fails what it is given"
        else:
            served = {"status": "ready", "deployments": sorted(self._table.routes)}
            shunned = self._table.shunned()
            self._reply(connection, request, {**served, **({"shunned": shunned} if shunned else {}), **self.control_plane()})
            return
        self._reply(connection, request, {"status": "not ready", "reason": reason}, 503, b"retry-after: 1\r\n")

    def _show_metrics(self, connection: Connection, request: HttpRequest) -> None:
        send = functools.partial(_send_metrics, connection, request.method == b"HEAD")
        if self.share is None:
            send(self._metrics.prometheus_text())
            return
        shown = asyncio.get_running_loop().run_in_executor(None, self.share.text)
        shown.add_done_callback(lambda done: None if done.cancelled() else send(done.result()))


def _send_metrics(connection: Connection, head_only: bool, text: bytes) -> None:
    connection.respond(200, text, PROMETHEUS_CONTENT_TYPE.encode(), _id_line(), head_only=head_only)


#: The Origin of a page that this machine serves itself.
_LOCAL = re.compile(rb"https?://(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.IGNORECASE)


def _check_origin(request: HttpRequest) -> None:
    """Refuse what a web page from elsewhere makes a browser send to a gateway without keys.

    Browsers name the page's site in every POST, also where its DNS name was made to point here.

    Raises:
        Forbidden: The Origin is another site.
    """
    origin = request.headers.get(b"origin")
    if origin is not None and not _LOCAL.fullmatch(origin):
        raise Forbidden(f"pages of {_shown(origin)} may not use a gateway without api_keys")


def _id_line() -> bytes:
    return b"x-request-id: %b\r\n" % new_id().encode()


def _shown(text: bytes) -> str:
    return text[:200].decode("ascii", "replace")
