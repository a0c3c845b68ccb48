"""The contracts as a client finds them: every RPC has a REST form, names follow one rule. (buf holds the rest: make check.)"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

PROTOS = Path(__file__).resolve().parents[2] / "protos" / "inference_runtime" / "v1"

#: RPCs that have no REST form on purpose: a bidirectional stream of frames means nothing there, and what gateways tell each other
#: is nobody else's business.
NOT_FOR_REST = {
    "inference_runtime.v1.EngineService.Session",
    "inference_runtime.v1.GatewayPeerService.Replicate",
    "inference_runtime.v1.GatewayPeerService.TakeStream",
}


def services() -> list[ServiceDescriptor]:
    """Every service of the package."""
    found: list[ServiceDescriptor] = []
    for path in sorted(PROTOS.glob("*_service.proto")):
        module = importlib.import_module(f"inference_runtime.v1.{path.stem}_pb2")
        found += module.DESCRIPTOR.services_by_name.values()
    return found


METHODS: list[MethodDescriptor] = [method for service in services() for method in service.methods]


def http_rules(method: MethodDescriptor) -> list[tuple[str, str, str]]:
    """(verb, path, body) of each REST form."""
    rule = method.GetOptions().Extensions[annotations_pb2.http]
    rules = [rule, *rule.additional_bindings]
    found = []
    for one in rules:
        verb = one.WhichOneof("pattern")
        if verb is not None:
            found.append((verb, getattr(one, verb), one.body))
    return found


def test_all_five_services_have_a_contract() -> None:
    """R01-R13: five services, one contract each; and one that gateways speak among themselves."""
    assert sorted(s.name for s in services()) == [
        "CoordinatorService",
        "DeploymentManagerService",
        "EngineService",
        "GatewayPeerService",
        "GatewayService",
        "MetricsService",
    ]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_every_rpc_has_a_rest_form(method: MethodDescriptor) -> None:
    """Every public RPC carries google.api.http with a path of the API; few others do not."""
    rules = http_rules(method)

    if method.full_name in NOT_FOR_REST:
        assert rules == []
        return
    assert rules
    for verb, path, body in rules:
        assert verb in {"get", "put", "post", "delete", "patch"}
        assert path.startswith("/api/v1/")
        assert body in {"", "*"}
        assert (verb in {"get", "delete"}) == (body == "")


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_path_variables_are_fields_of_the_request(method: MethodDescriptor) -> None:
    """A REST path names fields that exist."""
    for _, path, _ in http_rules(method):
        assert set(re.findall(r"\{(\w+)\}", path)) <= set(method.input_type.fields_by_name)


def test_no_two_rpcs_share_a_rest_form() -> None:
    """A verb and a path lead to one RPC, whatever the variables are called."""
    forms = [(verb, re.sub(r"\{\w+\}", "{}", path)) for method in METHODS for verb, path, _ in http_rules(method)]

    assert len(set(forms)) == len(forms)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_each_rpc_has_messages_of_its_own(method: MethodDescriptor) -> None:
    """A request and a response per RPC: a field added for one never reaches another."""
    assert (method.input_type.name, method.output_type.name) == (f"{method.name}Request", f"{method.name}Response")
