"""A model's tokenizer, for engines."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from dynamo_redis.errors import ModelError
from dynamo_redis.models.directory import ModelDirectory


def load_tokenizer(model: ModelDirectory) -> Tokenizer:
    """Return the model's tokenizer. Blocks (about 0.5 s for 11 MiB). Raises ModelError."""
    try:
        return Tokenizer.from_buffer(model.read_tokenizer())
    except ModelError:
        raise
    except Exception as exc:  # the library raises bare Exception
        raise ModelError(f"{model.files['tokenizer.json'].path} is not a usable tokenizer: {exc}") from exc


class ModelTokens:
    """Conversions between text and tokens, for answers in text and prompts as text."""

    def __init__(self, model: ModelDirectory) -> None:
        """Load the tokenizer. Blocks, and raises ModelError, as `load_tokenizer` does."""
        self._tokenizer = load_tokenizer(model)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # In an answer's text "<|im_end|>" is plain text of the model; as a special token it would have no
        # text.
        self._tokenizer.encode_special_tokens = True
        bytes_by_name = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        byte_ids = [token for token in bytes_by_name if token is not None]
        self._byte_ids = byte_ids if len(byte_ids) == len(bytes_by_name) else None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; names of special tokens in it are plain text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens without the special ones, as a frontend shows it."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def encode_bytes(self, text: str) -> list[int] | None:
        """Return one token a byte of the text; None if there are no tokens for bytes (`<0x0A>`)."""
        return None if self._byte_ids is None else [self._byte_ids[byte] for byte in text.encode()]

    def prompt_text(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt, with its special tokens by name."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
