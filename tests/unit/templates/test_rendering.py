"""Chat templates beyond that of Qwen3: forms of content, tools, special tokens, and failures."""

from __future__ import annotations

import resource
import time
from typing import Any

import psutil
import pytest

from dynamo_redis.errors import ModelError, TemplateError
from dynamo_redis.templates import rendering
from dynamo_redis.templates.masking import Masking
from dynamo_redis.templates.protocol import RENDER_LIMITS, RenderLimits
from dynamo_redis.templates.rendering import CompiledTemplates, special_tokens

USER: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


def chat(
    source: str, config: dict[str, Any] | None = None, limits: RenderLimits = RENDER_LIMITS, **named: str
) -> CompiledTemplates:
    return CompiledTemplates({"default": source, **named}, config or {}, limits=limits)


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


def test_template_that_reads_both_forms_gets_the_sent_one() -> None:
    both = chat(
        "{% set c = messages[0].content %}{% if c is string %}s:{{ c }}{% else %}"
        "{% for part in c %}p:{{ part.text }} {% endfor %}{% endif %}"
    )
    assert both.render(USER) == "s:Hi"
    assert both.render([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]) == "p:Hi "


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


def test_arguments_become_an_object_if_the_template_writes_json() -> None:
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
    without_default = CompiledTemplates({"rag": "x", "tool_use": "with {{ tools | length }}"}, {})
    assert without_default.render(USER, tools=[{}]) == "with 1"
    with pytest.raises(TemplateError, match="called rag, tool_use, and none of them is the default"):
        without_default.render(USER)


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


def test_templates_may_use_the_features_of_transformers() -> None:
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


def test_developer_message_becomes_system_for_older_templates() -> None:
    source = "{% for m in messages if m.role in ROLES %}{{ m.role }}:{{ m.content }} {% endfor %}"
    messages = [{"role": "developer", "content": "Be kind."}, *USER]
    without = source.replace("ROLES", "['system', 'user']")
    assert chat(without).render(messages) == "system:Be kind. user:Hi "
    knowing = source.replace("ROLES", "['developer', 'user']")
    assert chat(knowing).render(messages) == "developer:Be kind. user:Hi "


# --------------------------------------------------------------------------- failures


def test_exception_of_a_template_keeps_its_message() -> None:
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
    monkeypatch.setattr(rendering, "PROBE_LIMITS", RenderLimits(0.05, 64 << 20))
    with pytest.raises(ModelError, match="does not end"):
        chat(ENDLESS)


