"""The object store: model files in chunks."""
