"""The request plane over the deployment's Redis, for callers that cannot dial the workers."""
