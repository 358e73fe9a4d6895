"""Model deployment cards: the data by which a frontend serves a model.

A worker uploads the model's small files (tokenizer, chat template, configs) to the object store and then
registers a card that names them. A frontend fetches the files that it does not have, and checks their sha256.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from dynamo_redis.decoding import StoredModel, VersionedModel
from dynamo_redis.errors import InvalidRecord, ModelError
from dynamo_redis.names import MODEL_CARDS, EndpointName, InstanceId, decode_segment, parse_instance_id

CARD_VERSION = 1

REQUIRED_MODEL_FILES = ("tokenizer.json", "tokenizer_config.json")
"""The files that every card names."""

MODEL_FILES = (
    *REQUIRED_MODEL_FILES,
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files that a card can name beside `ADDITIONAL_TEMPLATE`s, in the order of upload. The last two have the
chat template of newer models and of multi-modal models."""

ADDITIONAL_TEMPLATES = "additional_chat_templates"
"""The directory of a model's further chat templates."""

ADDITIONAL_TEMPLATE = re.compile(rf"{ADDITIONAL_TEMPLATES}/([A-Za-z0-9_][A-Za-z0-9_.-]{{0,63}})\.jinja")
"""The name in a card of a file in that directory; the group is the template's name."""

MAX_ADDITIONAL_TEMPLATES = 32

MAX_FILES_BYTES: Final = 512 << 20
"""Most bytes of all files of a card. The large one is the tokenizer, of up to 40 MB."""

ModelKind = Literal["chat", "completions", "chat+completions", "embedding"]
"""The kinds of request that a model serves."""

MAX_RANKS = 4096
"""The greatest `data_parallel_size` of a card: a router has an entry for each rank."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_Count = Annotated[int, Field(ge=1, lt=1 << 63)]


class FileReference(StoredModel):
    """A file in the object store."""

    url: str
    sha256: str
    size_bytes: Annotated[int, Field(ge=0, lt=1 << 63)]


class RuntimeConfig(StoredModel):
    """The capacity of the worker's engine, of each data-parallel rank if it has several, and the form of its
    answers."""

    data_parallel_size: Annotated[int, Field(ge=1, le=MAX_RANKS)] | None = None
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    event_plane: str | None = None
    """The plane of its KV events, `DYN_EVENT_PLANE`."""
    tool_call_parser: str | None = None
    """The parser of the tool calls in its answers; None: by the chat template."""
    reasoning_parser: str | None = None
    """The parser of the reasoning in its answers; None: by the chat template."""
    modalities: list[str] | None = None
    """The modalities beside text that its engine reads in a chat: `image`, `audio`, `video`."""
    matryoshka: bool | None = None
    """Whether embeddings can be shortened by `dimensions`; None: the engine decides."""


class ModelCard(VersionedModel):
    """A model as one worker serves it. Stored as JSON at `EndpointName.model_card_key(...)`."""

    WHAT: ClassVar[str] = "a model card"
    VERSION: ClassVar[int] = CARD_VERSION

    display_name: Annotated[str, Field(min_length=1, max_length=1024)]
    slug: str
    model_type: ModelKind = "chat+completions"
    model_input: Literal["tokens", "text"] = "tokens"
    context_length: _Count
    kv_cache_block_size: _Count
    migration_limit: int = 0
    runtime_config: RuntimeConfig = RuntimeConfig()
    files: dict[str, FileReference] = Field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A digest, 16 hex digits, of the fields that a frontend serves by: cards with the same one share a
        model."""
        files = sorted((name, file.sha256) for name, file in self.files.items())
        content: list[object] = [self.context_length, self.model_type, self.model_input, files]
        parsers = (self.runtime_config.tool_call_parser, self.runtime_config.reasoning_parser)
        if parsers != (None, None):
            content += parsers
        if self.runtime_config.modalities:
            content.append({"modalities": sorted(self.runtime_config.modalities)})
        if self.runtime_config.matryoshka is not None:
            content.append({"matryoshka": self.runtime_config.matryoshka})
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def checked_files(self) -> dict[str, FileReference]:
        """Return the references of the files that a frontend fetches, by name, in the order of upload.

        Only known names are among them, since a frontend makes paths of these names, and the registry's data
        is not trusted. Raises ModelError if a required file is missing, there are too many templates or
        bytes, or a sha256 is not valid.
        """
        for name in REQUIRED_MODEL_FILES:
            if name not in self.files:
                raise ModelError(f"the card of model {self.display_name!r} names no {name}")
        additional = sorted(name for name in self.files if ADDITIONAL_TEMPLATE.fullmatch(name))
        if len(additional) > MAX_ADDITIONAL_TEMPLATES:
            raise ModelError(
                f"the card of model {self.display_name!r} names {len(additional)} chat templates"
            )
        wanted = {name: self.files[name] for name in (*MODEL_FILES, *additional) if name in self.files}
        for name, reference in wanted.items():
            if not _SHA256.fullmatch(reference.sha256):
                raise ModelError(f"the card of model {self.display_name!r} has no valid sha256 for {name}")
        size_bytes = sum(reference.size_bytes for reference in wanted.values())
        if size_bytes > MAX_FILES_BYTES:
            raise ModelError(
                f"the files of model {self.display_name!r} have {size_bytes} bytes by its card; "
                f"{MAX_FILES_BYTES} are allowed"
            )
        return wanted


def parse_card_key(key: str) -> tuple[EndpointName, InstanceId]:
    """Return the endpoint and the instance id of a card's registry key. Raises InvalidRecord."""
    segments = key.removeprefix(MODEL_CARDS).split("/")
    if len(segments) not in (4, 5):  # the fifth names a LoRA adapter
        raise InvalidRecord(ModelCard.WHAT, "no card has such a key", key=key)
    try:
        endpoint = EndpointName(*map(decode_segment, segments[:3]))
        instance_id = parse_instance_id(segments[3])
    except ValueError as exc:
        raise InvalidRecord(ModelCard.WHAT, exc, key=key) from exc
    if not endpoint.model_card_key(instance_id) == "/".join((MODEL_CARDS.rstrip("/"), *segments[:4])):
        raise InvalidRecord(ModelCard.WHAT, "its key is not written as the product writes it", key=key)
    return endpoint, instance_id
