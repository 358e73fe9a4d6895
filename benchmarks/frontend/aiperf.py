"""NVIDIA's aiperf, unmodified, against our frontend: `python -m benchmarks.frontend.aiperf`.

It is installed into a virtual environment of its own, gets the tokenizer as a local directory, and sends 500
chats of 200 tokens, 32 at a time, for 64 streamed tokens each, of which the mock engines send one each 20 ms.
The report that it prints is kept in `results/frontend_aiperf.txt`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from benchmarks.frontend.paced import OUR_PACE
from benchmarks.frontend.prompts import MODEL, NoTokenizer, model_directory
from benchmarks.frontend.sides import our_frontend, our_workers
from benchmarks.harness.processes import rival_python
from benchmarks.harness.report import RESULTS

AIPERF: Final = "aiperf==0.13.0"
REPORT: Final = RESULTS / "frontend_aiperf.txt"
OPTIONS: Final = (
    *("--endpoint-type", "chat", "--streaming", "--concurrency", "32", "--request-count", "500"),
    *("--synthetic-input-tokens-mean", "200", "--synthetic-input-tokens-stddev", "0"),
    *("--output-tokens-mean", "64", "--output-tokens-stddev", "0"),
    *("--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:64"),
    *("--ui", "none"),
)


def main() -> None:
    """Run it, and keep its report."""
    program = Path(rival_python("aiperf", AIPERF)).with_name("aiperf")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with model_directory() as model, our_workers(model, *OUR_PACE) as workers, our_frontend(workers) as side:
        artifacts = model.with_name("aiperf")
        place = ("--model", MODEL, "--url", side.url, "--tokenizer", str(model))
        command = [str(program), "profile", *place, *OPTIONS, "--output-artifact-dir", str(artifacts)]
        subprocess.run(command, check=True, env={**environment, "COLUMNS": "120"}, cwd=model.parent)
        [report] = artifacts.rglob("*console*.txt")
        shown = " ".join(("aiperf profile", "--model", MODEL, "--url", "http://127.0.0.1:PORT", *OPTIONS))
        tables = report.read_text().partition("╭")[0].strip()  # without a box about GPUs
        REPORT.write_text(f"{AIPERF}\n{shown}\n\n{tables}\n")
    print(f"wrote {REPORT}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except NoTokenizer as exc:
        raise SystemExit(str(exc)) from exc
