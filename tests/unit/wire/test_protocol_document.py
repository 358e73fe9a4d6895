"""docs/wire-protocol.md against the code: its example, its table of frames, its limits."""

from __future__ import annotations

import re
from pathlib import Path

from dynamo_redis.wire import codec, frame, handshake
from dynamo_redis.wire.decoder import FrameDecoder, ReadBuffers
from dynamo_redis.wire.handshake import ClientHandshake, MessageReader, ServerHandshake

DOCUMENT = (Path(__file__).parents[3] / "docs" / "wire-protocol.md").read_text()


def example(arrow: str) -> bytes:
    block = DOCUMENT.split("<!-- example", 1)[1].split("```")[1]
    lines = [line[2:60] for line in block.splitlines() if line.startswith(arrow)]
    return b"".join(bytes.fromhex(re.sub(r"\s{2,}.*", "", line)) for line in lines)


def test_the_server_understands_the_example() -> None:
    made = ServerHandshake(None, 100, 0x1A)
    _, rest = made.feed(memoryview(example("→")))
    assert made.done
    assert made.client is not None
    assert made.client.nonce == b"\xc1" * 32
    assert FrameDecoder(ReadBuffers(), 1000).feed(rest) == [
        [frame.OPEN, 1, "1a/dynamo/backend/generate", 0, None, {"n": 2}],
        [frame.OPEN, 2, "1a/d/b/g", 0, {"id": "r-1"}, None],
        [frame.CANCEL, 2, frame.Strength.STOP],
        [frame.PING, 0, 7],
    ]


def test_the_client_understands_the_example() -> None:
    made = ClientHandshake(None, 100, 0x1A)
    answer, rest = made.feed(memoryview(example("←")))
    assert made.server is not None
    assert made.server.nonce == b"\x5e" * 32
    assert MessageReader().feed(memoryview(answer))[0] == [b""]
    assert FrameDecoder(ReadBuffers(), 1000).feed(rest) == [
        [frame.LAST, 1, "hi"],
        [frame.BATCH, 2, ["a", "b"]],
        [frame.LAST, 2, "c"],
        [frame.PONG, 0, 7],
    ]


def test_the_table_lists_every_frame() -> None:
    listed = dict(re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", DOCUMENT, re.MULTILINE))
    assert {name: int(kind) for kind, name in listed.items()} == {
        name: getattr(frame, name) for name in listed.values()
    }
    assert set(listed) == {str(kind) for kind in range(1, 17)}


def test_the_limits_are_the_codes() -> None:
    assert f"frame {codec.MAX_FRAME_BYTES // 1024} KiB" in DOCUMENT
    assert f"headers {codec.MAX_HEADERS_BYTES // 1024} KiB" in DOCUMENT
    assert f"at most {codec.MAX_DEPTH} deep" in DOCUMENT
    assert f"of up to {codec.MAX_INLINE_BYTES // 1024} KiB" in DOCUMENT
    assert f"at most {handshake.MAX_MESSAGE_BYTES}." in DOCUMENT
    assert f"size div {frame.CREDIT_UNIT_BYTES}" in DOCUMENT
