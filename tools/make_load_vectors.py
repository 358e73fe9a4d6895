"""Makes tests/vectors/potential_blocks.json: loads of two workers as Dynamo counts them.

    pip install ai-dynamo-runtime==1.6.1
    python tools/make_load_vectors.py > tests/vectors/potential_blocks.json

Requests whose prompts begin alike come to two workers and end, in random order. After each, Dynamo reports
the blocks that each worker would hold with one more request. A prompt is written here as one token a block.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from typing import Any

from dynamo._core import SelectionService

BLOCK_SIZE = 16
WORKERS = (1, 2)
STEPS = 150


def prompt(rng: random.Random, systems: list[list[int]]) -> list[int]:
    """Return the beginning of one of the system prompts, and a few blocks of which some are common, too."""
    system = rng.choice(systems)
    return system[: rng.randint(1, len(system))] + rng.choices(range(3), k=rng.randint(0, 6))


async def main() -> None:
    """Write the vectors."""
    service = SelectionService(indexer_threads=1)
    for worker in WORKERS:
        kv_events = f"tcp://127.0.0.1:{9 + worker}"  # no process needs to listen there
        await service.upsert_worker(
            {
                "worker_id": worker,
                "model_name": "m",
                "endpoint": f"worker-{worker}",
                "block_size": BLOCK_SIZE,
                "kv_events_endpoint": kv_events,
                "replay_endpoint": kv_events,
            }
        )
    rng = random.Random(5)  # noqa: S311 - test data, no secret
    systems = [rng.choices(range(100, 999), k=rng.randint(3, 40)) for _ in range(3)]
    live: list[str] = []
    steps: list[dict[str, Any]] = []

    def request(blocks: list[int], **more: Any) -> dict[str, Any]:
        tokens = [token for token in blocks for _ in range(BLOCK_SIZE)]
        return {"model_name": "m", "token_ids": tokens, **more}

    for number in range(STEPS):
        step: dict[str, Any]
        if live and rng.random() < 0.45:
            step = {"free": live.pop(rng.randrange(len(live)))}
            await service.free_reservation(step["free"])
        else:
            worker, blocks = rng.choice(WORKERS), prompt(rng, systems)
            live.append(str(number))
            step = {"add": live[-1], "worker": worker, "prompt": blocks}
            await service.create_reservation(request(blocks, selection_id=live[-1], worker_id=worker))
            await service.prefill_complete(live[-1])
        step["asked"] = prompt(rng, systems)
        loads = await service.potential_loads(request(step["asked"]))
        step["blocks"] = {load["worker_id"]: load["potential_decode_blocks"] for load in loads}
        steps.append(step)
    vectors = {"made_with": "ai-dynamo-runtime 1.6.1", "block_size": BLOCK_SIZE, "steps": steps}
    sys.stdout.write(json.dumps(vectors) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
