"""Following events: a defect in the intake does not end a follower."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from dynamo_redis.router.index import followers
from dynamo_redis.router.index.followers import SnapshotStart, StreamFollower, TopicFollower
from dynamo_redis.router.index.snapshot import IndexSnapshot
from dynamo_redis.store.event_base import EntryId, NewEntry, StreamName
from dynamo_redis.store.streams.memory import MemoryEventStreams

STREAM = StreamName("dynamo", "backend", "kv_events")


class Intake:
    """Applies each batch, but raises at the first."""

    def __init__(self) -> None:
        self.applied: list[bytes] = []
        self.loss_count = 0
        self.has_begun = asyncio.Event()

    def apply(self, content: bytes) -> int:
        self.applied.append(content)
        if len(self.applied) == 1:
            raise RuntimeError("a defect")
        return 1

    def note_applied(self, shard: int, position: EntryId, event_count: int) -> None:
        pass

    def restore(self, snapshot: IndexSnapshot) -> None:
        pass

    def note_possible_loss(self) -> None:
        self.loss_count += 1

    def note_caught_up(self, shard: int) -> None:
        self.has_begun.set()


async def no_snapshot() -> IndexSnapshot | None:
    return None


@pytest.mark.parametrize("mode", ["stream", "pubsub"])
async def test_follower_goes_on_after_a_defect(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(followers, "DEFECT_PAUSE_S", 0.0)
    streams, intake = MemoryEventStreams(), Intake()
    follower: StreamFollower | TopicFollower
    if mode == "stream":
        follower = StreamFollower(streams, STREAM, "router", intake, SnapshotStart(no_snapshot, intake))
    else:
        follower = TopicFollower(streams, STREAM, intake)
    task = asyncio.create_task(follower.run())
    with anyio.fail_after(10):
        await intake.has_begun.wait()
        while len(intake.applied) < 2:
            if mode == "stream":
                await streams.append(STREAM, [NewEntry(b"event", 1)])
            else:
                await streams.publish(STREAM, b"event")
            await anyio.sleep(0.01)
        while not intake.loss_count:
            await anyio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    await follower.aclose()
    assert "a defect" in caplog.text
