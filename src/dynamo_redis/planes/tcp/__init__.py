"""The request plane over TCP: multiplexed streams of msgpack frames."""
