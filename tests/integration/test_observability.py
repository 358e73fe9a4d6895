"""compose/observability.yml: valid, and each metric and label of its dashboard and alerts is there.

The metrics are those of a real frontend, router and worker, after requests that end in several ways.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dynamo_redis.child import ChildProcess
from dynamo_redis.errors import ConnectionLost, HandlerFailed, Overloaded
from tests.promql import OWN_METRICS, TARGET_LABELS, names_in
from tests.routed_deployment import Deployment, FailingEngine, until_served
from tests.routed_deployment import deployment as deployment

WITHIN_S = 60.0
PROMPT = {"model": "demo", "prompt": "Tell me a long story. " * 20, "max_tokens": 20, "ignore_eos": True}


@pytest.fixture
def directory(repository: Path) -> Path:
    return repository / "compose"


@pytest.fixture
def compose(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((directory / "observability.yml").read_text())
    return content


@pytest.fixture
def dashboard(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "observability/grafana/dashboard.json").read_text())
    return content


@pytest.fixture
def alerts(directory: Path) -> list[dict[str, Any]]:
    content = yaml.safe_load((directory / "observability/alerts.yml").read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


# --------------------------------------------------------------------------- the compose file


def test_file_is_valid_by_the_compose_specification(compose: dict[str, Any], directory: Path) -> None:
    spec = pytest.importorskip("compose_spec", reason="has no wheel for this platform")
    spec.PyCompose.from_yaml(yaml.safe_dump(compose)).validate()
    single = yaml.safe_load((directory / "single.yml").read_text())
    assert single["name"] == compose["name"]
    merged = {**compose, "services": dict(single["services"]), "volumes": single["volumes"]}
    for name, service in compose["services"].items():
        base = single["services"].get(name, {})
        environment = {**base.get("environment", {}), **service.get("environment", {})}
        merged["services"][name] = {**base, **service, "environment": environment}
    merged["volumes"] = {**single["volumes"], **compose["volumes"]}
    spec.PyCompose.from_yaml(yaml.safe_dump(merged)).validate()


def test_mounted_files_are_there(compose: dict[str, Any], directory: Path) -> None:
    for name in ("prometheus", "grafana"):
        for volume in compose["services"][name]["volumes"]:
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (directory / source).is_file(), source


def test_images_have_exact_versions(compose: dict[str, Any]) -> None:
    images = [service["image"] for service in compose["services"].values() if "image" in service]
    assert len(images) == 2
    assert all(re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", image) for image in images), images


def test_ports_are_of_this_machine_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_targets_are_the_ports_of_the_services(compose: dict[str, Any], directory: Path) -> None:
    config = yaml.safe_load((directory / "observability/prometheus.yml").read_text())
    single = yaml.safe_load((directory / "single.yml").read_text())["services"]
    found = {
        look["names"][0]: str(look["port"])
        for job in config["scrape_configs"]
        for look in job["dns_sd_configs"]
    }
    assert found == {
        "frontend": single["frontend"]["environment"]["DYN_HTTP_PORT"],
        "worker": compose["services"]["worker"]["environment"]["DYN_SYSTEM_PORT"],
    }


# --------------------------------------------------------------------------- the dashboard


def expressions_of(dashboard: dict[str, Any]) -> list[str]:
    """Return the expressions of all panels, with Grafana's variables replaced."""
    return [
        target["expr"].replace("$__rate_interval", "5m").replace("$model", ".*")
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]


