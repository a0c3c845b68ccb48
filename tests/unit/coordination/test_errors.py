"""The errors of etcd belong to the one tree."""

from __future__ import annotations

import pytest

import inference_runtime.coordination as coordination
from inference_runtime.coordination import EtcdClient, EtcdError, EtcdOutcomeUnknown, EtcdUnavailable
from inference_runtime.coordination import errors as coordination_errors
from inference_runtime.errors import BadRequest, ErrorCode, Retry


def test_every_error_of_etcd_has_a_reason_of_its_own() -> None:
    classes = [getattr(coordination_errors, name) for name in coordination_errors.__all__]

    assert all(issubclass(c, EtcdError) for c in classes)
    assert len({c.reason for c in classes}) == len(classes)


def test_an_unknown_outcome_is_never_retried_blindly_and_an_unsent_call_may_be() -> None:
    assert EtcdUnavailable.grpc_code is ErrorCode.UNAVAILABLE
    assert EtcdUnavailable.retry is Retry.AFTER_DELAY
    assert EtcdOutcomeUnknown.retry is Retry.NEVER


def test_every_public_name_is_there() -> None:
    assert all(hasattr(coordination, name) for name in coordination.__all__)
    assert sorted(coordination.__all__, key=str.lower) == sorted(set(coordination.__all__), key=str.lower)


@pytest.mark.parametrize("endpoints", [[], ["localhost"], ["http://"], [":2379"], ["host:port"]])
def test_a_malformed_endpoint_is_refused_at_once(endpoints: list[str]) -> None:
    with pytest.raises(BadRequest, match=r"127\.0\.0\.1:2379"):
        EtcdClient(endpoints)


def test_endpoints_are_taken_with_and_without_a_scheme() -> None:
    client = EtcdClient(["http://a:1", "b:2", "https://c:3/"])

    assert client.endpoints == ("a:1", "b:2", "c:3")
