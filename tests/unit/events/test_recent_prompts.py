"""A publisher that came after its engine learns from prompts what it was never told; and never too much."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_redis.events import kv_publisher, recent_prompts
from dynamo_redis.events.block_hashes import SEED, chain, local_hashes, lora_seed
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.events.recent_prompts import Content, RecentPrompts
from dynamo_redis.wire.kv_event import DEVICE, HOST, REMOVED, REMOVED_INSIDE, STORED, KvEvent

BLOCK = 2


def _names(tokens: Sequence[int], *, seed: int = SEED) -> list[int]:
    return chain(local_hashes(tokens, BLOCK, seed=seed), seed=seed)


@pytest.fixture(autouse=True)
def one_block_is_enough() -> Iterator[None]:
    """Blocks of two tokens say as much here as those of 16 do elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent_prompts, "MATCH_TOKENS_COUNT", BLOCK)
        yield


@pytest.fixture
def rank() -> KvPublisher:
    return KvPublisher(None, block_size=BLOCK)


def _said(rank: KvPublisher) -> list[KvEvent]:
    return rank.events_from(0) or []


# --------------------------------------------------------------------------- one step at a time


def test_unnamed_block_gets_its_name_from_the_prompt(
    rank: KvPublisher,
) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    first, second, third, fourth = _names(prompt)
    rank.note_prompt(prompt)
    rank.stored([30, 40], [5, 6, 7, 8], 20)
    assert _said(rank) == [KvEvent(STORED, DEVICE, array("Q", [first, second, third, fourth]))]
    rank.stored([50], [9, 9], 20)  # behind what has a name now
    assert rank.block_count == 5
    assert not rank.left_out


def test_inferred_blocks_go_with_their_last_follower(rank: KvPublisher) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    first, second, third, fourth = _names(prompt)
    rank.note_prompt(prompt)
    rank.stored([40], [7, 8], 30)
    rank.removed([40])
    assert list(rank.blocks()) == [first, second, third]
    rank.stored([31], [9, 9], 30)
    other = _names([*prompt[:6], 9, 9])[-1]
    rank.removed([30])  # out of order: what is in doubt goes, too
    assert list(rank.blocks()) == [other]
    rank.removed([31])
    assert not rank.block_count
    assert _said(rank)[1:] == [
        KvEvent(REMOVED, DEVICE, array("Q", [fourth])),
        KvEvent(STORED, DEVICE, array("Q", [other])),
        KvEvent(REMOVED_INSIDE, DEVICE, array("Q", [third])),
        KvEvent(REMOVED, DEVICE, array("Q", [second, first])),
        KvEvent(REMOVED, DEVICE, array("Q", [other])),
    ]


def test_inferred_block_stays_once_the_engine_names_it(rank: KvPublisher) -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    first, _, _ = _names(prompt)
    rank.note_prompt(prompt)
    rank.stored([30], [5, 6], 20)
    rank.stored([10], [1, 2], None)
    assert len(_said(rank)) == 1
    rank.removed([30, 20])
    assert list(rank.blocks()) == [first]
    rank.removed([10])
    assert not rank.block_count


def test_equal_content_behind_different_beginnings_is_left_out(rank: KvPublisher) -> None:
    rank.note_prompt([1, 2, 5, 6, 7, 7])
    rank.note_prompt([3, 4, 5, 6, 8, 8])
    rank.stored([20], [5, 6], 10)
    assert (rank.block_count, rank.left_out["unknown_parent"]) == (0, 1)
    rank.stored([30], [8, 8], 20)  # only one goes on so
    assert list(rank.blocks()) == _names([3, 4, 5, 6, 8, 8])
    rank.removed([30, 20])
    assert list(rank.blocks()) == _names([3, 4])


def test_the_rest_of_one_prompt_may_be_the_middle_of_another(rank: KvPublisher) -> None:
    rank.note_prompt([1, 2, 5, 6])
    rank.note_prompt([3, 4, 5, 6, 8, 8])
    rank.stored([20], [5, 6], 10)
    assert rank.block_count == 0


