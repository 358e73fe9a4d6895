"""Runs commands of the CLI in one process, each line of standard input one; ends with 1 if one failed."""

from __future__ import annotations

import shlex
import sys

from dynamo_redis.cli.app import run


def main() -> int:
    failed = 0
    for line in sys.stdin:
        code = run(shlex.split(line))
        if code:
            failed = 1
            print(f"{code}: {line.strip()}", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
