"""The memory that a body takes on its way out of the process that parses it."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from typing import Any

import pytest

from dynamo_redis.frontend.http import bodies
from dynamo_redis.frontend.openai import TextBody

PROMPTS = {"text": "\u00e9" * 2_000_000, "ids": [100_000] * 500_000}


@pytest.mark.parametrize("form", PROMPTS)
def test_packed_prompt_is_kept_once(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held_bytes, dumps = 0, pickle.dumps

    def measure(fields: Any) -> bytes:
        nonlocal held_bytes
        held_bytes = tracemalloc.get_traced_memory()[0]
        return dumps(fields)

    content = json.dumps({"model": "m", "prompt": PROMPTS[form]}, ensure_ascii=False)
    job = bytearray(TextBody.tag + content.encode())
    monkeypatch.setattr(pickle, "dumps", measure)
    tracemalloc.start()
    try:
        packed = bodies.pack(job)
    finally:
        tracemalloc.stop()
    assert held_bytes < 1.25 * len(packed)
