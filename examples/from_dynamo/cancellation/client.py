"""The first of three processes: it asks for a thousand numbers, and stops after three.

DYN_REDIS_URL=redis://localhost:6379 python examples/from_dynamo/cancellation/client.py
"""

import uvloop

from dynamo_redis.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint("cancellation.middle.generate").client()
    await client.wait_for_instances()
    context = Context()
    seen: list[int] = []
    async for number in await client.round_robin(1000, annotated=False, context=context):
        seen.append(number)
        if len(seen) == 3:
            context.stop_generating()
            break
    print(f"client: stopped after {seen}", flush=True)


if __name__ == "__main__":
    uvloop.run(main())
