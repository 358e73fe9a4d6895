"""Traces of requests to replay: read from a file, or made up when there is none, and their arrival times.

A trace is a file of JSON lines, plain or gzipped, one request each, in Mooncake's form:

    {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [block, …]}

`hash_ids` name the prompt's blocks of 512 tokens, the last of which may be shorter. Equal ids mean equal
blocks behind equal blocks, so an id is a prefix's name.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

TRACE_BLOCK_SIZE: Final = 512
SHARED_TRACE: Final = Path("../shared/data/mooncake/conversation_trace.jsonl.gz")
"""Path from the root of the checkout."""

_SHARED_PROMPTS: Final = 24
_SHARED_PROMPT_BLOCKS: Final = (8, 40)
_SHARED_TURN_BLOCKS: Final = (1, 4)
_SHARED_TURNS: Final = (1, 5)
_SHARED_OUTPUT_TOKENS: Final = (50, 600)
_SHARED_OPEN_CHATS: Final = 96

_SYNTHETIC_SYSTEM_BLOCKS: Final = 2
_SYNTHETIC_TURN_BLOCKS: Final = (1, 12)
_SYNTHETIC_OUTPUT_TOKENS: Final = (20, 300)
_SYNTHETIC_TICK_S: Final = 3.0
_SYNTHETIC_TURNS: Final = (1, 8)
_SYNTHETIC_OPEN_CONVERSATIONS: Final = 24


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace; it arrives `arrival_s` after the first."""

    arrival_s: float
    prompt_count: int
    """Tokens of the prompt."""
    output_count: int
    """Tokens of the answer."""
    block_ids: tuple[int, ...]

    def token_ids(self) -> list[int]:
        """Return the prompt's tokens, in which equal blocks are equal and different ones differ."""
        tokens: list[int] = []
        for block in self.block_ids:
            tokens += [block] * TRACE_BLOCK_SIZE
        del tokens[self.prompt_count :]
        return tokens


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, and the name of their source."""

    name: str
    requests: tuple[TracedRequest, ...]

    @property
    def mean_prompt_count(self) -> float:
        """The mean number of prompt tokens."""
        return sum(request.prompt_count for request in self.requests) / len(self.requests)

    def first(self, count: int) -> Trace:
        """Return the first `count` requests."""
        return replace(self, requests=self.requests[:count])

    def with_shorter_answers(self, divisor: int) -> Trace:
        """Return the trace with answers of a `divisor`-th of their tokens, one at least."""
        requests = (replace(one, output_count=-(-one.output_count // divisor)) for one in self.requests)
        return replace(self, requests=tuple(requests))

    def as_poisson(self, rate: float, rng: random.Random) -> Trace:
        """Return the same requests in the same order with independent arrivals, `rate` a second."""
        now = 0.0
        requests: list[TracedRequest] = []
        for request in self.requests:
            requests.append(replace(request, arrival_s=now))
            now += rng.expovariate(rate)
        return replace(self, requests=tuple(requests))


def read_trace(path: Path) -> Trace:
    """Read a trace file. Raises OSError, and ValueError that names the line that is no request."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        requests = [_read_request(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise ValueError(f"{path} holds no request")
    requests.sort(key=lambda request: request.arrival_s)
    begin_s = requests[0].arrival_s
    name = path.name.partition(".")[0]
    return Trace(name, tuple(replace(one, arrival_s=one.arrival_s - begin_s) for one in requests))


