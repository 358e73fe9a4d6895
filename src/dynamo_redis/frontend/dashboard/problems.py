"""The verdict on a deployment: is it serving, and what is wrong. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

from dynamo_redis.frontend.dashboard.reading import InstanceState, ProcessReading, RouterReading

Level = Literal["ok", "warn", "bad"]

LAG_S: Final = 5.0
"""A router whose index is further behind is named as a problem."""

_MOST_FAILED: Final = 0.5
_MOST_LOST: Final = 0.5
"""Parts of the requests that failed, and of the instances in one bad state, above which it is a failure."""

_TROUBLE: Final[Mapping[InstanceState, tuple[str, str]]] = {
    "down": (
        "not answering",
        "Their process or machine may be gone. They get no requests until they answer.",
    ),
    "not ready": ("not ready", "Their event loop or engine hangs: look at their log."),
    "failing": ("failing requests", "Requests pass them over for a while: look at their log."),
    "silent": ("slow to answer", "Others are preferred until they answer."),
    "suspect": (
        "gone from the registry, but answering",
        "Many left together: Redis may have lost its data. They are kept while they answer.",
    ),
}
"""Words and advice for each state of an instance that is a problem."""


class Problem(NamedTuple):
    """A fact to act on, and advice."""

    level: Level
    text: str
    advice: str


class ModelView(NamedTuple):
    """A model as the page shows it. `failure` is the reason why it, or a version of it, is not loaded."""

    name: str
    is_served: bool
    context_length: int | None
    instance_count: int
    reachable_count: int
    in_flight_count: int
    queued_count: int
    version_count: int
    failure: str | None


def find_problems(
    processes: Sequence[ProcessReading],
    models: Sequence[ModelView],
    states: Mapping[InstanceState, int],
    routers: Sequence[RouterReading],
    requests: int,
    failures: Mapping[str, int],
    silent_processes: Sequence[str],
) -> list[Problem]:
    """Return the problems, the worst first. Requests and failures are those of the last minute."""
    found = [
        *_of_models(models),
        *_of_redis(processes),
        *_of_requests(requests, failures, sum(process.waiting_count for process in processes)),
        *_of_instances(states),
        *_of_routers(routers),
    ]
    if silent_processes:
        found.append(
            Problem(
                "warn",
                f"{_count(len(silent_processes), 'frontend process does', 'frontend processes do')} not "
                f"answer: {', '.join(silent_processes)}",
                "The figures are those of the others. SIGKILL has such a process replaced.",
            )
        )
    return sorted(found, key=lambda problem: problem.level != "bad")


def verdict(problems: Sequence[Problem], models: Sequence[ModelView]) -> tuple[Level, str, str]:
    """Return the level, and the two lines at the top of the page."""
    served = [model for model in models if model.is_served and model.reachable_count]
    instances = sum(model.reachable_count for model in served)
    serves = f"{_count(len(served), 'model', 'models')} on {_count(instances, 'instance', 'instances')}"
    if not served:
        return "bad", "Not serving", "No model can be served now."
    if not problems:
        return "ok", "Serving", f"{serves}. Nothing needs attention."
    if any(problem.level == "bad" for problem in problems):
        return "bad", "Serving, with failures", f"{serves}."
    return "warn", "Serving, with warnings", f"{serves}."


def _of_models(models: Sequence[ModelView]) -> list[Problem]:
    found = []
    if not models:
        advice = "Start a worker, or wait until it has registered."
        found.append(Problem("bad", "No model is registered", advice))
    for model in models:
        if model.failure is not None:
            level: Level = "warn" if model.is_served else "bad"
            found.append(Problem(level, f"Model {model.name} cannot be loaded", model.failure))
        elif not model.is_served:
            advice = "Its files are being fetched. This takes some seconds."
            found.append(Problem("warn", f"Model {model.name} is loading", advice))
        elif not model.reachable_count:
            advice = "All of its instances are down or gone: look at the events below."
            found.append(Problem("bad", f"No instance of model {model.name} can be reached", advice))
        if model.version_count > 1:
            advice = (
                "Its workers differ in files or context, as in a rolling update. Requests are shared out."
            )
            found.append(Problem("warn", f"Model {model.name} has {model.version_count} versions", advice))
    return found


def _of_redis(processes: Sequence[ProcessReading]) -> list[Problem]:
    if not all(process.redis_connected for process in processes):
        return [
            Problem(
                "warn",
                "Redis does not answer",
                "Requests are served with the instances known before. New workers are not seen, and dead "
                "ones are noticed only by requests.",
            )
        ]
    refusal = next((process.redis_refusal for process in processes if process.redis_refusal), None)
    if refusal is None:
        return []
    return [Problem("warn", "Redis refuses writes", f"New workers cannot register: {refusal}")]


def _of_requests(requests: int, failures: Mapping[str, int], waiting_count: int) -> list[Problem]:
    found = []
    failed = sum(failures.values())
    if failed:
        named = ", ".join(f"{kind} {count:,}" for kind, count in Counter(failures).most_common())
        level: Level = "bad" if failed > _MOST_FAILED * requests else "warn"
        text = f"{failed:,} of {requests:,} requests failed in the last minute"
        found.append(Problem(level, text, f"By type: {named}."))
    if waiting_count:
        advice = "The limit of requests under way is reached (DYN_HTTP_MAX_IN_FLIGHT)."
        text = f"{_count(waiting_count, 'request waits', 'requests wait')} for a place at the frontend"
        found.append(Problem("warn", text, advice))
    return found


def _of_instances(states: Mapping[InstanceState, int]) -> list[Problem]:
    usable = states.get("serving", 0)
    in_use = sum(states.values()) - states.get("registered", 0)
    found = [
        Problem(
            "bad" if states[state] > _MOST_LOST * in_use else "warn",
            f"{_count(states[state], 'instance is', 'instances are')} {words}",
            advice,
        )
        for state, (words, advice) in _TROUBLE.items()
        if states.get(state)
    ]
    if states.get("busy") and not usable:
        advice = "New requests wait or are refused: add workers, or raise the busy thresholds."
        found.append(Problem("warn", "All instances are busy", advice))
    return found


def _of_routers(routers: Sequence[RouterReading]) -> list[Problem]:
    found = []
    for router in routers:
        if router.connected is False:
            advice = "It chooses by the caches that it knew before."
            found.append(Problem("warn", f"The router of {router.endpoint} cannot read KV events", advice))
        elif router.lag_s is not None and router.lag_s > LAG_S:
            advice = f"{router.lag_entries:,} entries are not applied yet: cache hits are missed."
            text = f"The router of {router.endpoint} is {router.lag_s:.0f} s behind the KV events"
            found.append(Problem("warn", text, advice))
    return found


def _count(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
