"""The engine's side of KV events: PUB and replay ROUTER sockets, as in vLLM's publisher."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgpack
import zmq
import zmq.asyncio

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


class KvEventServer:
    """One rank's publisher, on the event loop. `port` 0 stands for a free port."""

    def __init__(
        self,
        *,
        port: int = 0,
        replay_port: int | None = None,
        topic: str = "",
        dp_rank: int = 0,
        buffer_count: int = 10_000,
        high_water_mark: int = 100_000,
    ) -> None:
        """Without `replay_port` there is no replay socket."""
        self.next_sequence = 0
        self.replay_requests: list[int] = []
        self._topic = topic.encode()
        self._dp_rank = dp_rank
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_count)
        self._context = zmq.asyncio.Context()
        self._high_water_mark = high_water_mark
        self._pub = self._open_pub()
        self.port = _bind(self._pub, port)
        self.endpoint = f"tcp://127.0.0.1:{self.port}"
        self.replay_endpoint: str | None = None
        self.replay_port: int | None = None
        self._replays: asyncio.Task[None] | None = None
        if replay_port is not None:
            self._router = self._context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.SNDHWM, 0)
            self.replay_port = _bind(self._router, replay_port)
            self.replay_endpoint = f"tcp://127.0.0.1:{self.replay_port}"
            self._replays = asyncio.create_task(self._serve_replays())

    def publish(self, events: Sequence[Any], *, lose: bool = False) -> bytes:
        """Send a batch; return its payload.

        With `lose` it is numbered and kept for a replay, but not sent.
        """
        payload: bytes = msgpack.packb([time.time(), list(events), self._dp_rank])
        self.send(payload, lose=lose)
        return payload

    def send(self, payload: bytes, *, lose: bool = False) -> None:
        """Do as `publish`, with any payload."""
        sequence, self.next_sequence = self.next_sequence, self.next_sequence + 1
        self._buffer.append((sequence, payload))
        if not lose:
            self._pub.send_multipart([self._topic, sequence.to_bytes(8, "big"), payload], zmq.NOBLOCK)

    def hang_up(self) -> None:
        """Close all subscribers' connections."""
        self._pub.close(linger=0)

    def listen_again(self) -> None:
        """Start again after `hang_up`: the same engine, at the same port."""
        self._pub = self._open_pub()
        _bind(self._pub, self.port)

    async def stop_replays(self) -> None:
        """Let the replay socket accept requests and answer none from now on."""
        if self._replays is not None:
            self._replays.cancel()
            await asyncio.gather(self._replays, return_exceptions=True)

    async def aclose(self) -> None:
        """Close the sockets. Idempotent."""
        await self.stop_replays()
        if self._replays is not None:
            self._router.close(linger=0)
        self._pub.close(linger=0)
        self._context.term()

    def _open_pub(self) -> Any:
        pub = self._context.socket(zmq.PUB)
        pub.setsockopt(zmq.SNDHWM, self._high_water_mark)
        return pub

    async def _serve_replays(self) -> None:
        while True:
            client, _, first = await self._router.recv_multipart()
            first_sequence = int.from_bytes(first, "big")
            self.replay_requests.append(first_sequence)
            for sequence, payload in list(self._buffer):
                if sequence >= first_sequence:
                    await self._router.send_multipart([client, b"", sequence.to_bytes(8, "big"), payload])
            await self._router.send_multipart([client, b"", END_OF_REPLAY, b""])


def _bind(zmq_socket: Any, port: int) -> int:
    if port:
        deadline = time.monotonic() + 10
        while True:
            try:
                zmq_socket.bind(f"tcp://127.0.0.1:{port}")
            except zmq.ZMQError:  # the socket before closes a moment after its `close`
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
            else:
                return port
    return int(zmq_socket.bind_to_random_port("tcp://127.0.0.1"))


def block_stored(
    hashes: Sequence[int | bytes], parent: int | bytes | None, tokens: Sequence[int]
) -> dict[str, Any]:
    """Return the event as vLLM 0.33 sends it."""
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": list(tokens),
        "block_size": len(tokens) // len(hashes),
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }


def block_removed(hashes: Sequence[int | bytes]) -> dict[str, Any]:
    """Return the event as vLLM 0.33 sends it."""
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"}


ALL_CLEARED = {"type": "AllBlocksCleared"}


def neighbouring_ports() -> tuple[int, int]:
    """Return the first of two consecutive free ports."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port, port + 1
