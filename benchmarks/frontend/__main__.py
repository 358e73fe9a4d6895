"""Suite `frontend`: the OpenAI-compatible frontend, against Dynamo's and others.

F1  requests/s, tokens one step apart, against Dynamo's frontend and mocker (`saturated`)
F2  CPU time a request of the whole deployment, in the same rounds
F3  requests/s against a FastAPI frontend in front of the same workers
F4  200 answers, a token each 20 ms: CPU time of a token in the frontend, against FastAPI (`paced`)
F5  the same in all processes, against Dynamo
F6  time to the first token without other load (`latency`)
F7  longest pause of the event loop under long prompts
F8  CPU time a request, two frontend processes on one port against one (`two_processes`)
F9  pause of an answer whose worker is killed (`kills`)
F10 requests/s in front of HTTP engines, against gateways written in Rust (`gateways`)
F11 CPU time of a streamed token with parsers of tool calls and reasoning, against none (`parsing`)
F12 golden tool calls and reasoning that are parsed right
F13 CPU time while three browsers look at the dashboard, with 1,000 workers (`dashboard`)

`--rows F1,F2` runs some.
"""

from __future__ import annotations

from benchmarks.frontend import paced, saturated
from benchmarks.frontend.dashboard import dashboard
from benchmarks.frontend.gateways import GATEWAYS, against_gateways
from benchmarks.frontend.kills import kills
from benchmarks.frontend.latency import first_tokens, pauses
from benchmarks.frontend.parsing import golden_answers, on_against_off
from benchmarks.frontend.prompts import NoTokenizer, tokenizer_source
from benchmarks.frontend.sides import DYNAMO_FRONTEND, FASTAPI_NEEDS
from benchmarks.frontend.two_processes import two_against_one
from benchmarks.harness.suite import Bounds, Groups, run_suite

BOUNDS: Bounds = {
    "F1": (
        ("requests/s, tokens one step apart ÷ Dynamo 1.6.1 frontend + mocker, same machine, same run"),
        2,
        3.5,
    ),
    "F2": ("CPU a request, whole deployment ÷ Dynamo's", 0.6, 0.3),
    "F3": ("requests/s ÷ FastAPI with a pydantic model a chunk, same worker", 3.5, 6),
    "F4": ("paced 20 ms a token, 200 streams: CPU a token ÷ that FastAPI", 0.4, 0.3),
    "F5": ("paced 20 ms a token, 200 streams: CPU a token of all processes ÷ Dynamo's", 1.0, 0.6),
    "F6": ("time to first token p50 unloaded, ms: 200-token prompt; 12k-token prompt", [4, 12], [2, 6]),
    "F7": ("worst pause of the event loop under 12k-token prompts, ms", 20, 5),
    "F8": ("CPU a request, two frontend processes on one port ÷ one", 1.1, 1.03),
    "F9": ("worker killed mid-answer, migration on: added pause p99, ms", 300, 50),
    "F10": (
        (
            "requests/s through the frontend and `worker openai` ÷ the best of the Rust gateways from the "
            "registry (`smg`, `sglang-router`, `vllm-router`), in front of the same two HTTP engines"
        ),
        0.6,
        0.9,
    ),
    "F11": ("tool parser: CPU a streamed token with tools on ÷ off", 1.5, 1.1),
    "F12": (
        "golden tool-call and reasoning cases parsed right, whole and at each split point, %",
        100,
        100,
    ),
    "F13": (
        "dashboard with 1,000 workers: CPU of the frontend while three browsers look, % of a core",
        10,
        3,
    ),
}
"""Text, bound (`must`) and aim of each row."""

GROUPS: Groups = (
    (("F1", "F2"), saturated.against_dynamo),
    (("F3",), saturated.against_fastapi),
    (("F4",), paced.against_fastapi),
    (("F5",), paced.against_dynamo),
    (("F6",), first_tokens),
    (("F7",), pauses),
    (("F8",), two_against_one),
    (("F9",), kills),
    (("F10",), against_gateways),
    (("F11",), on_against_off),
    (("F12",), golden_answers),
    (("F13",), dashboard),
)
"""The rows of each measurement."""


def main() -> None:
    """Run the suite, or the rows of the command line."""
    run_suite("frontend", __doc__, BOUNDS, GROUPS, _conditions, unavailable=(NoTokenizer,))


def _conditions(wanted: set[str], _: int) -> list[str]:
    """Return the conditions of the measurement that a reader needs to judge the figures. Raises
    NoTokenizer."""
    tokenizer_source()
    gateways = ", ".join(package for package, *_ in GATEWAYS.values())
    rivals = {
        **dict.fromkeys(("F1", "F2", "F5", "F6"), DYNAMO_FRONTEND),
        **dict.fromkeys(("F3", "F4"), FASTAPI_NEEDS[0]),
        "F10": gateways,
    }
    named = dict.fromkeys(rival for row, rival in rivals.items() if row in wanted)
    return [
        "unique prompts of 200 tokens, 64 streamed tokens, c=32, unless said otherwise; alternating rounds",
        *([f"rivals: {', '.join(named)}"] if named else []),
    ]


if __name__ == "__main__":
    main()