def test_an_answer_that_is_in_another_prompt_is_left_out(rank: KvPublisher) -> None:
    """Two conversations that differ in their beginnings only: what answers one stands in the other."""
    rank.note_prompt([1, 2, 5, 6, 7, 8, 1, 1, 9])
    rank.note_prompt([3, 4, 5])
    rank.stored([20, 30], [5, 6, 7, 8], 10)
    rank.stored([40], [7, 8], 20)
    assert rank.block_count == 0
    rank.note_prompt([3, 4, 5, 6, 7, 8, 2, 2])  # the next turn says which it was
    rank.stored([50], [2, 2], 30)
    assert list(rank.blocks()) == _names([3, 4, 5, 6, 7, 8, 2, 2])


def test_an_answer_may_begin_as_a_prompt_goes_on(rank: KvPublisher) -> None:
    rank.note_prompt([1, 2, 5, 6, 1, 1, 9])
    rank.note_prompt([1, 2, 5])
    rank.note_prompt([3, 4, 5, 6, 7, 8, 1, 1, 9])
    rank.stored([20, 30], [5, 6, 7, 8], 10)  # behind 1, 2 as an answer, or behind 3, 4
    assert rank.block_count == 0


def test_the_rest_of_a_prompt_is_no_answer(rank: KvPublisher) -> None:
    """Many prompts end with a token or two behind their last whole block, which many blocks begin with."""
    rank.note_prompt([8, 8, 5])
    rank.note_prompt([1, 2, 3, 4, 5, 6, 7, 7])
    rank.stored([30], [5, 6], 20)
    assert rank.block_count == 0
    rank.stored([40], [7, 7], 30)
    assert list(rank.blocks()) == _names([1, 2, 3, 4, 5, 6, 7, 7])


def test_blocks_that_were_left_out_come_with_those_behind_them(rank: KvPublisher) -> None:
    rank.stored([30], [5, 6], 20)
    rank.stored([40], [7, 8], 30)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    rank.note_prompt(prompt)
    rank.stored([50], [9, 9], 40)
    assert list(rank.blocks()) == _names(prompt)
    rank.removed([50, 40, 30])  # known by the engine's names
    assert list(rank.blocks()) == _names([1, 2, 3, 4])


@pytest.mark.parametrize("how", ["removed", "cleared", "reset"])
def test_removed_loose_blocks_contradict_no_place(rank: KvPublisher, how: str) -> None:
    """An engine that names blocks by numbers may give another one the number later."""
    rank.stored([30], [5, 6], 20)
    if how == "removed":
        rank.removed([30])
    else:
        getattr(rank, how)()
    prompt = [1, 2, 3, 4, 7, 7]
    rank.note_prompt(prompt)
    rank.stored([40], [7, 7], 30)
    assert list(rank.blocks()) == _names(prompt)


def test_blocks_behind_a_nameless_one_match_no_prompt(rank: KvPublisher) -> None:
    """Salted, or with an image: the blocks behind look as if they were plain."""
    rank.note_prompt([1, 2, 3, 4, 5, 6, 7, 8])
    rank.stored_nameless([10])
    rank.stored([20], [3, 4], 10)
    rank.stored([30, 40], [5, 6, 7, 8], 20)
    assert (rank.block_count, rank.left_out["unknown_parent"]) == (0, 3)
    rank.removed([40, 30, 20, 10])
    rank.stored([21], [3, 4], 10)  # another block's number by now
    assert list(rank.blocks()) == _names([1, 2, 3, 4])


def test_an_adapters_prompt_names_its_blocks_alone(rank: KvPublisher) -> None:
    rank.note_prompt([1, 2, 3, 4], "french")
    rank.stored([20], [3, 4], 10)
    assert rank.block_count == 0
    rank.stored([21], [3, 4], 11, lora_name="french")
    assert list(rank.blocks()) == _names([1, 2, 3, 4], seed=lora_seed("french"))


