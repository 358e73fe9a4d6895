"""Opens connections to a server one after the other, and drops each at another stage.

Run as `tcp_flood.py PORT COUNT`. Prints `"done"` at the end.
"""

from __future__ import annotations

import itertools
import socket
import struct
import sys

from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake

SECRET = b"a secret of the instance, random"
RESET = struct.pack("ii", 1, 0)
OPEN = pack([frame.OPEN, 1, "small", 0, None, b"x" * 500])
FRAMES = {"proven": b"", "in a frame": OPEN[:-100], "asked": OPEN}
STAGES = ("nothing said", "hello begun", "hello said", *FRAMES)


def visit(port: int, stage: str, *, reset: bool) -> None:
    """Connect, go on to the stage, and hang up, by a RST if `reset`."""
    sock = socket.create_connection(("127.0.0.1", port))
    handshake = ClientHandshake(SECRET, 100, 7)
    hello = handshake.first_message()
    if stage == "hello begun":
        sock.sendall(hello[:10])
    elif stage != "nothing said":
        sock.sendall(hello)
    if stage in FRAMES:
        proof = b""
        while not handshake.server:
            proof, _ = handshake.feed(memoryview(sock.recv(4096)))
        sock.sendall(proof + FRAMES[stage])
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def main(port: int, count: int) -> None:
    ways = itertools.cycle(itertools.product(STAGES, (False, True)))
    for stage, reset in itertools.islice(ways, count):
        visit(port, stage, reset=reset)
    print('"done"', flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
