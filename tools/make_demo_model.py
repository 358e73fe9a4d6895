"""Makes the demo model that a mock worker serves when no other is given.

    python tools/make_demo_model.py [DIRECTORY]

Trains a byte-level BPE tokenizer on `demo_corpus.txt` and the mock engine's own sentences, and writes it with
the configuration files of a small chat model. The result is the same for the same version of `tokenizers`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dynamo_redis.engines.text import sentences

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "src" / "dynamo_redis" / "engines" / "demo_model"

VOCABULARY_SIZE = 2048
CONTEXT_LENGTH = 32768
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, _, END_OF_MESSAGE = range(3)


def train() -> Tokenizer:
    """Train and return the tokenizer; special tokens have ids 0 to 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=1,  # the corpus is small: whole words of it may become tokens
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = (HERE / "demo_corpus.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    tokenizer.train_from_iterator([*corpus, *sentences(), *(f" {text}" for text in sentences())], trainer)
    return tokenizer


def configurations(vocabulary_size: int) -> dict[str, dict[str, Any]]:
    """Return the JSON files beside tokenizer.json, by name."""
    return {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(token_id): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token_id, token in enumerate(SPECIAL_TOKENS)
            },
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": (HERE / "demo_chat_template.jinja").read_text(encoding="utf-8"),
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL_TOKENS[END_OF_MESSAGE],
            "model_max_length": CONTEXT_LENGTH,
            "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
        "config.json": {
            "architectures": ["DemoForCausalLM"],
            "model_type": "demo",
            "eos_token_id": END_OF_MESSAGE,
            "max_position_embeddings": CONTEXT_LENGTH,
            "vocab_size": vocabulary_size,
        },
        "generation_config.json": {
            "eos_token_id": [END_OF_MESSAGE, END_OF_TEXT],
            "pad_token_id": END_OF_TEXT,
        },
    }


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(target / "tokenizer.json"), pretty=False)
    for name, content in configurations(tokenizer.get_vocab_size()).items():
        (target / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
