"""The request plane over a NATS server, for deployments that keep theirs."""
