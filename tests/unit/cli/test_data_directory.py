from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_redis.cli.data_directory import data_directory, remove_abandoned
from dynamo_redis.cli.failures import CommandFailed


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the parent of temporary directories. Its path is short, since that of a unix socket must be."""
    with tempfile.TemporaryDirectory(prefix="dr-") as path:
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)


def test_a_temporary_directory_ends_with_its_use(temporary: Path) -> None:
    with data_directory(None) as directory:
        assert directory.parent == temporary
        (directory / "data").touch()
    assert list(temporary.iterdir()) == []


def test_a_directory_that_was_chosen_stays_and_is_held(tmp_path: Path) -> None:
    with (
        data_directory(tmp_path / "data"),
        pytest.raises(CommandFailed, match="in use by another"),
        data_directory(tmp_path / "data"),
    ):
        pass
    with data_directory(tmp_path / "data"):
        pass
    assert (tmp_path / "data").is_dir()


def test_locked_directory_is_not_abandoned(temporary: Path) -> None:
    with data_directory(None) as directory:
        remove_abandoned(temporary)
        with data_directory(None):
            assert directory.is_dir()


def test_directory_of_running_server_is_not_abandoned(temporary: Path) -> None:
    directory = temporary / "dynamo-redis-up-x"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "redis.sock"))
        server.listen()
        remove_abandoned(temporary)
        assert directory.is_dir()
    remove_abandoned(temporary)
    assert not directory.exists()


def test_nothing_else_is_removed(temporary: Path, tmp_path: Path) -> None:
    (temporary / "dynamo-redis-up-link").symlink_to(tmp_path)
    (temporary / "dynamo-redis-up-file").touch()
    (temporary / "other").mkdir()
    remove_abandoned(temporary)
    assert {path.name for path in temporary.iterdir()} == {
        "dynamo-redis-up-link",
        "dynamo-redis-up-file",
        "other",
    }
    assert tmp_path.is_dir()
