"""The process's side of jobs: reads jobs from its standard input and writes answers to its standard output.

A frame is a size in 8 bytes, little-endian, and that many bytes. The process does one job at a time, and
answers in the order of the jobs. It ends when its input ends, so it does not outlive its parent. If the
parent is killed while a job runs, the job's limit of processor time ends the process.

Only the standard library is imported here, so that a process needs about 10 MB.
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
"""Limit of a job's elapsed time, as a multiple of its processor time: the system may be busy."""

_STDIN: Final = 0
_STDOUT: Final = 1


def serve(answer: Callable[[bytearray], bytes], *, memory_bytes: int, time_s: float) -> None:
    """Answer jobs until the input ends.

    All jobs together may use `memory_bytes` more than the process has now (of address space, where the system
    limits it). Each may use `time_s` of processor time, rounded up to whole seconds. A job that uses more
    ends the process: by MemoryError if it is not caught, or by SIGXCPU.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # only Linux tells the present size and enforces the limit
        with open("/proc/self/statm") as file:  # noqa: PTH123 - pathlib is not imported
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("1000")  # when the system itself has no memory left, this process goes first
    while (head := _read(FRAME.size)) is not None:
        content = _read(FRAME.unpack(head)[0])
        if content is None:
            return
        usage = resource.getrusage(resource.RUSAGE_SELF)
        ends_at = math.ceil(usage.ru_utime + usage.ru_stime + time_s)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(WALL_FACTOR * time_s) + 1)  # for a job that sleeps after its parent has died
        resource.setrlimit(resource.RLIMIT_CPU, (ends_at, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        answered = answer(content)
        signal.alarm(0)
        del content
        _write(FRAME.pack(len(answered)))
        _write(answered)
        del answered


def _read(size: int) -> bytearray | None:
    """Read `size` bytes; return None at the end of the input."""
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
