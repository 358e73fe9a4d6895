"""Models that a worker refuses before it registers anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dynamo_redis.config import ModelSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.worker import open_model
from dynamo_redis.errors import ModelError


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
