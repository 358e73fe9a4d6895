"""Recent events, of which those of one moment are one."""

from __future__ import annotations

from dynamo_redis.frontend.dashboard.event_log import EVENT_COUNT, EventLog


def test_events_of_one_moment_become_one() -> None:
    log = EventLog()
    log.add(10.0, "joined", "a.b.c", detail="1f")
    log.add(10.5, "redis_lost", "Redis")
    log.add(12.0, "joined", "a.b.c", detail="2f")
    log.add(12.0, "joined", "x.y.z", detail="3f")
    log.add(16.0, "joined", "a.b.c", detail="4f")
    found = [(event.at, event.kind, event.subject, event.count, event.detail) for event in log]
    assert found == [
        (10.0, "joined", "a.b.c", 2, ""),
        (10.5, "redis_lost", "Redis", 1, ""),
        (12.0, "joined", "x.y.z", 1, "3f"),
        (16.0, "joined", "a.b.c", 1, "4f"),
    ]


def test_oldest_events_go_first() -> None:
    log = EventLog()
    for place in range(EVENT_COUNT + 3):
        log.add(10.0 * place, "migrated", "")
    assert [event.number for event in log] == list(range(4, EVENT_COUNT + 4))
