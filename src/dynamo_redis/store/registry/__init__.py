"""The registry: leases, keys, the change log and watches."""
