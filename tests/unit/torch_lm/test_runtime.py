"""The runtime object: importing it is cheap, and what cannot work is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from inference_runtime.errors import BadRequest, RuntimeNotInstalled, Unsupported
from inference_runtime.runner import RunnerConfig, load_runtime
from inference_runtime.runners import torch_lm
from inference_runtime.runners.torch_lm import RUNTIME
from inference_runtime.runners.torch_lm.checkpoint import DEMO_FOLDER, Checkpoint
from inference_runtime.runners.torch_lm.options import Options, parse_options


@pytest.fixture
def copy_of_demo(tmp_path: Path) -> Path:
    """A checkpoint of our own to damage."""
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_importing_the_runtime_imports_no_torch_and_no_tokenizer() -> None:
    code = (
        "import sys, inference_runtime.runners.torch_lm as m; m.RUNTIME.check_installed();"
        "heavy = {'torch', 'tokenizers', 'safetensors', 'jinja2', 'numpy', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_codec_needs_no_torch() -> None:
    code = (
        "import sys; from inference_runtime.runner import RunnerConfig; from inference_runtime.runners.torch_lm import RUNTIME;"
        "config = RunnerConfig(model='demo'); RUNTIME.validate(config); RUNTIME.make_codec(config).encode('hello');"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_entry_point_names_this_runtime() -> None:
    assert load_runtime("torch") is RUNTIME


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_lm, "PACKAGES", ("torch", "a_package_that_is_not_there"))
    with pytest.raises(RuntimeNotInstalled, match=r"a_package_that_is_not_there.*inference-runtime\[torch\]"):
        RUNTIME.check_installed()


def test_the_demo_model_is_valid() -> None:
    RUNTIME.validate(RunnerConfig(model="demo"))


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"dtpye": "float32"}, "runtime_config.dtpye", "did you mean 'dtype'"),
        ({"colour": 1}, "runtime_config.colour", "known are: dtype"),
        ({"dtype": "float8"}, "runtime_config.dtype", "one of auto, float32, bfloat16"),
        ({"dtype": 32}, "runtime_config.dtype", "must be a text"),
        ({"linear": "fast"}, "runtime_config.linear", "one of auto, packed, plain"),
        ({"kv_cache_tokens": -1}, "runtime_config.kv_cache_tokens", "at least 0"),
        ({"max_step_tokens": 0}, "runtime_config.max_step_tokens", "at least 1"),
        ({"block_size": 2.5}, "runtime_config.block_size", "whole number"),
        ({"threads": True}, "runtime_config.threads", "whole number"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, object], param: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        RUNTIME.validate(RunnerConfig(model="demo", options=options))
    assert caught.value.param == param


def test_options_arrive() -> None:
    parsed = parse_options({"dtype": "bfloat16", "threads": 3, "kv_cache_tokens": 100})
    assert parsed == Options(dtype="bfloat16", threads=3, kv_cache_tokens=100)


def test_two_devices_are_refused() -> None:
    with pytest.raises(BadRequest, match="one accelerator") as caught:
        RUNTIME.validate(RunnerConfig(model="demo", accelerators=(0, 1)))
    assert caught.value.param == "accelerators"


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "nobody/has-this-model"])
def test_a_model_that_is_nowhere_is_refused(model: str) -> None:
    with pytest.raises(BadRequest, match=r"nowhere|nobody/has-this-model") as caught:
        RUNTIME.validate(RunnerConfig(model=model))
    assert caught.value.param == "model"


def test_a_model_in_the_hugging_face_cache_is_found_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repo = tmp_path / "models--some--model"
    shutil.copytree(DEMO_FOLDER, repo / "snapshots" / "abc123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    RUNTIME.validate(RunnerConfig(model="some/model"))
    RUNTIME.validate(RunnerConfig(model="some/model", options={"revision": "abc123"}))
    with pytest.raises(BadRequest, match="hf download"):
        RUNTIME.validate(RunnerConfig(model="some/model", options={"revision": "other"}))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(copy_of_demo: Path, name: str) -> None:
    (copy_of_demo / name).unlink()
    with pytest.raises(BadRequest, match=name):
        RUNTIME.validate(RunnerConfig(model=str(copy_of_demo)))


@pytest.mark.parametrize("keep", [0, 5, 100, 4000, 1_000_000])
def test_torn_weights_are_named(copy_of_demo: Path, keep: int) -> None:
    file = copy_of_demo / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadRequest, match=r"model\.safetensors is torn"):
        RUNTIME.validate(RunnerConfig(model=str(copy_of_demo)))


def test_a_file_that_is_no_safetensors_is_named(copy_of_demo: Path) -> None:
    (copy_of_demo / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"not json, not at all" + b"0" * 50)
    with pytest.raises(BadRequest, match=r"model\.safetensors is torn"):
        RUNTIME.validate(RunnerConfig(model=str(copy_of_demo)))


def test_torn_json_is_named(copy_of_demo: Path) -> None:
    (copy_of_demo / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(BadRequest, match=r"config\.json is not readable JSON"):
        RUNTIME.validate(RunnerConfig(model=str(copy_of_demo)))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, Unsupported, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "mamba"}, Unsupported, "mamba"),
        ({"quantization_config": {"bits": 4}}, Unsupported, "quantised"),
        ({"hidden_act": "gelu"}, Unsupported, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, Unsupported, "yarn"),
        ({"hidden_size": "big"}, BadRequest, "hidden_size is 'big'"),
        ({"num_key_value_heads": 3}, BadRequest, "do not fit 3 key heads"),
        ({"rms_norm_eps": -1}, BadRequest, "rms_norm_eps"),
        ({"eos_token_id": "end"}, BadRequest, "eos_token_id"),
    ],
)
def test_a_config_that_cannot_work_is_refused(
    copy_of_demo: Path, changes: dict[str, object], error: type[Exception], says: str
) -> None:
    edit(copy_of_demo / "config.json", **changes)
    (copy_of_demo / "generation_config.json").unlink()
    with pytest.raises(error, match=says):
        RUNTIME.validate(RunnerConfig(model=str(copy_of_demo)))


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 1, "do_sample": False, "temperature": 0.6}, (frozenset({1}), 0.0, 1.0, 0)),
        ({"eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.9, "top_k": 20}, (frozenset({1, 2}), 0.6, 0.9, 20)),
        ({}, (frozenset({1}), 1.0, 1.0, 0)),
    ],
)
def test_sampling_defaults_are_the_checkpoints(copy_of_demo: Path, generation: dict[str, object], expected: object) -> None:
    (copy_of_demo / "generation_config.json").write_text(json.dumps(generation))
    found = Checkpoint(copy_of_demo).generation_defaults()
    assert (found.eos_token_ids, found.temperature, found.top_p, found.top_k) == expected
