"""Deployments and project files: what parses, what is refused by name, which runtime a model gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inference_runtime.deployment import DeploymentSpec, infer_runtime, load_project, parse_deployment, revision_of
from inference_runtime.errors import BadRequest

README = Path(__file__).resolve().parents[2] / "README.md"

WHOLE = """
[cluster]
name = "lab"

[[deployment]]
name = "chat"
model = "demo"
runtime = "torch"
replicas = 2
accelerators = 0
runtime_config = { dtype = "float32" }
node_labels = { zone = "a" }

[deployment.serving]
max_concurrent = 4
queue_capacity = 0
on_capacity_exhausted = "reject"
max_context_tokens = 512

[deployment.timeouts]
first_chunk_s = 5
total_s = 30

[[deployment]]
name = "echo"
model = "scripted"
runtime = "scripted"
"""


def project_file(tmp_path: Path, text: str) -> Path:
    """A project file with this text."""
    path = tmp_path / "project.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_project_file_parses(tmp_path: Path) -> None:
    """X02: every key that exists, each where it belongs."""
    project = load_project(project_file(tmp_path, WHOLE))

    chat, echo = project.deployment
    assert project.cluster.name == "lab"
    assert (chat.name, chat.replicas, chat.runtime_config, chat.node_labels) == ("chat", 2, {"dtype": "float32"}, {"zone": "a"})
    assert (chat.serving.max_concurrent, chat.serving.queue_capacity, chat.serving.on_capacity_exhausted) == (4, 0, "reject")
    assert (chat.timeouts.first_chunk_s, chat.timeouts.total_s) == (5, 30)
    assert (echo.serving.max_concurrent, echo.serving.queue_capacity) == (32, 1024)  # Q01: the defaults


def test_trap_34_the_project_file_of_the_readme_parses(tmp_path: Path) -> None:
    """Trap 34, X02: what the documentation prints is what the program reads."""
    blocks = re.findall(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks, "README.md shows no project file"

    for text in blocks:
        assert load_project(project_file(tmp_path, text)).deployment


@pytest.mark.parametrize(
    ("addition", "key", "words"),
    [
        ("max_spend_per_hour = 5.0\n", "max_spend_per_hour", ""),
        ("[deployment.budget]\nmax_spend_per_hour = 5.0\n", "budget", ""),
        ("[deployment.budget]\nmax_spend_per_hour_usd = 5.0\n", "budget", ""),
        ("[deployment.rate_limits]\nrequests_per_minute = 10\n", "rate_limits", ""),
        ("[deployment.serving]\nmax_concurent = 4\n", "serving.max_concurent", "'max_concurrent'"),
        ("[deployment.timeouts]\ntotal = 4\n", "timeouts.total", "'total_s'"),
        ("replica = 2\n", "replica", "'replicas'"),
    ],
)
def test_trap_34_a_key_we_do_not_know_is_refused_and_never_ignored(tmp_path: Path, addition: str, key: str, words: str) -> None:
    """Trap 34: a budget that looks set and is not cannot happen: one sentence names file, deployment and key."""
    path = project_file(tmp_path, '[[deployment]]\nname = "a"\nmodel = "m"\n' + addition)

    with pytest.raises(BadRequest) as caught:
        load_project(path)

    assert str(path) in caught.value.message
    assert "deployment 1" in caught.value.message
    assert f"unknown key {key!r}" in caught.value.message
    assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "text", ["[budget]\nmax_spend_per_hour = 5\n", "[cluster]\nendpoint = 'http://x'\n", "deployments = []\n"]
)
def test_trap_34_unknown_sections_are_refused(tmp_path: Path, text: str) -> None:
    """Trap 34: at the top of the file too."""
    with pytest.raises(BadRequest, match="unknown key"):
        load_project(project_file(tmp_path, text))


def test_trap_34_one_key_of_a_section_is_enough(tmp_path: Path) -> None:
    """Trap 34: `[deployment.serving] max_concurrent` alone parses, the rest keeps its default."""
    text = '[[deployment]]\nname = "a"\nmodel = "m"\n[deployment.serving]\nmax_concurrent = 4\n'

    assert load_project(project_file(tmp_path, text)).deployment[0].serving.queue_capacity == 1024


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[deployment]\n", "is not TOML"),
        ('[[deployment]]\nname = "a"\n', "deployment 1: model"),
        ('[[deployment]]\nname = "a"\nmodel = "m"\nreplicas = -1\n', "deployment 1: replicas"),
        ('[[deployment]]\nname = "a b"\nmodel = "m"\n', "deployment 1: name"),
        ('[[deployment]]\nname = "../x"\nmodel = "m"\n', "deployment 1: name"),
        ('[[deployment]]\nname = "a..b"\nmodel = "m"\n', "deployment 1: name"),
        (
            '[[deployment]]\nname = "a"\nmodel = "m"\n[deployment.serving]\non_capacity_exhausted = "drop"\n',
            "on_capacity_exhausted",
        ),
        ('[[deployment]]\nname = "a"\nmodel = "m"\n[[deployment]]\nname = "a"\nmodel = "n"\n', "two deployments are called 'a'"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_says_where(tmp_path: Path, text: str, words: str) -> None:
    """Trap 32: a bad specification is the caller's error, with its place, not an internal one."""
    with pytest.raises(BadRequest) as caught:
        load_project(project_file(tmp_path, text))

    assert words in caught.value.message
    assert caught.value.http_status == 400


