"""Reading of engines' metrics pages; the lines are in the form that each engine writes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dynamo_redis.engines.openai.metrics import EngineMetrics, RankMetrics, read_metrics

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="Qwen/Qwen3-8B"} 3.0
vllm:num_requests_running{engine="1",model_name="Qwen/Qwen3-8B"} 1.0
vllm:num_requests_waiting{engine="0",model_name="Qwen/Qwen3-8B"} 2.0
vllm:num_requests_waiting{engine="1",model_name="Qwen/Qwen3-8B"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="Qwen/Qwen3-8B"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="Qwen/Qwen3-8B"} 5e-1
vllm:prefix_cache_queries_total{engine="0",model_name="Qwen/Qwen3-8B"} 400.0
vllm:prefix_cache_hits_total{engine="0",model_name="Qwen/Qwen3-8B"} 100.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="27420",x="a\\"b"} 1.0
"""

OLD_VLLM = """\
vllm:num_requests_running{model_name="m"} 1.0
vllm:num_requests_waiting{model_name="m"} 0.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.125
"""

SGLANG = """\
sglang:num_running_reqs{engine_type="unified",model_name="m",tp_rank="0"} 4.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",tp_rank="0"} 1.0
sglang:token_usage{engine_type="unified",model_name="m",tp_rank="0"} 0.5
sglang:cache_hit_rate{engine_type="unified",model_name="m",tp_rank="0"} 0.75
sglang:max_total_num_tokens{engine_type="unified",model_name="m",tp_rank="0"} 65536.0
"""

LLAMA_CPP = """\
llamacpp:requests_processing 1
llamacpp:requests_deferred 5
"""


def test_metrics_of_vllm() -> None:
    assert read_metrics(VLLM) == EngineMetrics(
        {0: RankMetrics(3, 2, 0.25, 0.25), 1: RankMetrics(1, 0, 0.5, None)},
        block_size=16,
        block_count=27420,
    )
    assert read_metrics(OLD_VLLM) == EngineMetrics({0: RankMetrics(1, 0, 0.125, None)})


def test_metrics_of_sglang() -> None:
    assert read_metrics(SGLANG) == EngineMetrics({0: RankMetrics(4, 1, 0.5, 0.75)}, token_count=65536)


def test_metrics_of_llama_cpp() -> None:
    assert read_metrics(LLAMA_CPP) == EngineMetrics({0: RankMetrics(1, 5, None, None)})


def test_unknown_lines_are_skipped() -> None:
    page = 'other{a="b"} 1\nvllm:num_requests_running{} NaN\nvllm:num_requests_running +Inf\nrubbish\n\n'
    assert read_metrics(page) == EngineMetrics({})


@given(st.text(alphabet=st.sampled_from([*'vllm:num_requests_running{}="1. \n#e+']), max_size=200))
def test_any_page_is_read_without_an_error(page: str) -> None:
    read_metrics(page + "\n" + VLLM)
