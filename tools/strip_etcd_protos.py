"""Turn etcd's published .proto files into the message-only copies in third_party/etcd.

Usage: python tools/strip_etcd_protos.py SOURCE_DIR, where SOURCE_DIR holds etcd's rpc.proto, kv.proto and auth.proto.

What changes: options and imports of gogoproto, google.api, openapi and versionpb go; services go (the client calls by path); all
messages move into our own proto package and file path, so that they collide with no other etcd client in one process.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PACKAGE = "inference_runtime.coordination.etcd_api"
TARGET = Path(__file__).parent.parent / "third_party/etcd/inference_runtime/coordination/etcd_api"
NOTICE = "// Changed for inference-runtime by tools/strip_etcd_protos.py: messages only, package renamed, options removed.\n"


def _without_blocks(text: str, opening: str) -> str:
    """Drops every top-level block that starts with `opening`, braces balanced."""
    while match := re.search(rf"^{opening}\b[^{{]*\{{", text, re.MULTILINE):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[: match.start()] + text[end:]
    return text


def strip(text: str) -> str:
    """The message-only form of one file."""
    text = _without_blocks(text, "service")
    text = re.sub(r'^import "(?!(?:.*/)?(?:kv|auth)\.proto").*\n', "", text, flags=re.MULTILINE)
    text = re.sub(
        r'^import "(?:.*/)?(kv|auth)\.proto";', rf'import "{PACKAGE.replace(".", "/")}/\1.proto";', text, flags=re.MULTILINE
    )
    text = re.sub(r"^\s*option [^;]*;\n", "", text, flags=re.MULTILINE)
    text = re.sub(r" *\[[^\]]*(?:gogoproto|versionpb|deprecated)[^\]]*\]", "", text)
    text = re.sub(r"^package \w+;", f"package {PACKAGE};", text, flags=re.MULTILINE)
    text = re.sub(r"\b(?:mvccpb|authpb)\.", "", text)
    return NOTICE + re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def main() -> None:
    source = Path(sys.argv[1])
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in ("kv.proto", "auth.proto", "rpc.proto"):
        (TARGET / name).write_text(strip((source / name).read_text()))


if __name__ == "__main__":
    main()
