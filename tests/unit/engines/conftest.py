"""Fixtures of the engines' tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dynamo_redis.engines.base import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.events.block_hashes import chain, local_hashes
from dynamo_redis.models.directory import ModelDirectory, read_model_directory


class EventOracle:
    """A reader of KV events as a router is; it refuses impossible events."""

    def __init__(self) -> None:
        self.stored: set[int] = set()
        self.events: list[KvEvent] = []

    def __call__(self, event: KvEvent) -> None:
        self.events.append(event)
        match event:
            case BlocksStored(hashes, parent, token_ids, block_size):
                assert hashes
                assert parent is None or parent in self.stored, "stored a block whose predecessor is unknown"
                assert list(hashes) == chain(local_hashes(token_ids, block_size), parent)
                assert len(token_ids) == len(hashes) * block_size
                assert self.stored.isdisjoint(hashes), "stored a block twice"
                self.stored.update(hashes)
            case BlocksRemoved(hashes):
                assert hashes
                assert self.stored.issuperset(hashes), "removed a block that was not stored"
                self.stored.difference_update(hashes)
            case AllBlocksCleared():
                self.stored.clear()


@pytest.fixture(scope="session")
def make_oracle() -> Callable[[], EventOracle]:
    """Return the class, for tests that need a new oracle for each example."""
    return EventOracle


@pytest.fixture
def oracle() -> EventOracle:
    return EventOracle()


@pytest.fixture(scope="session")
def demo_model() -> ModelDirectory:
    return read_model_directory(DEMO_MODEL_PATH)
