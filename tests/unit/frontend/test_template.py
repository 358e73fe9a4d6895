"""Chat templates beyond the one of Qwen3: forms of content, tools, special tokens, and what goes wrong."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dynamo_redis.errors import ModelError, TemplateError
from dynamo_redis.frontend import template
from dynamo_redis.frontend.template import ChatTemplate, special_tokens

USER: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


def chat(source: str, config: dict[str, Any] | None = None, **named: str) -> ChatTemplate:
    return ChatTemplate({"default": source, **named}, config or {})


def test_text_parts_are_joined_for_a_template_that_expects_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    assert chat("{{ messages[0].content + '!' }}").render(messages) == "one\ntwo!"
    assert messages == [{"role": "user", "content": parts}]


def test_text_is_made_a_part_for_a_template_that_expects_parts() -> None:
    expects_parts = chat("{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}")
    assert expects_parts.render(USER) == "[Hi]"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert expects_parts.render([{"role": "user", "content": parts}]) == "[a][b]"


def test_a_template_that_takes_both_gets_what_came() -> None:
    both = chat(
        "{% set c = messages[0].content %}{% if c is string %}s:{{ c }}{% else %}"
        "{% for part in c %}p:{{ part.text }} {% endfor %}{% endif %}"
    )
    assert both.render(USER) == "s:Hi"
    assert both.render([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]) == "p:Hi "


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


def test_arguments_become_an_object_for_a_template_that_writes_json() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}"
    )
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert chat(source).render(messages) == '{"a": 1}'
    assert CALL["function"] == {"name": "f", "arguments": '{"a":1}'}
    broken = {**CALL, "function": {"name": "f", "arguments": "{a"}}
    with pytest.raises(TemplateError, match="not JSON"):
        chat(source).render([*USER, {"role": "assistant", "tool_calls": [broken]}])


def test_arguments_stay_a_string_for_a_template_that_writes_it() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set x = c.function.arguments %}"
        "{{ x if x is string else x | tojson }}{% endfor %}{% endfor %}"
    )
    messages = [*USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert chat(source).render(messages) == '{"a":1}'


def test_json_is_not_escaped_for_html() -> None:
    source = "{{ tools | tojson }}|{{ tools | tojson(indent=1) }}"
    tools = [{"text": "<a> & 'b' é"}]
    assert chat(source).render(USER, tools=tools) == (
        '[{"text": "<a> & \'b\' é"}]|[\n {\n  "text": "<a> & \'b\' é"\n }\n]'
    )


def test_a_template_for_tools_is_used_with_tools() -> None:
    both = chat("plain", tool_use="with {{ tools | length }}")
    assert both.render(USER) == "plain"
    assert both.render(USER, tools=[{}, {}]) == "with 2"
    with pytest.raises(ModelError, match="no chat template called 'default'"):
        ChatTemplate({"tool_use": "x"}, {})


def test_special_tokens_are_strings_whatever_the_config_has() -> None:
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
    }
    assert special_tokens(config) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": ["<a>", "<b>"],
    }
    assert chat("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", config).render(USER) == "<s>Hi</s>"


def test_variables_of_the_request_reach_the_template() -> None:
    source = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{{ documents[0].title }}"
    documents = [{"title": "T"}]
    assert chat(source).render(USER, documents=documents, enable_thinking=False) == "FalseT"


def test_what_templates_of_transformers_may_use() -> None:
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
        "{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}{{ strftime_now('%Y') | length }}"
    )
    assert chat(source).render(USER * 2) == "Hi24"


def test_blocks_are_trimmed_as_transformers_does() -> None:
    assert chat("  {% if true %}\n  x\n  {% endif %}\ny").render(USER) == "  x\ny"


def test_reasoning_is_found_under_each_of_its_names() -> None:
    source = "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }} {% endfor %}"
    messages = [
        {"role": "assistant", "content": "", name: name}
        for name in ("reasoning_content", "thinking", "reasoning")
    ]
    assert chat(source).render(messages) == (
        "reasoning_content/reasoning_content thinking/thinking reasoning/reasoning "
    )


def test_the_final_message_is_cut_where_it_ends() -> None:
    source = "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}{{ '?' if add_generation_prompt }}"
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    assert chat(source).render(messages) == "<Hi><Well,>?"
    assert chat(source).render(messages, continue_final_message=True) == "<Hi><Well,"
    with pytest.raises(TemplateError, match="leaves the final message out"):
        chat("{{ messages[0].content }}").render(messages, continue_final_message=True)


# --------------------------------------------------------------------------- what goes wrong


def test_what_a_template_raises_is_its_own_message() -> None:
    source = "{{ raise_exception('roles must alternate') if messages | length > 1 }}"
    with pytest.raises(TemplateError, match=r"^roles must alternate$"):
        chat(source).render(USER * 2)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 if messages | length > 1 }}",
        "{{ 'x' + 1 if messages | length > 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'x' %}",
    ],
)
def test_whatever_a_template_does_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError):
        chat(source).render(USER * 2)


def test_a_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ModelError, match="'default' does not compile"):
        chat("{% for %}")


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "_PROBE_LIMIT_S", 0.05)
    with pytest.raises(ModelError, match="does not end"):
        chat(ENDLESS)


@pytest.mark.parametrize("body", [ENDLESS, "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}"])
def test_a_rendering_that_runs_away_is_stopped(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    runaway = chat("{% if messages | length > 2 %}" + body + "{% endif %}")
    monkeypatch.setattr(template, "OUTPUT_LIMIT_CHARS", 1 << 20)
    started = time.monotonic()
    with pytest.raises(TemplateError, match=r"ran for too long|wrote over"):
        runaway._variants["default"].render({"messages": USER * 3}, limit_s=0.1)
    assert time.monotonic() - started < 5
