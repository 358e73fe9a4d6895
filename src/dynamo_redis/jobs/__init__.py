"""Work that is done in a process of its own, one that may be killed."""
