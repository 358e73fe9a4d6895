"""Chat templates: a conversation → the text of a prompt, as `transformers` renders it, in another process.

A template comes with a model's files. Whatever it does, it does in a process that holds nothing else, has
limits of memory and of time, and is killed at them; see `templates/__main__.py`. So it costs its own model's
chats, and no one else's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

from dynamo_redis.errors import ModelError, Overloaded, TemplateError
from dynamo_redis.jobs.lane import (
    FirstJobRefused,
    JobDied,
    JobError,
    JobOverrun,
    Lane,
    NoProcess,
    QueueFull,
    job_environment,
)
from dynamo_redis.jobs.serving import FRAME
from dynamo_redis.templates.protocol import DONE, RENDER_LIMIT_S, to_json

LARGE_JOB_BYTES: Final = 64 << 10
"""A conversation over this size is rendered apart from the others, so that these need not wait for it."""

IDLE_S: Final = 300.0
"""A process that has rendered nothing for so long ends, and another one starts with the next chat."""

QUEUE_COUNT: Final = 1024
"""Most conversations of one model that wait to be rendered; large ones: an eighth of them."""

_AHEAD_COUNT: Final = 16

_COMMAND: Final = (sys.executable, "-P", "-m", "dynamo_redis.templates")


class ChatTemplate:
    """The chat templates of one model. Owns up to two processes, one of them for large conversations."""

    def __init__(self, templates: Mapping[str, str], tokenizer_config: Mapping[str, Any]) -> None:
        """`templates` maps names to Jinja source; `default` is used, and `tool_use` (if any) with tools.
        Special tokens (`bos_token`, …) come from `tokenizer_config`, as strings or as token objects.

        Nothing is tried yet: see `open` and `check`.
        """
        self._setup = to_json({"templates": dict(templates), "tokenizer_config": dict(tokenizer_config)})
        self._small = self._lane(QUEUE_COUNT, _AHEAD_COUNT)
        self._large = self._lane(QUEUE_COUNT // 8, 1)

    def _lane(self, queue_count: int, ahead_count: int) -> Lane:
        return Lane(
            _COMMAND,
            time_s=RENDER_LIMIT_S,
            idle_s=IDLE_S,
            queue_count=queue_count,
            ahead_count=ahead_count,
            first_job=self._setup,
            check_first=_check_setup,
        )

    @property
    def has_process(self) -> bool:
        """Whether a process of its own is there, or about to be."""
        return self._small.is_running or self._large.is_running

    @property
    def job_count(self) -> int:
        """The number of conversations that wait or are being rendered."""
        return self._small.job_count + self._large.job_count

    async def open(self) -> None:
        """Start the process and let it try the templates.

        Raises ModelError for templates that do not compile or do not end, or have no default, and Overloaded
        where no process can be started.
        """
        try:
            await self._small.run(b"")
        except JobError as exc:
            raise _setup_error(exc) from exc

    def check(self) -> None:
        """Let a process try the templates; blocks until it has. Raises as `open` does."""
        frame = FRAME.pack(len(self._setup)) + self._setup
        limit_s = 3 * RENDER_LIMIT_S
        try:
            run = subprocess.run(  # noqa: S603 - a module of this package
                _COMMAND,
                input=frame,
                capture_output=True,
                timeout=limit_s,
                check=False,
                env=job_environment(),
            )
            if not run.stdout:
                raise JobDied(f"its process ended with {run.returncode}")
            _check_setup(bytearray(run.stdout[FRAME.size :]))
        except subprocess.TimeoutExpired as exc:
            raise _setup_error(JobOverrun()) from exc
        except OSError as exc:
            raise _setup_error(NoProcess(exc.strerror or str(exc))) from exc
        except JobError as exc:
            raise _setup_error(exc) from exc

    async def render(self, conversation: bytes | bytearray) -> bytearray:
        """The prompt's text, in UTF-8, of what `render_job` made.

        Raises TemplateError, with the template's own message, for what it refuses, and Overloaded.
        """
        lane = self._small if len(conversation) <= LARGE_JOB_BYTES else self._large
        try:
            answer = await lane.run(conversation)
        except JobOverrun as exc:
            raise TemplateError("the chat template ran for too long") from exc
        except JobDied as exc:
            raise TemplateError("the chat template takes more memory than it may") from exc
        except (NoProcess, QueueFull) as exc:
            raise Overloaded(f"chat templates cannot be rendered now: {exc}") from exc
        except JobError as exc:
            raise TemplateError(str(exc)) from exc
        is_done = answer.startswith(DONE)
        del answer[:1]
        if not is_done:
            raise TemplateError(answer.decode())
        return answer

    async def aclose(self) -> None:
        """End the processes. Idempotent."""
        await self._small.aclose()
        await self._large.aclose()


def _check_setup(answer: bytearray) -> None:
    if not answer.startswith(DONE):
        raise FirstJobRefused(answer[1:].decode())


def _setup_error(exc: JobError) -> Exception:
    match exc:
        case NoProcess() | QueueFull():
            return Overloaded(f"no process can be started for chat templates: {exc}")
        case JobOverrun():
            return ModelError("a chat template does not end on a short message: it ran for too long")
        case JobDied():
            return ModelError(
                "a chat template does not end on a short message: it takes more memory than it may, "
                f"or nests too deeply ({exc})"
            )
    return ModelError(str(exc))
