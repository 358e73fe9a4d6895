"""Which templates are quick, and so rendered in the frontend."""

from __future__ import annotations

import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.templates.quick import is_quick

QWEN = (
    "{%- set ns = namespace(last=messages|length - 1) %}{%- for message in messages[::-1] %}"
    "{%- if message.role == 'user' and not message.content.startswith('<tool') %}"
    "{%- set ns.last = loop.index0 %}{%- break %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{{- message.content.split('</think>')[-1].lstrip('\\n') ~ tools | tojson }}{%- endfor %}"
)
LLAMA = (
    "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role in ['tool', 'ipython'] %}{{ message.content | trim }}{% endif %}{% endfor %}"
    "{% for key, value in tools[0].items() %}{{ key }}{% endfor %}"
)


@pytest.mark.parametrize("source", [QWEN, LLAMA])
def test_common_constructs_are_quick(source: str) -> None:
    assert is_quick(source)


def test_demo_template_is_quick() -> None:
    templates = read_model_directory(DEMO_MODEL_PATH).chat_templates
    assert templates
    assert all(map(is_quick, templates.values()))


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = [messages] %}",
        "{% set x = [messages, 1] %}",
        "{% set x = {'a': messages} %}",
        "{% set x = (messages, messages) %}",
        "{% set x = namespace(a=[1]) %}{% set x.a = [x.a, x.a] %}",
        "{{ [[messages]] == [[messages]] }}",
        "{{ 9 ** 9 }}",
        "{{ 'x' * 9 }}",
        "{{ messages | sort }}",
        "{{ messages | sum }}",
        "{{ messages | map('pprint') | list }}",
        "{{ messages | batch(2) }}",
        "{{ dict(a=messages) }}",
        "{{ range(9) }}",
        "{{ lipsum() }}",
        "{{ messages.copy() }}",
        "{{ 'x'.join(messages) }}",
        "{{ 'x'.format(messages) }}",
        "{{ ('x' | attr('center'))(9) }}",
        "{{ namespace(*messages) }}",
        "{{ namespace(**messages[0]) }}",
        "{{ messages is sameas(1) }}",
        "{% for m in messages recursive %}{{ loop(m) }}{% endfor %}",
        "{% macro x() %}{{ varargs }}{% endmacro %}{{ x(messages, messages) }}",
        "{% macro x() %}{{ caller() }}{% endmacro %}{% call x() %}{% endcall %}",
        "{% set x %}{{ messages }}{% endset %}",
        "{% filter upper %}{{ messages }}{% endfilter %}",
        "{% generation %}{{ messages }}{% endgeneration %}",
        "{% include 'x' %}",
        "{{ messages[0].content.strip(messages[1].content) }}",
        "{{ messages[0].content.lstrip(chars=messages[1].content) }}",
        "{{ messages[0].content.rsplit(messages[1].content) }}",
        "{{ messages[0].content.strip('" + "x" * 33 + "') }}",
        "{{ messages[0].content | trim(messages[1].content) }}",
        "{% if messages[0].content is in(messages[1].content) %}{% endif %}",
        "{% if messages is eq(tools) %}{% endif %}",
        "{% for %}",
        "{# " + "x" * 70_000 + " #}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
    ids=lambda source: source[:40],
)
def test_template_with_other_operations_is_not_quick(source: str) -> None:
    assert not is_quick(source)
