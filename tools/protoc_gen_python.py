"""The Python stubs (messages, their types, gRPC) as one plugin that buf can call.

grpcio-tools links its generators into one program with protoc, so buf does not find them by name. This reads the request buf
writes to stdin, runs that program on the same descriptors, and answers on stdout with the files it wrote. buf spells out every
field's JSON name; where it is the one that protobuf derives anyway it is left out, as protoc does, which keeps the stubs small.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.compiler import plugin_pb2
from grpc_tools import protoc  # type: ignore[import-not-found,unused-ignore]  # in .venv-proto only

OUTPUTS = ("python", "pyi", "grpc_python")


def derived_json_name(name: str) -> str:
    """The JSON name of a field that was given none: lower camel case."""
    first, *rest = name.split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in rest)


def drop_derived_json_names(messages: Iterable[descriptor_pb2.DescriptorProto]) -> None:
    """Leave only the JSON names that somebody chose, in these messages and those inside them."""
    for message in messages:
        for field in (*message.field, *message.extension):
            if field.json_name == derived_json_name(field.name):
                field.ClearField("json_name")
        drop_derived_json_names(message.nested_type)


def generate(request: plugin_pb2.CodeGeneratorRequest) -> plugin_pb2.CodeGeneratorResponse:
    """Every stub of every file that buf asks for."""
    response = plugin_pb2.CodeGeneratorResponse(
        supported_features=plugin_pb2.CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL,
    )
    for file in request.proto_file:
        drop_derived_json_names(file.message_type)
    with tempfile.TemporaryDirectory() as folder:
        descriptors = Path(folder, "in.binpb")
        descriptors.write_bytes(descriptor_pb2.FileDescriptorSet(file=request.proto_file).SerializeToString())
        out = Path(folder, "out")
        out.mkdir()
        flags = [f"--{output}_out={out}" for output in OUTPUTS]
        code = protoc.main(["protoc", f"--descriptor_set_in={descriptors}", *flags, *request.file_to_generate])
        if code != 0:
            response.error = f"grpc_tools.protoc ended with exit code {code}; its message is above"
            return response
        for path in sorted(p for p in out.rglob("*") if p.is_file()):
            response.file.add(name=path.relative_to(out).as_posix(), content=path.read_text(encoding="utf-8"))
    return response


if __name__ == "__main__":
    asked = plugin_pb2.CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
    sys.stdout.buffer.write(generate(asked).SerializeToString())
