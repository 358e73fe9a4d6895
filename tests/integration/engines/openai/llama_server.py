"""llama.cpp's own HTTP server with a tiny model of random weights, as a program:

    .bench/llama/bin/python llama_server.py MODEL_DIRECTORY FILE.gguf PORT

It runs in an environment of its own; `test_llama_cpp.py` describes how to make it. The model has the
tokenizer of the directory, so that both sides have the same tokens.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

LAYER_COUNT, WIDTH, HEAD_COUNT, INNER_WIDTH = 2, 64, 4, 128
CONTEXT_LENGTH = 2048


def write_model(directory: Path, target: Path) -> None:
    """Write a Llama of two narrow layers; its answers are noise, and always the same."""
    import numpy as np
    from gguf import GGUFWriter

    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    names = {number: name for name, number in tokenizer["model"]["vocab"].items()} | special
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    random = np.random.default_rng(1)
    writer = GGUFWriter(str(target), "llama")
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYER_COUNT)
    writer.add_feed_forward_length(INNER_WIDTH)
    writer.add_head_count(HEAD_COUNT)
    writer.add_head_count_kv(HEAD_COUNT)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEAD_COUNT)
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names[number] for number in range(len(names))])
    writer.add_token_types([3 if number in special else 1 for number in range(len(names))])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)

    def add(name: str, *shape: int, scale: float = 0.3) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * scale).astype(np.float32))

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, np.float32))

    add("token_embd.weight", len(names), WIDTH, scale=1.0)
    add_norm("output_norm.weight")
    add("output.weight", len(names), WIDTH, scale=1.0)
    for layer in range(LAYER_COUNT):
        for norm in ("attn_norm", "ffn_norm"):
            add_norm(f"blk.{layer}.{norm}.weight")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", INNER_WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", INNER_WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, INNER_WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(model: Path, port: int) -> None:
    """Serve until this process ends."""
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = CONTEXT_LENGTH
    params.n_parallel = 1
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.endpoint_metrics = True
    params.warmup = False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    while server:  # the server runs as long as the object lives
        time.sleep(3600)


if __name__ == "__main__":
    directory, target, port = sys.argv[1:]
    write_model(Path(directory), Path(target))
    serve(Path(target), int(port))
