"""Settings: order of sources, unknown keys, secrets."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

from inference_runtime.secret import SecretStr
from inference_runtime.settings import Secret, ServiceSettings, SettingsError, StrictModel, StringList, load_settings


class LimitsSection(StrictModel):
    """Limits of the sample service."""

    max_streams: int = Field(default=8, ge=1)
    token: Secret = SecretStr("")


class SampleSettings(ServiceSettings):
    """A service with every kind of field."""

    service: ClassVar[str] = "sample"

    http_port: int = Field(default=8080, ge=0, le=65535)
    origins: StringList = Field(default=[])
    limits: LimitsSection = LimitsSection()


def write(tmp_path: Path, text: str) -> list[str]:
    """Arguments that name a settings file with this text."""
    path = tmp_path / "sample.toml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def test_the_environment_beats_the_file_and_the_file_beats_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order: defaults < TOML < environment, also inside one section."""
    argv = write(tmp_path, "http_port = 1\n[limits]\nmax_streams = 2\n[etcd]\nlease_ttl_s = 3.5\n")
    monkeypatch.setenv("INFERENCE_SAMPLE__HTTP_PORT", "9")
    monkeypatch.setenv("INFERENCE_SAMPLE__ETCD__ENDPOINTS", "a:1, b:2")

    settings = load_settings(SampleSettings, argv)

    assert settings.http_port == 9  # environment
    assert settings.limits.max_streams == 2  # file
    assert settings.etcd.lease_ttl_s == 3.5  # file, in a section the environment also touches
    assert settings.etcd.endpoints == ["a:1", "b:2"]  # environment
    assert settings.telemetry.log_level == "info"  # default


def test_defaults_work_without_anything() -> None:
    """Every field has a default that works on a laptop."""
    settings = load_settings(SampleSettings, [])

    assert (settings.http_port, settings.rpc.host, settings.rpc.port) == (8080, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("htp_port = 1", "htp_port", "http_port"),
        ("[limits]\nmax_stream = 1", "limits.max_stream", "max_streams"),
        ("[etcd]\nendpoint = ['a:1']", "etcd.endpoint", "endpoints"),
        ("[telemetri]\nlog_level = 'info'", "telemetri", "telemetry"),
    ],
)
def test_an_unknown_key_in_the_file_is_refused_with_a_suggestion(tmp_path: Path, text: str, key: str, suggestion: str) -> None:
    """Trap 34 for settings: a typo is an error that names the key and the way out, never ignored."""
    with pytest.raises(SettingsError) as caught:
        load_settings(SampleSettings, write(tmp_path, text))

    assert repr(key) in caught.value.message
    assert repr(suggestion) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("INFERENCE_SAMPLE__HTP_PORT", "http_port"),
        ("INFERENCE_SAMPLE__ETC__ENDPOINTS", "etcd"),
        ("INFERENCE_SAMPLE__LIMITS__MAX_STREAM", "max_streams"),
        ("INFERENCE_SAMPLE__ETCD__ENDPOINT", "endpoints"),
    ],
)
def test_an_unknown_key_in_the_environment_is_refused_with_a_suggestion(
    name: str, suggestion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 34 for settings: the environment is held to the same rule."""
    monkeypatch.setenv(name, "1")

    with pytest.raises(SettingsError) as caught:
        load_settings(SampleSettings, [])

    assert name in caught.value.message
    assert repr(suggestion) in caught.value.message


def test_the_environment_of_another_service_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """One environment may start several services: only the own prefix is read."""
    monkeypatch.setenv("INFERENCE_GATEWAY__NO_SUCH_KEY", "1")

    assert load_settings(SampleSettings, []).http_port == 8080


def test_a_wrong_value_is_one_sentence_with_its_key(tmp_path: Path) -> None:
    """A value out of range names the key; the value itself is not quoted, it may be a secret."""
    with pytest.raises(SettingsError) as caught:
        load_settings(SampleSettings, write(tmp_path, "http_port = 987654"))

    assert "http_port" in caught.value.message
    assert "987654" not in caught.value.message


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["--config", "/nowhere/x.toml"], "does not exist"), (None, "not readable as TOML")],
    ids=["missing", "broken"],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, argv: list[str] | None, words: str) -> None:
    """A missing or broken settings file is an error of its own."""
    with pytest.raises(SettingsError, match=words):
        load_settings(SampleSettings, argv if argv is not None else write(tmp_path, "http_port = = 1"))


def test_settings_are_frozen() -> None:
    """Built once, passed down: nobody changes them on the way."""
    settings = load_settings(SampleSettings, [])

    with pytest.raises(ValidationError):
        settings.http_port = 1
    with pytest.raises(ValidationError):
        settings.limits.max_streams = 1


def test_a_secret_comes_from_a_string_a_file_or_another_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K01: secrets by reference."""
    path = tmp_path / "token"
    path.write_text("from-file\n", encoding="utf-8")
    monkeypatch.setenv("SOME_TOKEN", "from-env")

    values = []
    for reference in ("plain", f"file:{path}", "env:SOME_TOKEN"):
        monkeypatch.setenv("INFERENCE_SAMPLE__LIMITS__TOKEN", reference)
        values.append(load_settings(SampleSettings, []).limits.token.reveal())

    assert values == ["plain", "from-file", "from-env"]


def test_a_secret_never_prints(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """K02: repr, str, format, %-formatting, JSON, a log line and an error's text show a mask."""
    monkeypatch.setenv("INFERENCE_SAMPLE__LIMITS__TOKEN", "hunter2")
    settings = load_settings(SampleSettings, [])
    secret = settings.limits.token
    with caplog.at_level(logging.INFO):
        logging.getLogger("test").info("started %s with %r", secret, settings)

    shown = [repr(secret), str(secret), f"{secret}", f"{secret:>20}", "%s %r" % (secret, secret), repr(settings), str(settings)]  # noqa: UP031
    shown += [settings.model_dump_json(), repr(settings.model_dump()), caplog.text]

    assert secret.reveal() == "hunter2"
    assert [text for text in shown if "hunter2" in text] == []


def test_a_secret_cannot_be_pickled() -> None:
    """K02: nor does it leave through a serializer."""
    with pytest.raises(TypeError, match="secret"):
        pickle.dumps(SecretStr("hunter2"))


def test_settings_with_secrets_in_them_can_be_copied() -> None:
    """A secret is a value that nobody changes: a copy of what holds it (pydantic copies defaults) shares it."""
    secret = SecretStr("hunter2")

    assert copy.copy(secret) is secret
    assert copy.deepcopy([secret])[0] is secret


def test_secrets_compare_by_value() -> None:
    """Two secrets are equal when their text is; a secret never equals a plain string."""
    assert SecretStr("a") == SecretStr("a")
    assert SecretStr("a") != SecretStr("b")
    assert SecretStr("a") != "a"
    assert not SecretStr("")


@pytest.mark.parametrize(
    ("reference", "words"), [("file:/no/such/file", "/no/such/file"), ("env:NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE")]
)
def test_a_secret_reference_that_leads_nowhere_is_refused_by_name(
    reference: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K01: an empty key would lock everyone out without a hint."""
    monkeypatch.setenv("INFERENCE_SAMPLE__ETCD__PASSWORD", reference)
    with pytest.raises(SettingsError, match=words):
        load_settings(SampleSettings, [])


def test_a_variable_with_one_underscore_too_few_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks set and would not be."""
    monkeypatch.setenv("INFERENCE_SAMPLE_HTTP_PORT", "1")
    with pytest.raises(SettingsError, match="begin with INFERENCE_SAMPLE__"):
        load_settings(SampleSettings, [])
