"""The live set of models while cards are put, changed, broken and deleted."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.frontend import model_loading, models
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.models import chat_template
from dynamo_redis.models.chat_template import HERE_MESSAGE_COUNT
from dynamo_redis.models.download import fetch_model_files
from dynamo_redis.names import EndpointName
from dynamo_redis.planes.context import Context
from dynamo_redis.store.base import DeleteCause

OTHER = EndpointName("dynamo", "other", "generate")


def names(frontend: Any) -> list[str]:
    return [model.name for model in frontend.models.served()]


def status_of(frontend: Any, name: str) -> int:
    try:
        frontend.models.get(name)
    except ApiError as exc:
        return exc.status
    return 200


@pytest.fixture
async def frontend(open_frontend: Any) -> Any:
    """Yield a frontend with an empty registry."""
    return await open_frontend(model=None)


def changed_model(directory: Path, **config: Any) -> Path:
    """Return a copy of the demo model with other settings."""
    shutil.copytree(DEMO_MODEL_PATH, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


async def test_a_model_is_served_while_a_card_stands(frontend: Any) -> None:
    first = await frontend.runtime.publish("m", instance_id=1)
    second = await frontend.runtime.publish("m", instance_id=2)
    await frontend.until_served("m")
    frontend.runtime.registry.delete(first)
    await asyncio.sleep(0.05)
    assert names(frontend) == ["m"]
    frontend.runtime.registry.delete(second)
    await frontend.until(lambda: names(frontend) == [])
    assert status_of(frontend, "m") == 503
    assert status_of(frontend, "never") == 404


async def test_a_model_no_longer_served_is_remembered_for_a_while(
    frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_REMEMBERED_COUNT", 2)
    for index in range(3):
        key = await frontend.runtime.publish(f"m{index}", instance_id=1)
        await frontend.until_served(f"m{index}")
        frontend.runtime.registry.delete(key)
        await frontend.until(lambda: names(frontend) == [])
    assert [status_of(frontend, f"m{index}") for index in range(3)] == [404, 503, 503]
    response = await frontend.http.post(
        "/v1/chat/completions", json={"model": "m2", "messages": [{"role": "user", "content": "Hi"}]}
    )
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "no worker of model `m2` can be reached now; try again" in response.text
    monkeypatch.setattr(models, "REMEMBERED_S", 0.0)
    assert status_of(frontend, "m2") == 404
    await frontend.runtime.publish("m", instance_id=3)
    await frontend.until_served("m")


async def test_several_models_at_several_endpoints(frontend: Any) -> None:
    frontend.runtime.workers[str(OTHER)] = frontend.worker
    for index in range(5):
        await frontend.runtime.publish(f"m{index}", instance_id=index + 1)
    await frontend.runtime.publish("o", endpoint=OTHER, instance_id=9)
    await frontend.until(lambda: len(names(frontend)) == 6)
    # A client an endpoint, not one a model.
    assert sorted(frontend.runtime.opened) == ["dynamo.backend.generate", "dynamo.other.generate"]


async def test_models_of_one_endpoint_go_to_their_own_instances(frontend: Any) -> None:
    await frontend.runtime.publish("a", instance_id=1)
    await frontend.until_served("a")
    await frontend.http.post("/v1/completions", json={"model": "a", "prompt": "x"})
    await frontend.runtime.publish("b", instance_id=2)
    await frontend.runtime.publish("b", instance_id=3)
    await frontend.until_served("b")
    await frontend.until(lambda: len(frontend.models.get("b").among or ()) == 2)
    for name in ("a", "b"):
        await frontend.http.post("/v1/completions", json={"model": name, "prompt": "x"})
    assert [set(among) for among in frontend.worker.among] == [{1}, {1}, {2, 3}]
    await frontend.runtime.publish("a", instance_id=4)
    await frontend.until(lambda: set(frontend.worker.among[0]) == {1, 4})  # of the request that came first


async def test_requests_that_race_the_load_are_told_to_come_back(
    frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status_of(frontend, "m") == 503  # the first state is not known yet
    frontend.runtime.registry.put("v1/mdc/not-a-card", b"{}")
    await frontend.until(lambda: frontend.models.first_state.is_set())
    assert status_of(frontend, "m") == 404
    go_on = asyncio.Event()
    fetch = fetch_model_files

    async def slow(*args: Any) -> Path:
        await go_on.wait()
        return await fetch(*args)

    monkeypatch.setattr(model_loading, "fetch_model_files", slow)
    await frontend.runtime.publish("m")
    await frontend.until(lambda: status_of(frontend, "m") == 503)
    response = await frontend.http.post("/v1/completions", json={"model": "m", "prompt": "x"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_loading"
    assert response.headers["retry-after"] == "1"
    assert names(frontend) == []
    go_on.set()
    await frontend.until_served("m")


async def test_changed_card_loads_while_old_one_serves(frontend: Any, tmp_path: Path) -> None:
    await frontend.runtime.publish("m")
    await frontend.until_served("m")
    before = frontend.models.get("m").loaded
    await frontend.runtime.publish("m", path=changed_model(tmp_path / "new", max_position_embeddings=777))
    assert frontend.models.get("m").loaded is before
    await frontend.until(lambda: frontend.models.get("m").loaded.context_length == 777)
    # The same value again changes nothing.
    after = frontend.models.get("m").loaded
    await frontend.runtime.publish("m", path=tmp_path / "new")
    await asyncio.sleep(0.05)
    assert frontend.models.get("m").loaded is after


async def test_a_card_that_changes_its_name_moves(frontend: Any) -> None:
    await frontend.runtime.publish("old")
    await frontend.until_served("old")
    await frontend.runtime.publish("new")
    await frontend.until(lambda: names(frontend) == ["new"])


def versions(frontend: Any) -> dict[int, Any]:
    """Return the instances of each loaded version of model m, by its context length."""
    [named] = [model for model in frontend.models.served() if model.name == "m"]
    return {model.loaded.context_length: set(model.among) for model in named.loaded()}


async def test_one_card_at_two_endpoints_is_logged_as_such(
    frontend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await frontend.runtime.publish("m", instance_id=1)
    await frontend.until_served("m")
    await frontend.runtime.publish("m", endpoint=OTHER, instance_id=2)
    await frontend.until(lambda: "model 'm' has workers in 2 groups" in caplog.text)
    [line] = [record.message for record in caplog.records if "in 2 groups" in record.message]
    assert "that differ in endpoint or card" in line
    assert len({part.partition(" with card ")[2][:8] for part in line.split("; ")}) == 1


async def test_workers_of_different_cards_share_the_requests(
    frontend: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    frontend.worker.ids = [1, 2, 3]
    old = await frontend.runtime.publish("m", instance_id=1)
    await frontend.until_served("m")
    new = changed_model(tmp_path / "new", max_position_embeddings=777)
    for instance_id in (2, 3):
        await frontend.runtime.publish("m", instance_id=instance_id, path=new)
    await frontend.until(lambda: versions(frontend) == {32768: {1}, 777: {2, 3}})
    assert caplog.text.count("model 'm' has workers in 2 groups that differ in endpoint or card") == 1
    for _ in range(60):
        await frontend.http.post("/v1/completions", json={"model": "m", "prompt": "x"})
    asked = [set(among) for among in frontend.worker.among]
    assert {frozenset(among) for among in asked} == {frozenset({1}), frozenset({2, 3})}
    listed = (await frontend.http.get("/v1/models")).json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in listed] == [("m", 32768)]
    frontend.runtime.registry.delete(old)
    await frontend.until(lambda: versions(frontend) == {777: {2, 3}})
    assert "all workers of model 'm' have one endpoint and one card again" in caplog.text


async def test_request_goes_to_workers_whose_card_it_fits(frontend: Any, tmp_path: Path) -> None:
    frontend.worker.ids = [1, 2, 3]
    await frontend.runtime.publish("m", instance_id=1)
    new = changed_model(tmp_path / "new", max_position_embeddings=777)
    config = json.loads((new / "tokenizer_config.json").read_text())
    (new / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    for instance_id in (2, 3):
        await frontend.runtime.publish("m", instance_id=instance_id, path=new)
    await frontend.until(lambda: frontend.models.served() and len(versions(frontend)) == 2)
    for _ in range(10):
        answer = await frontend.http.post("/v1/completions", json={"model": "m", "prompt": [5] * 1000})
        assert answer.status_code == 200, answer.text
        answer = await frontend.http.post(
            "/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        )
        assert answer.status_code == 200, answer.text
    assert {frozenset(among) for among in frontend.worker.among} == {frozenset({1})}
    answer = await frontend.http.post("/v1/completions", json={"model": "m", "prompt": [5] * 40_000})
    assert answer.status_code == 400
    assert "32768 tokens" in answer.text


async def test_versions_of_a_model_have_a_bound(frontend: Any, tmp_path: Path) -> None:
    keys = []
    for number in range(models.MAX_VERSIONS + 2):
        path = changed_model(tmp_path / str(number), max_position_embeddings=1000 + number)
        keys.append(await frontend.runtime.publish("m", instance_id=number + 1, path=path))
    await frontend.until(lambda: frontend.models.served() and len(versions(frontend)) == models.MAX_VERSIONS)
    first = min(versions(frontend))
    frontend.runtime.registry.delete(keys[first - 1000])
    await frontend.until(
        lambda: first not in versions(frontend) and len(versions(frontend)) == models.MAX_VERSIONS
    )


async def test_broken_card_is_one_line_and_breaks_no_model(
    frontend: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await frontend.runtime.publish("good", instance_id=1)
    frontend.runtime.registry.put("v1/mdc/dynamo/backend/generate/2", b"not json")
    frontend.runtime.registry.put("v1/mdc/dynamo/backend/generate/xyz", b"{}")
    await frontend.runtime.publish("future", instance_id=3, version=99)
    broken = changed_model(tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    await frontend.runtime.publish("broken", instance_id=4, path=broken)
    raising = changed_model(tmp_path / "raising")
    config = json.loads((raising / "tokenizer_config.json").read_text())
    (raising / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{% for %}"}))
    await frontend.runtime.publish("raising", instance_id=5, path=raising)
    await frontend.runtime.publish("last", instance_id=6)
    await frontend.until_served("last")
    await frontend.until_served("good")
    await frontend.until(lambda: len(caplog.records) >= 5)
    assert names(frontend) == ["good", "last"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5
    assert all("\n" not in line for line in lines)
    response = await frontend.http.post("/v1/completions", json={"model": "broken", "prompt": "x"})
    assert response.status_code == 503
    assert "not a tokenizer" in response.json()["error"]["message"]
    # A whole card repairs it.
    await frontend.runtime.publish("broken", instance_id=4)
    await frontend.until_served("broken")


async def test_a_broken_card_beside_a_good_one_of_the_same_model(frontend: Any, tmp_path: Path) -> None:
    broken = changed_model(tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    await frontend.runtime.publish("m", instance_id=1)
    await frontend.runtime.publish("m", instance_id=2, path=broken)
    await frontend.until_served("m")
    assert set(frontend.models.get("m").among) == {1}


async def test_loading_goes_on_when_redis_comes_back(
    frontend: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetch = fetch_model_files
    attempts = 0

    async def failing(*args: Any) -> Path:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise StoreUnavailable("no answer from Redis")
        return await fetch(*args)

    monkeypatch.setattr(model_loading, "fetch_model_files", failing)
    monkeypatch.setattr(models, "_RETRY_PAUSE_S", (0.02, 0.1))
    await frontend.runtime.publish("m")
    await frontend.until_served("m")
    assert attempts == 3
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


@pytest.mark.parametrize("fault", ["not writable", "emptied"])
async def test_cache_that_is_put_right_heals_by_itself(
    frontend: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    fault: str,
) -> None:
    """A file takes the place of the directory, or the directory is emptied before its files are read."""
    monkeypatch.setattr(models, "_RETRY_PAUSE_S", (0.02, 0.1))
    cache, fetch = tmp_path / "cache", fetch_model_files

    async def emptied(*args: Any) -> Path:
        directory = await fetch(*args)
        shutil.rmtree(cache)
        return directory

    with monkeypatch.context() as faulty:
        if fault == "not writable":
            cache.touch()
        else:
            faulty.setattr(model_loading, "fetch_model_files", emptied)
        await frontend.runtime.publish("m")
        await frontend.until(lambda: "cannot be loaded yet" in caplog.text)
        response = await frontend.http.post("/v1/completions", json={"model": "m", "prompt": "x"})
        assert (response.status_code, "cannot be kept here now" in response.text) == (503, True)
        assert str(tmp_path) not in response.text
        assert caplog.text.count(str(cache)) == 1
        if fault == "not writable":
            cache.unlink()
    await frontend.until_served("m")


async def test_a_restart_needs_no_download(open_frontend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both frontends of this test share a cache directory, as two runs of one user do."""
    await open_frontend()
    again = await open_frontend(model=None)

    async def refused(*args: Any) -> None:
        raise AssertionError("nothing should be downloaded")

    monkeypatch.setattr(again.runtime.objects, "fetch", refused)
    await again.runtime.publish("demo")
    await again.until_served("demo")


