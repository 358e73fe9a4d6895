"""Redis Cluster and Valkey Cluster: which node serves a key, and the connections to it."""
