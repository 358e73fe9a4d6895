"""The decoder, or the readers of contents, under a fuzzer that looks at coverage. The process never returns.

    python -m tests.fuzz.guided decoder|contents SECONDS SEED

Needs atheris (libFuzzer for Python), which has wheels for some platforms only; `make fuzz` installs it where
it can. The first byte of an input names the reader (the decoder has one), the next two say how the rest is
split.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Final

import atheris
import click

with (
    redirect_stdout(sys.stderr),
    atheris.instrument_imports(
        include=["dynamo_redis.wire", "dynamo_redis.planes.http.content", "dynamo_redis.planes.http.token"]
    ),
):
    from dynamo_redis.planes.http import content as _content  # noqa: F401 - as below
    from dynamo_redis.planes.http import token as _token  # noqa: F401 - as below
    from dynamo_redis.wire import decoder as _decoder  # noqa: F401 - imported to be instrumented
    from dynamo_redis.wire import tunnel as _tunnel  # noqa: F401 - as above

from tests.fuzz import contents, decoding
from tests.fuzz.streams import WELL_FORMED

MAX_INPUT_BYTES: Final = 4096
HEAD_BYTES: Final = 3
READERS: Final = list(contents.READINGS)

Check = Callable[[bytes, list[int]], object]


def check_of(part: str, number: int) -> tuple[str, Check]:
    """Return a check, and the text that calls it up to its other arguments."""
    if part == "decoder":
        return "decoding.check(", decoding.check
    name = READERS[number % len(READERS)]
    return f"contents.check({name!r}, ", partial(contents.check, name)


def seeds(part: str) -> list[bytes]:
    """Return inputs to begin with."""
    if part == "decoder":
        return [b"\0\x05\x30" + data for data in WELL_FORMED]
    return [
        bytes((number, 5, 0x30)) + bytes(seed)
        for number, name in enumerate(READERS)
        for seed in contents.READINGS[name].seeds
    ]


def shrunk(data: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """Shorten a failing input: pieces are taken out, large ones first."""
    size = len(data) // 2
    while size:
        for start in range(HEAD_BYTES, len(data), size):
            shorter = data[:start] + data[start + size :]
            if fails(shorter):
                data = shorter
                break
        else:
            size //= 2
    return data


class Target:
    """One part, as atheris calls it."""

    def __init__(self, part: str) -> None:
        self._part = part

    def fails(self, data: bytes) -> bool:
        """Return whether a check fails, or an error escapes from a reader."""
        if len(data) <= HEAD_BYTES:
            return False
        _, check = check_of(self._part, data[0])
        try:
            check(data[HEAD_BYTES:], [data[1] + 1, data[2] + 1])
        except Exception:  # noqa: BLE001 - any failure is one
            return True
        return False

    def __call__(self, data: bytes) -> None:
        """Check one input; end the process with 1 if that fails, with the shortest such input."""
        if self.fails(data):
            small = shrunk(data, self.fails)
            text, _ = check_of(self._part, small[0])
            sizes = [small[1] + 1, small[2] + 1]
            click.echo(f"\nfailed: {text}bytes.fromhex({small[HEAD_BYTES:].hex()!r}), {sizes})")
            os._exit(1)


def main(part: str, seconds: int, seed: int) -> None:
    """Fuzz for `seconds`. Exits with 1 after a failure."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(seeds(part)):
            (Path(corpus) / str(number)).write_bytes(data)
        options: list[Any] = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}"]
        atheris.Setup([sys.argv[0], corpus, *options], Target(part))
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
