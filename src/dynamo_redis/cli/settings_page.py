"""The tables of `docs/settings.md`, made from the declarations in `config/`."""

from __future__ import annotations

from dynamo_redis.cli.options import option_name, section_title, shown_default
from dynamo_redis.config import GROUPS, SettingsGroup, env_name, unit_of


def render() -> str:
    """Return all settings as Markdown: a heading and a table for each group."""
    return "\n".join(_table(group) for group in GROUPS)


def _table(group: type[SettingsGroup]) -> str:
    rows = []
    for name, field in group.model_fields.items():
        default = f"`{shown}`" if (shown := shown_default(field)) else "unset"
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(
            f"| `{env_name(field)}` | `{option_name(name)}` | {default} | {unit_of(field)} | {meaning} |"
        )
    head = ["| variable | option | default | unit | meaning |", "|---|---|---|---|---|"]
    return "\n".join([f"### {section_title(group)}", "", *head, *rows, ""])
