"""The figures of a frontend: what is counted of each request, and the text of `/metrics`."""
