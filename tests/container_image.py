"""Reads the Dockerfile."""

from __future__ import annotations

import json
import re


def entrypoint_of(dockerfile: str) -> list[str]:
    """Return the program that the image runs, with its first arguments."""
    found = re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    assert found
    command: list[str] = json.loads(found[1])
    return command
