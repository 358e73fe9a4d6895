"""The files by which a running `dynamo-redis up` is found, and where model files are kept."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import platformdirs


def user_model_cache() -> Path:
    """Where this user's frontends keep model files, unless `DYN_MODEL_CACHE` says otherwise."""
    return platformdirs.user_cache_path("dynamo-redis") / "models"


def runtime_directory() -> Path:
    """Where each `dynamo-redis up` leaves its addresses for this user's other commands."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that the system has no runtime directory: its fallback serves as well
        return platformdirs.user_runtime_path("dynamo-redis")


def running_deployments() -> list[dict[str, str]]:
    """The addresses of each `up` of this user that still runs, in the order in which they were started."""
    live: list[tuple[float, dict[str, object]]] = []
    for path in runtime_directory().glob("up.*.json"):
        try:
            content, status = json.loads(path.read_text()), path.stat()
            os.kill(int(content["pid"]), 0)
            if _is_ours(status.st_uid):
                live.append((status.st_mtime, content))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a file of a dead process, or one that just went away
    live.sort(key=lambda found: found[0])
    return [{name: value for name, value in content.items() if isinstance(value, str)} for _, content in live]


def read_runtime_file() -> dict[str, str]:
    """The addresses of the `up` that was started last and still runs; empty if none does."""
    running = running_deployments()
    return running[-1] if running else {}


def write_runtime_file(**addresses: str) -> None:
    """Say where this process's servers are, readable by this user only. Dead processes' files are removed."""
    directory = runtime_directory()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_stale_files(directory)
    path = _own_runtime_file()
    draft = path.with_suffix(".draft")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps({"pid": os.getpid(), **addresses}))
    draft.replace(path)


def remove_runtime_file() -> None:
    """Forget this process's addresses; those of another `up` stay."""
    _own_runtime_file().unlink(missing_ok=True)


def _is_ours(owner_id: int) -> bool:
    """Whether this user wrote the file: on a system without runtime directories it stands in `/tmp`."""
    return not hasattr(os, "getuid") or owner_id == os.getuid()


def _own_runtime_file() -> Path:
    return runtime_directory() / f"up.{os.getpid()}.json"


def _remove_stale_files(directory: Path) -> None:
    for path in directory.glob("up.*"):
        try:
            os.kill(int(path.name.split(".")[1]), 0)
        except (ProcessLookupError, ValueError, IndexError):
            path.unlink(missing_ok=True)
        except OSError:
            continue  # alive, but another user's
