"""The client of Redis: connections, scripts, errors of the server, health."""
