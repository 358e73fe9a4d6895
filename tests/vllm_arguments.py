"""The flags of `vllm serve` that our deployments use, and the fields of its KV events, as documented.

https://docs.vllm.ai/en/latest/configuration/serve_args.html; `KVEventsConfig` in `vllm/config/kv_events.py`.
"""

from __future__ import annotations

from typing import Any

OPTIONS = {"--host", "--port", "--served-model-name", "--kv-events-config", "--max-model-len"}
SWITCHES = {"--enable-prefix-caching", "--enable-prompt-tokens-details"}
KV_EVENT_FIELDS = {
    "enable_kv_cache_events",
    "publisher",
    "endpoint",
    "replay_endpoint",
    "buffer_steps",
    "hwm",
    "max_queue_size",
    "topic",
}


def check_kv_events(config: dict[str, Any], *, host: str, events: str, replay: str) -> None:
    """Check that vLLM publishes its events, and that the worker's two settings name the places."""
    assert config.keys() <= KV_EVENT_FIELDS
    assert config["enable_kv_cache_events"] is True
    assert config["publisher"] == "zmq"
    assert "*" in config["endpoint"], "at an address without it vLLM connects, and does not listen"
    assert config["endpoint"].replace("*", host) == events
    assert config["replay_endpoint"].replace("*", host) == replay
