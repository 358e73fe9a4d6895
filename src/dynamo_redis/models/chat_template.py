"""Chat templates: a conversation → the text of a prompt, as `transformers` renders it.

A template comes with a model's files and is not trusted. It runs in a process of its own model, with limits
of memory and time, which is killed at them; see `templates/__main__.py`. A bad template fails the chats of
its own model, and no others.

Most templates are quick (`templates/quick.py`): their work is in proportion to the conversation. These render
small conversations here, within tight limits. That saves the way to the process and back, which costs more
than the rendering. A rendering that exceeds the limits is done again in the process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
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
    RenderLimits,
    to_json,
)
from dynamo_redis.templates.quick import is_quick
from dynamo_redis.templates.rendering import CompiledTemplates
from dynamo_redis.templates.sandbox import Runaway

log = logging.getLogger(__name__)

LARGE_JOB_BYTES: Final = 64 << 10
"""A conversation over this size is rendered in another process, so that smaller ones do not wait for it."""

IDLE_S: Final = 300.0
"""Seconds without a chat after which a process ends; the next chat starts another one."""

QUEUE_COUNT: Final = 1024
"""The most conversations of one model that wait to be rendered; an eighth of it for large ones."""

_AHEAD_COUNT: Final = 16

HERE_BYTES: Final = 32 << 10
"""The largest conversation that a quick template renders on the event loop."""

HERE_MESSAGE_COUNT: Final = 64
"""The most messages of such a conversation: each takes some 10 to 30 µs."""

HERE_LIMIT_S: Final = 0.05
HERE_LIMITS: Final = RenderLimits(HERE_LIMIT_S, 2 << 20)
"""The limits of a rendering on the event loop. The time is far above what one takes, since the
machine may be busy."""

MOST_OVERRUNS: Final = 8
"""Renderings that take too long after which a template renders in its process only."""

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
        self._here: CompiledTemplates | None = None
        self._overrun_count = 0
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
    def renders_here(self) -> bool:
        """True if small conversations are rendered in this process."""
        return self._here is not None

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
        if self._here is None and not self._overrun_count:
            self._here = await asyncio.to_thread(self._compile_here)

    def _compile_here(self) -> CompiledTemplates | None:
        """Compile the templates if all are quick. Blocks."""
        setup = json.loads(self._setup)
        if not all(map(is_quick, setup["templates"].values())):
            return None
        try:
            return CompiledTemplates(**setup, limits=HERE_LIMITS)
        except ModelError:  # the process took it: this one was held up for longer than a trial may take
            return None

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
        if self._here is not None and len(conversation) <= HERE_BYTES:
            text = self._render_here(self._here, conversation)
            if text is not None:
                return text
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

    def _render_here(
        self, templates: CompiledTemplates, conversation: bytes | bytearray
    ) -> bytearray | MaskedText | None:
        """Render a conversation in this process; None if that is left to the other one.

        A template is held to the processor's time that it took: the machine may be busy, and a long
        conversation may need more memory than it has here.
        """
        started_s = time.thread_time()
        try:
            arguments = json.loads(conversation)
            if len(arguments["messages"]) > HERE_MESSAGE_COUNT:
                return None
            prompt = templates.render(**arguments)
            text = bytearray(prompt.encode())
            return MaskedText(text, prompt.mask) if prompt.mask else text
        except Runaway:
            self._overrun_count += time.thread_time() - started_s > HERE_LIMITS.time_s / 2
            if self._overrun_count >= MOST_OVERRUNS:
                self._here = None
        except TemplateError:
            raise
        except Exception as exc:  # noqa: BLE001 - the process finds the words for it
            log.debug("a conversation could not be rendered here: %r", exc)
        return None

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
