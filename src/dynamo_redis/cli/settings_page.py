"""The tables of `docs/settings.md`, made from the declarations in `config/`."""

from __future__ import annotations

from dynamo_redis.cli.options import option_name, section_title, shown_default
from dynamo_redis.config import GROUPS, SettingsGroup, env_name, unit_of


def render() -> str:
    """All settings as Markdown: a heading and a table a group."""
    return "\n".join(_table(group) for group in GROUPS)


def _table(group: type[SettingsGroup]) -> str:
    rows = [
        f"| `{env_name(field)}` | `{option_name(name)}` | {_code(shown_default(field))} | {unit_of(field)} "
        f"| {_cell(field.description or '')} |"
        for name, field in group.model_fields.items()
    ]
    head = ["| variable | option | default | unit | meaning |", "|---|---|---|---|---|"]
    return "\n".join([f"### {section_title(group)}", "", *head, *rows, ""])


def _code(text: str) -> str:
    return f"`{text}`" if text else "unset"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
