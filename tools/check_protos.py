"""Checks the contracts: lint, format, no breaking change against the committed baseline, stubs that match the protos.

buf and the generators (grpcio-tools 1.80.0) are those on PATH, else those of .venv-proto: an environment apart from the project's
own, since newer generators raise the floor of protobuf for everyone who installs us.

    tools/check_protos.py              check everything
    tools/check_protos.py --write      format the protos and regenerate the stubs
    tools/check_protos.py --baseline   take the protos as they are for the new baseline (at a release)
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "protos/baseline.binpb"
STUBS = "inference_runtime/v1"
#: Pinned in the Makefile; another version writes other stubs.
GRPC_TOOLS = "1.80.0"


def generators() -> Path:
    """The folder that holds buf and the python with grpcio-tools. Ends the program when there is none or another version."""
    found = shutil.which("buf")
    folder = Path(found).parent if found else ROOT / ".venv-proto" / "bin"
    ask = "from importlib.metadata import version; print(version('grpcio-tools'))"
    try:
        seen = subprocess.run([folder / "python", "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"{folder} holds no python with grpcio-tools; run make proto, which sets up .venv-proto")
    if seen != GRPC_TOOLS:
        sys.exit(f"grpcio-tools {seen} is in {folder}, {GRPC_TOOLS} is needed; remove .venv-proto and run make proto")
    return folder


def buf(*args: str) -> bool:
    """Run buf in the repository's root. True when it is content."""
    folder = generators()
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run([folder / "buf", *args], cwd=ROOT, env=environment, check=False).returncode == 0


def stubs_match() -> bool:
    """Regenerate into an empty folder and compare, both ways: a stub that is stale, missing or left over is a drift."""
    with tempfile.TemporaryDirectory() as folder:
        if not buf("generate", "--output", folder):
            return False
        fresh, committed = Path(folder, "libs", STUBS), ROOT / "libs" / STUBS
        names = {p.name for p in fresh.iterdir()} | {p.name for p in committed.iterdir() if "_pb2" in p.name}
        names = {n for n in names if "_pb2" in n and not n.endswith(".pyc")}
        drifted = [
            n
            for n in sorted(names)
            if not ((fresh / n).is_file() and (committed / n).is_file() and filecmp.cmp(fresh / n, committed / n, False))
        ]
    for name in drifted:
        print(f"libs/{STUBS}/{name} does not match the protos; run make proto")
    return not drifted


def main() -> int:
    """Run the check, or what was asked for. Exit code 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", action="store_true", help="format the protos and regenerate the stubs")
    group.add_argument("--baseline", action="store_true", help="make the present protos the baseline")
    args = parser.parse_args()
    if args.write:
        return 0 if buf("format", "-w", "protos") and buf("generate") else 1
    if args.baseline:
        return 0 if buf("build", "protos", "--exclude-source-info", "-o", BASELINE) else 1
    results = {
        "lint": buf("lint"),
        "format": buf("format", "--diff", "--exit-code", "protos"),
        "breaking": buf("breaking", "protos", "--against", BASELINE),
        "stubs": stubs_match(),
    }
    for name, good in results.items():
        print(f"protos: {name:9s} {'ok' if good else 'FAILED'}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
