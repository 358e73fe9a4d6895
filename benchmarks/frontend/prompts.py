"""The model of suite `frontend`, and prompts of an exact length in its tokens.

The tokenizer is that of Qwen3. The prompts are running text from this repository's own pages, each from
another place and with a number of its own in front, so that no two begin alike.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from tokenizers import Tokenizer

from benchmarks.harness.processes import REPOSITORY

SHARED_TOKENIZER: Final = Path("../shared/data/qwen3-tokenizer")
"""Path from the root of the checkout."""
MODEL: Final = "qwen3"
FILLER: Final = " and"
NUMBER_DIGITS: Final = 8
"""Digits of a prompt's number. Qwen3 has a token for each digit."""

_CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
_GENERATION_CONFIG: Final[dict[str, Any]] = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}


class NoTokenizer(Exception):
    """The tokenizer's files are not there."""


def tokenizer_source() -> Path:
    """Return the directory of the tokenizer's files. Raises NoTokenizer."""
    source = (REPOSITORY / SHARED_TOKENIZER).resolve()
    if not (source / "tokenizer.json.gz").is_file():
        raise NoTokenizer(f"suite frontend is skipped: it needs the Qwen3 tokenizer in {SHARED_TOKENIZER}")
    return source


@contextmanager
def model_directory() -> Iterator[Path]:
    """Write the model's directory, without weights; it is deleted when the block ends. Raises
    NoTokenizer."""
    source = tokenizer_source()
    with TemporaryDirectory(prefix="bench-qwen3-") as name:
        directory = Path(name) / MODEL
        directory.mkdir()
        (directory / "tokenizer.json").write_bytes(
            gzip.decompress((source / "tokenizer.json.gz").read_bytes())
        )
        (directory / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
        (directory / "config.json").write_text(json.dumps(_CONFIG))
        (directory / "generation_config.json").write_text(json.dumps(_GENERATION_CONFIG))
        yield directory


class Prompts:
    """Makes prompts of an exact number of tokens, each different from the others."""

    def __init__(self, model: Path, seed: int) -> None:
        """`seed` decides the numbers and the places; another one makes other prompts."""
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._words = _words()
        encoded = self._tokenizer.encode_batch(self._words, add_special_tokens=False)
        self._ends = [0, *accumulate(len(encoding.ids) for encoding in encoded)]
        """The number of tokens before each word."""
        self._rng = random.Random(seed)
        for count in (NUMBER_DIGITS + 1, 200):
            if (found := len(self._tokenizer.encode(self.make(count), add_special_tokens=False))) != count:
                raise RuntimeError(f"a prompt of {count} tokens has {found}")

    def make(self, token_count: int) -> str:
        """Return the next prompt. Its tokens are those of its words: the tokenizer splits before a space."""
        wanted = token_count - NUMBER_DIGITS
        ends = self._ends
        first = self._rng.randrange(bisect_right(ends, ends[-1] - wanted))
        last = bisect_right(ends, ends[first] + wanted) - 1
        missing = wanted - (ends[last] - ends[first])
        number = self._rng.randrange(10**NUMBER_DIGITS)
        return f"{number:0{NUMBER_DIGITS}d}{''.join(self._words[first:last])}{FILLER * missing}"


def _words() -> list[str]:
    """Return the words of the pages, each with the space before it."""
    pages = sorted((REPOSITORY / "docs").glob("**/*.md"))
    text = "\n".join(page.read_text() for page in pages)
    return [f" {word}" for word in re.findall(r"\S+", text)]
