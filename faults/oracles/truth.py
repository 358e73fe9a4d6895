"""The true changes of the registry, from the observer's notes of the change log.

Entries form a tree: each names its predecessor, and a failover that lost a tail begins a branch. Every
incarnation is a tree of its own. An entry is identified by incarnation, id and operation: after a lost tail
the same id can come twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from faults.history import History, Note

CAUSES = {"d": "deleted", "r": "revoked", "x": "expired"}
"""The name that a watch gives to each kind of entry that ends a key."""

State = dict[str, "Entry"]
"""The put of each key that stands."""


@dataclass(slots=True, eq=False)
class Entry:
    """One entry of the change log. `depth` counts the entries before it in its tree."""

    id: str
    kind: str
    key: str
    value: str
    lease: str | None
    incarnation: str
    note: Note
    parent: Entry | None = None
    depth: int = 0

    @property
    def is_put(self) -> bool:
        """True if the key stands afterwards."""
        return self.kind == "p"

    @property
    def is_delete(self) -> bool:
        """True if the key is gone afterwards."""
        return self.kind in CAUSES

    def back(self) -> Iterator[Entry]:
        """Yield this entry and those before it, latest first."""
        entry: Entry | None = self
        while entry is not None:
            yield entry
            entry = entry.parent

    def __str__(self) -> str:
        if self.kind == "i":
            return f"{self.id}, the beginning of incarnation {self.incarnation}"
        what = f"put {self.key} = {self.value}" if self.is_put else f"{CAUSES.get(self.kind)} {self.key}"
        return f"{self.id} {what}"


@dataclass(slots=True)
class Truth:
    """All entries that any server ever had. `torn` are entries whose predecessor was never observed."""

    by_id: defaultdict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    by_key: defaultdict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    torn: list[Entry] = field(default_factory=list)

    @classmethod
    def of(cls, history: History) -> Truth:
        """Put the observer's notes together; servers of one history repeat their common entries."""
        truth = cls()
        entries: dict[tuple[str, str, str], Entry] = {}
        for note in history.of("log"):
            fields = note.fields
            name = (fields["incarnation"], fields["id"], fields["operation"])
            if name not in entries:
                lease = fields["lease"] or None
                entry = Entry(
                    fields["id"], fields["kind"], fields["key"], fields["value"], lease, name[0], note
                )
                entries[name] = entry
                truth.by_id[entry.id].append(entry)
                truth.by_key[entry.key].append(entry)
        for entry in entries.values():
            entry_id, operation = entry.note.fields["previous"]
            entry.parent = entries.get((entry.incarnation, entry_id, operation))
            if entry.parent is None and entry.kind != "i":
                truth.torn.append(entry)
        for entry in entries.values():
            _count_depth(entry)
        return truth

    def state(self, at: Entry, prefix: str) -> State:
        """Return the keys under a prefix just after an entry."""
        state: State = {}
        seen: set[str] = set()
        for entry in at.back():
            if entry.key.startswith(prefix) and entry.key not in seen:
                seen.add(entry.key)
                if entry.is_put:
                    state[entry.key] = entry
        return state

    def may_have_ended(self, stands: Entry) -> bool:
        """Return whether a record's lease may have run out though its expiry was logged only later, or
        never."""
        if stands.lease is None:
            return False
        after = (entry for entry in self.by_key[stands.key] if _before_of_key(entry) is stands)
        return all(entry.kind == "x" for entry in after)


def _count_depth(entry: Entry) -> None:
    chain = []
    at: Entry | None = entry
    while at is not None and not at.depth:
        chain.append(at)
        at = at.parent
    depth = at.depth if at is not None else 0
    for one in reversed(chain):
        depth += 1
        one.depth = depth


def _before_of_key(entry: Entry) -> Entry | None:
    before = iter(entry.back())
    next(before)
    return next((one for one in before if one.key == entry.key), None)
