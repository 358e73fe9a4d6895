"""Parsing and checking of bodies: small ones on the event loop, large ones in another process.

Parsing blocks the interpreter, and JSON can take twenty times its size in memory. So a body over
`INLINE_BYTES` is parsed by `body_process.py`, within limits of memory and time. Only its options and its
texts come back.
"""

from __future__ import annotations

import sys
from typing import Final

from dynamo_redis.frontend.http.bodies import Body, media_in, source_of, unpack
from dynamo_redis.frontend.http.body_process import READ_LIMIT_S
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.openai import read_body
from dynamo_redis.frontend.options import RequestBody
from dynamo_redis.jobs.lane import JobDied, JobError, JobOverrun, Lane

INLINE_BYTES: Final = 64 << 10
"""A body up to this size is parsed on the event loop: three milliseconds at worst, for many
small messages."""

LARGE_BYTES: Final = 1 << 20
"""Bodies over this size are parsed by a process of their own, so that smaller ones do not wait for them."""

MEMORY_FACTOR: Final = 4
"""Memory for parsing a body, in multiples of the largest body's size."""

IDLE_S: Final = 60.0
"""A process ends after this time without work."""

QUEUE_COUNT: Final = 1024
"""Most bodies that wait for one process."""


class BodyReader:
    """Parses bodies. Owns up to two processes, one of them for the largest bodies."""

    def __init__(self, max_body_bytes: int) -> None:
        self._memory_bytes = max(MEMORY_FACTOR * max_body_bytes, 64 << 20)
        self._medium = self._lane()
        self._large = self._lane()

    def _lane(self) -> Lane:
        return Lane(
            (sys.executable, "-P", "-m", "dynamo_redis.frontend.http.body_process", str(self._memory_bytes)),
            time_s=READ_LIMIT_S,
            idle_s=IDLE_S,
            queue_count=QUEUE_COUNT,
        )

    async def read(self, kind: type[RequestBody], content: list[bytearray]) -> Body:
        """Parse a body, which may be in pieces. Raises ApiError.

        A large body is never joined here: copying 40 MiB takes longer than a turn of the loop may. Its pieces
        are released on their way to the process: `content` is empty afterwards.
        """
        size = sum(map(len, content))
        if size <= INLINE_BYTES:
            body = read_body(kind, b"".join(content))
            options = body.options()
            media = media_in(options, body.media_places())
            return Body(options, source_of(options), body.notes(), media)
        lane = self._medium if size <= LARGE_BYTES else self._large
        try:
            reading = lane.run(kind.tag, *content)
            content.clear()
            answer = await reading
        except JobOverrun as exc:
            raise _too_complex(f"it takes over {READ_LIMIT_S:g} s to read") from exc
        except JobDied as exc:
            raise _too_complex(f"to read it takes over {self._memory_bytes} bytes of memory") from exc
        except JobError as exc:
            raise ApiError(
                503,
                f"Large requests cannot be read now: {exc}.",
                kind="service_unavailable_error",
                code="overloaded",
                retry_after_s=1.0,
            ) from exc
        return unpack(answer)

    async def aclose(self) -> None:
        """End the processes. Idempotent."""
        await self._medium.aclose()
        await self._large.aclose()


def _too_complex(reason: str) -> ApiError:
    return ApiError(413, f"The request body holds too many values: {reason}.", code="body_too_complex")
