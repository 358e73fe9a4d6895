"""Ids in JSON can be read by programs with floats as numbers."""

from __future__ import annotations

import json

from dynamo_redis.names import parse_instance_id, with_hex_ids

LARGE = 7587888160958627806


def test_ids_stand_beside_the_numbers() -> None:
    value = [{"instance_id": LARGE, "workers": [{"instance_id": 1}], "instance_ids": [LARGE], "lease": None}]
    shown = with_hex_ids(value)
    assert shown == [
        {
            "instance_id": LARGE,
            "instance_id_hex": "694d98147d54bfde",
            "workers": [{"instance_id": 1, "instance_id_hex": "1"}],
            "instance_ids": [LARGE],
            "instance_ids_hex": ["694d98147d54bfde"],
            "lease": None,
        }
    ]
    as_floats = json.loads(json.dumps(shown), parse_int=float)
    assert as_floats[0]["instance_id"] != LARGE
    assert parse_instance_id(as_floats[0]["instance_id_hex"]) == LARGE


def test_stored_values_stay_as_they_are() -> None:
    stored = {"key": "k", "value": {"instance_id": LARGE}, "lease": LARGE}
    assert with_hex_ids(stored) == {**stored, "lease_hex": "694d98147d54bfde"}
    assert with_hex_ids({"instance_id": "a text", "lease": True}) == {"instance_id": "a text", "lease": True}
