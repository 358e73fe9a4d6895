"""Loading of a model from its card: its files, tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from dynamo_redis.errors import DynamoRedisError, ModelCacheError, ModelError
from dynamo_redis.frontend.parsing import PLAIN, Parsing
from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.models.card import ModelCard
from dynamo_redis.models.chat_template import ChatTemplate
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.models.download import fetch_model_files
from dynamo_redis.store.base import ObjectStore
from dynamo_redis.templates.protocol import MaskedText


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model's tokenizer and chat template, with the limits that its requests are checked against.

    `template` is None for a model that only completes text. A model with `completes_text` false takes only
    conversations.
    """

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    context_length: int
    completes_text: bool = True
    parsing: Parsing = PLAIN
    modalities: frozenset[str] = frozenset()
    """The modalities beside text that its engines read in chats."""
    embeds: bool = False
    """True if the model makes embeddings, and nothing else."""
    takes_text: bool = False
    """True if its workers take the inputs of embeddings as they came."""
    matryoshka: bool | None = None
    """See `RuntimeConfig.matryoshka`."""
    read_tokenizer: Callable[[], bytes] | None = None
    """Reads the tokenizer's file again. Blocks. Raises ModelError."""

    def accelerate(self) -> None:
        """Encode prompts by `fastokens` from now on, as `Tokenizer.accelerate` does. Blocks. Raises
        ModelError."""
        assert self.read_tokenizer is not None
        self.tokenizer.accelerate(self.read_tokenizer())

    def encode_rendered(self, text: bytearray | MaskedText) -> list[int]:
        """Return the token ids of a rendered chat. Raises ModelError, InvalidRequest."""
        if isinstance(text, MaskedText):
            return self.tokenizer.encode_masked(text.text.decode(), text.mask)
        return self.tokenizer.encode(text.decode())


async def load_model(
    objects: ObjectStore, card: ModelCard, cache_dir: Path, executor: Executor
) -> LoadedModel:
    """Fetch the card's files unless they are cached, build the model in the executor, and try its templates.

    A process tries the chat templates. Raises StoreError, ModelCacheError and Overloaded for failures that
    may pass, and other ModelErrors for permanent ones.
    """
    if card.model_input != "tokens" and card.model_type != "embedding":
        raise ModelError(
            f"model {card.display_name!r} takes {card.model_input!r} as input; this frontend sends tokens"
        )
    directory = await fetch_model_files(objects, card, cache_dir)
    try:
        model = await asyncio.get_running_loop().run_in_executor(executor, build_model, card, directory)
    except DynamoRedisError as exc:
        if isinstance(exc.__cause__, OSError):  # a file of the cache cannot be read
            raise ModelCacheError(str(exc)) from exc
        raise
    except Exception as exc:
        raise ModelError(f"its files cannot be used: {type(exc).__name__}: {exc}") from exc
    if model.template is not None:
        try:
            await model.template.open()
        except BaseException:
            await model.template.aclose()
            raise
    return model


def build_model(card: ModelCard, directory: Path) -> LoadedModel:
    """Build a model from a directory of its files, without trying its templates.

    Blocks. Raises ModelError.
    """
    files = read_model_directory(directory, context_length=card.context_length)
    embeds = card.model_type == "embedding"
    wants_chat = card.model_type in ("chat", "chat+completions") and files.chat_templates
    tokenizer = Tokenizer(files.read_tokenizer(), origin=f"tokenizer.json of {card.display_name!r}")
    template = None
    if wants_chat:
        template = ChatTemplate(files.chat_templates, files.tokenizer_config, tokenizer.special_names)
    return LoadedModel(
        name=card.display_name,
        tokenizer=tokenizer,
        template=template,
        eos_token_ids=files.eos_token_ids,
        context_length=files.context_length,
        completes_text=card.model_type in ("completions", "chat+completions"),
        parsing=PLAIN if embeds else Parsing.of(card, files.chat_templates),
        modalities=frozenset(card.runtime_config.modalities or ()),
        embeds=embeds,
        takes_text=card.model_input == "text",
        matryoshka=card.runtime_config.matryoshka,
        read_tokenizer=files.read_tokenizer,
    )