def test_other_tiers_learn_nothing_of_prompts(rank: KvPublisher) -> None:
    rank.note_prompt([1, 2, 3, 4])
    rank.stored([20], [3, 4], 10, tier=HOST)
    assert (rank.block_count, rank.left_out) == (0, Counter(unknown_parent=1))


def test_log_names_the_remedy(rank: KvPublisher, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rank.stored([20], [3, 4], 10)
    assert "replay its events" in caplog.text


@pytest.mark.parametrize("tokens", [["x", 1], [-1, 2], [1 << 32, 2], [None, 1]])
def test_prompts_that_are_none_are_not_remembered(rank: KvPublisher, tokens: list[int]) -> None:
    rank.note_prompt(tokens)
    rank.stored([20], [3, 4], 10)
    assert rank.block_count == 0


# --------------------------------------------------------------------------- the memory alone


def _content(tokens: Sequence[int]) -> list[Content]:
    return [
        Content(
            local_hashes(tokens[at : at + BLOCK], BLOCK)[0], array("I", tokens[at : at + BLOCK]).tobytes()
        )
        for at in range(0, len(tokens), BLOCK)
    ]


def test_the_oldest_half_is_forgotten_when_the_younger_is_full() -> None:
    prompts = RecentPrompts(BLOCK, block_count=16)
    for number in range(100):
        prompts.note([number, 0, number, 1, 500], SEED)
        assert prompts.block_count <= 16
    found = [number for number in range(100) if prompts.find(_content([number, 1]), SEED) is not None]
    assert found == list(range(found[0], 100))
    assert 2 <= len(found) <= 5


def test_common_content_finds_no_place_and_costs_little() -> None:
    prompts = RecentPrompts(BLOCK)
    prompts.note([7] * 4096, SEED)
    assert prompts.find(_content([7, 7]), SEED) is None


def test_a_single_token_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_prompts, "MATCH_TOKENS_COUNT", 4)
    prompts = RecentPrompts(BLOCK)
    prompts.note([1, 2, 3, 4, 5, 6], SEED)
    assert prompts.find(_content([3, 4]), SEED) is None
    assert prompts.find(_content([3, 4, 5, 6]), SEED) == _names([1, 2])


def test_loose_blocks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_publisher, "LOOSE_BLOCK_COUNT", 3)
    few = KvPublisher(None, block_size=BLOCK)
    few.stored([20, 30, 40, 50], [3, 3, 4, 4, 5, 5, 6, 6], 10)
    few.note_prompt([1, 1, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7])
    few.stored([60], [7, 7], 50)
    assert few.block_count == 6  # the forgotten one has to be there as well
    few.removed([60, 50, 40, 30])
    assert list(few.blocks()) == _names([1, 1, 3, 3])
    few.removed([20])
    assert not few.block_count
    few.stored_nameless(range(100, 110))
    few.note_prompt([2, 2, 8, 8])
    few.stored([200], [8, 8], 109)
    assert list(few.blocks()) == []
    few.stored([201], [8, 8], 100)  # of which it is forgotten what it was
    assert list(few.blocks()) == _names([2, 2, 8, 8])


# --------------------------------------------------------------------------- a random life

HOT = (1, 1, 2, 2)
ASK = (3, 1, 1)
"""How every prompt ends: in a way that no answer has, and not with a whole block."""


