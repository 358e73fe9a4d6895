"""A model's directory: its small files, checked, and the values that they declare.

A worker reads the directory that it was given. A frontend reads the one that `download` has made of the same
files.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dynamo_redis.errors import ModelError
from dynamo_redis.models.card import (
    ADDITIONAL_TEMPLATE,
    ADDITIONAL_TEMPLATES,
    MAX_ADDITIONAL_TEMPLATES,
    MODEL_FILES,
    REQUIRED_MODEL_FILES,
)
from dynamo_redis.models.declared import (
    declared_context_length,
    declared_eos_token_ids,
    declared_matryoshka,
    find_chat_templates,
)


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
    matryoshka: bool | None = None
    """Whether embeddings can be shortened; None if config.json does not say it."""

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
        context_length=context_length or declared_context_length(path, parsed),
        eos_token_ids=declared_eos_token_ids(path, parsed),
        chat_templates=find_chat_templates(path, parsed, contents),
        tokenizer_config=parsed["tokenizer_config.json"],
        matryoshka=declared_matryoshka(parsed),
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
