"""The tests' own helpers, for processes that end meanwhile."""

from __future__ import annotations

import subprocess
import sys

import psutil

from tests.processes import command_line, is_alive, program_name


def test_ended_processes_raise_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen = psutil.Process(child.pid)
    assert is_alive(seen)
    child.kill()
    while is_alive(seen):
        pass
    assert command_line(seen) == []  # a zombie: not yet collected
    child.communicate()
    assert not is_alive(seen)
    assert (command_line(seen), program_name(seen)) == ([], "")
