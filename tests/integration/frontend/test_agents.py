"""An agent of pydantic-ai, unchanged, calls its tools through a frontend and the mock engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.frontend_deployment import Deployment, until_healthy

pydantic_ai = pytest.importorskip("pydantic_ai")
pytest.importorskip("pydantic_ai.models.openai")

CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'


@pytest.fixture
async def model(deployment: Deployment) -> AsyncIterator[Any]:
    """Yield the model of a deployment on a real Redis, as pydantic-ai has it."""
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    await deployment.worker()
    url = await deployment.frontend()
    await until_healthy(url)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield OpenAIChatModel("demo", provider=OpenAIProvider(openai_client=client))


def weather_agent(model: Any, asked: list[str]) -> Any:
    agent = pydantic_ai.Agent(model)

    @agent.tool_plain  # type: ignore[untyped-decorator]
    def get_weather(city: str) -> str:
        """Return the weather of a city."""
        asked.append(city)
        return "3 degrees and rain"

    return agent


async def test_agent_calls_its_tool_and_answers(model: Any) -> None:
    asked: list[str] = []
    result = await weather_agent(model, asked).run(f"<mock_answer>{CALL}{CALL}</mock_answer>")
    assert asked == ["Oslo", "Oslo"]
    assert result.output.endswith((".", "…"))
    assert "<tool_call>" not in result.output


async def test_agent_streams_its_loop(model: Any) -> None:
    asked: list[str] = []
    async with weather_agent(model, asked).run_stream(f"<mock_answer>{CALL}</mock_answer>") as result:
        output = await result.get_output()
    assert asked == ["Oslo"]
    assert output
