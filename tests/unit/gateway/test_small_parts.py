"""Keys, ids, error bodies, settings."""

from __future__ import annotations

import json

import pytest

from inference_runtime.errors import Backpressure, Internal, Unauthorized, Unsupported
from inference_runtime.secret import SecretStr
from inference_runtime.settings import SettingsError
from services.gateway.auth import KeyRing
from services.gateway.http.errors import error_body, error_headers
from services.gateway.live import new_id
from services.gateway.settings import GatewaySettings, HttpSettings, check_exposure


def test_trap_35_request_ids_are_random_and_never_repeat() -> None:
    """Trap 35: the original's ids were nanosecond timestamps."""
    ids = [new_id() for _ in range(20_000)]
    assert len(set(ids)) == len(ids)
    assert all(len(x) == 32 for x in ids[:100])
    assert len({x[:8] for x in ids}) > 19_900  # no part of them counts or tells the time


def test_an_open_ring_accepts_everyone() -> None:
    assert KeyRing([]).open
    assert KeyRing([]).check(b"") == ""


def test_a_key_is_taken_as_bearer_or_x_api_key() -> None:
    ring = KeyRing([SecretStr("one"), SecretStr("two")])
    tenant = ring.check(b"Bearer two")
    assert tenant == ring.check(b"", b"two") == ring.check(b"bearer  two")
    assert tenant != ring.check(b"Bearer one")
    assert "two" not in tenant


@pytest.mark.parametrize("header", [b"", b"Bearer", b"Bearer ", b"Bearer three", b"Basic two", b"two"])
def test_any_other_key_is_refused(header: bytes) -> None:
    with pytest.raises(Unauthorized):
        KeyRing([SecretStr("one"), SecretStr("two")]).check(header)


def test_an_error_body_has_openais_four_fields() -> None:
    body = json.loads(error_body(Unsupported("no penalties", feature="penalties")))
    assert body == {
        "error": {"message": "no penalties", "type": "invalid_request_error", "param": "presence_penalty", "code": "unsupported"}
    }


def test_a_fault_of_ours_tells_nothing_of_itself() -> None:
    assert b"secret" not in error_body(Internal("secret"))


def test_waiting_that_helps_is_told_in_whole_seconds() -> None:
    assert error_headers(Backpressure("x", retry_after_s=0.2)) == b"retry-after: 1\r\n"
    assert error_headers(Backpressure("x", retry_after_s=2.1)) == b"retry-after: 3\r\n"
    assert error_headers(Backpressure("x")) == b""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gateway.example"])
def test_an_open_gateway_beyond_loopback_is_refused(host: str) -> None:
    with pytest.raises(SettingsError, match="api_keys"):
        check_exposure(GatewaySettings(http=HttpSettings(host=host)))


def test_a_gateway_with_keys_or_with_leave_may_bind_anywhere() -> None:
    everywhere = HttpSettings(host="0.0.0.0")
    check_exposure(GatewaySettings(http=everywhere, api_keys=[SecretStr("k")]))
    check_exposure(GatewaySettings(http=everywhere, insecure_allow_remote=True))
    check_exposure(GatewaySettings())
