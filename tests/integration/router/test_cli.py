"""`dynamo-redis router-state` and `dynamo-redis best-worker`, against routers in this process."""

from __future__ import annotations

import asyncio
import json

import pytest

from dynamo_redis.names import with_hex_ids
from tests.integration.conftest import Cli, Done
from tests.routed_deployment import Deployment, until


async def call(cli: Cli, *arguments: str) -> Done:
    """Run a command, which has an event loop of its own, beside the one that it asks."""
    return await asyncio.to_thread(cli, *arguments)


async def test_router_shows_state_and_explains_a_choice(deployment: Deployment, cli: Cli) -> None:
    worker = await deployment.worker(data_parallel_size=2)
    router, _ = await deployment.router()
    prompt = list(range(2, 162))
    request = {
        "model": "demo",
        "token_ids": prompt,
        "stop_conditions": {"max_tokens": 1},
        "sampling_options": {},
        "eos_token_ids": [],
    }
    first = await router.generate(request, False)
    held_by = first.choice.worker
    assert [item async for item in first]
    await until(lambda: router.state().index["block_count"] == 10)

    explained = await call(cli, "best-worker", "--token-ids", json.dumps(prompt), "--json")
    answer = json.loads(explained.out)
    assert (answer["instance_id"], answer["dp_rank"]) == (held_by.instance_id, held_by.dp_rank)
    assert (answer["token_count"], answer["overlap_blocks"]) == (160, 10)
    assert answer["blind"] is False
    costs = {cost["dp_rank"]: cost["cost"] for cost in answer["costs"]}
    assert costs == {held_by.dp_rank: 10, 1 - held_by.dp_rank: 20}

    shown = await call(cli, "best-worker", "--model", "demo", "--prompt", "Once upon a time")
    assert shown.code == 0, shown.err
    assert shown.out.startswith("5 tokens, 0 whole blocks of 16\n")
    assert shown.out.count(f"{worker.instance_id:x}") == 2
    assert shown.out.count("chosen") == 1

    chat = await call(cli, "best-worker", "--message", "Once upon a time", "--json")
    assert json.loads(chat.out)["token_count"] > 5  # the template's own
    predicting, _ = await deployment.router(use_kv_events=False)
    async with asyncio.timeout(60):  # its position, and the workers it asks, go on changing
        while True:
            told = (await call(cli, "router-state", "--json")).json
            states = {str(state["router_id"]): state for state in told}
            assert states.keys() == {router.router_id, predicting.router_id}
            if states[router.router_id] == with_hex_ids(json.loads(json.dumps(router.state().to_json()))):
                break
    table = (await call(cli, "router-state")).out
    assert router.router_id in table
    assert "events (stream)" in table
    assert "prediction" in table
    assert "0.0%" in table


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "give one of --message, --prompt and --token-ids"),
        (["--prompt", "a", "--token-ids", "[1]"], 2, "give one of --message, --prompt and --token-ids"),
        (["--token-ids", "[1, -1]"], 2, "--token-ids takes a JSON list"),
        (["--prompt", "a", "--model", "other"], 1, "no model 'other' is served; the served models are: demo"),
        (["--prompt", "a"], 1, "start a frontend with --router-mode kv"),
    ],
)
async def test_errors_name_their_remedy(
    deployment: Deployment, cli: Cli, arguments: list[str], code: int, said: str
) -> None:
    await deployment.worker()
    done = await call(cli, "best-worker", *arguments)
    assert done.code == code
    assert said in done.err
    assert done.err.count("\n") == 1


async def test_without_anybody_there_is_nothing_to_show(deployment: Deployment, cli: Cli) -> None:
    done = await call(cli, "router-state")
    assert (done.code, done.out) == (0, "")
    assert "no routers: start a frontend with --router-mode kv" in done.err
    assert (await call(cli, "router-state", "--json")).json == []
    assert "no model is served: start a worker" in (await call(cli, "best-worker", "--prompt", "a")).err
