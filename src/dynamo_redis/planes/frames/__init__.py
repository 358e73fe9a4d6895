"""Sessions of frames: streams of requests and answers over one connection, whatever carries its bytes.

The tcp plane has a socket below. The nats and redis planes have a tunnel through their broker.
"""
