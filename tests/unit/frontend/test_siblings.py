"""The metrics of several processes in one text."""

from __future__ import annotations

import socket
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_redis.frontend.http import siblings
from dynamo_redis.frontend.http.siblings import answers, ask_siblings, merge

TEXT = """# HELP requests_total Requests
# TYPE requests_total counter
requests_total{model="a b {c}",status="success"} 3.0
# HELP connected 1 while Redis answers
# TYPE connected gauge
connected 1.0
"""


def test_samples_are_grouped_and_named_by_process() -> None:
    merged = merge({"12": TEXT, "7": TEXT.replace("3.0", "4.0")})
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert merged.count("# TYPE") == 2
    assert [(s.labels, s.value) for s in families["requests"].samples] == [
        ({"pid": "12", "model": "a b {c}", "status": "success"}, 3.0),
        ({"pid": "7", "model": "a b {c}", "status": "success"}, 4.0),
    ]
    assert [s.labels for s in families["connected"].samples] == [{"pid": "12"}, {"pid": "7"}]


def test_metric_of_one_process_only_stays() -> None:
    assert merge({"1": "", "2": TEXT}).count('pid="2"') == 2
    assert merge({}) == ""


async def test_only_a_silent_process_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose socket is gone may serve its port all the same."""
    assert await answers(tmp_path, 1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "2"))
        assert await answers(tmp_path, 2)
        listener.listen()
        monkeypatch.setattr(siblings, "ANSWER_S", 0.05)
        assert not await answers(tmp_path, 2)


async def test_hung_process_is_told_from_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "ANSWER_S", 0.2)
    with TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as hung:  # paths of sockets are short
        hung.bind(f"{short}/1")
        hung.listen()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(f"{short}/2")
        assert await ask_siblings(Path(short), "/dashboard/reading?0") == {"1": None}
        assert await ask_siblings(Path(short), "/dashboard/reading?0", without="1") == {}
