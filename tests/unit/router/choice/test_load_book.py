"""The load book: a worker's load is that of the live bookings on it, each block once, whatever is lost or
comes late."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_redis.events.block_hashes import pack_names
from dynamo_redis.router.base import Worker, WorkerLoad
from dynamo_redis.router.choice.load_book import IDLE, LoadBook
from dynamo_redis.router.prompts import block_hashes

A, B = Worker(1), Worker(1, 1)
OTHER = Worker(2)


def booked(book: LoadBook, request_id: str, worker: Worker = A, *, deadline: float = 100.0) -> None:
    book.add("router", request_id, worker, prefill_tokens=10, blocks=3, deadline=deadline)


def _prefixes(hashes: list[int]) -> set[tuple[int, ...]]:
    """The name of a block: all tokens of its prompt up to its end."""
    return {tuple(hashes[: end + 1]) for end in range(len(hashes))}


class Book(RuleBasedStateMachine):
    """Routers that add, free, repeat themselves and die, beside a plain dict of what lives."""

    def __init__(self) -> None:
        super().__init__()
        self.book = LoadBook()
        self.now = 0.0
        self.live: dict[tuple[str, str], tuple[Worker, int, int, float, list[int]]] = {}
        self.ended: set[tuple[str, str]] = set()
        self.early: set[tuple[str, str]] = set()

    owners = st.sampled_from(["one", "two"])
    ids = st.sampled_from("abcd")

    @rule(
        owner=owners,
        request_id=ids,
        worker=st.sampled_from([A, B, OTHER]),
        tokens=st.integers(0, 9),
        unnamed=st.integers(0, 9),
        hashes=st.lists(st.integers(0, 2), max_size=6),
        wait=st.floats(0, 40),
    )
    def adds(
        self,
        owner: str,
        request_id: str,
        worker: Worker,
        tokens: int,
        unnamed: int,
        hashes: list[int],
        wait: float,
    ) -> None:
        booking = (worker, tokens, len(hashes) + unnamed, self.now + wait, hashes)
        self._add(self.book, owner, request_id, booking)
        if (owner, request_id) in self.early:
            self.early.discard((owner, request_id))
        else:
            self.live[owner, request_id] = booking
        self.ended.discard((owner, request_id))

    @rule(owner=owners, request_id=ids)
    def reads_the_prompt(self, owner: str, request_id: str) -> None:
        self.book.prefill_done(owner, request_id)
        if booking := self.live.get((owner, request_id)):
            self.live[owner, request_id] = (booking[0], 0, *booking[2:])

    @rule(owner=owners, request_id=ids)
    def frees(self, owner: str, request_id: str) -> None:
        key = (owner, request_id)
        self.book.free(*key)
        if self.live.pop(key, None):
            self.ended.add(key)
        elif key not in self.ended:
            self.early.add(key)

    @rule(owner=owners)
    def dies(self, owner: str) -> None:
        self.book.drop_owner(owner)
        self.live = {key: booking for key, booking in self.live.items() if key[0] != owner}

    @rule(instance_id=st.sampled_from([1, 2]))
    def loses_an_instance(self, instance_id: int) -> None:
        self.book.drop_instance(instance_id)
        self._end({key for key, booking in self.live.items() if booking[0].instance_id == instance_id})

    @rule(later=st.floats(0, 20))
    def expires(self, later: float) -> None:
        self.now += later
        late = {key for key, booking in self.live.items() if booking[3] <= self.now}
        assert self.book.expire(self.now) == len(late)
        self._end(late)
        if later:  # frees are remembered for some time only: this model does without
            self.book = self._anew()

    def _end(self, keys: set[tuple[str, str]]) -> None:
        for key in keys:
            del self.live[key]
        self.ended |= keys

    def _anew(self) -> LoadBook:
        """The same bookings in another book."""
        self.ended, self.early = set(), set()
        book = LoadBook()
        for key, booking in self.live.items():
            self._add(book, *key, booking)
        return book

    def _add(
        self,
        book: LoadBook,
        owner: str,
        request_id: str,
        booking: tuple[Worker, int, int, float, list[int]],
    ) -> None:
        worker, tokens, blocks, deadline, hashes = booking
        names = pack_names(hashes)
        book.add(
            owner,
            request_id,
            worker,
            prefill_tokens=tokens,
            blocks=blocks,
            deadline=deadline,
            names=names,
        )

    @invariant()
    def load_is_that_of_what_lives(self) -> None:
        tokens: Counter[Worker] = Counter()
        unnamed: Counter[Worker] = Counter()
        named: dict[Worker, set[tuple[int, ...]]] = {}
        requests: Counter[Worker] = Counter()
        for worker, prefill_tokens, blocks, _, hashes in self.live.values():
            tokens[worker] += prefill_tokens
            unnamed[worker] += blocks - len(hashes)
            named.setdefault(worker, set()).update(_prefixes(hashes))
            requests[worker] += 1
        assert self.book.loads() == {
            worker: WorkerLoad(tokens[worker], len(named[worker]) + unnamed[worker], requests[worker])
            for worker in requests
        }
        assert self.book.booking_count == len(self.live)

    @rule(hashes=st.lists(st.integers(0, 2), max_size=6))
    def asks_what_is_active(self, hashes: list[int]) -> None:
        asked = _prefixes(hashes)
        active: dict[Worker, set[tuple[int, ...]]] = {}
        for worker, *_, held in self.live.values():
            if shared := asked & _prefixes(held):
                active.setdefault(worker, set()).update(shared)
        found = self.book.active(pack_names(hashes))
        assert found == {worker: len(blocks) for worker, blocks in active.items()}

    def teardown(self) -> None:
        """When all routers are gone no worker has any load."""
        for owner in ("one", "two"):
            self.book.drop_owner(owner)
        assert self.book.loads() == {}
        assert self.book.load(A) == IDLE
        assert not self.book._blocks
        assert not self.book._sums


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_free_that_comes_first_leaves_no_load() -> None:
    book = LoadBook()
    book.free("router", "a")
    booked(book, "a")
    assert book.load(A) == IDLE


def test_a_request_that_is_freed_twice_may_be_booked_again() -> None:
    """As a retry does; and the router that made a dead instance's bookings frees them again."""
    book = LoadBook()
    booked(book, "a")
    book.free("router", "a")
    book.free("router", "a")
    booked(book, "a", OTHER)
    assert book.load(OTHER).request_count == 1
    book.drop_instance(OTHER.instance_id)
    book.free("router", "a")
    booked(book, "a")
    assert book.load(A).request_count == 1


