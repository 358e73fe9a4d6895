"""Text to tokens and back, for engines that speak in text."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from dynamo_redis.errors import ModelError
from dynamo_redis.models.files import ModelDirectory


class ModelTokens:
    """A model's tokenizer, as an engine's answers in text and prompts as text need it."""

    def __init__(self, model: ModelDirectory) -> None:
        """Blocks (about 0.5 s for 11 MiB). Raises ModelError."""
        try:
            self._tokenizer = Tokenizer.from_buffer(model.read_tokenizer())
        except ModelError:
            raise
        except Exception as exc:  # the library raises bare Exception
            raise ModelError(
                f"{model.files['tokenizer.json'].path} is not a usable tokenizer: {exc}"
            ) from exc
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # In an answer's text "<|im_end|>" is what the model wrote; as a token it would have no text.
        self._tokenizer.encode_special_tokens = True
        bytes_by_name = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        byte_ids = [token for token in bytes_by_name if token is not None]
        self._byte_ids = byte_ids if len(byte_ids) == len(bytes_by_name) else None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; names of special tokens in it are plain text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens as a frontend shows it: special ones have none."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def spell(self, text: str) -> list[int] | None:
        """The text byte by byte, or None if there are no tokens for single bytes (`<0x0A>`)."""
        return None if self._byte_ids is None else [self._byte_ids[byte] for byte in text.encode()]

    def prompt_text(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt, its special tokens by name."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
