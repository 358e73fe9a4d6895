"""The figures of a frontend: counts of requests, and the text of `/metrics`."""
