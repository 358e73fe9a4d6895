"""Fixtures that run on the event loop of their test, for anyio's plugin and for pytest-asyncio.

`on_the_tests_loop` makes a fixture that dispatches to several hidden ones: one for anyio's plugin, one for
each loop scope of pytest-asyncio. A test that is run by neither plugin, or by both, is refused at collection.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Generator
from types import FunctionType
from typing import Any

import pytest

try:
    pytest_asyncio: Any = importlib.import_module("pytest_asyncio")
except ImportError:
    pytest_asyncio = None

_LOOP_SCOPES = ("function", "class", "module", "package", "session")
_NAMES: set[str] = set()
"""The names of the fixtures that need a loop."""


def on_the_tests_loop(namespace: dict[str, Any]) -> Callable[[Any], Any]:
    """Decorate an asynchronous function: it becomes a fixture.

    `namespace` is that of a module in which pytest looks for fixtures: the hidden fixtures are put there.
    """

    def decorate(function: FunctionType) -> Any:
        name = function.__name__
        _NAMES.add(name)
        namespace[f"_{name}_anyio"] = pytest.fixture(_copy(function), name=f"_{name}_anyio")
        for scope in _LOOP_SCOPES if _asyncio_is_usable() else ():
            hidden = f"_{name}_asyncio_{scope}"
            namespace[hidden] = pytest_asyncio.fixture(_copy(function), name=hidden, loop_scope=scope)

        @pytest.fixture(name=name)
        def dispatch(request: pytest.FixtureRequest) -> Any:
            plugin = plugin_of(request.node)
            if plugin is None:
                pytest.fail(_complaint(request.node), pytrace=False)
            if plugin == "anyio":
                request.getfixturevalue("dynamo_asyncio_backend")
            return request.getfixturevalue(f"_{name}_{plugin}")

        dispatch.__doc__ = function.__doc__
        return dispatch

    return decorate


def plugin_of(item: pytest.Item) -> str | None:
    """Return the test's plugin: `anyio`, or `asyncio_` with the scope of its loop; None if it is unclear."""
    by_anyio = "anyio_backend" in getattr(item, "fixturenames", ())
    if not _is_asyncio_test(item):
        return "anyio" if by_anyio else None
    if by_anyio or not _asyncio_is_usable():
        return None
    marker = item.get_closest_marker("asyncio")
    given = {} if marker is None else marker.kwargs
    scope = given.get("loop_scope") or given.get("scope")
    return f"asyncio_{scope or item.config.getini('asyncio_default_test_loop_scope') or 'function'}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Refuse tests whose fixtures would run on another loop."""
    made = yield
    for item in made if isinstance(made, list) else [made]:
        uses_a_loop = isinstance(item, pytest.Function) and not _NAMES.isdisjoint(item.fixturenames)
        if uses_a_loop and plugin_of(item) is None:
            raise collector.CollectError(_complaint(item))
    return made


def _complaint(item: pytest.Item) -> str:
    names = ", ".join(sorted(_NAMES.intersection(getattr(item, "fixturenames", ())))) or "a fixture"
    beginning = f"{item.name} uses {names} of dynamo_redis.testing"
    if not inspect.iscoroutinefunction(getattr(item, "obj", None)):
        return f"{beginning}, which needs an event loop: make it `async def`"
    if not _is_asyncio_test(item):
        write = "@pytest.mark.anyio (or @pytest.mark.asyncio, with pytest-asyncio installed)"
        return f"{beginning}, and no plugin runs it: write {write} above it"
    if not _asyncio_is_usable():
        return f"{beginning} and is run by pytest-asyncio, which is too old: install pytest-asyncio>=0.24"
    return (
        f"{beginning}, and both anyio and pytest-asyncio want to run it: write only one of "
        "@pytest.mark.anyio and @pytest.mark.asyncio above it; with asyncio_mode=auto all tests are "
        "pytest-asyncio's, so leave @pytest.mark.anyio, anyio_mode=auto and the fixture anyio_backend out, "
        "or set asyncio_mode=strict"
    )


def _is_asyncio_test(item: pytest.Item) -> bool:
    return pytest_asyncio is not None and pytest_asyncio.is_async_test(item)


def _asyncio_is_usable() -> bool:
    """Return whether pytest-asyncio is installed, and lets fixtures choose their loop's scope."""
    return pytest_asyncio is not None and "loop_scope" in inspect.signature(pytest_asyncio.fixture).parameters


def _copy(function: FunctionType) -> FunctionType:
    """Copy a function: pytest-asyncio stores the scope of its loop on the function."""
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__annotations__ = function.__annotations__
    return copy


@pytest.fixture
def dynamo_asyncio_backend(anyio_backend_name: str) -> None:
    """Skip the test if its loop is not asyncio's."""
    if anyio_backend_name != "asyncio":
        pytest.skip(
            f"dynamo_redis runs on asyncio, not on {anyio_backend_name}: give your tests an anyio_backend "
            "fixture"
        )
