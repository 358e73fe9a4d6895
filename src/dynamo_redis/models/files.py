"""A model's files: read from a directory by a worker, and fetched through the object store by a frontend.

A worker reads its model directory (`read_model_directory`), uploads the files, registers the card that names
them (`publish_model`), and uploads again files that vanish (`keep_model_files`). A frontend makes a directory
of the same files from a card (`fetch_model_files`), and reads it with `read_model_directory`, too.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import logging
import os
import random
import re
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

import anyio
import anyio.to_thread

from dynamo_redis.errors import ModelCacheError, ModelError, ObjectChanged, StoreError
from dynamo_redis.models.card import (
    ADDITIONAL_TEMPLATE,
    ADDITIONAL_TEMPLATES,
    MAX_ADDITIONAL_TEMPLATES,
    MODEL_FILES,
    REQUIRED_MODEL_FILES,
    FileReference,
    ModelCard,
    ModelKind,
    RuntimeConfig,
)
from dynamo_redis.names import EndpointName, InstanceId, slug
from dynamo_redis.store.base import LostReason, ObjectStore, Registration, Registry, parse_object_url

log = logging.getLogger(__name__)

MODEL_BUCKET = "models"
"""The object store's bucket for model files.

Its names: `<model slug>/<first digits of sha256>/<file name>`.
"""

UPLOAD_AGAIN_S = 1.0
"""Mean seconds between two attempts to upload to a Redis that refuses all writes."""
CHECK_S = 10.0
"""Mean seconds between two checks that the files of a worker's card are in the object store."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNLIMITED = 10**9  # tokenizers without a limit declare 1e30

_CONTEXT_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


# --------------------------------------------------------------------------- the directory


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model. Size and sha256 are of its content, after unpacking if it is gzipped."""

    name: str
    path: Path
    size_bytes: int
    sha256: str

    @property
    def packed(self) -> bool:
        """True if the file on disk is gzipped (`tokenizer.json.gz`)."""
        return self.path.suffix == ".gz"

    def read(self) -> bytes:
        """Return the content, unpacked. Blocks. Raises ModelError."""
        return _read(self.path)


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """A model's files, checked, and the values read from them.

    `chat_templates` maps `default`, and other names such as `tool_use`, to Jinja source. It is empty for a
    model without chat. `eos_token_ids` come from generation_config.json, else config.json, else
    tokenizer_config.json. `tokenizer_config` is the content of that file, with the tokens of
    special_tokens_map.json where transformers reads them.
    """

    path: Path
    files: Mapping[str, ModelFile]
    context_length: int
    eos_token_ids: tuple[int, ...]
    chat_templates: Mapping[str, str]
    tokenizer_config: Mapping[str, Any]

    @property
    def model_type(self) -> Literal["completions", "chat+completions"]:
        """The kinds of request that the model serves."""
        return "chat+completions" if self.chat_templates else "completions"

    def read_tokenizer(self) -> bytes:
        """Return the content of tokenizer.json. Blocks. Raises ModelError."""
        return self.files["tokenizer.json"].read()


def read_model_directory(
    path: Path, *, context_length: int | None = None, chat_template: Path | None = None
) -> ModelDirectory:
    """Read and check a model directory. Blocks while it hashes and parses (11 MiB: 0.2 s).

    A file may be gzipped, with `.gz` after its name. `context_length` replaces the length in the files.
    `chat_template` is a file of Jinja source that replaces all of the model's own templates. Raises
    ModelError, with a message of one line, if a file is missing or broken.
    """
    files: dict[str, ModelFile] = {}
    contents: dict[str, bytes] = {}
    found_files = _find_files(path)
    if chat_template is not None:
        own = {name: file for name, file in found_files.items() if not ADDITIONAL_TEMPLATE.fullmatch(name)}
        found_files = own | {"chat_template.jinja": chat_template}
    for name, found in found_files.items():
        contents[name] = content = _read(found)
        files[name] = ModelFile(name, found, len(content), hashlib.sha256(content).hexdigest())
    for name in REQUIRED_MODEL_FILES:
        if name not in files:
            raise ModelError(f"{path} has no {name}: every model needs {' and '.join(REQUIRED_MODEL_FILES)}")
    parsed: dict[str, dict[str, Any]] = {}
    for name, content in contents.items():
        if name.endswith(".json"):
            try:
                value = json.loads(content)
            except (ValueError, RecursionError) as exc:
                raise ModelError(f"{files[name].path} is not valid JSON: {exc}") from exc
            if not isinstance(value, dict):
                raise ModelError(f"{files[name].path} holds {type(value).__name__}, not a JSON object")
            parsed[name] = value
    if "added_tokens_decoder" not in parsed["tokenizer_config.json"]:
        # As transformers does (`PreTrainedTokenizerBase._from_pretrained`): files that list
        # `added_tokens_decoder` have the special tokens there already.
        parsed["tokenizer_config.json"].update(parsed.get("special_tokens_map.json", {}))
    if not isinstance(parsed["tokenizer.json"].get("model"), dict):
        raise ModelError(f"{files['tokenizer.json'].path} is not a tokenizer: it has no 'model' object")
    return ModelDirectory(
        path=path,
        files=files,
        context_length=context_length or _context_length(path, parsed),
        eos_token_ids=_eos_token_ids(path, parsed),
        chat_templates=_chat_templates(path, parsed, contents),
        tokenizer_config=parsed["tokenizer_config.json"],
    )


def _find_files(directory: Path) -> dict[str, Path]:
    """Return the paths of the model's files, by their names in a card. Raises ModelError."""
    try:
        present = {entry.name for entry in directory.iterdir()}
        if ADDITIONAL_TEMPLATES in present:
            additional = sorted((directory / ADDITIONAL_TEMPLATES).glob("*.jinja"))
        else:
            additional = []
    except NotADirectoryError as exc:
        raise ModelError(f"{directory} is a file: give the directory that holds tokenizer.json") from exc
    except OSError as exc:
        raise ModelError(f"cannot read model directory {directory}: {exc.strerror or exc}") from exc
    found: dict[str, Path] = {}
    for name in MODEL_FILES:
        for candidate in (name, f"{name}.gz"):
            if candidate in present:
                found.setdefault(name, directory / candidate)
    for template in additional:
        name = f"{ADDITIONAL_TEMPLATES}/{template.name}"
        if not ADDITIONAL_TEMPLATE.fullmatch(name):
            raise ModelError(f"{template}: give it a name of letters, digits, '_', '.' and '-'")
        found[name] = template
    if len(additional) > MAX_ADDITIONAL_TEMPLATES:
        raise ModelError(
            f"{directory / ADDITIONAL_TEMPLATES} holds {len(additional)} templates: "
            f"a model has {MAX_ADDITIONAL_TEMPLATES} at most"
        )
    return found


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise ModelError(f"cannot read {path}: {reason}") from exc