def test_a_missing_project_file_is_one_sentence(tmp_path: Path) -> None:
    """Bad input: the file that is not there is named."""
    with pytest.raises(BadRequest, match="give the path of a TOML file"):
        load_project(tmp_path / "none.toml")


@pytest.mark.parametrize("key", ["max_spend_per_hour", "budget", "idempotent", "circuit_breaker"])
def test_trap_34_an_api_caller_is_held_to_the_same_rule(key: str) -> None:
    """Trap 34: the same parser stands behind the API; the key at fault is `param`."""
    with pytest.raises(BadRequest) as caught:
        parse_deployment({"name": "a", "model": "m", key: 1})

    assert caught.value.param == key


PROVIDERS = {"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k", "GEMINI_API_KEY": "k", "LITELLM_API_KEY": "k"}


@pytest.mark.parametrize(
    ("model", "runtime", "environment", "registered", "expected"),
    [
        ("gpt-4o", "", PROVIDERS, [], "openai"),
        ("o3-mini", "", PROVIDERS, [], "openai"),
        ("claude-sonnet-4", "", PROVIDERS, [], "anthropic"),
        ("gemini-2.5-pro", "", PROVIDERS, [], "gemini"),
        ("litellm/any", "", PROVIDERS, [], "litellm"),
        ("meta-llama/Llama-3.1-8B", "", PROVIDERS, [], "torch"),
        ("/weights/llama", "", {}, [], "torch"),
        ("demo", "", {}, [], "torch"),
        ("mine", "", {}, ["python:mine"], "python:mine"),
        ("gpt-4o", "torch", PROVIDERS, [], "torch"),
        ("gpt-4o", "scripted", {}, [], "scripted"),
        ("mine", "torch", {}, ["python:mine"], "torch"),
    ],
)
def test_the_runtime_is_inferred_from_the_model(
    model: str, runtime: str, environment: dict[str, str], registered: list[str], expected: str
) -> None:
    """N01: provider's family with its key set, registered name, else a local model; explicit always wins."""
    spec = DeploymentSpec(name="a", model=model, runtime=runtime)

    assert infer_runtime(spec, environment, registered) == expected


@pytest.mark.parametrize(
    ("model", "key"), [("gpt-4o", "OPENAI_API_KEY"), ("claude-x", "ANTHROPIC_API_KEY"), ("gemini-x", "GEMINI_API_KEY")]
)
def test_a_providers_model_without_its_key_names_the_key(model: str, key: str) -> None:
    """N01: no silent fall to a local runtime for a provider's model."""
    with pytest.raises(BadRequest, match=key):
        infer_runtime(DeploymentSpec(name="a", model=model), {}, [])


def test_a_folder_called_like_a_providers_model_is_local(tmp_path: Path) -> None:
    """N01: a path that exists is a local model, whatever it is called."""
    folder = tmp_path / "gpt-4o"
    folder.mkdir()

    assert infer_runtime(DeploymentSpec(name="a", model=str(folder)), {}, []) == "torch"


def test_the_revision_changes_with_what_decides_the_output_and_with_nothing_else() -> None:
    """Replicas of one revision may continue each other's streams."""
    spec = DeploymentSpec(name="a", model="m", runtime_config={"x": 1, "y": [2]})
    base = revision_of(spec, "torch")

    same = [
        spec.model_copy(update={"name": "b"}),
        spec.model_copy(update={"replicas": 7}),
        spec.model_copy(update={"runtime_config": {"y": [2], "x": 1}}),
    ]
    other = [spec.model_copy(update={"model": "n"}), spec.model_copy(update={"runtime_config": {"x": 2}})]

    assert {revision_of(s, "torch") for s in same} == {base}
    assert base not in {revision_of(s, "torch") for s in other} | {revision_of(spec, "scripted")}
    assert re.fullmatch(r"[0-9a-f]{16}", base)
