"""What a person asks for: a deployment, its parts, their validation, and the project file that lists them.

Everything is checked at the edge: an unknown key is an error with a suggestion, never ignored. A limit that looks set is set.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from inference_runtime.errors import BadRequest
from inference_runtime.settings import StrictModel, validation_sentence

__all__ = [
    "ClusterSection",
    "DeploymentSpec",
    "Project",
    "Serving",
    "Timeouts",
    "infer_runtime",
    "load_project",
    "parse_deployment",
    "revision_of",
]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"

#: Families of models that a provider serves, by prefix of the model's name (N01).
PROVIDER_PREFIXES: tuple[tuple[str, str], ...] = (
    ("gpt-", "openai"), ("o1", "openai"), ("o3", "openai"), ("o4", "openai"), ("chatgpt-", "openai"),
    ("text-embedding-", "openai"), ("claude-", "anthropic"), ("gemini-", "gemini"), ("litellm/", "litellm"),
)  # fmt: skip
#: The setting that holds a provider's credentials.
PROVIDER_KEYS = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "litellm": "LITELLM_API_KEY",
}


class Serving(StrictModel):
    """Bounds of one replica."""

    max_concurrent: int = Field(default=32, ge=1, le=4096, description="requests that run at once")
    queue_capacity: int = Field(default=1024, ge=0, le=1_000_000, description="requests that wait")
    on_capacity_exhausted: Literal["queue", "reject"] = Field(default="queue", description="wait, or refuse at once")
    max_context_tokens: int = Field(default=0, ge=0, description="prompt and output together; 0 is what the model allows")


class Timeouts(StrictModel):
    """Limits in time, by phase."""

    first_chunk_s: float = Field(default=60.0, gt=0, description="from admission to the first chunk")
    next_chunk_s: float = Field(default=10.0, gt=0, description="from one chunk of a streamed answer to the next")
    total_s: float = Field(default=600.0, gt=0, description="the whole request")
    disconnected_s: float = Field(
        default=0.0, ge=0, description="what a streamed answer goes on for after its client has left; 0 cancels it at once"
    )


class DeploymentSpec(StrictModel):
    """One deployment as asked for."""

    name: str = Field(pattern=NAME_PATTERN, description='what clients put into "model"')
    model: str = Field(min_length=1, max_length=1024, description="path, Hugging Face id, provider's model, registered name")
    runtime: str = Field(default="", description="runtime; empty is inferred from the model's name")
    replicas: int = Field(default=1, ge=0, le=1000, description="number of copies")
    runtime_config: dict[str, Any] = Field(default_factory=dict, description="settings of the runtime")
    serving: Serving = Serving()
    timeouts: Timeouts = Timeouts()
    accelerators: int = Field(default=0, ge=0, le=64, description="accelerators one replica needs")
    node_labels: dict[str, str] = Field(default_factory=dict, description="labels a node must carry")
    memory_bytes: int = Field(
        default=0, ge=0, description="memory one replica needs: of each accelerator, or of the node; 0 looks at none"
    )
    tolerations: tuple[str, ...] = Field(default=(), max_length=32, description="taints of nodes it may run on nevertheless")
    spread_over: str = Field(default="zone", max_length=253, description="node label over whose values replicas are spread")
    isolation: Literal["auto", "thread", "process"] = Field(
        default="auto", description="what restarts after a fault: a thread, or a child process; auto: a process with accelerators"
    )

    @field_validator("name")
    @classmethod
    def _no_dots_alone(cls, value: str) -> str:
        if ".." in value:
            raise ValueError("must not contain '..'")
        return value


class ClusterSection(StrictModel):
    """`[cluster]` of a project file."""

    name: str = Field(default="local", pattern=NAME_PATTERN, description="name of the cluster, for people")


class Project(StrictModel):
    """A project file."""

    cluster: ClusterSection = ClusterSection()
    deployment: list[DeploymentSpec] = Field(default_factory=list)


def parse_deployment(document: Mapping[str, Any], what: str = "deployment") -> DeploymentSpec:
    """A checked deployment from plain data.

    Raises:
        BadRequest: with `param` = the key at fault.
    """
    try:
        return DeploymentSpec.model_validate(dict(document))
    except ValidationError as err:
        sentence, key = validation_sentence(err, DeploymentSpec, what)
        raise BadRequest(sentence, param=key) from err


def load_project(path: Path) -> Project:
    """A checked project file.

    Raises:
        BadRequest: The file is missing, is not TOML, or has an unknown key or a wrong value.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise BadRequest(f"project file {path}: {err.strerror}; give the path of a TOML file", param="file") from err
    except tomllib.TOMLDecodeError as err:
        raise BadRequest(f"project file {path} is not TOML: {err}", param="file") from err
    try:
        project = Project.model_validate(document)
    except ValidationError as err:
        sentence, key = _project_sentence(err, path)
        raise BadRequest(sentence, param=key) from err
    names = [d.name for d in project.deployment]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise BadRequest(f"project file {path}: two deployments are called {twice[0]!r}; names are unique", param="deployment")
    return project


def _project_sentence(err: ValidationError, path: Path) -> tuple[str, str]:
    loc = err.errors()[0]["loc"]
    if loc[:1] == ("deployment",) and len(loc) > 2:  # name the deployment by its place, and its own keys in the suggestion
        inner = ValidationError.from_exception_data("deployment", [_shift(err, 2)])
        return validation_sentence(inner, DeploymentSpec, f"{path}: deployment {int(loc[1]) + 1}")
    return validation_sentence(err, Project, str(path))


def _shift(err: ValidationError, by: int) -> Any:
    first = err.errors()[0]
    return {"type": first["type"], "loc": tuple(first["loc"][by:]), "input": first.get("input"), "ctx": first.get("ctx", {})}


def infer_runtime(spec: DeploymentSpec, environment: Mapping[str, str], registered: list[str]) -> str:
    """The runtime that serves a deployment (N01): explicit wins; a provider's model where its credentials are set; a registered
    `python:<name>`; else a local path or Hugging Face id, for `torch`.

    Raises:
        BadRequest: The model belongs to a provider whose credentials are not set.
    """
    if spec.runtime:
        return spec.runtime
    if f"python:{spec.model}" in registered:
        return f"python:{spec.model}"
    provider = next((p for prefix, p in PROVIDER_PREFIXES if spec.model.startswith(prefix)), "")
    if provider and not Path(spec.model).exists():
        if environment.get(PROVIDER_KEYS[provider]):
            return provider
        raise BadRequest(
            f"deployment {spec.name!r}: model {spec.model!r} is served by {provider} and {PROVIDER_KEYS[provider]} is not set; "
            f"set it, or name a runtime",
            param="model",
        )
    return "torch"


def revision_of(spec: DeploymentSpec, runtime: str) -> str:
    """Hash of what decides a replica's output: model, runtime, its configuration, the context limit. 16 hex digits.

    Replicas of one revision may continue each other's streams; a change of anything else needs no new weights.
    """
    document = [spec.model, runtime, spec.runtime_config, spec.serving.max_context_tokens]
    canonical = re.sub(r"\s+$", "", json.dumps(document, sort_keys=True, separators=(",", ":"), default=str))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
