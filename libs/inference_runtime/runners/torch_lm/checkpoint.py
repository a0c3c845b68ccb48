"""Where a checkpoint lies and what its small files say: reads folders, JSON and safetensors headers, never a tensor.

The runtime, the codec and the runner call it. A file that is missing or torn is a BadRequest that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inference_runtime.errors import BadRequest

__all__ = ["DEMO_FOLDER", "DEMO_MODEL", "Checkpoint", "GenerationDefaults", "check_safetensors", "find_checkpoint"]

#: Model name of the checkpoint that comes with the package.
DEMO_MODEL = "demo"
DEMO_FOLDER = Path(__file__).resolve().parents[2] / "demo_model"
#: A safetensors header is JSON of names and offsets; the format caps it at 100 MB.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the checkpoint wants where a request says nothing."""

    eos_token_ids: frozenset[int]
    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with a model in Hugging Face layout."""

    folder: Path

    def path(self, name: str) -> Path:
        """The file `name`. Raises BadRequest when it is not there."""
        path = self.folder / name
        if not path.is_file():
            raise BadRequest(f"the checkpoint has no {name}: {path} does not exist", param="model", file=str(path))
        return path

    def json(self, name: str) -> dict[str, object]:
        """The JSON object in the file `name`. Raises BadRequest when it is missing or torn."""
        path = self.path(name)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as err:
            raise BadRequest(f"{path} is not readable JSON: {err}", param="model", file=str(path)) from err
        if not isinstance(value, dict):
            raise BadRequest(f"{path} does not hold a JSON object", param="model", file=str(path))
        return value

    def optional_json(self, name: str) -> dict[str, object]:
        """Like `json`, and {} when the file is not there."""
        return self.json(name) if (self.folder / name).is_file() else {}

    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted by name. Raises BadRequest for one that is missing or torn."""
        index = "model.safetensors.index.json"
        if (self.folder / index).is_file():
            names = self.json(index).get("weight_map")
            if not isinstance(names, dict):
                raise BadRequest(f"{self.folder / index} has no weight_map", param="model", file=str(self.folder / index))
            files = [self.path(str(name)) for name in sorted(set(names.values()))]
        else:
            files = [self.path("model.safetensors")]
        for file in files:
            check_safetensors(file)
        return files

    def generation_defaults(self) -> GenerationDefaults:
        """Ends of text and sampling defaults, from generation_config.json, else from config.json.

        A file that says `do_sample: false` asks for greedy; one that says nothing leaves a temperature of 1.
        """
        generation, config = self.optional_json("generation_config.json"), self.json("config.json")
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        greedy = generation.get("do_sample") is False
        return GenerationDefaults(
            eos_token_ids=_token_ids(eos, self.folder),
            temperature=0.0 if greedy else _number(generation, "temperature", 1.0),
            top_p=_number(generation, "top_p", 1.0),
            top_k=int(_number(generation, "top_k", 0)),
        )


def find_checkpoint(model: str, revision: str = "main") -> Checkpoint:
    """The checkpoint a model name stands for: "demo", a folder, or a Hugging Face id that is in the local cache.

    The network is never used. Raises BadRequest that says where it was looked for.
    """
    if model == DEMO_MODEL:
        return Checkpoint(DEMO_FOLDER)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Checkpoint(folder.resolve())
    if folder.is_absolute() or model.startswith((".", "~")):
        raise BadRequest(f"the model folder {folder} does not exist", param="model", file=str(folder))
    cached = _cached_snapshot(model, revision)
    if cached is not None:
        return Checkpoint(cached)
    raise BadRequest(
        f"model {model!r} is neither 'demo', nor a folder, nor in the Hugging Face cache {_hub_cache()}; "
        f"download it first: hf download {model}",
        param="model",
    )


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file that is cut or not one, by its header and its size. Reads the header only."""

    def torn(why: str) -> BadRequest:
        return BadRequest(f"{path} is torn: {why}; copy or download it again", param="model", file=str(path))

    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > min(MAX_HEADER_BYTES, size - 8):
            raise torn(f"its header needs {header_size} bytes and the file has {size}")
        try:
            header = json.loads(file.read(header_size))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            raise torn("its header is not readable") from err
    if 8 + header_size + end != size:
        raise torn(f"its tensors need {8 + header_size + end} bytes and the file has {size}")


def _hub_cache() -> Path:
    from huggingface_hub import constants  # it comes with tokenizers; its import costs time that `import torch_lm` must not

    return Path(constants.HF_HUB_CACHE)


def _cached_snapshot(model: str, revision: str) -> Path | None:
    repo = _hub_cache() / ("models--" + model.replace("/", "--"))
    ref = repo / "refs" / revision
    snapshot = repo / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    return snapshot if snapshot.is_dir() else None


def _token_ids(value: object, folder: Path) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise BadRequest(f"eos_token_id in {folder} is {value!r}; it must be a number or a list of numbers", param="model")
    return frozenset(ids)


def _number(values: Mapping[str, object], key: str, default: float) -> float:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) else default