def _read_request(path: Path, number: int, line: str) -> TracedRequest:
    try:
        fields = json.loads(line)
        request = TracedRequest(
            fields["timestamp"] / 1e3,
            fields["input_length"],
            fields["output_length"],
            tuple(fields["hash_ids"]),
        )
        whole = len(request.block_ids) == -(-request.prompt_count // TRACE_BLOCK_SIZE)
        if not (whole and request.prompt_count > 0 and request.output_count > 0):
            raise ValueError("its lengths do not match its blocks")
    except (ValueError, KeyError, TypeError) as exc:
        raise ValueError(f"{path}, line {number}, is no request of a trace: {exc!r}") from exc
    return request


def synthetic_trace(count: int, *, seed: int = 0) -> Trace:
    """Make up conversations that share a system prompt, grow turn by turn, and come in bursts."""
    rng = random.Random(seed)
    fresh = iter(range(1 << 31))
    system = [next(fresh) for _ in range(_SYNTHETIC_SYSTEM_BLOCKS)]
    conversations: list[_Conversation] = []
    requests: list[TracedRequest] = []
    now_s = 0.0
    while len(requests) < count:
        for _ in range(rng.randint(1, 16)):
            while len(conversations) < _SYNTHETIC_OPEN_CONVERSATIONS:
                conversations.append(_Conversation(list(system), rng.randint(*_SYNTHETIC_TURNS)))
            conversation = rng.choice(conversations)
            added = [next(fresh) for _ in range(rng.randint(*_SYNTHETIC_TURN_BLOCKS))]
            blocks = conversation.blocks + added
            prompt_count = len(blocks) * TRACE_BLOCK_SIZE - rng.randrange(TRACE_BLOCK_SIZE)
            output_count = rng.randint(*_SYNTHETIC_OUTPUT_TOKENS)
            requests.append(TracedRequest(now_s, prompt_count, output_count, tuple(blocks)))
            conversation.blocks = blocks[:-1]  # the last block was partial, and the answer filled it
            conversation.turns_left -= 1
            if not conversation.turns_left:
                conversations.remove(conversation)
        now_s += _SYNTHETIC_TICK_S
    return Trace("synthetic", tuple(requests[:count]))


def shared_prompts_trace(count: int, *, seed: int = 0) -> Trace:
    """Make up chats that share long system prompts, as of several applications.

    There are 24 prompts of 4,096 to 20,480 tokens; the n-th is used 1/n as often as the first. A chat has up
    to five turns, and grows by one to four blocks with each. All requests arrive at 0.
    """
    rng = random.Random(seed)
    fresh = iter(range(1 << 31))
    prompts = [
        [next(fresh) for _ in range(rng.randint(*_SHARED_PROMPT_BLOCKS))] for _ in range(_SHARED_PROMPTS)
    ]
    popularity = [1 / rank for rank in range(1, _SHARED_PROMPTS + 1)]
    chats: list[_Conversation] = []
    requests: list[TracedRequest] = []
    for _ in range(count):
        while len(chats) < _SHARED_OPEN_CHATS:
            [system] = rng.choices(prompts, popularity)
            chats.append(_Conversation(list(system), rng.randint(*_SHARED_TURNS)))
        chat = rng.choice(chats)
        added = [next(fresh) for _ in range(rng.randint(*_SHARED_TURN_BLOCKS))]
        blocks = chat.blocks + added
        prompt_count = len(blocks) * TRACE_BLOCK_SIZE - rng.randrange(TRACE_BLOCK_SIZE)
        output_count = rng.randint(*_SHARED_OUTPUT_TOKENS)
        requests.append(TracedRequest(0.0, prompt_count, output_count, tuple(blocks)))
        chat.blocks = blocks[:-1]
        chat.turns_left -= 1
        if not chat.turns_left:
            chats.remove(chat)
    return Trace("shared-prompts", tuple(requests))


@dataclass(slots=True, eq=False)
class _Conversation:
    blocks: list[int]
    turns_left: int


def find_trace(given: Path | None, root: Path, count: int, *, seed: int) -> Trace:
    """Return the given trace; without one the shared trace beside the checkout; else a made-up one of `count`
    requests."""
    if given is not None:
        return read_trace(given)
    shared = root / SHARED_TRACE
    return read_trace(shared) if shared.exists() else synthetic_trace(count, seed=seed)


def offered_rate(load: float, workers: int, prompt_tokens_per_s: float, mean_prompt_count: float) -> float:
    """Return the requests a second whose prompts are `load` of the tokens that the workers could read if
    nothing were cached."""
    return load * workers * prompt_tokens_per_s / mean_prompt_count
