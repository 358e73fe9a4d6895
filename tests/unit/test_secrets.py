"""No text of a value, as repr or message, shows a secret."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from typing import Any

import pytest

import dynamo_redis
from dynamo_redis.cli.settings import describe
from dynamo_redis.config import OpenAIEngineSettings, StoreSettings
from dynamo_redis.engines.openai.http import EngineHttp
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.base import Target
from dynamo_redis.runtime import Instance, Settings
from dynamo_redis.store.base import LeaseId, Put, PutOp, Record, Revision, Snapshot, WatchBatch
from dynamo_redis.store.registry.scripts_api import OwnedPut

SECRET = b"the secret of an instance, 32 by"
PASSWORD = "hunter2"
URL = f"redis://user:{PASSWORD}@127.0.0.1:6379"
ENGINE_URL = f"http://user:{PASSWORD}@127.0.0.1:8001/v1"

HOLDS_SECRETS = re.compile(r"secret|password|api_key|^env$|redis_url|^value$")
HARMLESS = {
    "RedisLogin.password_file",  # a path
    "ShownValue.value",  # it is made for showing; `show_value` masks the secret
    "_Stored.value",  # a LockedValue, which hides its bytes
    "_Value.value",  # the load of a rank
}


def dataclasses_of_the_package() -> set[type[Any]]:
    found = set()
    for module in pkgutil.walk_packages(dynamo_redis.__path__, "dynamo_redis."):
        if module.name != "dynamo_redis.__main__":
            values = vars(importlib.import_module(module.name)).values()
            found |= {
                value for value in values if isinstance(value, type) and dataclasses.is_dataclass(value)
            }
    return {cls for cls in found if cls.__module__.startswith("dynamo_redis.")}


def test_dataclasses_hide_fields_that_hold_secrets() -> None:
    shown = {
        f"{cls.__name__}.{field.name}"
        for cls in dataclasses_of_the_package()
        if cls.__dataclass_params__.repr
        for field in dataclasses.fields(cls)
        if field.repr and HOLDS_SECRETS.search(field.name)
    }
    assert shown <= HARMLESS


@pytest.fixture
def instance() -> Instance:
    name = EndpointName("dynamo", "backend", "generate")
    return Instance(name, InstanceId(7), {"tcp": "127.0.0.1:5/s"}, secret=SECRET)


def test_values_made_from_a_secret_do_not_show_it(instance: Instance) -> None:
    record = Record("k", instance.to_bytes(), Revision("1-0"), Revision("1-0"), 1, LeaseId(7))
    target = instance.target("tcp")
    assert isinstance(target, Target)
    values = [
        instance,
        target,
        record,
        Snapshot((record,), Revision("1-0")),
        WatchBatch((Put(record),), Revision("1-0")),
        PutOp("k", instance.to_bytes()),
        OwnedPut("k", instance.to_bytes()),
        Settings.load(redis_url=URL),
        StoreSettings.load(redis_url=URL),
        OpenAIEngineSettings.load(engine_url=ENGINE_URL),
    ]
    for value in values:
        for text in (repr(value), str(value), f"{value}"):
            assert SECRET.hex() not in text
            assert repr(SECRET)[2:-1] not in text
            assert PASSWORD not in text


def test_engine_is_shown_without_its_password() -> None:
    engine = EngineHttp(ENGINE_URL, None, 1.0)
    assert engine.url == "http://127.0.0.1:8001"


def test_wrong_engine_address_is_named_without_its_password() -> None:
    with pytest.raises(ValueError, match="not an HTTP address") as raised:
        EngineHttp(f"user:{PASSWORD}@127.0.0.1:8001", None, 1.0)
    assert PASSWORD not in str(raised.value)


def test_settings_command_masks_the_password_of_an_engine() -> None:
    (row,) = [
        row
        for row in describe(OpenAIEngineSettings, {"engine_url": ENGINE_URL})
        if "engine_url" in row["option"].replace("-", "_")
    ]
    assert row["value"] == "http://user:***@127.0.0.1:8001/v1"
