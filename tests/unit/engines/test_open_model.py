"""Models that a worker refuses before it registers anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest

from dynamo_redis.config import ModelSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.worker import kind_of, open_model
from dynamo_redis.errors import ModelError
from dynamo_redis.models.upload import make_card


@pytest.mark.parametrize(
    ("config", "setting", "expected"),
    [
        ({}, "auto", None),
        ({"is_matryoshka": True}, "auto", True),
        ({"is_matryoshka": False}, "auto", False),
        ({"matryoshka_dimensions": [64, 128]}, "auto", True),
        ({"is_matryoshka": "odd"}, "auto", None),
        ({"is_matryoshka": True}, "false", False),
        ({}, "true", True),
    ],
)
def test_card_says_whether_vectors_can_be_shortened(
    tmp_path: Path, config: dict[str, Any], setting: Literal["auto", "true", "false"], expected: bool | None
) -> None:
    path = tmp_path / "model"
    shutil.copytree(DEMO_MODEL_PATH, path)
    original = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(original | config))
    settings = ModelSettings(model_path=path, model_type="embedding", matryoshka=setting)
    model, name = open_model(settings)
    card = make_card(model, model_name=name, kv_cache_block_size=16, model_type=kind_of(settings))
    assert (card.model_type, card.runtime_config.matryoshka) == ("embedding", expected)
    completing = make_card(model, model_name=name, kv_cache_block_size=16)
    assert completing.runtime_config.matryoshka is None


def test_template_of_an_embedding_model_is_not_tried(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(DEMO_MODEL_PATH, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{% if x"}))
    open_model(ModelSettings(model_path=path, model_type="embedding"))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if x", "does not compile"),
        ("{{ x | nothing }}", "does not compile"),
        ("{{ 'x' * 10000000000 }}", "does not end on a short message"),
    ],
)
def test_template_that_frontends_cannot_use_is_refused(tmp_path: Path, template: str, words: str) -> None:
    path = tmp_path / "model"
    shutil.copytree(DEMO_MODEL_PATH, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    with pytest.raises(ModelError, match=words) as caught:
        open_model(ModelSettings(model_path=path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
