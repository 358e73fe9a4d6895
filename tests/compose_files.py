"""Compose files, read and merged as Compose does with several `-f`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.native_containers import Container

_REPLACED_WHOLE = ("command", "entrypoint", "test")
"""Sequences that a later file replaces; other sequences are added up."""

PORTS = {"redis": [6379], "frontend": [8000]}
"""The ports on which the services of single.yml listen."""


LOOPBACK = {"DYN_HTTP_HOST": "127.0.0.1"}
"""Containers listen in a network of their own; the tests' processes only on this machine."""


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def merged(first: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of all files together. Later files count more."""
    found = dict(first)
    for other in others:
        for name, value in other.items():
            if name in found and isinstance(value, Mapping):
                found[name] = merged(found[name], value)
            elif name in found and isinstance(value, list) and name not in _REPLACED_WHOLE:
                found[name] = [*found[name], *value]
            else:
                found[name] = value
    return found


def check(content: Mapping[str, Any]) -> None:
    """Check a file against the Compose Specification. Raises an error of the parser. Skips without it."""
    spec = pytest.importorskip("compose_spec", reason="has no wheel for this platform")
    text = yaml.safe_dump(dict(content), width=10_000)
    spec.PyCompose.from_yaml(re.sub(r"\$\{\w+[^}]*\}", "/x", text)).validate()


def container(
    content: Mapping[str, Any],
    service: str,
    *,
    entrypoint: list[str],
    variables: Mapping[str, str],
    volumes: Path,
    ports: list[int] | None = None,
    host: str | None = None,
) -> Container:
    """Return one container of a service. Its volumes are directories below `volumes`."""
    found = content["services"][service]

    def interpolated(text: str) -> str:
        text = re.sub(r"\$\{(\w+)[^}]*\}", lambda name: variables[name[1]], text)
        return text.replace("$$", "$")

    start = found.get("entrypoint", [] if service.startswith(("redis", "sentinel")) else entrypoint)
    mounts = {}
    for volume in found.get("volumes", ()):
        source, target = interpolated(volume).split(":")[:2]
        mounts[target] = Path(source) if source.startswith("/") else volumes / source
        if source.startswith("."):
            mounts[target] = Path(__file__).parents[1] / "compose" / source
    for target in found.get("tmpfs", ()):
        mounts[target] = volumes / f"{host or service}{target.replace('/', '-')}"
    return Container(
        host=host or service,
        argv=[interpolated(word) for word in [*start, *found.get("command", ())]],
        env=LOOPBACK | {name: interpolated(str(text)) for name, text in found.get("environment", {}).items()},
        ports=ports if ports is not None else PORTS.get(service, ()),
        mounts=mounts,
        read_only=bool(found.get("read_only")),
    )


def service_of(content: Mapping[str, Any], host: str) -> str:
    """Return the service of a host: its own name, or that before the number of one of several containers."""
    return host if host in content["services"] else host.rpartition("-")[0]


def health_check(content: Mapping[str, Any], host: str) -> list[str]:
    """Return the command of the health check of a host's service."""
    kind, *test = content["services"][service_of(content, host)]["healthcheck"]["test"]
    words = [word.replace("$$", "$") for word in test]
    return ["sh", "-c", *words] if kind == "CMD-SHELL" else words