class WarmEngine:
    """Answers prompts with a cache of prefixes; as vLLM it tells each block that it computes, held or not."""

    def __init__(self, rank: KvPublisher) -> None:
        self.rank = rank
        self.heard = False
        self.copies: Counter[tuple[int, ...]] = Counter()  # by all tokens up to the block's end

    def answer(self, prompt: tuple[int, ...], answer: tuple[int, ...], *, chunk: int) -> tuple[int, ...]:
        """Answers both."""
        self.rank.note_prompt(prompt)
        cached_count = 0
        while cached_count + BLOCK < len(prompt) and prompt[: cached_count + BLOCK] in self.copies:
            cached_count += BLOCK
        end = len(prompt) // BLOCK * BLOCK
        for start in range(cached_count, end, chunk * BLOCK):
            self._store(prompt, start, min(start + chunk * BLOCK, end))
        whole = prompt + answer
        for start in range(end, len(whole) - BLOCK + 1, BLOCK):
            self._store(whole, start, start + BLOCK)
        return whole

    def _store(self, tokens: tuple[int, ...], start: int, end: int) -> None:
        contents = [tokens[:stop] for stop in range(start + BLOCK, end + 1, BLOCK)]
        self.copies.update(contents)
        if self.heard:
            parent = hash(tokens[:start]) if start else None
            self.rank.stored([hash(content) for content in contents], tokens[start:end], parent)

    def ends(self) -> list[tuple[int, ...]]:
        """Blocks that nothing follows; what is hot stays for ever."""
        inside = {content[:-BLOCK] for content in self.copies}
        return sorted(set(self.copies) - inside - {HOT[:BLOCK], HOT})

    def spares(self) -> list[tuple[int, ...]]:
        """Blocks of which there is more than one copy, whatever follows them."""
        return sorted(content for content, count in self.copies.items() if count > 1)

    def evict(self, content: tuple[int, ...]) -> None:
        self.copies[content] -= 1
        self.copies = +self.copies
        if self.heard:
            self.rank.removed([hash(content)])

    def held(self) -> set[int]:
        return {_names(content)[-1] for content in self.copies}


_TOKENS = st.lists(st.integers(1, 2), min_size=0, max_size=5).map(tuple)


def _serve_a_little(engine: WarmEngine, said: list[tuple[int, ...]], data: st.DataObject) -> None:
    action = data.draw(
        st.sampled_from(("answer", "answer", "answer", "again", "evict", "spare", "drain", "deaf"))
    )
    if not engine.heard and data.draw(st.integers(0, 2)) == 0:
        engine.rank.reset()
        engine.heard = True
    if action == "answer":
        prompt = data.draw(st.sampled_from([(), HOT, (2, 2, 2, 2), *said])) + data.draw(_TOKENS)
        prompt += (1,) * (len(prompt) % BLOCK) + ASK
        said.append(engine.answer(prompt, data.draw(_TOKENS), chunk=data.draw(st.integers(1, 3))))
    elif action == "again" and said:  # behind another beginning
        prompt = data.draw(st.sampled_from([(1, 1), (2, 1)])) + data.draw(st.sampled_from(said))[BLOCK:]
        prompt = prompt[: len(prompt) // BLOCK * BLOCK] + ASK
        engine.answer(prompt, data.draw(_TOKENS), chunk=1)
    elif action == "evict" and (ends := engine.ends()):
        engine.evict(data.draw(st.sampled_from(ends)))
    elif action == "spare" and (spares := engine.spares()):
        engine.evict(data.draw(st.sampled_from(spares)))
    elif action == "drain":
        while ends := engine.ends():
            for end in ends:
                engine.evict(end)
    elif action == "deaf":
        engine.heard = False


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_late_publisher_is_never_wrong_and_learns_hot_blocks(data: st.DataObject) -> None:
    engine = WarmEngine(KvPublisher(None, block_size=BLOCK))
    engine.answer((*HOT, 1), (), chunk=2)
    said: list[tuple[int, ...]] = []
    for _ in range(data.draw(st.integers(1, 14))):
        _serve_a_little(engine, said, data)
        if engine.heard:
            assert set(engine.rank.blocks()) <= engine.held()
    if not engine.heard:
        engine.rank.reset()
        engine.heard = True
    new = (*HOT, 11, 12, *ASK)
    engine.answer(new, (), chunk=2)
    assert set(_names(new)) <= set(engine.rank.blocks()) <= engine.held()
