"""The program `dynamo-redis`: its commands by name, and the exit code of their errors."""

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
class LazyCommand:
    """A command before it is imported: its location (`module:attribute`) and its line in the help."""

    location: str
    summary: str


SECTIONS: dict[str, dict[str, LazyCommand]] = {
    "Run": {
        "up": LazyCommand("dynamo_redis.cli.up:up", "A Redis, a frontend and mock workers on this machine."),
        "frontend": LazyCommand("dynamo_redis.cli.frontend:frontend", "The OpenAI-compatible HTTP server."),
        "router": LazyCommand(
            "dynamo_redis.cli.router:router", "The KV-aware router as a service of its own."
        ),
        "worker": LazyCommand("dynamo_redis.cli.worker:worker", "A worker that serves a model."),
    },
    "Look into the registry": {
        "instances": LazyCommand(
            "dynamo_redis.cli.listings:instances", "The live processes and their endpoints."
        ),
        "models": LazyCommand(
            "dynamo_redis.cli.listings:models", "The served models and how many workers each has."
        ),
        "get": LazyCommand("dynamo_redis.cli.keys:get", "Print a key's value, or all keys under a prefix."),
        "put": LazyCommand("dynamo_redis.cli.keys:put", "Write a key."),
        "del": LazyCommand("dynamo_redis.cli.keys:delete", "Delete a key."),
        "watch": LazyCommand("dynamo_redis.cli.keys:watch", "Follow the changes under a prefix."),
    },
    "Instances": {
        "ping": LazyCommand("dynamo_redis.cli.services:ping", "Ask all instances for a sign of life."),
        "stats": LazyCommand(
            "dynamo_redis.cli.services:stats", "Requests, errors and times of each endpoint of each instance."
        ),
        "call": LazyCommand("dynamo_redis.cli.requests:call", "Send one request to an endpoint."),
        "bench": LazyCommand(
            "dynamo_redis.cli.requests:bench", "A short load on an endpoint, with percentiles."
        ),
        "token": LazyCommand(
            "dynamo_redis.cli.services:token", "A bearer token for an instance of the http plane."
        ),
    },
    "Routing": {
        "router-state": LazyCommand(
            "dynamo_redis.cli.router_state:router_state", "The state of each router."
        ),
        "best-worker": LazyCommand(
            "dynamo_redis.cli.best_worker:best_worker", "The worker that a prompt would go to, and the costs."
        ),
    },
    "Events": {
        "events": LazyCommand(
            "dynamo_redis.cli.events:events", "Event streams, their readers, and their lag."
        ),
    },
    "Objects": {
        "objects": LazyCommand(
            "dynamo_redis.cli.objects:objects", "List, store, fetch and remove files in Redis."
        ),
    },
    "Locks": {
        "lock": LazyCommand("dynamo_redis.cli.lock:lock", "Run a command while it holds a lock."),
    },
    "Redis": {
        "doctor": LazyCommand(
            "dynamo_redis.cli.doctor.command:doctor", "Check a Redis: its settings, rights, limits and speed."
        ),
        "backup": LazyCommand("dynamo_redis.cli.backup:backup", "Save records and objects to a file."),
        "restore": LazyCommand("dynamo_redis.cli.backup:restore", "Restore records and objects from a file."),
        "gc": LazyCommand("dynamo_redis.cli.gc:gc", "Find and remove what no process needs any more."),
        "acl": LazyCommand("dynamo_redis.cli.acl:acl", "Rules for users of Redis with the least rights."),
    },
    "Settings": {
        "settings": LazyCommand(
            "dynamo_redis.cli.settings:settings", "Every setting: its value and the source of the value."
        ),
    },
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the help."""
        return [name for section in SECTIONS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command. Return None for an unknown name."""
        for section in SECTIONS.values():
            if cmd_name in section:
                module, _, attribute = section[cmd_name].location.partition(":")
                command = getattr(import_module(module), attribute)
                assert isinstance(command, click.Command)
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, section by section, without importing them."""
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.summary) for name, entry in section.items()])


@click.group(
    PROGRAM,
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option can also be set by an environment variable or in a `.env` file: see "
    "`dynamo-redis settings`, and `dynamo-redis COMMAND --help`.",
)
@click.version_option(__version__, prog_name=PROGRAM)
def program() -> None:
    """Serve LLMs on many machines with one Redis: discovery, model files, request routing.

    \b
    Try it:       dynamo-redis up
    Then, in another terminal:
                  dynamo-redis instances
                  dynamo-redis watch v1/
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the program with these arguments (None: those of the process). Return the exit code."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        outcome = program.main(args, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except BaseException as exc:  # noqa: BLE001 - every error becomes a line and an exit code
        return failures.report(exc)
    return outcome if isinstance(outcome, int) else 0
