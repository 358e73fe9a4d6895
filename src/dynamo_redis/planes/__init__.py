"""Request planes: sockets around the wire protocol."""
