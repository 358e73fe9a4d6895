"""Discovery, leases, model files and request routing for distributed LLM serving, on one Redis."""

__version__ = "0.1.0"
