"""The messages of `inference.proto`, with the types in `inference_pb2.pyi`.

They are made from the compiled descriptors, in a pool of their own. So any release of protobuf that the extra
allows can run them, and a program can also import another package's messages of the same names, as
tritonclient has them: the default pool takes each name once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message_factory import GetMessageClass

COMPILED: Final = Path(__file__).with_name("inference.binpb")
"""The compiled `inference.proto`, a serialized FileDescriptorSet."""

[_compiled] = FileDescriptorSet.FromString(COMPILED.read_bytes()).file
_pool = DescriptorPool()
_pool.Add(_compiled)

DESCRIPTOR = _pool.FindFileByName(_compiled.name)
globals().update(
    {name: GetMessageClass(message) for name, message in DESCRIPTOR.message_types_by_name.items()},
    **{name: EnumTypeWrapper(enum) for name, enum in DESCRIPTOR.enum_types_by_name.items()},
)
globals().update(
    {value.name: value.number for enum in DESCRIPTOR.enum_types_by_name.values() for value in enum.values}
)
