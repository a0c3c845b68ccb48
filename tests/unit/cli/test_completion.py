"""Shell completion: what the script asks for is answered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INFERCTL = str(Path(sys.executable).with_name("inferctl"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_asks_this_program(shell: str) -> None:
    done = subprocess.run([INFERCTL, "completion", shell], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"_INFERCTL_COMPLETE={shell}_complete" in done.stdout


def test_a_word_that_was_begun_is_completed() -> None:
    asked = {"_INFERCTL_COMPLETE": "bash_complete", "COMP_WORDS": "inferctl desc", "COMP_CWORD": "1"}
    done = subprocess.run([INFERCTL], env=os.environ | asked, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["plain,describe"]
