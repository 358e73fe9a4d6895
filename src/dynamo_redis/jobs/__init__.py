"""Jobs in a separate process that may be killed."""