def test_dashboard_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_dashboard_has_a_row_for_each_part(dashboard: dict[str, Any]) -> None:
    rows = {panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"}
    assert {"Requests", "Tokens", "Latency", "Errors and shed load", "Workers", "Router", "Redis"} <= rows


def test_legends_name_labels_of_their_expression(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert shown <= names_in(target["expr"]).labels, target


# --------------------------------------------------------------------------- names that exist


def labels_by_metric(*texts: str) -> dict[str, set[str]]:
    """Return the labels that the samples of each name have."""
    found: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] |= sample.labels.keys()
    return found


async def addresses_of(deployment: Deployment) -> list[str]:
    """Run requests that end in each way; return the addresses of the metrics of frontend and workers."""
    ports = {"system_port": 0, "system_host": "127.0.0.1"}
    workers = [await deployment.worker(ports, kind=FailingEngine) for _ in range(2)]
    frontend = await deployment.frontend(migration_limit=1)
    await until_served(frontend, instances=2)
    assert (await frontend.post("/v1/completions", json=PROMPT)).status_code == 200
    for failure in (HandlerFailed("no"), Overloaded("no"), ConnectionLost("no")):
        FailingEngine.failure = failure
        await frontend.post("/v1/completions", json=PROMPT)
    assert (await frontend.post("/v1/completions", json={**PROMPT, "model": "no"})).status_code == 404
    with suppress(TimeoutError):
        async with asyncio.timeout(WITHIN_S):
            while "dynamo_redis_router_index_lag_seconds{" not in (await frontend.get("/metrics")).text:
                await asyncio.sleep(0.1)  # the lag is measured each 2 s
    addresses = [str(worker.process.runtime.system_address) for worker in workers]
    return [f"{frontend.base_url.host}:{frontend.base_url.port}", *addresses]


async def exposed(addresses: list[str]) -> dict[str, set[str]]:
    """Return the labels of all metrics there, by name."""
    async with httpx.AsyncClient(timeout=WITHIN_S) as http:
        answers = [await http.get(f"http://{address}/metrics") for address in addresses]
    return labels_by_metric(*(answer.text for answer in answers))


def unknown_names(expression: str, found: dict[str, set[str]]) -> set[str]:
    """Return the metrics and labels of an expression that are not shown."""
    names = names_in(expression)
    metrics = names.metrics - OWN_METRICS
    labels = TARGET_LABELS.union(*(found.get(metric, set()) for metric in metrics))
    return (metrics - found.keys()) | (names.labels - labels)


async def test_dashboard_and_alerts_name_what_exists(
    deployment: Deployment, dashboard: dict[str, Any], alerts: list[dict[str, Any]]
) -> None:
    found = await exposed(await addresses_of(deployment))
    assert unknown_names("sum by (nothing) (no_such_metric)", found) == {"nothing", "no_such_metric"}
    for expression in [*expressions_of(dashboard), *(alert["expr"] for alert in alerts)]:
        assert not unknown_names(expression, found), expression
    variables = [
        variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    for query in variables:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()  # type: ignore[union-attr]
        assert label in found[metric]


async def test_page_of_metrics_has_all_names(deployment: Deployment, repository: Path) -> None:
    page = (repository / "docs/health-and-metrics.md").read_text()
    shown = set(re.findall(r"`(…?\w+)`", page))
    for name in await exposed(await addresses_of(deployment)):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        endings = {f"…{base[place:]}" for place, letter in enumerate(base) if letter == "_"}
        assert base.startswith("process_") or {base, *endings} & shown, name


def test_alert_annotations_name_what_exists(alerts: list[dict[str, Any]]) -> None:
    for alert in alerts:
        shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(alert["annotations"])))
        grouped = names_in(alert["expr"]).labels
        by_group = re.search(r"\bby\b", alert["expr"]) is not None
        assert shown <= (grouped if by_group else grouped | TARGET_LABELS | {"router_id"}), alert["alert"]
        assert alert["annotations"].keys() == {"summary", "description"}


def test_promtool_accepts_rules_and_expressions(
    directory: Path, dashboard: dict[str, Any], tmp_path: Path
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    recorded = [
        {"record": f"panel:{number}", "expr": expression}
        for number, expression in enumerate(expressions_of(dashboard))
    ]
    panels = tmp_path / "panels.yml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    for command in (
        ["check", "rules", str(directory / "observability/alerts.yml"), str(panels)],
        ["check", "config", str(directory / "observability/prometheus.yml")],
    ):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# --------------------------------------------------------------------------- a real Prometheus


@asynccontextmanager
async def prometheus(directory: Path, alerts: Path, addresses: list[str]) -> AsyncIterator[httpx.AsyncClient]:
    """Run Prometheus on a port of its own, with the frontend and the workers as targets."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    jobs = {"frontend": addresses[:1], "worker": addresses[1:]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(alerts)],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": targets}]} for name, targets in jobs.items()
        ],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    log = directory / "prometheus.log"
    with log.open("wb") as output:
        process = ChildProcess.start(
            [
                program,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stdout=output,
            stderr=output,
        )
    try:
        async with asyncio.timeout(WITHIN_S):
            while not (found := re.search(r"[Ll]istening on.*127\.0\.0\.1:([1-9]\d*)", log.read_text())):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.05)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{found[1]}", timeout=WITHIN_S) as http:
            yield http
    finally:
        await process.stop(5.0)


async def value_of(http: httpx.AsyncClient, expression: str) -> list[Any]:
    answer = (await http.get("/api/v1/query", params={"query": expression})).json()
    assert answer["status"] == "success", answer
    found: list[Any] = answer["data"]["result"]
    return found


async def test_prometheus_answers_every_panel(
    deployment: Deployment, dashboard: dict[str, Any], directory: Path, tmp_path: Path
) -> None:
    addresses = await addresses_of(deployment)
    alerts = directory / "observability/alerts.yml"
    left = expressions_of(dashboard)
    async with prometheus(tmp_path, alerts, addresses) as http, asyncio.timeout(2 * WITHIN_S):
        while left := [expression for expression in left if not await value_of(http, expression)]:
            await asyncio.sleep(0.5)  # a rate needs two scrapes
        rules = (await http.get("/api/v1/rules")).json()["data"]["groups"][0]["rules"]
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
        up = await value_of(http, "sum by (job) (up)")
        assert {(one["metric"]["job"], one["value"][1]) for one in up} == {("frontend", "1"), ("worker", "2")}
