"""The floor of row E4: PINGs to the server of `DYN_REDIS_URL` on a plain socket, from `begin` to `end`.

Prints `ready`, then `begun`, and at the end the 99th percentile of the round trips, in ms.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time

PAUSE_S = 0.001


def measure(connection: socket.socket) -> float:
    """Send PINGs until there is a line on standard input. Returns the 99th percentile of their round trips,
    in ms."""
    took: list[float] = []
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        began = time.perf_counter()
        connection.sendall(b"PING\r\n")
        connection.recv(64)
        took.append(time.perf_counter() - began)
    sys.stdin.readline()
    took.sort()
    return 1e3 * took[len(took) * 99 // 100]


def main() -> None:
    """Answer the suite's lines until the input ends."""
    host, _, port = os.environ["DYN_REDIS_URL"].rpartition("/")[2].rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print("ready", flush=True)
        while sys.stdin.readline():
            print("begun", flush=True)
            print(measure(connection), flush=True)


if __name__ == "__main__":
    main()
