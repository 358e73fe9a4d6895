"""Prompts equal those of transformers: from model directories of all forms, and of messages without content.

The vectors are made by transformers, see tools/make_chat_vectors.py; no test needs it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.errors import TemplateError
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.templates.rendering import CompiledTemplates

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "vectors" / "chat_prompts.json").read_text(encoding="utf-8")
)


def directory_of(files: dict[str, Any], path: Path) -> Path:
    """Return a model directory with the demo model's tokenizer and these files."""
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(DEMO_MODEL_PATH / name, path / name)
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("case", VECTORS["directories"], ids=lambda case: case["name"])
def test_directory_gives_the_prompts_of_transformers(case: dict[str, Any], tmp_path: Path) -> None:
    model = read_model_directory(directory_of(case["files"], tmp_path))
    if not model.chat_templates:
        assert {answer.get("error") for answer in case["prompts"]} == {"ValueError"}
        return
    templates = CompiledTemplates(model.chat_templates, model.tokenizer_config)
    for answer in case["prompts"]:
        if "error" in answer:
            with pytest.raises(TemplateError, match="none of them is the default"):
                templates.render(case["messages"], tools=answer["tools"])
        else:
            assert templates.render(case["messages"], tools=answer["tools"]) == answer["prompt"]


@pytest.mark.parametrize("case", VECTORS["conversations"], ids=lambda case: case["name"])
def test_message_without_content_reaches_the_template(case: dict[str, Any]) -> None:
    sent = json.loads(json.dumps(case["messages"]))
    assert CompiledTemplates({"default": case["template"]}, {}).render(sent) == case["prompt"]
    assert sent == case["messages"]
