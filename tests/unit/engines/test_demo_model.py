"""The demo model: small, reproducible, and good enough to chat with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.models.directory import ModelDirectory


@pytest.fixture(scope="module")
def tokenizer(demo_model: ModelDirectory) -> Tokenizer:
    return Tokenizer.from_buffer(demo_model.read_tokenizer())


def test_demo_model_is_small(demo_model: ModelDirectory) -> None:
    assert sum(file.size_bytes for file in demo_model.files.values()) < 300_000


@pytest.mark.parametrize(
    "text",
    [
        "Hello! How are you?",
        "  leading and trailing  \n\n\ttabs\r\n",
        "Grüße aus Köln — “quoted”, 你好, Привет, مرحبا, 안녕하세요",
        "👩‍👩‍👧‍👦 🏳️‍🌈 🙂 é ﬁ \u200b\u0000\u007f",
        "def f(x): return {'a': [1, 2.5e-3]}",
    ],
)
def test_any_text_survives_encode_and_decode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_match_the_files(tokenizer: Tokenizer, demo_model: ModelDirectory) -> None:
    declared = demo_model.tokenizer_config["added_tokens_decoder"]
    assert {int(token_id): entry["content"] for token_id, entry in declared.items()} == {
        0: "<|endoftext|>",
        1: "<|im_start|>",
        2: "<|im_end|>",
    }
    for token_id, entry in declared.items():
        assert tokenizer.token_to_id(entry["content"]) == int(token_id)
        assert tokenizer.encode(f"a{entry['content']}b").ids[1] == int(token_id)
    config = json.loads(demo_model.files["config.json"].read())
    assert config["vocab_size"] == tokenizer.get_vocab_size()


def test_script_makes_the_demo_model_again(repository: Path, tmp_path: Path) -> None:
    script = repository / "tools" / "make_demo_model.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=50)
    made = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    kept = {path.name: json.loads(path.read_text()) for path in DEMO_MODEL_PATH.glob("*.json")}
    assert made == kept
