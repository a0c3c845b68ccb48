"""What an installation without extras brings along."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: Packages that carry or drive a GPU stack, by canonical name or prefix of it.
GPU_PACKAGE = re.compile(
    r"^(torch|torchvision|torchaudio|triton|vllm|tritonclient|jax|jaxlib|cupy.*|onnxruntime.*|tensorrt.*|flash-attn.*|nvidia-.*|cuda-.*)$"
)


def base_graph(root: str) -> dict[str, str]:
    """Every distribution that `root` needs without extras, transitively -> the one that asked for it first.

    Markers are evaluated for this interpreter; an extra that a requirement itself asks for is followed.
    """
    seen: dict[str, str] = {}
    todo: list[tuple[str, frozenset[str], str]] = [(root, frozenset(), "")]
    done: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, extras, asked_by = todo.pop()
        if (name, extras) in done:
            continue
        done.add((name, extras))
        seen.setdefault(name, asked_by)
        todo += [(need, more, name) for need, more in _needs(name, extras)]
    return seen


def _needs(name: str, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    for line in metadata.distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def test_the_base_installation_has_no_gpu_package_in_its_graph() -> None:
    """M10: zero GPU packages without local extras, computed from the installed distributions' metadata, transitively."""
    graph = base_graph("inference-runtime")

    assert {"grpcio", "pydantic", "protobuf", "click"} <= set(graph), "the graph was not walked"
    assert "typing-extensions" in graph, "only direct requirements were walked"
    assert {name: asked for name, asked in graph.items() if GPU_PACKAGE.match(name)} == {}


def test_torch_comes_with_its_extra_only() -> None:
    """M10: the walk would see torch if it were there; it is behind the extra."""
    assert "torch" in dict(_needs("inference-runtime", frozenset({"torch"})))
    assert "torch" not in dict(_needs("inference-runtime", frozenset()))


@pytest.mark.parametrize("name", ["torch", "triton", "nvidia-cublas-cu12", "vllm", "cuda-bindings"])
def test_the_pattern_knows_gpu_packages(name: str) -> None:
    """M10: the names that the graph is searched for."""
    assert GPU_PACKAGE.match(name)


def test_every_service_and_the_command_line_are_installed_as_commands() -> None:
    """Deploy independently means one command for each service."""
    commands = {e.name for e in metadata.entry_points(group="console_scripts") if e.dist and e.dist.name == "inference-runtime"}

    services = {"gateway", "coordinator", "deployment-manager", "engine", "metrics"}
    assert commands == {"inferctl"} | {f"inference-{name}" for name in services}
