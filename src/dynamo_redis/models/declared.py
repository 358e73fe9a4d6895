"""Values that the files of a model declare: context length, end-of-sequence tokens, chat templates. Pure.

`parsed` has the content of the JSON files, by name; tokenizer.json and tokenizer_config.json are among them.
`path` is the model's directory, for the messages of errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from dynamo_redis.errors import ModelError
from dynamo_redis.models.card import ADDITIONAL_TEMPLATE

_UNLIMITED = 10**9  # tokenizers without a limit declare 1e30

_CONTEXT_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def declared_context_length(path: Path, parsed: Mapping[str, dict[str, Any]]) -> int:
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


def declared_eos_token_ids(path: Path, parsed: Mapping[str, dict[str, Any]]) -> tuple[int, ...]:
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


def declared_matryoshka(parsed: Mapping[str, dict[str, Any]]) -> bool | None:
    """Return whether config.json says that embeddings can be shortened; None if it says nothing.

    Source: vLLM's page on pooling models.
    """
    config = parsed.get("config.json", {})
    if config.get("matryoshka_dimensions"):
        return True
    declared = config.get("is_matryoshka")
    return declared if isinstance(declared, bool) else None


def find_chat_templates(
    path: Path, parsed: Mapping[str, dict[str, Any]], contents: Mapping[str, bytes]
) -> dict[str, str]:
    """Return the model's templates by name. Raises ModelError.

    They come from the template files, else from tokenizer_config.json, else from chat_template.json, which
    transformers has for multi-modal models.
    """
    files: dict[str, str] = {}  # an additional template named `default` takes the place of the usual one
    for file in contents:
        additional = ADDITIONAL_TEMPLATE.fullmatch(file)
        if additional is not None or file == "chat_template.jinja":
            files["default" if additional is None else additional[1]] = file
    templates: dict[str, str] = {}
    for name, file in files.items():
        try:
            templates[name] = contents[file].decode()
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
