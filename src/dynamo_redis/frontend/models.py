"""The models that can be served now: a live set, from the model cards in the registry."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.config import RouterSettings
from dynamo_redis.errors import DynamoRedisError, InvalidRequest, ModelCacheError, Overloaded, StoreError
from dynamo_redis.frontend.busy import ModelThresholds
from dynamo_redis.frontend.http.errors import model_broken, model_loading, model_not_found, no_workers
from dynamo_redis.frontend.model import Answer, CardEntry, EndpointClient, Model, NamedModel
from dynamo_redis.frontend.model_loading import LoadedModel, load_model
from dynamo_redis.models.chat_template import ChatTemplate
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.names import MODEL_CARDS, EndpointName
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.among import IdsWithout
from dynamo_redis.runtime.following import follow, key_of
from dynamo_redis.store.base import Delete, DeleteCause, ObjectStore, Put, Registry, WatchBatch
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

LINGER_S = 2.0
"""Seconds for which a card counts after its lease expired: its instance is probed in this time."""

REMEMBERED_S = 300.0
"""Seconds for which a model that is no longer served is unavailable, not unknown: workers may come back."""

_REMEMBERED_COUNT = 1024  # beyond it, the model that ended first is forgotten

_RETRY_PAUSE_S = (0.25, 5.0)

_LOOK_S = 0.1

MAX_VERSIONS = 4
"""Most versions of one model that are loaded at once: each takes the memory of a tokenizer."""

_NOT_NOW = {
    ModelCacheError: "its files cannot be kept here now",
    Overloaded: "its chat templates cannot be tried now",
}


OpenClient = Callable[[EndpointName], Awaitable[EndpointClient]]
"""Opens the client of an endpoint. Raises StoreError."""


class Runtime(Protocol):
    """The part of a runtime that the set needs."""

    @property
    def registry(self) -> Registry: ...
    @property
    def objects(self) -> ObjectStore: ...


class LiveModels:
    """Watches the cards and keeps the set. Use it as `async with`.

    A model is served from the end of its loading until its last card is gone. If the cards of one name
    differ, as in a rolling update, each version is loaded, at most `MAX_VERSIONS`. Requests are shared out
    among the versions that can take them, in proportion to their instances. A card that was deleted or
    revoked is gone at once. A card that *expired*, or that a resync no longer finds, counts while its
    instance is in the endpoint's view (see `runtime/discovery.py`), and at least for `LINGER_S`: a lost
    registry must not end the service. While Redis is away the set does not change.

    It owns a task that reads the watch, a task for each version that is being loaded, a task while cards
    linger, two threads that build models, and the processes of the models' chat templates. The processes of a
    model that is no longer served end when they are idle.

    The registry bounds the watch's queue (overflow: a resync). The handler only updates dictionaries and
    starts tasks, so a large model does not delay it.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        open_client: OpenClient,
        cache_dir: Path,
        lease_ttl_s: float = 10.0,
        tokenizer: Literal["fastokens", "default"] = "default",
        router_settings: RouterSettings | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`router_settings` have the busy thresholds of models for which none were set."""
        self._runtime = runtime
        self.thresholds = ModelThresholds(runtime.registry, router_settings, on_change=self._count_load_soon)
        self._open_client = open_client
        self._cache_dir = cache_dir
        self._lease_ttl_s = lease_ttl_s
        self._wants_fastokens = tokenizer == "fastokens"
        self._clock = clock
        self._models: dict[str, NamedModel] = {}
        self._names: dict[str, str] = {}  # card key → name of the model it belongs to
        self._clients: dict[EndpointName, EndpointClient] = {}
        self._client_lock = asyncio.Lock()
        self._lingering: dict[str, float] = {}  # card key → monotonic time until which it counts in any case
        self._gone: dict[str, float] = {}  # name once served → monotonic time of its end, in that order
        self._puts = 0
        self._templates: set[ChatTemplate] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.Task[None] | None = None
        self._rng = random.Random()  # noqa: S311 - spreading load, no secret
        self._supervisor = Supervisor(log, "the models")
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="model")
        self.version = 0
        """A number that grows when cards come, change or go, and with each model that is loaded."""
        self.first_state = asyncio.Event()
        """Set once the cards at the start are known."""

    # ----------------------------------------------------------------- lifetime

    async def __aenter__(self) -> Self:
        def on_batch(batch: WatchBatch) -> None:
            self.apply(batch)
            self.first_state.set()

        self._start(follow(self._runtime.registry, MODEL_CARDS, on_batch, self._supervisor))
        self._start(self.thresholds.follow())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()
        for template in self._templates:
            await template.aclose()
        # A build under way cannot be interrupted; do not wait for it.
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ----------------------------------------------------------------- reading

    def known(self) -> list[NamedModel]:
        """Return all models that have a card, loaded or not, ordered by name."""
        return sorted(self._models.values(), key=lambda m: m.name)

    def served(self) -> list[NamedModel]:
        """Return the loaded models, ordered by name."""
        return sorted((m for m in self._models.values() if m.loaded()), key=lambda m: m.name)

    async def until_loaded(self) -> None:
        """Wait until each model of the first state is served, or cannot be loaded for now."""
        await self.first_state.wait()
        while loading := [
            version.loading
            for named in self._models.values()
            for version in named.versions.values()
            if version.loading is not None and version.failure is None
        ]:
            await asyncio.wait(loading, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)

    def named(self, name: str) -> NamedModel:
        """Return the loaded model of that name.

        Raises ApiError: 404 for an unknown model; 503 for a model that is not loaded, or that was served
        within the last `REMEMBERED_S`.
        """
        named = self._models.get(name)
        if named is None:
            if self._clock.monotonic() < self._gone.get(name, -REMEMBERED_S) + REMEMBERED_S:
                raise no_workers(name)
            # Before the first state is known, any model may exist.
            raise model_not_found(name) if self.first_state.is_set() else model_loading(name)
        if not named.loaded():
            failures = [model.failure for model in named.versions.values()]
            if not failures or None in failures:
                raise model_loading(name)
            raise model_broken(name, failures[-1] or "")
        return named

    def get(self, name: str, can_serve: Callable[[LoadedModel], bool] = lambda _: True) -> Model:
        """Return the version of a model for the next request, at random in proportion to the instances.

        Only versions that `can_serve` the request are used, if there are any. Raises the errors of `named`.
        """
        named = self.named(name)
        versions = named.loaded()
        if len(versions) == 1:
            return versions[0]
        versions = [model for model in versions if model.loaded and can_serve(model.loaded)] or versions
        counts = [named.reachable_count(model) for model in versions]
        return self._rng.choices(versions, counts if any(counts) else None)[0]

    def with_longer_context(
        self, model: Model, can_serve: Callable[[LoadedModel], bool] = lambda _: True
    ) -> Model | None:
        """Return the version with the longest context that `can_serve` the request, if it is longer than that
        of `model`; of several, the one with the most instances. Else None.
        """
        assert model.loaded is not None
        named = self._models.get(model.name)
        best, found = (model.loaded.context_length, 0), None
        for other in named.loaded() if named else ():
            if named and other.loaded and can_serve(other.loaded):
                rank = other.loaded.context_length, named.reachable_count(other)
                if other.loaded.context_length > model.loaded.context_length and rank > best:
                    best, found = rank, other
        return found

    async def generate(
        self,
        model: Model,
        request: GenerateRequest,
        context: Context,
        excluded: Collection[int] = (),
    ) -> Answer:
        """Send a request to one of the model's instances that are not excluded. Raises PlaneError;
        InvalidRequest if the request names an instance that does not serve the model."""
        assert model.client is not None
        among: Collection[int] = IdsWithout(model.among, excluded) if excluded else model.among
        wanted = request.get("backend_instance_id")
        if wanted is not None:
            if wanted not in model.among:
                raise InvalidRequest(f"nvext.backend_instance_id: {wanted} serves no model {model.name!r}")
            among = [wanted] if wanted in among else []
        busy = self.thresholds.of(model.name)
        if busy.is_set:
            return await model.client.generate(request, False, context, among=among, busy=busy)
        return await model.client.generate(request, False, context, among=among)

    async def count_load(self, name: str) -> None:
        """Begin to count the load of a model's workers, as its busy thresholds need."""
        named = self._models.get(name)
        clients = {model.client for model in (named.loaded() if named is not None else ())}
        await asyncio.gather(*(client.count_load() for client in clients if client is not None))

    def _count_load_soon(self, name: str) -> None:
        if self.thresholds.of(name).is_set:
            self._start(self.count_load(name))

    def clients(self) -> set[EndpointClient]:
        """Return the clients of the models that are served."""
        return {version.client for model in self.served() for version in model.loaded() if version.client}

    def migration_limit(self, model: Model) -> int:
        """Return the limit that the cards of this version of a model name: the highest."""
        named = self._models.get(model.name)
        cards = named.cards.values() if named is not None else ()
        return max((entry.card.migration_limit for entry in cards if entry.source == model.source), default=0)

    # ----------------------------------------------------------------- the watch

    def apply(self, batch: WatchBatch) -> None:
        """Apply a batch to the set. Loading goes on in the background.

        An unreadable card is logged and skipped; the last good card of its key stays.
        """
        touched: set[str] = set()

        def take(event: Put | Delete) -> None:
            if isinstance(event, Put):
                key, entry = event.record.key, CardEntry.from_record(event.record, self._puts)
                self._puts += 1
                self._lingering.pop(key, None)
                name = entry.card.display_name
                touched.update(self._forget(key, keep=name), (name,))
                self._models.setdefault(name, NamedModel(name)).cards[key] = entry
                self._names[key] = name
            elif event.key not in self._names:
                return
            elif event.cause in (DeleteCause.EXPIRED, DeleteCause.RESYNC):
                is_expired = event.cause is DeleteCause.EXPIRED
                linger_s = LINGER_S if is_expired else max(LINGER_S, self._lease_ttl_s)
                self._lingering[event.key] = self._clock.monotonic() + linger_s
                if self._sweeper is None or self._sweeper.done():
                    self._sweeper = self._start(self._sweep())
            else:
                self._lingering.pop(event.key, None)
                touched.update(self._forget(event.key))

        self._supervisor.each(batch.events, take, key_of)
        self._reconcile(touched)

    def _forget(self, key: str, *, keep: str | None = None) -> set[str]:
        """Remove a card from its model, unless that is `keep`. Return the names of the changed models."""
        name = self._names.get(key)
        if name is None or name == keep:
            return set()
        del self._names[key]
        del self._models[name].cards[key]
        return {name}

    async def _sweep(self) -> None:
        """Drop lingering cards after their time, once their instance is gone."""
        while self._lingering:
            await asyncio.sleep(LINGER_S / 4)
            now = self._clock.monotonic()
            for key, until in tuple(self._lingering.items()):
                entry = self._models[self._names[key]].cards[key]
                client = self._clients.get(entry.endpoint)
                if now < until or (client is not None and entry.instance_id in client.instance_ids()):
                    continue
                del self._lingering[key]
                self._reconcile(self._forget(key))

    # ----------------------------------------------------------------- loading

    def _reconcile(self, names: Collection[str]) -> None:
        """Update models to their cards, drop those without a card, and restrict each to its own instances.

        An instance without a card is not chosen: it may be about to announce another model.
        """
        self.version += 1
        for name in names:
            named = self._models[name]
            if named.cards:
                self._choose_versions(named)
                self._log_versions(named)
                continue
            for model in named.versions.values():
                self._retire(named, model)
            del self._models[name]
            if named.loaded():
                self._gone.pop(name, None)
                self._gone[name] = self._clock.monotonic()
                if len(self._gone) > _REMEMBERED_COUNT:
                    del self._gone[next(iter(self._gone))]
            self._start(self._release_clients())
            log.info("model %r is no longer served", name)
        for named in self._models.values():
            for model in named.loaded():
                model.among.set(named.instance_ids(model))

    def _choose_versions(self, named: NamedModel) -> None:
        """Drop the versions without a card, and load new ones, up to `MAX_VERSIONS`.

        The versions with the most workers, then the newest, are loaded first. A served version goes on until
        another is loaded in its place.
        """
        cards = named.by_source()
        has_successor = any(model.source in cards for model in named.loaded())
        for source, model in tuple(named.versions.items()):
            if source not in cards and (has_successor or model.loaded is None):
                self._retire(named, model)
                del named.versions[source]
        room_count = MAX_VERSIONS - sum(not model.is_broken for model in named.versions.values())
        waiting = sorted(
            cards.keys() - named.versions.keys(),
            key=lambda source: (len(cards[source]), max(entry.order for entry in cards[source])),
        )
        for source in waiting[max(len(waiting) - room_count, 0) :]:
            model = named.versions[source] = Model(named.name, source)
            newest = max(cards[source], key=lambda entry: entry.order)
            model.loading = self._start(self._load(named, model, newest))

    def _log_versions(self, named: NamedModel) -> None:
        """Log the versions of a model when its workers begin to differ, and when they agree again."""
        versions = named.by_source()
        if versions.keys() == named.logged_sources:
            return
        before, named.logged_sources = named.logged_sources, frozenset(versions)
        if len(versions) > 1:
            described = "; ".join(
                f"{len(cards)} at {source.endpoint} with card {source.fingerprint[:8]}, context "
                f"{cards[0].card.context_length}" + ("" if source in named.versions else ": not served")
                for source, cards in versions.items()
            )
            log.warning(
                "model %r has workers in %d groups that differ in endpoint or card, and its requests are "
                "shared out among all that can take them: %s",
                named.name,
                len(versions),
                described,
            )
        elif len(before) > 1:
            log.info("all workers of model %r have one endpoint and one card again", named.name)

    def _retire(self, named: NamedModel, model: Model) -> None:
        """Stop loading a version. Its waiting requests go to the instances that replace it."""
        if model.loading is not None:
            model.loading.cancel()
        model.loading = None
        model.among.set(named.instance_ids(model))

    async def _load(self, named: NamedModel, model: Model, entry: CardEntry) -> None:
        pause_s, longest_s = _RETRY_PAUSE_S
        while True:
            try:
                await self._load_once(named, model, entry)
            except (StoreError, ModelCacheError, Overloaded) as exc:
                failure = _NOT_NOW.get(type(exc), "its files cannot be fetched now")
                if model.failure != failure:
                    log.warning("model %r cannot be loaded yet, trying again: %s", model.name, exc)
                model.failure = failure
            except Exception as exc:
                # Catch every error: a task that ended here would leave the model at "loading" for ever.
                is_defect = not isinstance(exc, DynamoRedisError)
                log.error("model %r cannot be served: %s", model.name, exc, exc_info=is_defect)
                model.failure = str(exc)
                model.is_broken, model.loading = True, None
                self._reconcile({model.name})
                return
            else:
                return
            await asyncio.sleep(pause_s * (0.5 + random.random() / 2))  # noqa: S311 - jitter
            pause_s = min(2 * pause_s, longest_s)

    async def _load_once(self, named: NamedModel, model: Model, entry: CardEntry) -> None:
        loaded = await load_model(self._runtime.objects, entry.card, self._cache_dir, self._executor)
        self._templates = {template for template in self._templates if template.has_process}
        # A served template without a process is kept: it starts a process again at the next chat.
        versions = [version.loaded for other in self._models.values() for version in other.versions.values()]
        self._templates.update(v.template for v in versions if v is not None and v.template is not None)
        if loaded.template is not None:
            self._templates.add(loaded.template)
        async with self._client_lock:
            if entry.endpoint not in self._clients:
                self._clients[entry.endpoint] = await self._open_client(entry.endpoint)
            client = self._clients[entry.endpoint]
        if self.thresholds.of(model.name).is_set:
            await client.count_load()
        log.info("model %r is %s", model.name, "served from new files" if named.loaded() else "served")
        model.loaded, model.client, model.failure, model.loading = loaded, client, None, None
        named.created_at = named.created_at or self._clock.wall()
        self._reconcile({named.name})
        await self._release_clients()
        if self._wants_fastokens:
            self._start(self._accelerate(loaded))

    async def _accelerate(self, model: LoadedModel) -> None:
        """Have a served model's prompts tokenized faster, if that gives the same tokens."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, model.accelerate)
        except Exception as exc:
            is_defect = not isinstance(exc, DynamoRedisError)
            text = "prompts of model %r are tokenized by tokenizers, which is slower: %s"
            log.log(logging.ERROR if is_defect else logging.INFO, text, model.name, exc, exc_info=is_defect)
        else:
            log.debug("prompts of model %r are tokenized by fastokens", model.name)

    async def _release_clients(self) -> None:
        """Close the clients of endpoints without a card. Requests under way go on."""
        async with self._client_lock:
            used = {entry.endpoint for named in self._models.values() for entry in named.cards.values()}
            used |= {model.source.endpoint for named in self._models.values() for model in named.loaded()}
            for endpoint in self._clients.keys() - used:
                await self._clients.pop(endpoint).aclose()