@pytest.mark.parametrize("cause", [DeleteCause.EXPIRED, DeleteCause.RESYNC])
async def test_a_lost_card_counts_while_its_instance_answers(
    frontend: Any, cause: DeleteCause, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "LINGER_S", 0.1)
    key = await frontend.runtime.publish("m", instance_id=1)
    await frontend.until_served("m")
    frontend.models._lease_ttl_s = 0.1
    frontend.runtime.registry.delete(key, cause)
    await asyncio.sleep(0.4)
    assert names(frontend) == ["m"]
    frontend.worker.ids = []
    await frontend.until(lambda: names(frontend) == [])


async def test_a_lost_card_that_comes_back_stays(frontend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LINGER_S", 0.1)
    frontend.models._lease_ttl_s = 0.2
    key = await frontend.runtime.publish("m", instance_id=1)
    await frontend.until_served("m")
    loaded = frontend.models.get("m").loaded
    frontend.worker.ids = []
    frontend.runtime.registry.delete(key, DeleteCause.RESYNC)
    await asyncio.sleep(0.05)
    await frontend.runtime.publish("m", instance_id=1)
    await asyncio.sleep(0.5)
    assert frontend.models.get("m").loaded is loaded


async def test_a_large_model_does_not_hold_up_the_watch(
    frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other models are served, and the event loop turns, while a large one loads."""
    go_on = threading.Event()
    build: Callable[..., Any] = model_loading.build_model

    def slow(card: Any, directory: Path) -> Any:
        if card.display_name == "large":
            go_on.wait(10)
        return build(card, directory)

    monkeypatch.setattr(model_loading, "build_model", slow)
    await frontend.runtime.publish("large", instance_id=1)
    for index in range(3):
        await frontend.runtime.publish(f"small{index}", instance_id=2 + index)
    await frontend.until(lambda: len(names(frontend)) == 3)
    assert status_of(frontend, "large") == 503
    go_on.set()
    await frontend.until_served("large")


async def test_served_model_gets_the_faster_tokenizer(open_frontend: Any) -> None:
    pytest.importorskip("fastokens", reason="fastokens has no wheel for this platform")
    frontend = await open_frontend(tokenizer="fastokens")
    slow = await open_frontend(tokenizer="default")
    tokenizer = frontend.models.get("demo").loaded.tokenizer
    limit = slow.models.get("demo").loaded.tokenizer.inline_bytes
    await frontend.until(lambda: tokenizer.inline_bytes > limit)
    for each in (frontend, slow):
        answer = await each.client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Two wörds\u0301."}], max_tokens=2
        )
        assert answer.choices
    assert frontend.worker.requests[-1]["token_ids"] == slow.worker.requests[-1]["token_ids"]


async def test_requests_under_way_outlive_their_model(frontend: Any) -> None:
    key = await frontend.runtime.publish("m")
    await frontend.until_served("m")
    frontend.worker.script = frontend.worker.says("one two three", pause_s=0.05)
    model = frontend.models.get("m")
    request: Any = {"model": "m", "token_ids": [1]}
    items = await frontend.models.generate(model, request, Context())
    frontend.runtime.registry.delete(key)
    await frontend.until(lambda: names(frontend) == [])
    received: list[Any] = []
    while arrived := await items.next_items():
        received += arrived
    assert received[-1]["finish_reason"] == "stop"


async def test_template_that_was_idle_ends_with_the_models(
    open_frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "IDLE_S", 0.05)
    frontend = await open_frontend()
    template = frontend.models.get("demo").loaded.template
    await frontend.until(lambda: not template.has_process)
    template._small._idle_s = 600
    await frontend.runtime.publish("other", instance_id=2)
    await frontend.until_served("other")
    messages: Any = [{"role": "user", "content": "Hi"}] * (HERE_MESSAGE_COUNT + 1)
    await frontend.client.chat.completions.create(model="demo", messages=messages)
    assert template.has_process
    await frontend.models.__aexit__()
    assert not template.has_process
