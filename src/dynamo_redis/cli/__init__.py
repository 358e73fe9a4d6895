"""The command line. It composes the other packages; a command's module is imported when the command runs."""

from __future__ import annotations


def main() -> None:
    """Run the program `dynamo-redis` and exit with its code."""
    from dynamo_redis.cli import collection

    collection.suspend()
    from dynamo_redis.cli.app import run

    raise SystemExit(run())
