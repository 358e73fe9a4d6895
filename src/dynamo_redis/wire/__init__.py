"""Pure protocol: bytes to values and back. Knows no event loop, socket or server."""