def test_an_early_free_is_forgotten_after_a_while() -> None:
    book = LoadBook()
    book.expire(0.0)
    book.free("router", "a")
    book.expire(60.0)
    book.expire(120.0)
    booked(book, "a", deadline=500.0)
    assert book.load(A).request_count == 1


def test_early_frees_are_bounded() -> None:
    book = LoadBook()
    for number in range(20_000):
        book.free("router", str(number))
    booked(book, "0")
    booked(book, "19999")
    assert book.load(A).request_count == 1, "the oldest is forgotten, the youngest is not"


def test_a_prompt_is_read_once() -> None:
    book = LoadBook()
    booked(book, "a")
    book.prefill_done("router", "a")
    book.prefill_done("router", "a")
    assert book.load(A) == WorkerLoad(0, 3, 1)
    book.free("router", "a")
    assert book.load(A) == IDLE


def test_a_lost_free_is_load_until_the_deadline_only() -> None:
    book = LoadBook()
    booked(book, "a", deadline=10.0)
    assert book.expire(9.9) == 0
    assert book.load(A) == WorkerLoad(10, 3, 1)
    assert book.expire(10.0) == 1
    assert book.loads() == {}


def test_a_booking_made_anew_has_its_new_deadline() -> None:
    book = LoadBook()
    booked(book, "a", deadline=10.0)
    booked(book, "a", OTHER, deadline=20.0)
    assert book.expire(15.0) == 0
    assert dict(book.loads()) == {OTHER: WorkerLoad(10, 3, 1)}
    assert book.expire(20.0) == 1


