"""An object that all clients of a process share, with a thread and an event loop of its own.

So it works from event loops and threads alike, and the keepalive thread does not depend on the application's
event loop.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Hashable
from concurrent.futures import CancelledError
from typing import Any, ClassVar, Final, Generic, Self, TypeVar, cast

from dynamo_redis.store.redis.server_errors import RouteError

_STOP_TIMEOUT_S: Final = 1.0
_CLOSED: Final = "the connection to Redis has been closed"

Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)


class OwnThread(ABC, Generic[Key]):
    """Base of an object that is shared by a key, such as a URL. It is made by `shared`; each user releases it
    once.

    The thread is started at the first use, and ends with the last `release`.
    """

    _open: ClassVar[dict[tuple[type, Hashable], OwnThread[Any]]] = {}
    _open_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, key: Key) -> None:
        super().__init__()
        self._key = key
        self._users_count = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def shared(cls, key: Key) -> Self:
        """Return this process's object of a key. Each caller releases it once."""
        with cls._open_lock:
            found = cast("Self", cls._open.get((cls, key)) or cls._open.setdefault((cls, key), cls(key)))
            found._users_count += 1
            return found

    def release(self) -> None:
        """End one client's use. Never waits."""
        with self._open_lock:
            self._users_count -= 1
            if self._users_count:
                return
            self._open.pop((type(self), self._key), None)
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)

    @property
    @abstractmethod
    def thread_name(self) -> str:
        """The name of the thread."""

    @abstractmethod
    async def _keep(self) -> None:
        """Do the thread's own work until it is cancelled, at the end."""

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run work in the thread, for a task of another event loop. Cancelling it is safe.

        Raises RouteError if the last user has released this object.
        """
        running = asyncio.run_coroutine_threadsafe(work, self._running_loop(work))
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if running.cancelled() and task is not None and not task.cancelling():
                raise RouteError(_CLOSED) from None  # by `release`, not by the caller
            raise

    def run_in_thread(self, work: Coroutine[Any, Any, Result], timeout_s: float) -> Result:
        """As `run`, for a thread. Raises TimeoutError, too."""
        running = asyncio.run_coroutine_threadsafe(work, self._running_loop(work))
        try:
            return running.result(timeout_s)
        except (TimeoutError, CancelledError) as exc:
            running.cancel()
            raise TimeoutError from exc

    def _running_loop(self, work: Coroutine[Any, Any, Any]) -> asyncio.AbstractEventLoop:
        """Return the event loop of the thread, which is started at the first call."""
        with self._open_lock:
            if not self._users_count:
                work.close()
                raise RouteError(_CLOSED)
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._run, args=(self._loop,), name=self.thread_name, daemon=True
                ).start()
            return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            keeping = loop.create_task(self._keep())
            loop.run_forever()
            tasks = {keeping} | asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks, timeout=_STOP_TIMEOUT_S))
            loop.run_until_complete(asyncio.sleep(0))  # the sockets of dropped connections are closed now
        finally:
            loop.close()
