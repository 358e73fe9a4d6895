"""grpc.aio: generic methods on bytes, unary and server streaming, on one channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from benchmarks.request.rivals.peer import STREAMS, Announce, Peer
from benchmarks.request.workloads import KINDS, Kind

OPTIONS: Final = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
SERVICE: Final = "bench.Echo"


async def _echo(request: bytes, _: Any) -> bytes:
    return request


def _streaming(kind: Kind) -> Any:
    items = STREAMS[kind]

    async def handler(request: bytes, _: Any) -> AsyncIterator[bytes]:
        async for item in items(int(request)):
            yield item

    return grpc.unary_stream_rpc_method_handler(handler)


async def serve(announce: Announce) -> None:
    """Serve the kinds as methods, without serializers."""
    server = grpc.aio.server(options=OPTIONS)
    handlers: dict[str, Any] = {
        kind: grpc.unary_unary_rpc_method_handler(_echo) if kind == "echo" else _streaming(kind)
        for kind in KINDS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(f"127.0.0.1:{port}")
    await asyncio.Event().wait()


class GrpcPeer(Peer):
    """One channel, as the documentation advises."""

    def __init__(self, channel: Any) -> None:
        self._echo = channel.unary_unary(f"/{SERVICE}/echo")
        self._streams: dict[Kind, Any] = {
            kind: channel.unary_stream(f"/{SERVICE}/{kind}") for kind in KINDS if kind != "echo"
        }

    async def echo(self, payload: bytes) -> Any:
        return await self._echo(payload)

    async def stream(self, kind: Kind, count: int) -> int:
        seen = 0
        async for _ in self._streams[kind](b"%d" % count):
            seen += 1
        return seen


async def connect(address: str) -> GrpcPeer:
    """Connect to the server."""
    channel = grpc.aio.insecure_channel(address, options=OPTIONS)
    await channel.channel_ready()
    return GrpcPeer(channel)
