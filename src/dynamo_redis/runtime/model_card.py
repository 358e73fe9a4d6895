"""Model deployment cards: what a frontend must know of a model to serve it.

A worker uploads the model's small files (tokenizer, chat template, configs) to the object store and then
registers a card that names them; a frontend that has none of these files fetches them, checked by sha256.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dynamo_redis.errors import ModelError

CARD_VERSION = 1

REQUIRED_MODEL_FILES = ("tokenizer.json", "tokenizer_config.json")
"""The files every card names."""

MODEL_FILES = (*REQUIRED_MODEL_FILES, "config.json", "generation_config.json", "chat_template.jinja")
"""The files a card can name, in the order of upload. Newer models keep the chat template in its own file."""


class CardModel(BaseModel):
    """Base of the stored models: fields of later releases are kept and ignored."""

    model_config = ConfigDict(extra="allow", frozen=True)


class FileReference(CardModel):
    """A file in the object store."""

    url: str
    sha256: str
    size_bytes: int


class RuntimeConfig(CardModel):
    """What the worker's engine can hold: of each data-parallel rank, if it has several."""

    data_parallel_size: int | None = None
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    event_plane: str | None = None
    """How its KV events travel, `DYN_EVENT_PLANE`."""


class ModelCard(CardModel):
    """A model as one worker serves it. Stored as JSON at `EndpointName.model_card_key(...)`."""

    version: int = CARD_VERSION
    display_name: str
    slug: str
    model_type: Literal["chat", "completions", "chat+completions"] = "chat+completions"
    model_input: Literal["tokens", "text"] = "tokens"
    context_length: int
    kv_cache_block_size: int
    migration_limit: int = 0
    runtime_config: RuntimeConfig = RuntimeConfig()
    files: dict[str, FileReference] = {}

    def to_bytes(self) -> bytes:
        """The stored form."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, stored: bytes) -> ModelCard:
        """Read a stored card. Raises ModelError: not a card, or of an unknown major version."""
        try:
            card = cls.model_validate_json(stored)
        except ValidationError as exc:
            raise ModelError(f"not a model card: {exc.errors(include_url=False)[0]['msg']}") from exc
        if card.version != CARD_VERSION:
            raise ModelError(
                f"model card of {card.display_name!r} has version {card.version}, "
                f"this release reads {CARD_VERSION}: upgrade the older side"
            )
        return card
