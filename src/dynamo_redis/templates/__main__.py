"""The process in which one model's chat templates are tried and rendered: `python -m dynamo_redis.templates`.

A template comes from a tenant, and there are operations that no sandbox can interrupt. Here they cost a
process that can be killed, and that holds nothing but this model's templates.

The first job is the templates and the tokenizer's configuration; the answer says whether they can be used.
Each further job holds the arguments of one `CompiledTemplates.render`, as JSON; an empty one does nothing.
"""

from __future__ import annotations

import json

from dynamo_redis.errors import ModelError
from dynamo_redis.jobs.serving import serve
from dynamo_redis.templates.protocol import DONE, PROCESS_MEMORY_BYTES, REFUSED, RENDER_LIMIT_S
from dynamo_redis.templates.rendering import CompiledTemplates


class Renderer:
    """Answers the jobs of one model."""

    def __init__(self) -> None:
        self._templates: CompiledTemplates | None = None

    def answer(self, job: bytearray) -> bytes:
        """`+` and the text, or `-` and why there is none."""
        if not job:
            return DONE
        try:
            arguments = json.loads(job)
            del job
            if self._templates is None:
                self._templates = CompiledTemplates(arguments["templates"], arguments["tokenizer_config"])
                return DONE
            return DONE + self._templates.render(**arguments).encode()
        except ModelError as exc:
            reason = str(exc)
        except UnicodeEncodeError:
            reason = "the chat template writes half a character (a lone surrogate)"
        except MemoryError:
            reason = "the chat template needs more memory than there is"
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is this job's
            reason = f"the chat template failed: {type(exc).__name__}: {exc}"
        return REFUSED + reason.encode(errors="replace")


if __name__ == "__main__":
    serve(Renderer().answer, memory_bytes=PROCESS_MEMORY_BYTES, time_s=RENDER_LIMIT_S)
