"""The decoder under a fuzzer that looks at coverage, in a process of its own: it never returns.

    python -m tests.fuzz.guided SECONDS SEED

Needs atheris (libFuzzer for Python), which has wheels for some platforms only; `make fuzz` installs it where
it can. The first two bytes of an input say how the rest is split.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

import atheris
import click

with redirect_stdout(sys.stderr), atheris.instrument_imports(include=["dynamo_redis.wire"]):
    from dynamo_redis.wire import decoder as _decoder  # noqa: F401 - imported to be instrumented

from tests.fuzz.decoding import check
from tests.fuzz.streams import WELL_FORMED

MAX_INPUT_BYTES: Final = 4096


def try_bytes(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any error that escapes from the decoder."""
    if len(data) > 2:
        check(data[2:], [data[0] + 1, data[1] + 1])


def shrunk(data: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """Shorten a failing input: pieces are taken out, large ones first."""
    size = len(data) // 2
    while size:
        for start in range(2, len(data), size):
            shorter = data[:start] + data[start + size :]
            if fails(shorter):
                data = shorter
                break
        else:
            size //= 2
    return data


def _fails(data: bytes) -> bool:
    try:
        try_bytes(data)
    except Exception:  # noqa: BLE001 - any failure is one
        return True
    return False


def _one_input(data: bytes) -> None:
    if _fails(data):
        small = shrunk(data, _fails)
        sizes = [small[0] + 1, small[1] + 1]
        click.echo(f"\nfailed: decoding.check(bytes.fromhex({small[2:].hex()!r}), {sizes})")
        os._exit(1)


def main(seconds: int, seed: int) -> None:
    """Fuzz for `seconds`. Exits with 1 after a failure."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(WELL_FORMED):
            (Path(corpus) / str(number)).write_bytes(b"\x05\x30" + data)
        options: list[Any] = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}"]
        atheris.Setup([sys.argv[0], corpus, *options], _one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
