"""The plan of one run of a replay, which every process of it is given: trace, processes, and the speed of
time."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from benchmarks.harness.processes import REPOSITORY
from benchmarks.replay.trace import (
    TRACE_BLOCK_SIZE,
    Trace,
    find_trace,
    offered_rate,
    shared_prompts_trace,
    synthetic_trace,
)
from dynamo_redis.config import MockEngineSettings, RouterSettings
from dynamo_redis.runtime import Settings

Mode = Literal["kv", "predicted", "rr", "p2c"]
MODES: Final[dict[Mode, str]] = {
    "kv": "kv",
    "predicted": "kv without events",
    "rr": "round robin",
    "p2c": "p2c",
}
"""The name of each mode in tables."""

Arrivals = Literal["given", "poisson"]

Workload = Literal["trace", "made-up", "shared-prompts"]
"""A trace's file, or made-up requests, which follow from the plan's seed."""

ENDPOINT: Final = "replay.backend.generate"
MODEL: Final = "replay"
CONTEXT_LENGTH: Final = 1 << 18

ENGINE_SPEED: Final = 0.5
"""Speed of the workers as a part of the mock engine's own: they read 10,000 prompt tokens a second."""

TOKENS_A_STEP: Final = 4
"""Tokens that one step stands for: it takes as long as so many, and answers have as many fewer. So an answer
takes the same time, and passing on tokens, which is not measured, does not take most of this machine's
time."""


class Chance(random.Random):
    """Chance among workers of equal cost that depends only on a seed and on the request, and on nothing
    before it.

    So two runs of one seed choose alike wherever their workers cost alike, also after a choice in which they
    differed. The remaining difference is that of the policies and not chance.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._seed = seed

    def start_request(self, index: int) -> None:
        """Begin the draws for a request, given its place in the trace."""
        self.seed((self._seed << 32) + index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a run. Times in it are the trace's, of which `speedup` seconds pass in one."""

    trace: Path | None
    """None: the shared one beside the checkout, or else a made-up one."""
    requests: int
    arrivals: Arrivals
    load: float
    """For Poisson arrivals: prompt tokens that come ÷ those that the workers could read if nothing were
    cached."""
    seed: int
    workers: int
    kv_blocks: int
    """Blocks of each worker's cache."""
    mode: Mode = "kv"
    replicas: int = 1
    speedup: float = 1.0
    redis_url: str = ""
    prefix: str = ""
    workload: Workload = "trace"
    snapshot_threshold: int | None = None
    """Events after which routers store their index; None: the setting's default."""

    def to_json(self) -> str:
        """Return the plan as text for a process's command line."""
        return json.dumps({**asdict(self), "trace": self.trace and str(self.trace)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the plan that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "trace": fields["trace"] and Path(fields["trace"])})

    @property
    def engine(self) -> MockEngineSettings:
        """The settings of a worker's engine."""
        default = MockEngineSettings.load()
        return MockEngineSettings.load(
            decode_step_s=TOKENS_A_STEP * default.decode_step_s,
            decode_sequence_s=TOKENS_A_STEP * default.decode_sequence_s,
            block_size=TRACE_BLOCK_SIZE,
            total_kv_blocks=self.kv_blocks,
            speedup_ratio=ENGINE_SPEED * self.speedup,
            max_num_waiting=1 << 20,
        )

    @property
    def settings(self) -> Settings:
        """The settings of each process. Workers publish no events if the mode uses none."""
        return Settings.load(
            redis_url=self.redis_url,
            prefix=self.prefix,
            event_plane="stream" if self.mode == "kv" else "none",
        )

    def load_trace(self) -> Trace:
        """Return the requests, the same in every process. Raises OSError or ValueError for a bad file."""
        if self.workload == "made-up":
            trace = synthetic_trace(self.requests, seed=self.seed)
        elif self.workload == "shared-prompts":
            trace = shared_prompts_trace(self.requests, seed=self.seed)
        else:
            trace = find_trace(self.trace, REPOSITORY, self.requests, seed=self.seed)
        mean_prompt_count = trace.mean_prompt_count
        trace = trace.first(self.requests).with_shorter_answers(TOKENS_A_STEP)
        if self.arrivals == "given":
            return trace
        tokens_per_s = ENGINE_SPEED / MockEngineSettings.load().prefill_token_s
        rate = offered_rate(self.load, self.workers, tokens_per_s, mean_prompt_count)
        return trace.as_poisson(rate, random.Random(self.seed))

    @property
    def router(self) -> RouterSettings:
        """The settings of a KV-aware router. Its predictions last as long in the trace's time as they do by
        default."""
        default = RouterSettings.load()
        return RouterSettings.load(
            use_kv_events=self.mode == "kv",
            router_ttl_s=default.router_ttl_s / self.speedup,
            router_snapshot_threshold=self.snapshot_threshold or default.router_snapshot_threshold,
        )

    @property
    def client_mode(self) -> str | None:
        """The mode of a client; None where a router chooses."""
        return {"rr": "round_robin", "p2c": "p2c"}.get(self.mode)