@pytest.mark.parametrize("body", [ENDLESS, "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}"])
def test_a_rendering_that_runs_away_is_stopped(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    body = "{% if messages | length > 2 %}" + body + "{% endif %}"
    runaway = chat(body, limits=RenderLimits(0.1, 1 << 30))
    monkeypatch.setattr(rendering, "OUTPUT_LIMIT_CHARS", 1 << 20)
    started = time.monotonic()
    with pytest.raises(TemplateError, match=r"ran for too long|wrote over"):
        runaway.render(USER * 3)
    assert time.monotonic() - started < 5


NESTED = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
COPIES = (
    "{% set n = namespace(l=[], b='x' * 9999999) %}"
    "{% for i in range(999) %}{% set n.l = n.l + [n.b[1:]] %}{% endfor %}"
)

BOMBS = [
    "{{ 'x' * 10000000000 }}",
    "{{ [0] * 10000000000 }}",
    "{{ 'x' | center(10000000000) }}",
    "{{ 'x' | center(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '%*d' % (10000000000, 1) }}",
    "{{ '%(a(b))10000000000d' % {'a(b)': 1} }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10000000000) }}",
    "{{ '{x:>10000000000}'.format_map({'x': 1}) }}",
    "{{ 10 ** (10 ** 8) }}",
    "{{ 'x'.ljust(10000000000) }}",
    "{{ 'x'.encode().rjust(10000000000) }}",
    "{{ (1).to_bytes(10000000000, 'big') }}",
    "{{ '\t'.expandtabs(1000000000) * 99 }}",
    "{{ ('x' * 90000).replace('x', 'y' * 90000) }}",
    "{{ ('x' * 90000) | replace('x', 'y' * 90000) }}",
    "{{ ('y' * 90000).join('x' * 90000) }}",
    "{{ range(90000) | join('y' * 90000) }}",
    "{{ ('x' * 90000).translate({120: 'y' * 90000}) }}",
    "{{ 'x\ny' | indent(10000000000) }}",
    "{{ ('x' * 90000).translate(['y' * 90000] * 200) }}",
    "{{ ('x' | attr('center'))(10000000000) }}",
    "{{ ('y' * 90000).join(range(90000) | map('string')) }}",
    "{{ [1] | batch(10000000000, 0) | list }}",
    "{{ [1] | slice(10000000000) | list }}",
    "{{ [1] | tojson(indent=10000000000) }}",
    "{{ 1 | round(1000000000, 'ceil') }}",
    "{{ lipsum(1000000000) }}",
    "{% set ns = namespace(x='x' * 9999) %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x' * 9999) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    NESTED + "{{ ns.x }}",
    NESTED + "{{ ns }}",
    NESTED + "{{ ns.x | tojson }}",
    "{% set b = 'x' * 999999 %}{% set y %}{% for i in range(99999) %}{{ b }}{% endfor %}{% endset %}{{ y }}",
    COPIES,
    "{% set b = 'x' * 9999999 %}{% for i in b %}{% for j in b %}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_that_takes_all_memory_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both when the model is loaded and at a request; the address space is limited, so that a failure shows
    here."""
    monkeypatch.setattr(rendering, "PROBE_LIMITS", RenderLimits(0.5, 64 << 20))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (1 << 30), before[1]))
    started = time.monotonic()
    try:
        later = chat(
            "{% if messages | length > 2 %}" + source + "{% endif %}", limits=RenderLimits(0.5, 256 << 20)
        )
        with pytest.raises(TemplateError, match=r"the chat template (?!failed|needs)|undefined"):
            later.render(USER * 3)
        if "lipsum" not in source:
            with pytest.raises(ModelError, match=r"does not end on a short message: .*(?<!there is)$"):
                chat(source)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < 5


SEARCHED = "{% set t = 'a' * 500000 %}{% set p = 'a' * 1000 ~ 'b' %}"


@pytest.mark.parametrize(
    "source",
    [
        SEARCHED + "{% for c in t[:9999] if p in t %}{% endfor %}",
        SEARCHED + "{% if p in t %}{% endif %}" * 4000 + "{{ 1 + 1 }}",
        "{{ ('%(' * 99999) % {} }}",
    ],
    ids=["filtered loop", "comparisons", "fields without an end"],
)
def test_slow_operations_are_stopped_in_time(source: str) -> None:
    runaway = chat(
        "{% if messages | length > 2 %}" + source + "{% endif %}", limits=RenderLimits(0.05, 1 << 30)
    )
    started_s = time.process_time()
    with pytest.raises(TemplateError):
        runaway.render(USER * 3)
    assert time.process_time() - started_s < 2


def test_names_are_masked_in_deeply_nested_values() -> None:
    value: Any = "<|end|>"
    for _ in range(5000):
        value = [value]
    assert Masking(["<|end|>"]).is_needed(value)
    assert not Masking(["<|other|>"]).is_needed(value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'ab' * 3 ~ 2 ** 10 }}", "ababab1024"),
        ("{{ '%5.1f|%s' % (1.25, 'x') }}{{ '%03d' | format(7) }}", "  1.2|x007"),
        ("{{ '{:>4}{x!r}'.format(1, x='y') }}", "   1'y'"),
        ("{{ 'x' | center(3) }}{{ 'a\nb' | indent(2) }}", " x a\n  b"),
        ("{{ '-'.join(['a', 'b'] | map('upper')) }}", "A-B"),
        ("{{ [1, 2] | join(', ') }}{{ ['a', 'b'] | map('upper') | join }}", "1, 2AB"),
        ("{{ messages | map(attribute='role') | join('|') }}", "user"),
        (
            "{{ messages | join('|', attribute='content') }}{{ 'abc'[1:] }}{{ messages[::-1] | length }}",
            "Hibc1",
        ),
        ("{{ 'a b'.split() | list }}{{ 'a-b'.split('-', 1)[1] }}{{ 'a'.replace('a', 'b') }}", "['a', 'b']bb"),
        ("{% for i in range(3) if i %}{{ loop.index }}{{ loop.last }}{% endfor %}", "1False2True"),
        ("{% for i in range(5) if i > 1 and i != 3 %}{{ i }}{% endfor %}{{ 1 < 2 < 2 }}", "24False"),
        ("{{ 'i' in messages[0].content }}{{ 'x' not in 'y' and not (1 == 2) }}", "TrueTrue"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) + m(none) }}", "<1><None>"),
        ("{{ {'a': [1, 2.5]} }}{{ {'a': 1}.items() | list }}{{ none }}", "{'a': [1, 2.5]}[('a', 1)]None"),
    ],
)
def test_usual_operations_of_templates_are_within_the_limits(source: str, expected: str) -> None:
    assert chat(source).render(USER) == expected
