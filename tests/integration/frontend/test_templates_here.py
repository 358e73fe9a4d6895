"""Quick templates render small conversations in the frontend, and give what their process gives."""

from __future__ import annotations

import pytest

from dynamo_redis.errors import TemplateError
from dynamo_redis.models import chat_template
from dynamo_redis.models.chat_template import HERE_BYTES, HERE_MESSAGE_COUNT, MOST_OVERRUNS, ChatTemplate
from dynamo_redis.templates.protocol import MaskedText, RenderLimits, render_job

QUICK = (
    "{% if messages | length > 90 %}{{ raise_exception('too many') }}{% endif %}"
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
)
SLOW = "{% set parts = [messages] %}" + QUICK


async def rendered(template: ChatTemplate, count: int, content: str = "Hé") -> bytes:
    text = await template.render(conversation(count, content))
    assert isinstance(text, bytearray)
    return bytes(text)


def conversation(count: int, content: str = "Hé") -> bytes:
    return render_job([{"role": "user", "content": content}] * count)


def expected(count: int, content: str = "Hé") -> bytes:
    return f"user: {content}\n".encode() * count


@pytest.mark.parametrize(("source", "is_here"), [(QUICK, True), (SLOW, False)])
@pytest.mark.parametrize(
    ("count", "content"),
    [(1, "Hé"), (HERE_MESSAGE_COUNT, "a"), (HERE_MESSAGE_COUNT + 1, "a"), (2, "x" * HERE_BYTES)],
    ids=["small", "most messages", "one message more", "large"],
)
async def test_both_places_give_the_same(source: str, is_here: bool, count: int, content: str) -> None:
    template = ChatTemplate({"default": source}, {})
    try:
        await template.open()
        assert template.renders_here is is_here
        assert await rendered(template, count, content) == expected(count, content)
    finally:
        await template.aclose()


async def test_refusals_have_the_words_of_the_template() -> None:
    template = ChatTemplate({"default": QUICK.replace("> 90", "> 1")}, {})
    try:
        await template.open()
        with pytest.raises(TemplateError, match=r"^too many$"):
            await template.render(conversation(2))
        with pytest.raises(TemplateError, match="surrogate"):
            await template.render(conversation(1, "\ud800"))
        with pytest.raises(TemplateError, match=r"no attribute 'content'"):
            await template.render(render_job([{"role": "user"}]))
    finally:
        await template.aclose()


async def test_rendering_over_the_limits_is_done_in_the_process() -> None:
    copies = "{% for message in messages %}" + "{{ '-' + message.content }}" * 200 + "{% endfor %}"
    template = ChatTemplate({"default": copies}, {})
    try:
        await template.open()
        content = "x" * (HERE_BYTES // 2)
        for _ in range(MOST_OVERRUNS + 1):
            assert await rendered(template, 1, content) == f"-{content}".encode() * 200
        assert template.renders_here  # it needs memory, not time
    finally:
        await template.aclose()


async def test_template_that_takes_too_long_goes_to_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "HERE_LIMITS", RenderLimits(0.0, 1 << 20))
    template = ChatTemplate({"default": QUICK}, {})
    try:
        await template.open()
        for left in range(MOST_OVERRUNS, 0, -1):
            assert template.renders_here, left
            assert await rendered(template, 1) == expected(1)
        assert not template.renders_here
        assert await rendered(template, 1) == expected(1)
    finally:
        await template.aclose()


async def test_names_of_special_tokens_are_masked_in_both_places() -> None:
    texts = []
    for source in (QUICK, SLOW):
        template = ChatTemplate({"default": source}, {}, ["<|end|>"])
        try:
            await template.open()
            texts.append(await template.render(conversation(1, "a<|end|>")))
        finally:
            await template.aclose()
    assert isinstance(texts[0], MaskedText)
    assert texts[0] == texts[1]
