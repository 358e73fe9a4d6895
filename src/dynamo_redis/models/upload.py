"""The upload of a model's files to the object store, and the card that names them.

A worker uploads the files of its `ModelDirectory`, registers the card (`publish_model`), and uploads again
files that vanish (`keep_model_files`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Callable
from typing import Literal, Protocol

import anyio.to_thread

from dynamo_redis.errors import ModelError, StoreError
from dynamo_redis.models.card import FileReference, ModelCard, ModelKind, RuntimeConfig
from dynamo_redis.models.directory import ModelDirectory, ModelFile
from dynamo_redis.names import EndpointName, InstanceId, slug
from dynamo_redis.store.base import LostReason, ObjectStore, Registration, Registry, parse_object_url

log = logging.getLogger(__name__)

MODEL_BUCKET = "models"
"""The object store's bucket for model files.

Its names: `<model slug>/<first digits of sha256>/<file name>`.
"""

UPLOAD_AGAIN_S = 1.0
"""Mean seconds between two attempts to upload to a Redis that refuses all writes."""
CHECK_S = 10.0
"""Mean seconds between two checks that the files of a worker's card are in the object store."""
CHECKED_BY_COUNT = 16
"""Processes up to which each checks as often: beyond, they share the checks that so many make."""
LONGEST_CHECK_S = 300.0
"""Mean seconds between two checks by one process of very many: it may be the only one of its model."""


class PublishingRuntime(Protocol):
    """The part of a runtime that `publish_model` uses."""

    @property
    def registry(self) -> Registry: ...
    @property
    def objects(self) -> ObjectStore: ...
    @property
    def instance_id(self) -> InstanceId: ...


def make_card(
    model: ModelDirectory,
    *,
    model_name: str,
    kv_cache_block_size: int,
    runtime_config: RuntimeConfig | None = None,
    model_type: ModelKind | None = None,
    model_input: Literal["tokens", "text"] = "tokens",
    migration_limit: int = 0,
) -> ModelCard:
    """Return the card of a model as a worker serves it.

    It has the URLs under which `upload_model_files` stores the files. `model_type` None stands for all kinds
    of request that the files allow.
    """
    config = runtime_config or RuntimeConfig()
    if model_type == "embedding" and config.matryoshka is None:
        config = config.model_copy(update={"matryoshka": model.matryoshka})
    return ModelCard(
        display_name=model_name,
        slug=slug(model_name),
        model_type=model_type or model.model_type,
        model_input=model_input,
        context_length=model.context_length,
        kv_cache_block_size=kv_cache_block_size,
        migration_limit=migration_limit,
        runtime_config=config,
        files={
            file.name: FileReference(
                url=f"redis-object://{MODEL_BUCKET}/{slug(model_name)}/{file.sha256[:16]}/{file.name}",
                sha256=file.sha256,
                size_bytes=file.size_bytes,
            )
            for file in model.files.values()
        },
    )


async def upload_model_files(objects: ObjectStore, model: ModelDirectory, card: ModelCard) -> None:
    """Upload the model's files to the URLs of the card. Content that is there already is not sent again.

    Raises ModelError if a file has changed on disk since the directory was read, and StoreError.
    """
    for name, reference in card.files.items():
        await _upload(objects, model.files[name], reference)


async def _upload(objects: ObjectStore, file: ModelFile, reference: FileReference) -> None:
    """Upload one file. Raises ModelError if it has changed on disk, and StoreError."""
    content = await anyio.to_thread.run_sync(file.read)
    if hashlib.sha256(content).hexdigest() != reference.sha256:
        raise ModelError(f"{file.path} has changed since this worker read it: restart it")
    await objects.put(*parse_object_url(reference.url), content)


def check_pause_s(process_count: int) -> float:
    """Return the mean seconds between two checks by one of so many processes."""
    return min(CHECK_S * max(1.0, process_count / CHECKED_BY_COUNT), LONGEST_CHECK_S)


async def keep_model_files(
    objects: ObjectStore,
    model: ModelDirectory,
    card: ModelCard,
    process_count: Callable[[], int],
) -> None:
    """Upload again each of the model's files that vanishes from Redis alone. Runs until it is cancelled.

    It checks each file, with two small exchanges, about every `check_pause_s` of the processes that live.
    """
    failure = ""
    while True:
        await asyncio.sleep(check_pause_s(process_count()) * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
        try:
            for name, reference in card.files.items():
                if not await objects.holds(*parse_object_url(reference.url), reference.sha256):
                    log.warning(
                        "%s of model %s is gone from Redis, or damaged there: uploading it again",
                        name,
                        card.display_name,
                    )
                    await _upload(objects, model.files[name], reference)
            failure = ""
        except (StoreError, ModelError) as exc:
            if str(exc) != failure:
                failure = str(exc)
                log.warning("files of model %s cannot be kept in Redis: %s", card.display_name, failure)


async def publish_model(
    runtime: PublishingRuntime,
    endpoint: EndpointName,
    model: ModelDirectory,
    card: ModelCard,
) -> Registration:
    """Upload the model's files, then register its card for this process's instance of `endpoint`.

    The card lives as long as the process's lease. After the registry has lost its data, the files are
    uploaded again before the card is. Files that vanish alone are uploaded by `keep_model_files`. Waits while
    Redis refuses all writes. Raises ModelError, and StoreError for other failures; nothing is registered
    then.
    """

    async def upload() -> None:
        await upload_model_files(runtime.objects, model, card)

    def on_lost(reason: LostReason) -> None:
        log.warning(
            "this worker's card of model %s was taken out of the registry (%s): it gets no new requests",
            card.display_name,
            reason,
        )

    warned = False
    while True:
        try:
            await upload()
            break
        except StoreError as exc:
            if not exc.refuses_writes:
                raise
            if not warned:
                log.warning("model %s waits for Redis to take its files: %s", card.display_name, exc)
            warned = True
            await asyncio.sleep(UPLOAD_AGAIN_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
    key = endpoint.model_card_key(runtime.instance_id)
    return await runtime.registry.register(key, card.to_bytes(), prepare=upload, on_lost=on_lost)
