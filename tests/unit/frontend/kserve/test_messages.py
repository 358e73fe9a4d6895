"""The messages of the KServe server agree with their .proto file, with their types, and with Triton's."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from tritonclient.grpc import model_config_pb2, service_pb2

from dynamo_redis.frontend.kserve import inference_pb2
from dynamo_redis.frontend.kserve.apis import SERVICE

SOURCE = Path(inference_pb2.__file__).with_name("inference.proto")
COMPILED = SOURCE.with_suffix(".binpb")
HOW = "run `make proto`"


def all_messages(messages: Any) -> dict[str, Any]:
    """Return the descriptors of messages and of those within them, by name, without the entries of maps."""
    found: dict[str, Any] = {}
    for message in messages:
        if not message.GetOptions().map_entry:
            found |= {message.name: message} | all_messages(message.nested_types)
    return found


def test_compiled_messages_equal_the_proto_file(tmp_path: Path) -> None:
    compiled = tmp_path / "inference.binpb"
    command = (sys.executable, "-m", "grpc_tools.protoc", f"-I{SOURCE.parent}")
    subprocess.run([*command, f"--descriptor_set_out={compiled}", str(SOURCE)], check=True, timeout=60)
    fresh, kept = (FileDescriptorSet.FromString(p.read_bytes()) for p in (compiled, COMPILED))
    assert kept == fresh, HOW


def test_types_have_all_messages_and_fields() -> None:
    tree = ast.parse(Path(inference_pb2.__file__).with_suffix(".pyi").read_text())
    typed = {
        node.name: {
            field.target.id
            for field in node.body
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and not field.target.id.endswith("_FIELD_NUMBER")
        }
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    for name, message in all_messages(inference_pb2.DESCRIPTOR.message_types_by_name.values()).items():
        assert {field.name for field in message.fields} == typed[name], (name, HOW)
        assert hasattr(inference_pb2, name) or message.containing_type is not None


def test_messages_equal_those_of_triton() -> None:
    """Each field has the number and the type that it has there, and each call the same messages."""
    own = all_messages(inference_pb2.DESCRIPTOR.message_types_by_name.values())
    files = (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR)
    triton = {
        name: message
        for file in files
        for name, message in all_messages(file.message_types_by_name.values()).items()
    }
    for name, message in own.items():
        theirs = triton[name].fields_by_name
        for field in message.fields:
            other = theirs[field.name]
            assert (field.number, field.type) == (other.number, other.type), (name, field.name)
    [service] = service_pb2.DESCRIPTOR.services_by_name.values()
    calls = service.methods_by_name
    for method in inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        other = calls[method.name]
        assert method.containing_service.full_name == other.containing_service.full_name == SERVICE
        assert method.input_type.full_name == other.input_type.full_name
        assert method.output_type.full_name == other.output_type.full_name
