"""Queries about other processes, each of which may end between two of a test's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psutil

PROGRAMS: Final = Path(__file__).parent / "programs"
"""The programs that tests run as processes of their own."""


def is_alive(process: psutil.Process) -> bool:
    """Return whether it runs: a zombie, which only waits to be collected, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_line(process: psutil.Process) -> list[str]:
    """Return its program and arguments; empty once it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def program_name(process: psutil.Process) -> str:
    """Return the file name of its program; empty once it has ended."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""
