"""The load book: a worker's load is the sum of the live bookings on it, whatever is lost or comes late."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_redis.router.base import Worker, WorkerLoad
from dynamo_redis.router.load import IDLE, LoadBook

A, B = Worker(1), Worker(1, 1)
OTHER = Worker(2)


def booked(book: LoadBook, request_id: str, worker: Worker = A, *, deadline: float = 100.0) -> None:
    book.add("router", request_id, worker, prefill_tokens=10, blocks=3, deadline=deadline)


class Book(RuleBasedStateMachine):
    """Routers that add, free, repeat themselves and die, beside a plain dict of what lives."""

    def __init__(self) -> None:
        super().__init__()
        self.book = LoadBook()
        self.now = 0.0
        self.live: dict[tuple[str, str], tuple[Worker, int, int, float]] = {}
        self.ended: set[tuple[str, str]] = set()
        self.early: set[tuple[str, str]] = set()

    owners = st.sampled_from(["one", "two"])
    ids = st.sampled_from("abcd")

    @rule(
        owner=owners,
        request_id=ids,
        worker=st.sampled_from([A, B, OTHER]),
        tokens=st.integers(0, 9),
        blocks=st.integers(0, 9),
        wait=st.floats(0, 40),
    )
    def adds(
        self, owner: str, request_id: str, worker: Worker, tokens: int, blocks: int, wait: float
    ) -> None:
        deadline = self.now + wait
        self.book.add(owner, request_id, worker, prefill_tokens=tokens, blocks=blocks, deadline=deadline)
        if (owner, request_id) in self.early:
            self.early.discard((owner, request_id))
        else:
            self.live[owner, request_id] = (worker, tokens, blocks, deadline)
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
        for (owner, request_id), (worker, tokens, blocks, deadline) in self.live.items():
            book.add(owner, request_id, worker, prefill_tokens=tokens, blocks=blocks, deadline=deadline)
        return book

    @invariant()
    def load_is_the_sum_of_what_lives(self) -> None:
        tokens: Counter[Worker] = Counter()
        blocks: Counter[Worker] = Counter()
        requests: Counter[Worker] = Counter()
        for worker, *booking in self.live.values():
            tokens[worker] += int(booking[0])
            blocks[worker] += int(booking[1])
            requests[worker] += 1
        assert self.book.loads() == {
            worker: WorkerLoad(tokens[worker], blocks[worker], requests[worker]) for worker in requests
        }
        assert self.book.booking_count == len(self.live)

    def teardown(self) -> None:
        """When all routers are gone, nobody has anything to do."""
        for owner in ("one", "two"):
            self.book.drop_owner(owner)
        assert self.book.loads() == {}
        assert self.book.load(A) == IDLE


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_a_free_that_comes_first_leaves_no_load() -> None:
    book = LoadBook()
    book.free("router", "a")
    booked(book, "a")
    assert book.load(A) == IDLE


def test_a_request_that_is_freed_twice_may_be_booked_again() -> None:
    """As a retry does; and a dead instance's bookings are freed again by whoever made them."""
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


def test_deadlines_of_what_was_freed_take_no_room() -> None:
    book = LoadBook()
    for number in range(10_000):
        booked(book, str(number))
        book.free("router", str(number))
    assert len(book._deadlines) < 1000
