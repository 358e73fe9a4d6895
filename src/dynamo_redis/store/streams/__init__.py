"""Event streams on Redis Streams."""