def _context_length(path: Path, parsed: Mapping[str, dict[str, Any]]) -> int:
    """Return the context length of config.json, else of tokenizer_config.json. Raises ModelError."""
    config = parsed.get("config.json", {})
    text_config = config.get("text_config")  # multi-modal models have the language model's part there
    for source in (config, text_config if isinstance(text_config, dict) else {}):
        for key in _CONTEXT_LENGTH_KEYS:
            length = source.get(key)
            if _is_length(length):
                return int(length)
            if length is not None:
                raise ModelError(f"{path / 'config.json'}: {key} is {length!r}, not a number of tokens")
    declared = parsed["tokenizer_config.json"].get("model_max_length")
    if _is_length(declared):
        return int(declared)
    raise ModelError(
        f"{path} does not say how long the model's context is (max_position_embeddings in config.json): "
        "give --context-length"
    )


def _is_length(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _UNLIMITED


def _eos_token_ids(path: Path, parsed: Mapping[str, dict[str, Any]]) -> tuple[int, ...]:
    """Return the ids of the end-of-sequence tokens, as `ModelDirectory` describes. Raises ModelError."""
    config = parsed.get("config.json", {})
    text_config = config.get("text_config")
    sources = (
        ("generation_config.json", parsed.get("generation_config.json", {})),
        ("config.json", config),
        ("config.json", text_config if isinstance(text_config, dict) else {}),
    )
    for name, source in sources:
        declared = source.get("eos_token_id")
        if declared is None:
            continue
        ids = declared if isinstance(declared, list) else [declared]
        if not all(isinstance(item, int) and item >= 0 for item in ids):
            raise ModelError(f"{path / name}: eos_token_id is {declared!r}, not a token id or a list of them")
        return tuple(ids)
    token = parsed["tokenizer_config.json"].get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        return ()
    tokenizer = parsed["tokenizer.json"]
    for added in tokenizer.get("added_tokens") or ():
        if isinstance(added, dict) and added.get("content") == content and isinstance(added.get("id"), int):
            return (int(added["id"]),)
    vocabulary = tokenizer["model"].get("vocab")
    found = vocabulary.get(content) if isinstance(vocabulary, dict) else None
    return (found,) if isinstance(found, int) else ()


def _chat_templates(
    path: Path, parsed: Mapping[str, dict[str, Any]], contents: Mapping[str, bytes]
) -> dict[str, str]:
    """Return the model's templates by name. Raises ModelError.

    They come from the template files, else from tokenizer_config.json, else from chat_template.json, which
    transformers has for multi-modal models.
    """
    templates: dict[str, str] = {}
    for file, content in contents.items():
        additional = ADDITIONAL_TEMPLATE.fullmatch(file)
        if additional is not None or file == "chat_template.jinja":
            try:
                templates["default" if additional is None else additional[1]] = content.decode()
            except UnicodeDecodeError as exc:
                raise ModelError(f"{path / file} is not UTF-8: {exc}") from exc
    if templates:
        return templates
    for file in ("tokenizer_config.json", "chat_template.json"):
        declared = parsed.get(file, {}).get("chat_template")
        if isinstance(declared, str):
            return {"default": declared}
        if declared is not None:
            try:
                named = dict(
                    declared
                    if isinstance(declared, dict)
                    else ((one["name"], one["template"]) for one in declared)
                )
            except (TypeError, KeyError):
                named = {}
            if not named or not all(isinstance(part, str) for pair in named.items() for part in pair):
                raise ModelError(
                    f"{path / file}: chat_template is neither text nor a list of named templates"
                )
            return named
    return {}


# --------------------------------------------------------------------------- to the object store


class PublishingRuntime(Protocol):
    """The part of a runtime that `publish_model` uses."""

    @property
    def registry(self) -> Registry: ...
    @property
    def objects(self) -> ObjectStore: ...
    @property
    def instance_id(self) -> InstanceId: ...


def make_card(
    model: ModelDirectory,
    *,
    model_name: str,
    kv_cache_block_size: int,
    runtime_config: RuntimeConfig | None = None,
    model_type: ModelKind | None = None,
) -> ModelCard:
    """Return the card of a model as a worker serves it.

    It has the URLs under which `upload_model_files` stores the files. `model_type` None stands for all kinds
    of request that the files allow.
    """
    return ModelCard(
        display_name=model_name,
        slug=slug(model_name),
        model_type=model_type or model.model_type,
        context_length=model.context_length,
        kv_cache_block_size=kv_cache_block_size,
        runtime_config=runtime_config or RuntimeConfig(),
        files={
            file.name: FileReference(
                url=f"redis-object://{MODEL_BUCKET}/{slug(model_name)}/{file.sha256[:16]}/{file.name}",
                sha256=file.sha256,
                size_bytes=file.size_bytes,
            )
            for file in model.files.values()
        },
    )


async def upload_model_files(objects: ObjectStore, model: ModelDirectory, card: ModelCard) -> None:
    """Upload the model's files to the URLs of the card. Content that is there already is not sent again.

    Raises ModelError if a file has changed on disk since the directory was read, and StoreError.
    """
    for name, reference in card.files.items():
        await _upload(objects, model.files[name], reference)


async def _upload(objects: ObjectStore, file: ModelFile, reference: FileReference) -> None:
    """Upload one file. Raises ModelError if it has changed on disk, and StoreError."""
    content = await anyio.to_thread.run_sync(file.read)
    if hashlib.sha256(content).hexdigest() != reference.sha256:
        raise ModelError(f"{file.path} has changed since this worker read it: restart it")
    await objects.put(*parse_object_url(reference.url), content)


async def keep_model_files(objects: ObjectStore, model: ModelDirectory, card: ModelCard) -> None:
    """Upload again each of the model's files that vanishes from Redis alone. Runs until it is cancelled.

    About every `CHECK_S` it checks each file, with two small exchanges.
    """
    failure = ""
    while True:
        await asyncio.sleep(CHECK_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
        try:
            for name, reference in card.files.items():
                if not await objects.holds(*parse_object_url(reference.url), reference.sha256):
                    log.warning(
                        "%s of model %s is gone from Redis, or damaged there: uploading it again",
                        name,
                        card.display_name,
                    )
                    await _upload(objects, model.files[name], reference)
            failure = ""
        except (StoreError, ModelError) as exc:
            if str(exc) != failure:
                failure = str(exc)
                log.warning("files of model %s cannot be kept in Redis: %s", card.display_name, failure)


async def publish_model(
    runtime: PublishingRuntime,
    endpoint: EndpointName,
    model: ModelDirectory,
    card: ModelCard,
) -> Registration:
    """Upload the model's files, then register its card for this process's instance of `endpoint`.

    The card lives as long as the process's lease. After the registry has lost its data, the files are
    uploaded again before the card is. Files that vanish alone are uploaded by `keep_model_files`. Waits while
    Redis refuses all writes. Raises ModelError, and StoreError for other failures; nothing is registered
    then.
    """

    async def upload() -> None:
        await upload_model_files(runtime.objects, model, card)

    def on_lost(reason: LostReason) -> None:
        log.warning(
            "this worker's card of model %s was taken out of the registry (%s): it gets no new requests",
            card.display_name,
            reason,
        )

    warned = False
    while True:
        try:
            await upload()
            break
        except StoreError as exc:
            if not exc.refuses_writes:
                raise
            if not warned:
                log.warning("model %s waits for Redis to take its files: %s", card.display_name, exc)
            warned = True
            await asyncio.sleep(UPLOAD_AGAIN_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
    key = endpoint.model_card_key(runtime.instance_id)
    return await runtime.registry.register(key, card.to_bytes(), prepare=upload, on_lost=on_lost)


# --------------------------------------------------------------------------- from the object store


async def fetch_model_files(objects: ObjectStore, card: ModelCard, cache_dir: Path) -> Path:
    """Return a directory with the card's files; download those that `cache_dir` does not have.

    The cache is addressed by content: `blobs/<sha256>`, and for each set of files a directory of links,
    `models/<digest of the set>`, which is returned. Any number of processes may share the cache: a blob is
    moved there when it is complete and checked, and a damaged one is fetched again.

    Raises ModelError for an unusable card, ModelCacheError if the cache directory cannot be written,
    ObjectChanged if the object store has other content than the card says, and StoreError.
    """
    for name in REQUIRED_MODEL_FILES:
        if name not in card.files:
            raise ModelError(f"the card of model {card.display_name!r} names no {name}")
    # Only known names become paths: the registry's data is not trusted.
    additional = sorted(name for name in card.files if ADDITIONAL_TEMPLATE.fullmatch(name))
    if len(additional) > MAX_ADDITIONAL_TEMPLATES:
        raise ModelError(f"the card of model {card.display_name!r} names {len(additional)} chat templates")
    wanted = {name: card.files[name] for name in (*MODEL_FILES, *additional) if name in card.files}
    for name, reference in wanted.items():
        if not _SHA256.fullmatch(reference.sha256):
            raise ModelError(f"the card of model {card.display_name!r} has no valid sha256 for {name}")
    blobs = cache_dir / "blobs"
    try:
        blobs.mkdir(parents=True, exist_ok=True)
        for reference in wanted.values():
            blob = blobs / reference.sha256
            if not await anyio.to_thread.run_sync(_is_whole, blob, reference):
                await _download(objects, reference, blob)
        return _link(cache_dir, wanted)
    except OSError as exc:
        raise ModelCacheError(f"cannot write the model cache {cache_dir}: {exc.strerror or exc}") from exc


async def _download(objects: ObjectStore, reference: FileReference, blob: Path) -> None:
    """Fetch a file to a draft beside `blob`, check it, and rename it.

    Raises ModelError, StoreError, OSError.
    """
    try:
        bucket, name = parse_object_url(reference.url)
    except ValueError as exc:
        raise ModelError(str(exc)) from exc
    draft = blob.with_name(f"{blob.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        info = await objects.fetch(bucket, name, draft)
        if not await anyio.to_thread.run_sync(_is_whole, draft, reference):
            raise ObjectChanged(
                reference.url,
                f"it has {info.size_bytes} bytes and sha256 {info.sha256[:16]}…, "
                f"the card says {reference.size_bytes} and {reference.sha256[:16]}…",
            )
        draft.replace(blob)
    finally:
        draft.unlink(missing_ok=True)


def _is_whole(path: Path, reference: FileReference) -> bool:
    """Return whether the file exists with the size and sha256 of the card. Blocks."""
    try:
        if path.stat().st_size != reference.size_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == reference.sha256
    except FileNotFoundError:
        return False


def _link(cache_dir: Path, wanted: Mapping[str, FileReference]) -> Path:
    """Make the directory of links to the blobs of this set of files, and return it."""
    listing = "".join(f"{name} {reference.sha256}\n" for name, reference in sorted(wanted.items()))
    directory = cache_dir / "models" / hashlib.sha256(listing.encode()).hexdigest()[:32]
    for name, reference in wanted.items():
        link = directory / name
        link.parent.mkdir(parents=True, exist_ok=True)
        draft = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
        draft.symlink_to(os.path.relpath(cache_dir / "blobs" / reference.sha256, link.parent))
        draft.replace(link)
    return directory
