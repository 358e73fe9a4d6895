"""A model's files: reading a directory, upload to the object store, and download."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.errors import ModelCacheError, ModelError, ObjectChanged, ObjectNotFound, StoreRefused
from dynamo_redis.models.card import FileReference, ModelCard, RuntimeConfig
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.models.download import fetch_model_files
from dynamo_redis.models.upload import (
    LONGEST_CHECK_S,
    check_pause_s,
    keep_model_files,
    make_card,
    publish_model,
    upload_model_files,
)
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.store.base import ObjectInfo, Registration, Registry
from dynamo_redis.store.objects.memory import MemoryObjectStore

ENDPOINT = EndpointName.parse("dynamo.backend.generate")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the demo model that tests may change."""
    return shutil.copytree(
        DEMO_MODEL_PATH, tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__", "*.py")
    )


def _edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# --------------------------------------------------------------------------- the directory


def test_whole_directory_is_read(directory: Path) -> None:
    model = read_model_directory(directory)
    assert list(model.files) == [
        "tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json",
    ]  # fmt: skip
    assert (model.context_length, model.eos_token_ids, model.model_type) == (
        32768,
        (2, 0),
        "chat+completions",
    )
    assert model.chat_templates["default"].count("<|im_start|>")
    for name, file in model.files.items():
        content = (directory / name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert file.read() == content


def test_real_tokenizer_is_read(shared: Path) -> None:
    """Gzipped, without config.json: context length and end-of-text come from tokenizer_config.json."""
    model = read_model_directory(shared / "data" / "qwen3-tokenizer")
    assert model.files["tokenizer.json"].size_bytes == 11_422_654
    assert len(model.read_tokenizer()) == 11_422_654
    assert (model.context_length, model.eos_token_ids) == (131_072, (151_645,))
    assert model.model_type == "chat+completions"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ModelError, match=rf"has no {name}") as caught:
        read_model_directory(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_other_files_may_be_missing(directory: Path, name: str) -> None:
    (directory / name).unlink()
    model = read_model_directory(directory)
    assert model.context_length == 32768
    assert 2 in model.eos_token_ids


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b'{"model": {', "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"{}", "is not a tokenizer"),
        ("config.json", b"\xff\xfe", "config.json is not valid JSON"),
        ("config.json", b"[1]", "holds list, not a JSON object"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "not a token id"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template is neither"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("config.json", b'{"max_position_embeddings": "many"}', "not a number of tokens"),
        ("config.json", b"[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_file_is_named(directory: Path, name: str, content: bytes, words: str) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        read_model_directory(directory)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_paths_are_no_model_directory(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_model_directory(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is a file"):
        read_model_directory(directory / "config.json")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").mkdir()
    with pytest.raises(ModelError, match="Is a directory"):
        read_model_directory(directory)


def test_damaged_archive_is_named(directory: Path) -> None:
    packed = gzip.compress((directory / "tokenizer.json").read_bytes())
    (directory / "tokenizer.json").unlink()
    for broken in (packed[: len(packed) // 2], b"plain", packed[:30] + b"x" * 100 + packed[130:]):
        (directory / "tokenizer.json.gz").write_bytes(broken)
        with pytest.raises(ModelError, match=r"cannot read .*tokenizer\.json\.gz"):
            read_model_directory(directory)


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": None, "n_positions": 1024}, 1024),
        ({"max_position_embeddings": None, "text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"max_position_embeddings": None}, 32768),
    ],
)
def test_context_length_is_found(directory: Path, changes: dict[str, Any], length: int) -> None:
    _edit(directory / "config.json", **changes)
    assert read_model_directory(directory).context_length == length
    assert read_model_directory(directory, context_length=77).context_length == 77


def test_unknown_context_length_names_the_option(directory: Path) -> None:
    _edit(directory / "config.json", max_position_embeddings=None)
    _edit(directory / "tokenizer_config.json", model_max_length=1e30)
    with pytest.raises(ModelError, match="--context-length"):
        read_model_directory(directory)


def test_end_of_text_is_found_in_order(directory: Path) -> None:
    assert read_model_directory(directory).eos_token_ids == (2, 0)
    (directory / "generation_config.json").unlink()
    assert read_model_directory(directory).eos_token_ids == (2,)
    _edit(directory / "config.json", eos_token_id=None, text_config={"eos_token_id": [0, 2]})
    assert read_model_directory(directory).eos_token_ids == (0, 2)
    _edit(directory / "config.json", text_config=None)
    assert read_model_directory(directory).eos_token_ids == (2,)
    _edit(directory / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    assert read_model_directory(directory).eos_token_ids == (0,)
    _edit(directory / "tokenizer_config.json", eos_token=None)
    assert read_model_directory(directory).eos_token_ids == ()


def test_chat_templates_are_found_in_all_their_places(directory: Path) -> None:
    _edit(
        directory / "tokenizer_config.json",
        chat_template=[{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}],
    )
    assert read_model_directory(directory).chat_templates == {"default": "A", "tool_use": "B"}
    (directory / "chat_template.jinja").write_text("Ü")
    assert read_model_directory(directory).chat_templates == {"default": "Ü"}


@pytest.mark.parametrize("name", [".hidden.jinja", "a b.jinja", "ü.jinja"])
def test_additional_template_needs_a_plain_name(directory: Path, name: str) -> None:
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / name).write_text("T")
    with pytest.raises(ModelError, match="give it a name of letters"):
        read_model_directory(directory)


def test_additional_default_template_replaces_an_unreadable_one(directory: Path) -> None:
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "default.jinja").write_text("T")
    assert read_model_directory(directory).chat_templates == {"default": "T"}


def test_additional_templates_have_a_bound(directory: Path) -> None:
    (directory / "additional_chat_templates").mkdir()
    for number in range(33):
        (directory / "additional_chat_templates" / f"t{number}.jinja").write_text("T")
    with pytest.raises(ModelError, match="holds 33 templates: a model has 32 at most"):
        read_model_directory(directory)


def test_given_template_replaces_all_of_the_models(directory: Path, tmp_path: Path) -> None:
    (directory / "chat_template.jinja").write_text("NEW")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    given = tmp_path / "given.jinja"
    given.write_text("GIVEN")
    model = read_model_directory(directory, chat_template=given)
    assert model.chat_templates == {"default": "GIVEN"}
    assert set(model.files) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
    }


def test_end_of_text_is_found_in_special_tokens_map(directory: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (directory / name).unlink()
    _edit(directory / "tokenizer_config.json", eos_token=None, added_tokens_decoder=None)
    (directory / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert read_model_directory(directory).eos_token_ids == (0,)
    _edit(directory / "tokenizer_config.json", added_tokens_decoder={})
    assert read_model_directory(directory).eos_token_ids == ()


def test_model_without_a_template_completes_text(directory: Path) -> None:
    _edit(directory / "tokenizer_config.json", chat_template=None)
    model = read_model_directory(directory)
    assert model.model_type == "completions"
    assert make_card(model, model_name="m", kv_cache_block_size=16).model_type == "completions"


# --------------------------------------------------------------------------- upload and download


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


@pytest.fixture
def card(directory: Path) -> ModelCard:
    return make_card(read_model_directory(directory), model_name="Demo/Model-1.0", kv_cache_block_size=16)


async def _uploaded(objects: MemoryObjectStore, directory: Path, card: ModelCard) -> None:
    await upload_model_files(objects, read_model_directory(directory), card)


async def test_files_are_fetched_as_uploaded(
    objects: MemoryObjectStore, directory: Path, card: ModelCard, tmp_path: Path
) -> None:
    await _uploaded(objects, directory, card)
    fetched = await fetch_model_files(objects, ModelCard.from_bytes(card.to_bytes()), tmp_path / "cache")

    there, here = read_model_directory(fetched), read_model_directory(directory)
    assert {n: f.sha256 for n, f in there.files.items()} == {n: f.sha256 for n, f in here.files.items()}
    assert (there.context_length, there.eos_token_ids, there.chat_templates) == (
        here.context_length,
        here.eos_token_ids,
        here.chat_templates,
    )


async def test_template_files_are_fetched_as_uploaded(
    objects: MemoryObjectStore, directory: Path, tmp_path: Path
) -> None:
    (directory / "chat_template.jinja").write_text("NEW")
    (directory / "chat_template.json").write_text('{"chat_template": "OLD"}')
    _edit(directory / "tokenizer_config.json", added_tokens_decoder=None)
    (directory / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    here = read_model_directory(directory)
    card = make_card(here, model_name="m", kv_cache_block_size=16)
    await _uploaded(objects, directory, card)
    fetched = await fetch_model_files(objects, ModelCard.from_bytes(card.to_bytes()), tmp_path / "cache")
    there = read_model_directory(fetched)
    assert {n: f.sha256 for n, f in there.files.items()} == {n: f.sha256 for n, f in here.files.items()}
    assert there.chat_templates == here.chat_templates == {"default": "NEW", "tool_use": "TOOLS"}
    assert there.tokenizer_config == here.tokenizer_config
    assert there.tokenizer_config["bos_token"] == "<s>"
    many = {f"additional_chat_templates/t{n}.jinja": card.files["chat_template.jinja"] for n in range(33)}
    with pytest.raises(ModelError, match="names 34 chat templates"):
        await fetch_model_files(
            objects, card.model_copy(update={"files": card.files | many}), tmp_path / "many"
        )


async def test_gzipped_file_arrives_unpacked(
    objects: MemoryObjectStore, directory: Path, tmp_path: Path
) -> None:
    content = (directory / "tokenizer.json").read_bytes()
    (directory / "tokenizer.json.gz").write_bytes(gzip.compress(content))
    (directory / "tokenizer.json").unlink()
    card = make_card(read_model_directory(directory), model_name="m", kv_cache_block_size=16)
    await _uploaded(objects, directory, card)
    fetched = await fetch_model_files(objects, card, tmp_path / "cache")
    assert (fetched / "tokenizer.json").read_bytes() == content


async def test_cached_files_are_not_fetched_again(
    objects: MemoryObjectStore, directory: Path, card: ModelCard, tmp_path: Path
) -> None:
    await _uploaded(objects, directory, card)
    first = await fetch_model_files(objects, card, tmp_path / "cache")
    assert await fetch_model_files(MemoryObjectStore(), card, tmp_path / "cache") == first


async def test_damaged_cache_is_repaired(
    objects: MemoryObjectStore, directory: Path, card: ModelCard, tmp_path: Path
) -> None:
    await _uploaded(objects, directory, card)
    fetched = await fetch_model_files(objects, card, tmp_path / "cache")
    blob = (fetched / "config.json").resolve()
    whole = blob.read_bytes()
    for broken in (whole[:-1], b"x" * len(whole)):
        blob.write_bytes(broken)
        assert await fetch_model_files(objects, card, tmp_path / "cache") == fetched
        assert (fetched / "config.json").read_bytes() == whole
    blob.unlink()
    await fetch_model_files(objects, card, tmp_path / "cache")
    assert (fetched / "config.json").read_bytes() == whole


async def test_versions_of_a_model_do_not_collide(
    objects: MemoryObjectStore, directory: Path, card: ModelCard, tmp_path: Path
) -> None:
    await _uploaded(objects, directory, card)
    _edit(directory / "config.json", max_position_embeddings=4096)
    newer = make_card(read_model_directory(directory), model_name="Demo/Model-1.0", kv_cache_block_size=16)
    await _uploaded(objects, directory, newer)

    fetched = [await fetch_model_files(objects, each, tmp_path / "cache") for each in (card, newer)]
    assert [read_model_directory(path).context_length for path in fetched] == [32768, 4096]
    assert len(await objects.list("models")) == len(card.files) + 1


async def test_larger_object_is_left_at_its_first_piece(
    directory: Path, card: ModelCard, tmp_path: Path
) -> None:
    read_count = 0

    class CountingStore(MemoryObjectStore):
        async def _open(self, bucket: str, name: str) -> tuple[ObjectInfo, AsyncGenerator[bytes]]:
            info, pieces = await super()._open(bucket, name)

            async def counted() -> AsyncGenerator[bytes]:
                nonlocal read_count
                async for piece in pieces:
                    read_count += 1
                    yield piece

            return info, counted()

    objects = CountingStore(chunk_bytes=1024)
    await _uploaded(objects, directory, card)
    name = card.files["tokenizer.json"].url.removeprefix("redis-object://models/")
    await objects.put("models", name, b"x" * (20 << 20))
    with pytest.raises(ObjectChanged, match="20971520 bytes in Redis, the card says"):
        await fetch_model_files(objects, card, tmp_path / "cache")
    assert read_count == 2, "it is tried twice, since an object may be replaced while it is read"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


async def test_card_with_huge_files_is_refused(
    objects: MemoryObjectStore, card: ModelCard, tmp_path: Path
) -> None:
    huge = card.files["tokenizer.json"].model_copy(update={"size_bytes": 1 << 40})
    with pytest.raises(ModelError, match=r"bytes by its card; 536870912 are allowed"):
        await fetch_model_files(
            objects, card.model_copy(update={"files": card.files | {"tokenizer.json": huge}}), tmp_path
        )


async def test_content_other_than_the_cards_is_refused(
    objects: MemoryObjectStore, directory: Path, card: ModelCard, tmp_path: Path
) -> None:
    await _uploaded(objects, directory, card)
    name = card.files["config.json"].url.removeprefix("redis-object://models/")
    size = card.files["config.json"].size_bytes
    lying = card.files["config.json"].model_copy(update={"size_bytes": size + 1})
    with pytest.raises(ObjectChanged, match=f"has {size} bytes .* the card says {size + 1}"):
        await fetch_model_files(
            objects,
            card.model_copy(update={"files": card.files | {"config.json": lying}}),
            tmp_path / "cache",
        )
    for content in (b"{}", b"x" * size):
        await objects.put("models", name, content)
        with pytest.raises(ObjectChanged, match="the card says"):
            await fetch_model_files(objects, card, tmp_path / "cache")
    assert not (tmp_path / "cache" / "models").exists()
    assert {path.name for path in (tmp_path / "cache" / "blobs").iterdir()} <= {
        reference.sha256 for reference in card.files.values()
    }


async def test_file_that_is_gone_is_named(card: ModelCard, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match=r"tokenizer\.json"):
        await fetch_model_files(MemoryObjectStore(), card, tmp_path / "cache")


async def test_paths_in_a_card_are_not_used(
    objects: MemoryObjectStore, directory: Path, card: ModelCard, tmp_path: Path
) -> None:
    await _uploaded(objects, directory, card)
    evil = card.model_copy(update={"files": {**card.files, "../../evil": card.files["config.json"]}})
    fetched = await fetch_model_files(objects, evil, tmp_path / "a" / "b" / "cache")
    assert {path.name for path in fetched.iterdir()} == set(card.files)
    assert not list(tmp_path.rglob("evil"))

    reference = FileReference(url="redis-object://models/x", sha256="../../evil", size_bytes=1)
    for files, words in (
        ({"tokenizer.json": reference, "tokenizer_config.json": reference}, "no valid sha256"),
        ({"tokenizer.json": card.files["tokenizer.json"]}, "names no tokenizer_config"),
        (
            {n: f.model_copy(update={"url": "http://x"}) for n, f in card.files.items()},
            "not an object URL",
        ),
    ):
        broken = card.model_copy(update={"files": files})
        with pytest.raises(ModelError, match=words):
            await fetch_model_files(objects, broken, tmp_path / "other")


@pytest.mark.parametrize(
    "name",
    [
        "/outside/evil",
        "..",
        "config.json/../../evil",
        "additional_chat_templates/../../evil.jinja",
        "additional_chat_templates/.evil.jinja",
        "additional_chat_templates/evil.jinja\0.jinja",
        "additional_chat_templates/evil.jinja\n",
        "additional_chat_templates/a/evil.jinja",
        "config.json\0",
        "CON",
        "NUL.json",
        "evil" * 1000,
    ],
)
async def test_hostile_names_in_a_card_make_no_file(
    objects: MemoryObjectStore, directory: Path, card: ModelCard, tmp_path: Path, name: str
) -> None:
    await _uploaded(objects, directory, card)
    name = f"{tmp_path}{name}" if name.startswith("/") else name
    evil = card.model_copy(update={"files": {**card.files, name: card.files["config.json"]}})
    fetched = await fetch_model_files(objects, ModelCard.from_bytes(evil.to_bytes()), tmp_path / "cache")
    names = {str(path.relative_to(fetched)) for path in fetched.rglob("*") if path.is_file()}
    assert names == set(card.files)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", directory.name}


async def test_ten_thousand_files_of_a_card_cost_nothing(
    objects: MemoryObjectStore, directory: Path, card: ModelCard, tmp_path: Path
) -> None:
    """Unknown names are not fetched, and as many templates are refused before anything is."""
    await _uploaded(objects, directory, card)
    one = card.files["config.json"]
    unknown = card.model_copy(update={"files": {**card.files, **{f"x{n}": one for n in range(10_000)}}})
    fetched = await fetch_model_files(objects, unknown, tmp_path / "cache")
    assert {path.name for path in fetched.iterdir()} == set(card.files)
    templates = {f"additional_chat_templates/t{n}.jinja": one for n in range(10_000)}
    with pytest.raises(ModelError, match="10000 chat templates"):
        await fetch_model_files(
            objects, card.model_copy(update={"files": card.files | templates}), tmp_path / "other"
        )
    assert not (tmp_path / "other").exists()


async def test_unwritable_cache_is_named(
    objects: MemoryObjectStore, directory: Path, card: ModelCard, tmp_path: Path
) -> None:
    await _uploaded(objects, directory, card)
    (tmp_path / "file").touch()
    with pytest.raises(ModelCacheError, match=f"cannot write the model cache {tmp_path / 'file'}: "):
        await fetch_model_files(objects, card, tmp_path / "file")


async def test_changed_file_is_not_uploaded(
    objects: MemoryObjectStore, directory: Path, card: ModelCard
) -> None:
    model = read_model_directory(directory)
    _edit(directory / "config.json", max_position_embeddings=1)
    with pytest.raises(ModelError, match="has changed"):
        await upload_model_files(objects, model, card)


async def test_files_that_vanish_are_uploaded_again(
    directory: Path, card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Also after a time in which uploads failed."""
    objects = Refusing()
    await _uploaded(objects, directory, card)
    monkeypatch.setattr("dynamo_redis.models.upload.CHECK_S", 0.01)
    model = read_model_directory(directory)
    keeping = asyncio.create_task(keep_model_files(objects, model, card, lambda: 1))
    try:
        async with asyncio.timeout(20):
            for info in await objects.list():
                await objects.remove(info.bucket, info.name)
            objects.refuses = True
            while objects.refused_count < 3:
                await asyncio.sleep(0.01)
            objects.refuses = False
            while len(await objects.list()) < len(card.files):
                await asyncio.sleep(0.01)
        await fetch_model_files(objects, card, tmp_path / "cache")
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])
    assert [record.message for record in caplog.records].count(
        "files of model Demo/Model-1.0 cannot be kept in Redis: Redis is full"
    ) == 1


@pytest.mark.parametrize(("process_count", "checks_per_s"), [(0, 0.1), (1, 0.1), (16, 1.6), (400, 1.6)])
def test_many_workers_share_the_checks_of_their_files(process_count: int, checks_per_s: float) -> None:
    assert max(process_count, 1) / check_pause_s(process_count) == pytest.approx(checks_per_s)


def test_a_worker_among_very_many_checks_its_files_all_the_same() -> None:
    assert check_pause_s(100_000) == LONGEST_CHECK_S


class Refusing(MemoryObjectStore):
    """An object store that takes no object while it `refuses`."""

    refuses = False
    refused_count = 0

    async def put(self, *args: Any, **options: Any) -> ObjectInfo:
        if self.refuses:
            self.refused_count += 1
            raise StoreRefused("Redis is full")
        return await super().put(*args, **options)


# --------------------------------------------------------------------------- the card


class OneKeyRegistry:
    """A registry that takes one registration, and keeps its callbacks."""

    def __init__(self, objects: MemoryObjectStore) -> None:
        self._objects = objects
        self.key = ""
        self.value = b""
        self.prepare: Callable[[], Awaitable[None]] | None = None
        self.objects_at_registration = 0

    async def register(self, key: str, value: bytes, **options: Any) -> Registration:
        self.key, self.value, self.prepare = key, value, options["prepare"]
        self.objects_at_registration = len(await self._objects.list("models"))
        return cast("Registration", self)


class OneRegistryRuntime:
    """The part of a runtime that `publish_model` uses."""

    def __init__(self, objects: MemoryObjectStore) -> None:
        self.objects = objects
        self.entries = OneKeyRegistry(objects)
        self.registry = cast("Registry", self.entries)
        self.instance_id = InstanceId(0x694D98147D54BFDE)


async def test_files_are_uploaded_before_the_card(
    objects: MemoryObjectStore, directory: Path, tmp_path: Path
) -> None:
    runtime = OneRegistryRuntime(objects)
    model = read_model_directory(directory)
    made = make_card(
        model,
        model_name="Demo/Model-1.0",
        kv_cache_block_size=16,
        runtime_config=RuntimeConfig(total_kv_blocks=10, max_num_seqs=2, max_num_batched_tokens=64),
    )
    await publish_model(runtime, ENDPOINT, model, made)
    entries = runtime.entries
    assert entries.key == "v1/mdc/dynamo/backend/generate/694d98147d54bfde"
    assert entries.objects_at_registration == 4
    card = ModelCard.from_bytes(entries.value)
    assert (card.display_name, card.slug, card.context_length) == ("Demo/Model-1.0", "demo_model-1_0", 32768)
    assert (card.kv_cache_block_size, card.runtime_config.total_kv_blocks) == (16, 10)

    for info in await objects.list():
        await objects.remove(info.bucket, info.name)
    assert entries.prepare is not None
    await entries.prepare()
    await fetch_model_files(objects, card, tmp_path / "cache")
