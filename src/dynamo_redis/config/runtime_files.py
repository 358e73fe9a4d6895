"""The files by which commands find a running `dynamo-redis up`, and the directory of model files."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import platformdirs


def user_model_cache() -> Path:
    """Return the directory of this user's model files, used unless `DYN_MODEL_CACHE` names another."""
    return platformdirs.user_cache_path("dynamo-redis") / "models"


def runtime_directory() -> Path:
    """Return the directory in which each `dynamo-redis up` writes its addresses for the user's commands."""
    with warnings.catch_warnings():
        # The warning says that the system has no runtime directory: the library's fallback will do.
        warnings.simplefilter("ignore")
        return platformdirs.user_runtime_path("dynamo-redis")


def running_deployments() -> list[dict[str, str]]:
    """Return the addresses of each `up` of this user that still runs, in the order of their start."""
    live: list[tuple[float, dict[str, object]]] = []
    for path in runtime_directory().glob("up.*.json"):
        try:
            content, status = json.loads(path.read_text()), path.stat()
            os.kill(int(content["pid"]), 0)
            # On a system without runtime directories the file is in `/tmp`, where any user may write.
            if not hasattr(os, "getuid") or status.st_uid == os.getuid():
                live.append((status.st_mtime, content))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the file of a dead process, or one that was just removed
    live.sort(key=lambda found: found[0])
    return [{name: value for name, value in content.items() if isinstance(value, str)} for _, content in live]


def read_runtime_file() -> dict[str, str]:
    """Return the addresses of the running `up` that was started last; empty if none runs."""
    running = running_deployments()
    return running[-1] if running else {}


def write_runtime_file(**addresses: str) -> None:
    """Write this process's addresses, readable by this user only. Removes the files of dead processes."""
    directory = runtime_directory()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for stale in directory.glob("up.*"):
        try:
            os.kill(int(stale.name.split(".")[1]), 0)
        except (ProcessLookupError, ValueError, IndexError):
            stale.unlink(missing_ok=True)
        except OSError:
            continue  # a live process of another user
    path = _own_runtime_file()
    draft = path.with_suffix(".draft")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps({"pid": os.getpid(), **addresses}))
    draft.replace(path)


def remove_runtime_file() -> None:
    """Remove this process's addresses. Those of another `up` stay."""
    _own_runtime_file().unlink(missing_ok=True)


def _own_runtime_file() -> Path:
    return runtime_directory() / f"up.{os.getpid()}.json"
