"""Settings of every process: defaults < TOML file < environment, frozen, unknown keys refused with a suggestion.

A service subclasses `ServiceSettings` and calls `load_settings(cls, argv)` once, in its `__main__`. The environment prefix is
`INFERENCE_<SERVICE>__`, nested with `__`: `INFERENCE_GATEWAY__HTTP_PORT=8080`, `INFERENCE_ENGINE__ETCD__ENDPOINTS=a:1,b:2`.
This is the only module that reads `os.environ`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from inference_runtime.errors import BadRequest
from inference_runtime.secret import SecretStr

__all__ = [
    "EtcdSettings",
    "RpcSettings",
    "Secret",
    "SecretList",
    "ServiceSettings",
    "SettingsError",
    "StrictModel",
    "StringList",
    "TelemetrySettings",
    "environment",
    "load_settings",
    "validation_sentence",
]


class SettingsError(BadRequest):
    """A setting is unknown or has a wrong value. The message names it and what to change."""

    reason = "BAD_SETTINGS"


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _secret(value: object) -> SecretStr:
    """A secret by value or by reference. A reference that leads nowhere is an error: an empty key would lock everyone out."""
    if isinstance(value, SecretStr):
        return value
    if not isinstance(value, str):
        raise ValueError("a secret is a string, file:PATH or env:NAME")
    kind, _, name = value.partition(":")
    if kind == "file":
        try:
            found = Path(name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as err:
            raise ValueError(f"the secret file {name} cannot be read: {getattr(err, 'strerror', 'it is not text')}") from err
    elif kind == "env":
        found = os.environ.get(name, "")
    else:
        return SecretStr(value)
    if not found:
        raise ValueError(f"the secret {value} is empty; {'write it into the file' if kind == 'file' else 'set the variable'}")
    return SecretStr(found)


#: A field type for secrets: a string, `file:PATH` or `env:NAME`.
Secret = Annotated[SecretStr, BeforeValidator(_secret), PlainSerializer(repr)]
#: A list that may be given as one comma-separated string.
StringList = Annotated[list[str], NoDecode, BeforeValidator(_split)]
SecretList = Annotated[list[Secret], NoDecode, BeforeValidator(_split)]


class StrictModel(BaseModel):
    """A frozen value that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class EtcdSettings(StrictModel):
    """Where etcd is."""

    endpoints: StringList = Field(default=["127.0.0.1:2379"], description="host:port of each member")
    username: str = Field(default="", description="etcd user; empty means no authentication")
    password: Secret = Field(default=SecretStr(""), description="its password")
    ca_file: str = Field(default="", description="CA certificate; set it to use TLS")
    cert_file: str = Field(default="", description="client certificate, for mutual TLS")
    key_file: str = Field(default="", description="client key, for mutual TLS")
    lease_ttl_s: float = Field(default=10.0, gt=0, description="seconds after which a silent process counts as gone")


class RpcSettings(StrictModel):
    """Where a service's gRPC server listens."""

    host: str = Field(default="127.0.0.1", description="address to bind; 127.0.0.1 keeps it on this machine")
    port: int = Field(default=0, ge=0, le=65535, description="port; 0 picks a free one")
    advertise: str = Field(default="", description="host:port that others reach it at; empty means host:port as bound")


class TelemetrySettings(StrictModel):
    """Logs, traces and metrics."""

    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$", description="least level that is logged")
    log_format: str = Field(default="text", pattern="^(text|json)$", description="text for people, json for collectors")
    prometheus_port: int = Field(default=-1, ge=-1, le=65535, description="port of /metrics; 0 picks one, -1 means none")
    otlp_endpoint: str = Field(default="", description="host:port of an OTLP gRPC collector; empty exports nothing")
    trace_ratio: float = Field(default=1.0, ge=0, le=1, description="share of new traces that is kept")
    metric_interval_s: float = Field(default=10.0, gt=0, description="seconds between two OTLP metric exports")


class ServiceSettings(BaseSettings):
    """Base of each service's settings. Subclasses set `service`."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_nested_delimiter="__", arbitrary_types_allowed=True)
    service: ClassVar[str] = ""
    _toml: ClassVar[Path | None] = None

    etcd: EtcdSettings = EtcdSettings()
    rpc: RpcSettings = RpcSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = (TomlConfigSettingsSource(settings_cls, cls._toml),) if cls._toml is not None else ()
        return (init_settings, env_settings, *toml)


S = TypeVar("S", bound=ServiceSettings)


def environment() -> Mapping[str, str]:
    """The process environment, for code that starts other processes."""
    return os.environ


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Field names of the (nested) model that `path` leads to."""
    current: type[BaseModel] = model
    for name in path:
        field = current.model_fields.get(name)
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            break
        current = kind
    return list(current.model_fields)


def validation_sentence(err: ValidationError, model: type[BaseModel], what: str) -> tuple[str, str]:
    """The first fault of a validation, as (sentence, dotted key). Never quotes the value: it may be a secret."""
    first = err.errors(include_input=False, include_url=False)[0]
    path = [str(p) for p in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, [p for p in path[:-1] if not p.isdigit()])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known)}"
        return f"{what}: unknown key {key!r}; {hint}", key
    return f"{what}: {key}: {first['msg']}", key


def _refuse_unknown_environment(cls: type[ServiceSettings], prefix: str) -> None:
    for name in os.environ:
        if name.startswith(prefix):
            _check_path(cls, name, name[len(prefix) :].lower().split("__"))
        elif name.startswith(prefix[:-1]):
            raise SettingsError(f"environment variable {name}: settings of this service begin with {prefix}", param=name)


def _check_path(cls: type[ServiceSettings], name: str, path: Sequence[str]) -> None:
    """Refuse the first key of the path that does not exist."""
    model: type[BaseModel] | None = cls
    for depth, key in enumerate(path):
        known = list(model.model_fields) if model is not None else []
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            where = f" below {'__'.join(path[:depth])!r}" if depth else ""
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known) or 'none'}"
            raise SettingsError(f"environment variable {name}: unknown key {key!r}{where}; {hint}", param=name)
        assert model is not None  # a model without keys has refused
        kind = model.model_fields[key].annotation
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def load_settings(cls: type[S], argv: Sequence[str] | None = None, flags: argparse.ArgumentParser | None = None) -> S:
    """The settings of one process.

    Args:
        cls: The service's settings class.
        argv: Command line after the program's name: `--config FILE`.
        flags: Flags that the program takes besides, made without help: they are shown by `--help`, and parsed by the program.

    Raises:
        SettingsError: A file is missing or not TOML, a key is unknown, or a value is wrong.
    """
    parser = argparse.ArgumentParser(
        prog=f"inference-{cls.service.replace('_', '-')}", description=cls.__doc__, parents=[flags] if flags is not None else []
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    path = parser.parse_args(argv).config
    prefix = f"INFERENCE_{cls.service.upper()}__"
    if path and not Path(path).is_file():
        raise SettingsError(f"settings file {path} does not exist; give --config an existing TOML file", param="config")
    _refuse_unknown_environment(cls, prefix)
    config = SettingsConfigDict(**{**cls.model_config, "env_prefix": prefix})
    bound: Any = type(
        cls.__name__, (cls,), {"model_config": config, "_toml": Path(path) if path else None, "__doc__": cls.__doc__}
    )
    try:
        settings: S = bound()
    except ValidationError as err:
        sentence, key = validation_sentence(err, cls, path or "settings")
        raise SettingsError(sentence, param=key) from err
    except (tomllib.TOMLDecodeError, OSError) as err:
        raise SettingsError(f"{path}: not readable as TOML: {err}", param="config") from err
    return settings
