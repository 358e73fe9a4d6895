"""Chat templates: a conversation → the text of a prompt, as `transformers` renders it, in another process.

A template comes with a model's files and is not trusted. It runs in a process of its own model, with limits
of memory and time, which is killed at them; see `templates/__main__.py`. A bad template fails the chats of
its own model, and no others.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
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
from dynamo_redis.templates.protocol import (
    DONE,
    MASK_BYTES,
    MASKED,
    RENDER_LIMIT_S,
    MaskedText,
    to_json,
)

LARGE_JOB_BYTES: Final = 64 << 10
"""A conversation over this size is rendered in another process, so that smaller ones do not wait for it."""

IDLE_S: Final = 300.0
"""Seconds without a chat after which a process ends; the next chat starts another one."""

QUEUE_COUNT: Final = 1024
"""The most conversations of one model that wait to be rendered; an eighth of it for large ones."""

_AHEAD_COUNT: Final = 16

_COMMAND: Final = (sys.executable, "-P", "-m", "dynamo_redis.templates")


class ChatTemplate:
    """The chat templates of one model. Owns up to two processes, one of them for large conversations."""

    def __init__(
        self,
        templates: Mapping[str, str],
        tokenizer_config: Mapping[str, Any],
        special_names: Iterable[str] = (),
    ) -> None:
        """Take the templates, without compiling them: see `open` and `check`.

        `templates` maps names to Jinja source. `default` is used, and with tools `tool_use`, if there is one.
        Special tokens (`bos_token`, …) come from `tokenizer_config`, as strings or as token objects.
        `special_names` are the names of all special tokens, which clients' texts may not write.
        """
        self._setup = to_json(
            {
                "templates": dict(templates),
                "tokenizer_config": dict(tokenizer_config),
                "special_names": list(special_names),
            }
        )
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
        """True if a process of these templates runs, or is about to start."""
        return self._small.is_running or self._large.is_running

    @property
    def job_count(self) -> int:
        """The number of conversations that wait or are being rendered."""
        return self._small.job_count + self._large.job_count

    async def open(self) -> None:
        """Start the process and let it compile and try the templates.

        Raises ModelError if a template does not compile or does not end, or if there is no default;
        Overloaded if no process can be started.
        """
        try:
            await self._small.run(b"")
        except JobError as exc:
            raise _setup_error(exc) from exc

    def check(self) -> None:
        """Compile and try the templates in a process of its own. Blocks. Raises as `open` does."""
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

    async def render(self, conversation: bytes | bytearray) -> bytearray | MaskedText:
        """Render a job of `render_job`; return the prompt's text in UTF-8. It is masked if a client wrote the
        name of a special token.

        Raises TemplateError if the template refuses the conversation, with its own message, or fails, and
        Overloaded.
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
        kind = bytes(answer[:1])
        del answer[:1]
        if kind == DONE:
            return answer
        if kind == MASKED:
            mask = answer[:MASK_BYTES].decode()
            del answer[:MASK_BYTES]
            return MaskedText(answer, mask)
        raise TemplateError(answer.decode())

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
