"""The process that tests and renders one model's chat templates: `python -m dynamo_redis.templates`.

A template is untrusted, and some operations cannot be interrupted by a sandbox. This process can be killed,
and holds only this model's templates.

The first job has the templates and the tokenizer's configuration; its answer tells whether they are usable.
Each further job has the arguments of one `CompiledTemplates.render`, as JSON. An empty job has no effect.
"""

from __future__ import annotations

import json

from dynamo_redis.errors import ModelError
from dynamo_redis.jobs.serving import serve
from dynamo_redis.templates.protocol import DONE, MASKED, PROCESS_MEMORY_BYTES, REFUSED, RENDER_LIMIT_S
from dynamo_redis.templates.rendering import CompiledTemplates


class Renderer:
    """Runs the jobs of one model."""

    def __init__(self) -> None:
        self._templates: CompiledTemplates | None = None

    def answer(self, job: bytearray) -> bytes:
        """Run a job; return `+` and the text, `=` with a mask and the masked text, or `-` and the reason why
        there is none."""
        if not job:
            return DONE
        try:
            arguments = json.loads(job)
            del job
            if self._templates is None:
                self._templates = CompiledTemplates(**arguments)
                return DONE
            prompt = self._templates.render(**arguments)
            return (MASKED if prompt.mask else DONE) + prompt.mask.encode() + prompt.encode()
        except ModelError as exc:
            reason = str(exc)
        except UnicodeEncodeError:
            reason = "the chat template writes half a character (a lone surrogate)"
        except MemoryError:
            reason = "the chat template needs more memory than there is"
        except Exception as exc:  # noqa: BLE001 - any failure is that of this job
            reason = f"the chat template failed: {type(exc).__name__}: {exc}"
        return REFUSED + reason.encode(errors="replace")


if __name__ == "__main__":
    serve(Renderer().answer, memory_bytes=PROCESS_MEMORY_BYTES, time_s=RENDER_LIMIT_S)