def test_deadlines_of_freed_bookings_take_no_memory() -> None:
    book = LoadBook()
    for number in range(10_000):
        booked(book, str(number))
        book.free("router", str(number))
    assert len(book._deadlines) < 1000


SYSTEM = list(range(400))


def book_chats(book: LoadBook, count: int, *, read: bool = True) -> None:
    """Chats of one system prompt of 400 blocks, with four blocks of their own each."""
    for number in range(count):
        names = pack_names([*SYSTEM, *range(1000 * number + 400, 1000 * number + 404)])
        tokens = 0 if read else 64
        book.add("me", str(number), A, prefill_tokens=tokens, blocks=404, deadline=1e9, names=names)


def test_requests_that_begin_alike_share_their_blocks() -> None:
    book = LoadBook()
    book_chats(book, 12)
    assert book.load(A).blocks == 400 + 12 * 4
    assert book.active(pack_names([*SYSTEM, 999_999])) == {A: 400}
    for number in range(11):
        book.free("me", str(number))
    assert book.load(A).blocks == 404
    book.free("me", "11")
    assert book.load(A) == IDLE


def test_a_report_counts_where_more_is_held_than_booked() -> None:
    """Answers that grow, and requests of which this router does not know."""
    book = LoadBook()
    book_chats(book, 1)
    book.report(A, 450)
    assert book.load(A) == WorkerLoad(0, 450, 1)
    booked(book, "later")
    assert book.load(A) == WorkerLoad(10, 453, 2)
    book.free("me", "0")
    assert book.load(A) == WorkerLoad(10, 49, 1)
    book.report(OTHER, 7)
    assert book.load(OTHER) == WorkerLoad(0, 7, 0)
    book.forget_report(A)
    book.forget_report(OTHER)
    assert dict(book.loads()) == {A: WorkerLoad(10, 3, 1)}


def test_a_report_counts_where_less_is_held_than_booked() -> None:
    """Of prompts that are read. Those that are not, the worker may hold in part, or not yet."""
    book = LoadBook()
    book_chats(book, 12)
    book.report(A, 367)
    assert book.load(A).blocks == 367
    book.forget_report(A)
    booked(book, "unread")
    for said in (448, 450, 451):
        book.report(A, said)
        assert book.load(A).blocks == 451
    book.report(A, 440)
    assert book.load(A).blocks == 443


def test_a_report_ends_with_its_instance() -> None:
    book = LoadBook()
    booked(book, "a")
    book.report(A, 9)
    book.report(B, 5)
    book.drop_instance(A.instance_id)
    assert book.loads() == {}


def test_blocks_are_those_that_dynamo_counts() -> None:
    """Its `potential_decode_blocks`, as `tools/make_load_vectors.py` wrote them down."""
    vectors = json.loads((Path(__file__).parents[3] / "vectors/potential_blocks.json").read_text())
    size = vectors["block_size"]

    def names_of(prompt: list[int]) -> bytes:
        return pack_names(block_hashes([token for token in prompt for _ in range(size)], size))

    book = LoadBook()
    for step in vectors["steps"]:
        if "free" in step:
            book.free("me", step["free"])
        else:
            prompt = step["prompt"]
            book.add(
                "me",
                step["add"],
                Worker(step["worker"]),
                prefill_tokens=0,
                blocks=len(prompt),
                deadline=1e9,
                names=names_of(prompt),
            )
        active = book.active(names_of(step["asked"]))
        for worker in map(Worker, (1, 2)):
            potential = book.load(worker).blocks + len(step["asked"]) - active.get(worker, 0)
            assert potential == step["blocks"][str(worker.instance_id)]
