"""The commands of docs/moving-a-deployment.md, as they stand there, on a real deployment."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from pathlib import Path

import click
import pytest

from dynamo_redis.cli.app import program
from tests.integration.engines.conftest import Deployment
from tests.integration.engines.conftest import deployment as deployment
from tests.rendered_pages import ROOT, code_blocks

PAGE = Path(ROOT) / "docs" / "moving-a-deployment.md"
SERVICES = ("frontend", "worker")
"""Commands that run until they are stopped; other tests run them."""


def commands() -> list[list[str]]:
    """Return the words of each command of the page, behind `dynamo-redis`."""
    lines = [line for block in code_blocks(PAGE, "console") for line in block.splitlines()]
    words = [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]
    assert all(line[0] == "dynamo-redis" for line in words)
    return [line[1:] for line in words]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_options_of_each_command_exist(words: list[str]) -> None:
    command: click.Command = program
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(click.Context(command), name)
        assert found is not None, name
        command = found
    command.make_context(command.name, words).close()


async def test_commands_that_look_succeed(
    dynamo_redis_url: str, dynamo_redis_prefix: str, deployment: Deployment
) -> None:
    environment = {"DYN_REDIS_URL": dynamo_redis_url, "DYN_REDIS_PREFIX": dynamo_redis_prefix}
    async with deployment.worker():
        for words in commands():
            if words[0] in SERVICES:
                continue
            arguments = [dynamo_redis_url if word.startswith("redis://") else word for word in words]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "dynamo_redis", *arguments),
                env=os.environ | environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            async with asyncio.timeout(60):
                said, _ = await process.communicate()
            assert process.returncode == 0, said.decode()
            if words[0] == "models":
                assert b"demo" in said
