"""schemathesis makes requests from the served document: no answer is a 5xx or differs from the document.

By hand, for as long as wanted: `schemathesis run http://localhost:8000/openapi.json --exclude-path
/dashboard/events`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.frontend_deployment import Deployment, until_healthy

CONFIG = Path(__file__).with_name("schemathesis.toml")
CONTEXT_LENGTH = 64
"""It keeps answers short."""

MODELS = {"/v1/embeddings": "vectors", "/busy_threshold": "idle"}
"""The models of the paths whose model is not `demo`."""

ENDLESS = "/dashboard/events"
Document = dict[str, Any]


async def test_generated_requests_find_no_fault(deployment: Deployment, tmp_path: Path) -> None:
    await deployment.worker(context_length=CONTEXT_LENGTH)
    await deployment.worker("idle")
    await deployment.embedding_worker()
    url = await deployment.frontend()
    await until_healthy(url, 3)
    async with httpx.AsyncClient(base_url=url) as http:
        document = (await http.get("/openapi.json")).json()
    OpenAPIV31SpecValidator(document).validate()
    narrow(document)
    path = tmp_path / "narrowed.json"
    path.write_text(json.dumps(document))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG)),
        *("run", str(path), "--url", url),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        report, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, report.decode()
    assert f"{len(document['paths']) + 1} selected" in report.decode()  # `/busy_threshold` has two


def narrow(document: Document) -> None:
    """Narrow the bodies to those that reach a worker.

    Parameters that only the table of refused and harmless ones knows are left out: the same code reads all of
    them. The thresholds are those of another model, whose workers may be too busy for requests then.
    """
    del document["paths"][ENDLESS]
    for path, operations in document["paths"].items():
        if "requestBody" not in operations.get("post", {}):
            continue
        content = operations["post"]["requestBody"]["content"]["application/json"]
        schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
        properties: dict[str, Any] = {
            name: described
            for name, described in schema["properties"].items()
            if not described.keys() <= {"description", "enum"}
        }
        if "model" in properties:
            model = MODELS.get(path, "demo")
            properties["model"] = {"const": model}
            content["example"]["model"] = model
        schema["properties"] = properties
