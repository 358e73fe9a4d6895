"""`/openapi.json` describes the routes that are served, and what they take and answer."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from dynamo_redis.frontend.openapi.document import OPENAPI_PATH
from dynamo_redis.frontend.openapi.operations import OPERATIONS
from tests.frontend_deployment import Deployment
from tests.integration.frontend.conftest import Frontend, OpenFrontend

CHAT: Any = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: Any = {"model": "demo", "prompt": "Hi"}
MESSAGES: Any = {**CHAT, "max_tokens": 5}
RESPONSES: Any = {"model": "demo", "input": "Hi"}
THRESHOLD: Any = {"model": "demo", "active_decode_blocks_threshold": 0.5}


async def document_of(http: httpx.AsyncClient, **headers: str) -> dict[str, Any]:
    answer = await http.get(OPENAPI_PATH, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    found: dict[str, Any] = answer.json()
    return found


def validator(document: dict[str, Any], schema: Any) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document["components"]})


def body_validator(document: dict[str, Any], path: str) -> Draft202012Validator:
    content = document["paths"][path]["post"]["requestBody"]["content"]
    return validator(document, content["application/json"]["schema"])


async def test_document_has_each_served_route(deployment: Deployment) -> None:
    async with httpx.AsyncClient(base_url=await deployment.frontend()) as http:
        document = await document_of(http)
        unknown = (await http.get("/no/such/path")).json()["error"]["message"]
        offered = re.findall(r"(?:GET|POST) (/[^\s,]*[^\s,.])", unknown.partition("There are:")[2])
        assert set(document["paths"]) == set(offered)
        described = {
            (method.upper(), path) for path, methods in document["paths"].items() for method in methods
        }
        assert described == set(OPERATIONS)
        for path, methods in document["paths"].items():
            allowed = (await http.request("PUT", path)).headers["allow"]
            assert {each.strip() for each in allowed.split(",")} - {"HEAD"} == {
                method.upper() for method in methods
            }


async def test_document_is_valid(frontend: Frontend) -> None:
    document = await document_of(frontend.http)
    assert document["openapi"].startswith("3.1.")
    for name, schema in document["components"]["schemas"].items():
        assert re.fullmatch(r"[\w.-]+", name)
        Draft202012Validator.check_schema(schema)
    names = {each for path in document["paths"].values() for each in _references(path)}
    names |= _references(document["components"])
    assert names == {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    operations = [each for path in document["paths"].values() for each in path.values()]
    ids = [each["operationId"] for each in operations]
    assert len(ids) == len(set(ids))
    for operation in operations:
        assert all(each["description"] for each in operation["responses"].values())


def _references(value: Any) -> set[str]:
    if isinstance(value, list):
        return {found for each in value for found in _references(each)}
    if not isinstance(value, dict):
        return set()
    found = {inner for each in value.values() for inner in _references(each)}
    return found | {value["$ref"]} if isinstance(value.get("$ref"), str) else found


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", CHAT, 200),
        ("POST", "/v1/chat/completions", {**CHAT, "top_k": "x"}, 400),
        ("POST", "/v1/completions", TEXT, 200),
        ("POST", "/v1/completions", {**TEXT, "model": "no"}, 404),
        ("POST", "/v1/messages", MESSAGES, 200),
        ("POST", "/v1/messages", {**MESSAGES, "model": "no"}, 404),
        ("POST", "/v1/messages/count_tokens", CHAT, 200),
        ("POST", "/v1/responses", RESPONSES, 200),
        ("POST", "/v1/responses", {**RESPONSES, "truncation": "auto"}, 400),
        ("POST", "/tokenize", TEXT, 200),
        ("POST", "/detokenize", {"model": "demo", "tokens": [1, 2]}, 200),
        ("POST", "/busy_threshold", {"model": "demo"}, 200),
        ("POST", "/busy_threshold", THRESHOLD | {"model": "no"}, 404),
        ("POST", "/clear_kv_blocks", {"odd": 1}, 400),
        ("GET", "/busy_threshold", None, 200),
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/models/demo", None, 200),
        ("GET", "/v1/models/no", None, 404),
        ("GET", "/health", None, 200),
        ("GET", "/live", None, 200),
        ("GET", "/version", None, 200),
        ("GET", "/metrics", None, 200),
    ],
)
async def test_answers_are_as_described(
    frontend: Frontend, method: str, path: str, body: Any, status: int
) -> None:
    document = await document_of(frontend.http)
    answer = await frontend.http.request(method, path, json=body)
    assert answer.status_code == status
    described = path if path in document["paths"] else "/v1/models/{model}"
    responses = document["paths"][described][method.lower()]["responses"]
    media = answer.headers["content-type"].partition(";")[0]
    schema = responses[str(status)]["content"][media]["schema"]
    content = answer.json() if media == "application/json" else answer.text
    validator(document, schema).validate(content)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/demo", "/v1/models/no"])
async def test_anthropic_models_are_as_described(frontend: Frontend, path: str) -> None:
    document = await document_of(frontend.http)
    answer = await frontend.http.get(path, headers={"anthropic-version": "2023-06-01"})
    described = "/v1/models" if path == "/v1/models" else "/v1/models/{model}"
    response = document["paths"][described]["get"]["responses"][str(answer.status_code)]
    validator(document, response["content"]["application/json"]["schema"]).validate(answer.json())


@pytest.mark.parametrize(
    ("path", "body", "is_taken"),
    [
        ("/v1/chat/completions", {**CHAT, "stop": ["a", "b"], "user": "me", "audio": False}, True),
        ("/v1/chat/completions", {**CHAT, "nvext": {"top_k": 3, "annotations": []}}, True),
        ("/v1/chat/completions", {**CHAT, "nvext": {"odd": 1}}, False),
        ("/v1/chat/completions", {**CHAT, "service_tier": "flex"}, False),
        ("/v1/chat/completions", {**CHAT, "odd": 1}, False),
        ("/v1/chat/completions", {**CHAT, "messages": []}, False),
        ("/v1/chat/completions", {**CHAT, "stop": ["a"] * 5}, False),
        ("/v1/completions", {"model": "demo", "prompt": [[1, 2], [3]]}, True),
        ("/v1/completions", {"model": "demo", "prompt": [1.5]}, False),
        ("/v1/messages", {**MESSAGES, "system": [{"type": "text", "text": "Be brief."}]}, True),
        ("/v1/messages", {**MESSAGES, "messages": [{"role": "user", "content": [{"type": "odd"}]}]}, False),
        ("/v1/messages", CHAT, False),
        ("/v1/responses", {**RESPONSES, "store": True, "max_output_tokens": 5}, True),
        ("/v1/responses", {**RESPONSES, "background": True}, False),
        ("/detokenize", {"model": "demo", "tokens": [-1]}, False),
        ("/busy_threshold", {"model": "demo", "active_decode_blocks_threshold": None}, True),
        ("/busy_threshold", {**THRESHOLD, "active_decode_blocks_threshold": 1.5}, False),
        ("/busy_threshold", {**THRESHOLD, "odd": 1}, False),
        ("/clear_kv_blocks", {}, True),
        ("/clear_kv_blocks", {"odd": 1}, False),
    ],
)
async def test_bodies_are_taken_as_described(
    frontend: Frontend, path: str, body: Any, is_taken: bool
) -> None:
    document = await document_of(frontend.http)
    assert body_validator(document, path).is_valid(body) is is_taken
    assert ((await frontend.http.post(path, json=body)).status_code == 200) is is_taken


async def test_keys_are_described(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(http_api_key="secret-key", http_open_paths="/live")
    assert (await frontend.http.get(OPENAPI_PATH)).status_code == 401
    document = await document_of(frontend.http, authorization="Bearer secret-key")
    assert "secret-key" not in str(document)
    assert set(document["components"]["securitySchemes"]) == {"bearer", "x-api-key", "password"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) is (path != "/live")
            assert ("401" in operation["responses"]) is (path != "/live")
    opened = await open_frontend(http_api_key="secret-key", http_open_paths=f"/live,{OPENAPI_PATH}")
    assert "security" not in (await document_of(opened.http))["paths"][OPENAPI_PATH]["get"]


async def test_document_without_keys_asks_for_none(frontend: Frontend) -> None:
    document = await document_of(frontend.http)
    assert "securitySchemes" not in document["components"]
    assert "security" not in document["paths"]["/v1/models"]["get"]
