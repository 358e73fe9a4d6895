"""The mock engine: an engine's timing and KV cache without a model."""
