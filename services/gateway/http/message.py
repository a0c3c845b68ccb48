"""What is said over HTTP/1.1: a parsed request, and the first line of an answer."""

from __future__ import annotations

import httptools

__all__ = ["STATUS_LINES", "HttpRequest", "path_of"]

STATUS_LINES = {
    code: f"HTTP/1.1 {code} {text}\r\n".encode()
    for code, text in {
        200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
        408: "Request Timeout", 409: "Conflict", 413: "Content Too Large", 415: "Unsupported Media Type",
        422: "Unprocessable Content", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
        499: "Client Closed Request", 500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable",
        504: "Gateway Timeout",
    }.items()
}  # fmt: skip


class HttpRequest:
    """One parsed request. `path` has no query; header names are lower case."""

    __slots__ = ("body", "chunked_ok", "headers", "keep_alive", "method", "path")

    def __init__(
        self, method: bytes, path: bytes, headers: dict[bytes, bytes], body: bytes, keep_alive: bool, chunked_ok: bool
    ) -> None:
        self.method, self.path, self.headers, self.body = method, path, headers, body
        self.keep_alive, self.chunked_ok = keep_alive, chunked_ok


def path_of(url: bytes) -> bytes:
    """The path of a request's target, without its query."""
    if url[:1] != b"/" and b"://" in url[:9]:
        try:
            url = httptools.parse_url(url).path or b"/"
        except httptools.HttpParserInvalidURLError:
            return url
    return url.partition(b"?")[0]
