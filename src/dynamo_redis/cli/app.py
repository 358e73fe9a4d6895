"""The program: its commands by name, and what becomes of their errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import click

from dynamo_redis import __version__
from dynamo_redis.cli import failures

PROGRAM = "dynamo-redis"


@dataclass(frozen=True, slots=True)
class Entry:
    """A command before it is imported: where it stands (`module:attribute`), and its line in the help."""

    location: str
    summary: str


SECTIONS: dict[str, dict[str, Entry]] = {
    "Run": {
        "up": Entry("dynamo_redis.cli.up:up", "A Redis, a frontend and mock workers on this machine."),
        "frontend": Entry("dynamo_redis.cli.frontend:frontend", "The OpenAI-compatible HTTP server."),
        "router": Entry("dynamo_redis.cli.router:router", "The KV-aware router as a service of its own."),
        "worker": Entry("dynamo_redis.cli.worker:worker", "A worker that serves a model."),
    },
    "Look into the registry": {
        "instances": Entry("dynamo_redis.cli.listings:instances", "Who serves which endpoint."),
        "models": Entry("dynamo_redis.cli.listings:models", "Which models are served, and by how many."),
        "get": Entry("dynamo_redis.cli.keys:get", "A key's value, or all keys under a prefix."),
        "put": Entry("dynamo_redis.cli.keys:put", "Write a key."),
        "del": Entry("dynamo_redis.cli.keys:delete", "Delete a key."),
        "watch": Entry("dynamo_redis.cli.keys:watch", "Follow the changes under a prefix."),
    },
    "Routing": {
        "router-state": Entry("dynamo_redis.cli.router_state:router_state", "How each router is."),
        "best-worker": Entry(
            "dynamo_redis.cli.best_worker:best_worker", "Which worker a prompt would go to, and why."
        ),
    },
    "Events": {
        "events": Entry("dynamo_redis.cli.events:events", "Event streams, who reads them, and how far."),
    },
    "Objects": {
        "objects": Entry("dynamo_redis.cli.objects:objects", "List, store, fetch and remove files in Redis."),
    },
    "Locks": {
        "lock": Entry("dynamo_redis.cli.lock:lock", "Run a command while nobody else has a lock."),
    },
    "Settings": {
        "settings": Entry(
            "dynamo_redis.cli.settings:settings", "Every setting: its value now, and from where."
        ),
    },
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the help."""
        return [name for section in SECTIONS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is none of that name."""
        for section in SECTIONS.values():
            if cmd_name in section:
                module, _, attribute = section[cmd_name].location.partition(":")
                command = getattr(import_module(module), attribute)
                assert isinstance(command, click.Command)
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands, section by section, without importing any."""
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.summary) for name, entry in section.items()])


@click.group(
    PROGRAM,
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option can be set by an environment variable or in a `.env` file, too: see "
    "`dynamo-redis settings`, and `dynamo-redis COMMAND --help`.",
)
@click.version_option(__version__, prog_name=PROGRAM)
def program() -> None:
    """Serve LLMs on many machines with one Redis: discovery, model files, request routing.

    \b
    Try it:       dynamo-redis up
    Then, beside: dynamo-redis instances
                  dynamo-redis watch v1/
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the program with these arguments (None: those of the process). Answers the exit code."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        outcome = program.main(args, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except BaseException as exc:  # noqa: BLE001 - the program's last line of defence
        return failures.report(exc)
    return outcome if isinstance(outcome, int) else 0
