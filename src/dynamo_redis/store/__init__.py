"""Redis behind Protocols: the registry and the object store. The only importer of redis."""
