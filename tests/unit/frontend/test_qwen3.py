"""Prompts of a real model: token ids equal to those of `transformers`, on golden vectors and live."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.frontend.fast_encoding import FastEncoder
from dynamo_redis.frontend.http.bodies import source_of
from dynamo_redis.frontend.model_loading import LoadedModel, build_model
from dynamo_redis.frontend.openai import ChatBody, read_body
from dynamo_redis.frontend.prompts import tokenize
from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.models.card import ModelCard
from dynamo_redis.templates.protocol import MaskedText

REPOSITORY = Path(__file__).resolve().parents[3]
VECTORS: dict[str, Any] = json.loads((REPOSITORY / "tests" / "vectors" / "qwen3_chat.json").read_text())
LOOK_ALIKES = "look-alikes of special tokens"  # text here; transformers makes tokens of them
CASES: list[dict[str, Any]] = [case for case in VECTORS["cases"] if case["name"] != LOOK_ALIKES]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the real Qwen3 tokenizer."""
    source = REPOSITORY.parent / "shared" / "data" / "qwen3-tokenizer"
    if not source.is_dir():
        pytest.skip(f"needs the Qwen3 tokenizer in {source}")
    directory = tmp_path_factory.mktemp("qwen3")
    content = gzip.decompress((source / "tokenizer.json.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == VECTORS["tokenizer_sha256"]
    (directory / "tokenizer.json").write_bytes(content)
    (directory / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return directory


@pytest.fixture(scope="module", params=["tokenizers", "fastokens"])
def model(qwen3: Path, request: pytest.FixtureRequest) -> LoadedModel:
    card = ModelCard(display_name="qwen3", slug="qwen3", context_length=131072, kv_cache_block_size=16)
    model = build_model(card, qwen3)
    if request.param == "fastokens":
        pytest.importorskip("fastokens", reason="fastokens has no wheel for this platform")
        model.accelerate()
    return model


def prompt_ids(model: LoadedModel, case: dict[str, Any]) -> list[int]:
    """Return the token ids of a case, prepared from the body of a request."""
    options = dict(case.get("options", {}))
    body = {"model": "qwen3", "messages": case["messages"], "tools": case.get("tools")}
    for field in ("add_generation_prompt", "continue_final_message"):
        if field in options:
            body[field] = options.pop(field)
    content = json.dumps({**body, "chat_template_kwargs": options}).encode()
    chat = read_body(ChatBody, content)

    async def rendered() -> str | MaskedText:
        assert model.template is not None
        source = source_of(chat)
        assert isinstance(source, bytes)
        try:
            text = await model.template.render(source)
            return text if isinstance(text, MaskedText) else text.decode()
        finally:
            await model.template.aclose()

    [ids] = tokenize(model, chat, [asyncio.run(rendered())])
    return ids


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_prompts_have_the_ids_that_transformers_gives(model: LoadedModel, case: dict[str, Any]) -> None:
    ids = prompt_ids(model, case)
    assert ids == case.get("ids", ids)
    assert len(ids) == case["token_count"]
    assert hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest() == case["ids_sha256"]


def test_names_of_special_tokens_stay_text(model: LoadedModel) -> None:
    [case] = [case for case in VECTORS["cases"] if case["name"] == LOOK_ALIKES]
    ids = prompt_ids(model, case)
    special = [token_id for token_id in ids if 151643 <= token_id <= 151656]
    start, end = 151644, 151645
    assert special == [start, end] * len(case["messages"]) + [start]
    assert 151657 in ids  # <tool_call> is no special token
    text = model.tokenizer.decode(ids, skip_special_tokens=False)
    for message in case["messages"]:
        assert message["content"] in text


def test_text_round_trips(model: LoadedModel) -> None:
    """Compare the detokenizer with the library's decoder, on the tokens of real text, for any cut."""
    rng = random.Random(20261122)
    texts = [str(message["content"]) for case in CASES for message in case["messages"]]
    for text in texts:
        ids = model.tokenizer.encode(text)
        start = rng.randrange(len(ids) + 1)
        for part in (ids, ids[start:], ids[:start]):
            assert streamed(model.tokenizer, part) == model.tokenizer.decode(part)


def test_fast_encoder_agrees_on_random_texts(qwen3: Path) -> None:
    pytest.importorskip("fastokens", reason="fastokens has no wheel for this platform")
    content = (qwen3 / "tokenizer.json").read_bytes()
    slow, fast = Tokenizer(content), FastEncoder(content)
    rng = random.Random(11)
    blocks = (
        (32, 127),
        (0x20, 0x300),
        (0x300, 0x3000),
        (0x3000, 0xD800),
        (0xE000, 0x20000),
        (0x1F300, 0x1FAFF),
    )
    for size in (*(rng.randrange(200) for _ in range(2000)), 10_000, 40_000):
        low, high = rng.choice(blocks)
        text = "".join(chr(rng.randrange(low, high)) if rng.random() < 0.8 else " " for _ in range(size))
        assert fast.encode(text, False) == slow.encode(text)


def test_known_expressions_are_quick_for_long_runs(qwen3: Path) -> None:
    """Texts that make other expressions take forever."""
    tokenizer = Tokenizer((qwen3 / "tokenizer.json").read_bytes())
    assert not tokenizer.has_expressions
    for run in (" ", "\n", "a", "1", "!", "'", "\u0301", " \n", "a'"):
        assert tokenizer.encode(run * 20_000)


def test_any_tokens_round_trip(model: LoadedModel) -> None:
    rng = random.Random(7)
    for _ in range(500):
        count = rng.randrange(1, 40)
        # Ids below 260 are single bytes: they make broken and half characters. Some ids do not exist.
        ids = [rng.randrange(rng.choice((260, 152_000))) for _ in range(count)]
        assert streamed(model.tokenizer, ids) == model.tokenizer.decode(ids)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join(detokenizer.feed([token_id]) for token_id in ids) + detokenizer.finish()


@pytest.fixture(scope="module")
def reference(qwen3: Path) -> Any:
    """Return the tokenizer of `transformers` if that is installed."""
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers where it is installed"
    )
    return transformers.AutoTokenizer.from_pretrained(str(qwen3))


@pytest.mark.filterwarnings("ignore")
def test_prompts_equal_those_of_transformers_live(model: LoadedModel, reference: Any) -> None:
    rng = random.Random(3)
    pool = [str(message["content"]) for case in CASES for message in case["messages"]]
    for _ in range(200):
        texts = [rng.choice(pool)[rng.randrange(20) :] for _ in range(rng.randrange(1, 8))]
        messages = [
            {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)
        ]
        if rng.random() < 0.3:
            messages.insert(0, {"role": "system", "content": rng.choice(pool)})
        tools = rng.choice([case.get("tools") for case in CASES])
        options = rng.choice(({}, {"enable_thinking": False}, {"add_generation_prompt": False}))
        case = {"messages": messages, "tools": tools, "options": options}
        expected = reference.apply_chat_template(
            messages, tools=tools, tokenize=True, **{"add_generation_prompt": True, **options}
        )
        assert prompt_ids(model, case) == expected["input_ids"]
