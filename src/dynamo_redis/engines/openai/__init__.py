"""A worker for an OpenAI-compatible engine: vLLM, SGLang, llama.cpp server."""
