"""The status page of a frontend, live in a browser."""
