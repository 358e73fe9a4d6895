"""`dynamo-redis best-worker`: the worker that a prompt would go to, and the cost of each worker."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import CommandFailed, require_extra
from dynamo_redis.cli.options import SettingsCommand, load, setting_options, store_options
from dynamo_redis.cli.output import print_json_line, print_line, print_table
from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import DynamoRedisError, ModelError
from dynamo_redis.names import MODEL_CARDS, format_instance_id
from dynamo_redis.templates.protocol import render_job

if TYPE_CHECKING:
    from dynamo_redis.frontend.model import CardEntry
    from dynamo_redis.runtime.runtime import DistributedRuntime


@click.command("best-worker", cls=SettingsCommand)
@click.option(
    "--message", metavar="TEXT", help="A chat of this one user message, rendered by the model's template."
)
@click.option("--prompt", metavar="TEXT", help="A prompt as in `/v1/completions`, without a template.")
@click.option("--token-ids", metavar="JSON", help="A prompt as a JSON list of token ids.")
@click.option("--model", metavar="NAME", help="The model.  [default: the only one that is served]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@setting_options(FrontendSettings, "model_cache")
@store_options
def best_worker(
    message: str | None,
    prompt: str | None,
    token_ids: str | None,
    model: str | None,
    as_json: bool,
    **options: str | None,
) -> None:
    """Ask a router which worker it would choose for a prompt now, and print the cost of each worker.

    Nothing is sent to a worker, and nothing is booked. All columns count blocks. MATCHED: blocks of the
    prompt that the worker holds already. PREFILL: blocks that it would have to read, if it held none, with
    those that it must read for other requests. DECODE: blocks that its requests would hold. COST is PREFILL,
    minus the credit for MATCHED, plus DECODE. The lowest cost is chosen.

    \b
    Examples:
      dynamo-redis best-worker --message "Hello!"
      dynamo-redis best-worker --prompt "Once upon a time"
      dynamo-redis best-worker --model Qwen/Qwen3-0.6B --token-ids "[1, 2, 3, 4]" --json
    """
    if [message, prompt, token_ids].count(None) != 2:
        raise click.UsageError("give one of --message, --prompt and --token-ids")
    require_extra("http")
    explained = connect.run(_ask(message, prompt, _parse_token_ids(token_ids), model, options))
    if as_json:
        print_json_line(explained)
        return
    block_size = explained["block_size"]
    whole_count = explained["token_count"] // block_size
    print_line(
        f"{explained['token_count']} tokens, {whole_count} whole block{'s' * (whole_count != 1)} of "
        f"{block_size}"
    )
    columns = ["WORKER", "RANK", "MATCHED", "PREFILL", "DECODE", "COST", ""]
    rows = []
    for cost in explained["costs"]:
        instance_id, dp_rank = cost["instance_id"], cost["dp_rank"]
        matched = ", ".join(f"{count} {tier}" for tier, count in cost["matched"].items() if count) or "0"
        blocks = [f"{cost[name]:g}" for name in ("prefill_blocks", "decode_blocks", "cost")]
        is_chosen = (instance_id, dp_rank) == (explained["instance_id"], explained["dp_rank"])
        chosen = "chosen" if is_chosen else ""
        rows.append([format_instance_id(instance_id), str(dp_rank), matched, *blocks, chosen])
    print_table(columns, rows, empty="no workers")


def _parse_token_ids(token_ids: str | None) -> list[int] | None:
    if token_ids is None:
        return None
    try:
        given = json.loads(token_ids)
    except ValueError:
        given = None
    if not isinstance(given, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in given):
        raise click.UsageError("--token-ids takes a JSON list of token ids, for example '[1, 2, 3]'")
    return given


async def _ask(
    message: str | None,
    prompt: str | None,
    token_ids: list[int] | None,
    model: str | None,
    options: dict[str, str | None],
) -> dict[str, Any]:
    from dynamo_redis.frontend.http.server import model_cache
    from dynamo_redis.frontend.model_loading import load_model
    from dynamo_redis.router.asking import ask_best_worker

    async with connect.open_runtime(options) as runtime:
        entry = await _served_card(runtime, model)
        if token_ids is None:
            wanted_cache = load(FrontendSettings, options).model_cache
            with model_cache(wanted_cache) as cache_dir, ThreadPoolExecutor(1) as executor:
                try:
                    loaded = await load_model(runtime.objects, entry.card, cache_dir, executor)
                except ModelError as exc:
                    name = entry.card.display_name
                    raise CommandFailed(f"model {name!r} cannot be loaded: {exc}") from exc
            try:
                if prompt is not None:
                    token_ids = loaded.tokenizer.encode(prompt, add_special_tokens=True)
                elif loaded.template is None:
                    raise CommandFailed(f"model {loaded.name!r} has no chat template: give --prompt")
                else:
                    job = render_job([{"role": "user", "content": message}])
                    token_ids = loaded.encode_rendered(await loaded.template.render(job))
            finally:
                if loaded.template is not None:
                    await loaded.template.aclose()
        explained = await ask_best_worker(runtime, entry.endpoint, {"token_ids": token_ids})
        return {"model": entry.card.display_name, "token_count": len(token_ids), **explained}


async def _served_card(runtime: DistributedRuntime, wanted: str | None) -> CardEntry:
    """Return the card of the wanted model. Raises CommandFailed if there is none, or several and no name."""
    from dynamo_redis.frontend.model import CardEntry

    entries: dict[str, CardEntry] = {}
    for record in (await runtime.registry.get_prefix(MODEL_CARDS)).records:
        try:
            entry = CardEntry.from_record(record, 0)
        except DynamoRedisError:
            continue
        entries[entry.card.display_name] = entry
    if wanted is None and len(entries) == 1:
        return next(iter(entries.values()))
    if wanted in entries:
        return entries[wanted]
    if not entries:
        raise CommandFailed("no model is served: start a worker")
    names = ", ".join(sorted(entries))
    if wanted is None:
        raise CommandFailed(f"several models are served: choose one with --model: {names}")
    raise CommandFailed(f"no model {wanted!r} is served; the served models are: {names}")
