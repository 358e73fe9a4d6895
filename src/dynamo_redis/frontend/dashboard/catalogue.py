"""The parts of the page that seldom change: who the instances are, and what their cards say.

They are kept from one state to the next: with a thousand instances, to make them anew each second would take
most of the time.
"""

from __future__ import annotations

from dynamo_redis.frontend.dashboard.page_state import CardFacts, InstanceView
from dynamo_redis.frontend.dashboard.recorder import Recorder
from dynamo_redis.frontend.model import NamedModel
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.names import format_instance_id
from dynamo_redis.runtime.instance import Instance


class Catalogue:
    """The instances and cards of a frontend, by the names that instances have on the page."""

    def __init__(self, models: LiveModels) -> None:
        self._models = models
        self._version = -1
        self._cards: dict[str, CardFacts] = {}
        self._version_counts: dict[str, int] = {}
        self._views: dict[str, tuple[Instance, tuple[str, ...], InstanceView]] = {}

    def cards(self) -> dict[str, CardFacts]:
        """Return the facts of all cards."""
        if self._version != self._models.version:
            self._version = self._models.version
            known = self._models.known()
            self._version_counts = {model.name: len(model.by_source()) for model in known}
            self._cards = _read_cards(known)
        return self._cards

    def version_count(self, model: NamedModel) -> int:
        """Return the number of sorts of a model's cards."""
        self.cards()
        return self._version_counts.get(model.name, 0)

    def views(self, recorder: Recorder) -> dict[str, InstanceView]:
        """Return the instances in the registry, and those that have left it and still count."""
        instances = dict(recorder.instances)
        for member, name in recorder.members().items():
            instances.setdefault(name, member.instance)
        for name, member in recorder.draining.items():
            instances.setdefault(name, member.instance)
        cards, known = self.cards(), self._views
        self._views = {}
        for name, instance in instances.items():
            facts = cards.get(name)
            models = () if facts is None else facts.models
            before = known.get(name)
            if before is None or before[0] is not instance or before[1] is not models:
                before = (instance, models, _view(instance, ", ".join(models)))
            self._views[name] = before
        return {name: view for name, (_, _, view) in self._views.items()}


def _read_cards(known: list[NamedModel]) -> dict[str, CardFacts]:
    cards: dict[str, CardFacts] = {}
    for model in known:
        for entry in model.cards.values():
            name = f"{entry.endpoint}/{format_instance_id(entry.instance_id)}"
            config = entry.card.runtime_config
            blocks = config.total_kv_blocks
            if blocks is not None:
                blocks *= config.data_parallel_size or 1
            before = cards.get(name)
            cards[name] = (
                CardFacts((model.name,), blocks)
                if before is None
                else CardFacts((*before.models, model.name), before.total_blocks or blocks)
            )
    return cards


def _view(instance: Instance, models: str) -> InstanceView:
    return InstanceView(
        endpoint=str(instance.name),
        instance_id=format_instance_id(instance.instance_id),
        models=models,
        address=", ".join(instance.addresses.values()),
        started_at=round(instance.started_at),
    )
