"""The prefix index: the blocks of each worker's KV cache, from events, snapshots and dumps."""
