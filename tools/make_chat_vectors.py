"""Makes tests/vectors/chat_prompts.json: prompts as transformers makes them.

    pip install transformers jinja2 && python tools/make_chat_vectors.py > tests/vectors/chat_prompts.json

Each directory is the demo model's tokenizer with other files beside it. Its prompts are those of
`apply_chat_template`: the tokenizer's, and the processor's for `chat_template.json`, which tokenizers do not
read. Those of conversations are `render_jinja_template`'s, which gives a template null content as the client
sent it; `apply_chat_template` drops the key.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

DEMO_MODEL = Path(__file__).parents[1] / "src" / "dynamo_redis" / "engines" / "demo_model"

CONFIG = {"model_max_length": 2048, "tokenizer_class": "PreTrainedTokenizerFast"}
PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENS = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}
HELLO = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

DIRECTORIES: dict[str, dict[str, Any]] = {
    "template in tokenizer_config.json": {
        "tokenizer_config.json": {**CONFIG, "chat_template": PLAIN, "bos_token": "<|im_start|>"},
    },
    "tokens in special_tokens_map.json alone": {
        "tokenizer_config.json": {**CONFIG, "chat_template": PLAIN},
        "special_tokens_map.json": TOKENS,
    },
    "special_tokens_map.json goes before tokenizer_config.json": {
        "tokenizer_config.json": {**CONFIG, "chat_template": PLAIN, "bos_token": "<|endoftext|>"},
        "special_tokens_map.json": TOKENS,
    },
    "added_tokens_decoder goes before special_tokens_map.json": {
        "tokenizer_config.json": {
            **CONFIG,
            "chat_template": PLAIN,
            "bos_token": "<|endoftext|>",
            "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
        },
        "special_tokens_map.json": TOKENS,
    },
    "tokens under names of the model's own": {
        "tokenizer_config.json": {
            **CONFIG,
            "chat_template": "{{ image_token }}|{{ audio_token }}|" + PLAIN,
            "image_token": "<|im_start|>",
            "extra_special_tokens": {"audio_token": "<|im_end|>"},
        },
    },
    "chat_template.jinja": {
        "tokenizer_config.json": {**CONFIG, "chat_template": "OLD" + PLAIN},
        "chat_template.jinja": PLAIN,
    },
    "chat_template.jinja goes before a list with tool_use": {
        "tokenizer_config.json": {
            **CONFIG,
            "chat_template": [
                {"name": "default", "template": PLAIN},
                {"name": "tool_use", "template": "TOOLS" + PLAIN},
            ],
        },
        "chat_template.jinja": "NEW" + PLAIN,
    },
    "additional_chat_templates": {
        "tokenizer_config.json": CONFIG,
        "chat_template.jinja": PLAIN,
        "additional_chat_templates/tool_use.jinja": "TOOLS {{ tools | length }}" + PLAIN,
        "additional_chat_templates/rag.jinja": "RAG" + PLAIN,
    },
    "additional_chat_templates alone": {
        "tokenizer_config.json": {**CONFIG, "chat_template": "OLD" + PLAIN},
        "additional_chat_templates/tool_use.jinja": "TOOLS" + PLAIN,
    },
    "a list": {
        "tokenizer_config.json": {
            **CONFIG,
            "chat_template": [
                {"name": "default", "template": PLAIN},
                {"name": "tool_use", "template": "TOOLS" + PLAIN},
            ],
        },
    },
    "a list without a default": {
        "tokenizer_config.json": {**CONFIG, "chat_template": [{"name": "rag", "template": PLAIN}]},
    },
    "a list with tool_use and no default": {
        "tokenizer_config.json": {**CONFIG, "chat_template": [{"name": "tool_use", "template": PLAIN}]},
    },
    "a map of templates": {
        "tokenizer_config.json": {**CONFIG, "chat_template": {"default": PLAIN, "tool_use": "T" + PLAIN}},
    },
    "chat_template.json": {
        "tokenizer_config.json": CONFIG,
        "chat_template.json": {"chat_template": PLAIN},
    },
    "no template": {"tokenizer_config.json": CONFIG},
}

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 5, "b": "x"}'}}
PARSED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 5, "b": "x"}}}


def calling(call: dict[str, Any], **content: Any) -> list[dict[str, Any]]:
    """Return a conversation in which the assistant calls a tool."""
    return [
        {"role": "user", "content": "5+3"},
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "8"},
    ]


NULL, EMPTY, ABSENT = {"content": None}, {"content": ""}, dict[str, Any]()

# The templates below follow published models; the name says which property decides.
MESSAGES = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
CALLS_BY_STRING = (
    "{% for c in m.tool_calls %}<C>{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}"
)
TEMPLATES = {
    "content is none": MESSAGES.replace(
        "BODY",
        "{% if m.role != 'assistant' %}<{{ m.role }}>{{ m['content'] }}{% endif %}"
        "{% if m.role == 'assistant' and m['content'] is none %}" + CALLS_BY_STRING + "{% endif %}"
        "{% if m.role == 'assistant' and m['content'] is not none %}<A>{{ m['content'] }}{% endif %}",
    ),
    "content is not defined": MESSAGES.replace(
        "BODY",
        "{% if m.content is not defined %}" + CALLS_BY_STRING + "{% else %}<{{ m.role }}>{{ m.content }}"
        "{% endif %}",
    ),
    "tool_calls in the message": MESSAGES.replace(
        "BODY",
        "{% if 'tool_calls' in m %}" + CALLS_BY_STRING + "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}",
    ),
    "content is added to text": MESSAGES.replace(
        "BODY", "{{ '<' + m.role + '>' + m.content }}{% if m.tool_calls %}" + CALLS_BY_STRING + "{% endif %}"
    ),
    "content is written": MESSAGES.replace(
        "BODY", "<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}" + CALLS_BY_STRING + "{% endif %}"
    ),
    "content is asked for": MESSAGES.replace(
        "BODY",
        "<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}",
    ),
    "arguments one by one": MESSAGES.replace(
        "BODY",
        "<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<C>{{ c.function.name }}"
        "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}",
    ),
}

# What a client sends, and how transformers is given it so that the prompt is the one wanted: as it is, by
# `render_jinja_template`; without the keys that are null, by `apply_chat_template`; with empty content, where
# a template fails on both.
CONVERSATIONS: list[tuple[str, dict[str, Any], list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    ("content is none", NULL, calling(CALL, **NULL), None),
    ("content is none", EMPTY, calling(CALL, **EMPTY), None),
    ("content is not defined", ABSENT, calling(CALL), None),
    ("content is not defined", EMPTY, calling(CALL, **EMPTY), None),
    ("tool_calls in the message", NULL, calling(CALL, **NULL), None),
    ("tool_calls in the message", ABSENT, calling(CALL), None),
    ("content is added to text", NULL, calling(CALL, **NULL), calling(CALL, **EMPTY)),
    ("content is added to text", ABSENT, calling(CALL), calling(CALL, **EMPTY)),
    ("content is written", NULL, calling(CALL, **NULL), calling(CALL)),
    ("content is written", ABSENT, calling(CALL), None),
    ("content is asked for", NULL, calling(CALL, **NULL), calling(PARSED, **NULL)),
    ("content is asked for", EMPTY, calling(CALL, **EMPTY), calling(PARSED, **EMPTY)),
    ("arguments one by one", NULL, calling(CALL, **NULL), calling(PARSED, **NULL)),
    ("arguments one by one", ABSENT, calling(PARSED), None),
]


class _Processor(ProcessorMixin):  # type: ignore[misc]
    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


def _write(files: dict[str, Any], directory: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(DEMO_MODEL / name, directory / name)
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


def _prompt_or_error(render: Callable[[], str]) -> dict[str, str]:
    try:
        return {"prompt": render()}
    except (ValueError, TypeError) as exc:
        return {"error": type(exc).__name__}


def _of_directory(name: str, files: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        _write(files, Path(made))
        source: Any = PreTrainedTokenizerFast.from_pretrained(made)
        if "chat_template.json" in files:
            source = _Processor.from_pretrained(made)
        prompts = [
            {
                "tools": tools,
                **_prompt_or_error(
                    lambda tools=tools: source.apply_chat_template(  # type: ignore[misc]
                        HELLO, tools=tools, tokenize=False, add_generation_prompt=True
                    )
                ),
            }
            for tools in (None, TOOLS)
        ]
    return {"name": name, "files": files, "messages": HELLO, "prompts": prompts}


def _of_conversation(
    template: str,
    content: dict[str, Any],
    sent: list[dict[str, Any]],
    given: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    [[prompt], _] = render_jinja_template(
        [given or sent], chat_template=TEMPLATES[template], add_generation_prompt=True
    )
    return {
        "name": f"{template}: {json.dumps(content)}",
        "template": TEMPLATES[template],
        "messages": sent,
        "given": "as sent" if given is None else given,
        "prompt": prompt,
    }


def main() -> None:
    """Print the vectors."""
    vectors = {
        "origin": f"transformers {transformers.__version__}, by tools/make_chat_vectors.py",
        "directories": [_of_directory(name, files) for name, files in DIRECTORIES.items()],
        "conversations": [_of_conversation(*one) for one in CONVERSATIONS],
    }
    json.dump(vectors, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
