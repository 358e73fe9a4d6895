"""The side of the process: it reads jobs from its standard input and writes answers to its standard output.

A frame is its size in 8 bytes, little-endian, and so many bytes. Answers come in the order of their jobs; one
job is worked on at a time. The process ends when its input does, so it does not outlive its parent: should
that be killed while a job runs, the job's limit of processor time ends the process.

Only the standard library is imported here, so that a process takes some 10 MB.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final

FRAME: Final = struct.Struct("<Q")

WALL_FACTOR: Final = 3
"""A process that the system gives no processor has so many times its limit of processor time."""

_STDIN: Final = 0
_STDOUT: Final = 1


def serve(answer: Callable[[bytearray], bytes], *, memory_bytes: int, time_s: float) -> None:
    """Answer jobs until the input ends.

    All jobs together have `memory_bytes` beside what the process holds already (address space, where the
    system counts it), and each has `time_s` of processor time, rounded up to whole seconds. A job that asks
    for more ends the process: by MemoryError if it is not caught, or by SIGXCPU.
    """
    _limit_memory(memory_bytes)
    used = FRAME.unpack
    while (head := _read(FRAME.size)) is not None:
        content = _read(used(head)[0])
        if content is None:
            return
        _limit_time(time_s)
        said = answer(content)
        signal.alarm(0)
        del content
        _write(FRAME.pack(len(said)))
        _write(said)


def _limit_memory(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # only Linux says how much there is, and keeps the limit
        with open("/proc/self/statm") as file:  # noqa: PTH123 - pathlib is not imported
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("1000")  # when the system itself has no memory left, this process goes first


def _limit_time(time_s: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ends_at = math.ceil(usage.ru_utime + usage.ru_stime + time_s)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(math.ceil(WALL_FACTOR * time_s) + 1)  # for one that sleeps, and has lost its parent
    resource.setrlimit(resource.RLIMIT_CPU, (ends_at, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _read(size: int) -> bytearray | None:
    """So many bytes, or None at the end of the input."""
    content = bytearray(size)
    view = memoryview(content)
    while view:
        count = os.readv(_STDIN, [view])
        if not count:
            return None
        view = view[count:]
    return content


def _write(content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(_STDOUT, view) :]
