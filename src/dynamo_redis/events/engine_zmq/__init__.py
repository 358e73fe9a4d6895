"""The KV events that engines publish at ZMQ sockets, in the form of vLLM."""
