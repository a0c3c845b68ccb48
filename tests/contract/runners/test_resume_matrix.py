"""The committed table of what a resumed answer is, held against what the runners do."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest

import inference_runtime

ROOT = Path(__file__).resolve().parents[3]
DEMO = Path(inference_runtime.__file__).parent / "demo_model" / "model.safetensors"


@pytest.mark.skipif(
    not DEMO.exists() or importlib.util.find_spec("torch") is None,
    reason="needs torch and the demo model: pip install '.[torch]'",
)
async def test_the_page_says_what_the_runners_do() -> None:
    """No cell is worse than exact or an honest refusal, and no cell is out of date."""
    page = await runpy.run_path(str(ROOT / "tools" / "resume_matrix.py"))["matrix"]()
    assert (ROOT / "docs" / "resume-matrix.md").read_text(encoding="utf-8") == page
    cells = {cell.strip() for line in page.splitlines() if line.startswith("| ") for cell in line.split("|")[2:-1]}
    headings = {"scripted", "torch, demo model, float32"}
    assert {cell for cell in cells - headings if cell != "exact" and not cell.startswith("refused (")} == set()
