"""A small model directory without a model: tokenizer, chat template and configuration for the mock engine.

Made by `tools/make_demo_model.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEMO_MODEL_NAME: Final = "demo"
DEMO_MODEL_PATH: Final = Path(__file__).resolve().parent
