"""The tables of `docs/settings.md`, made from the declarations in `config/`."""

from __future__ import annotations

from dynamo_redis.cli.options import option_name, section_title, shown_default
from dynamo_redis.config import GROUPS, env_name, unit_of


def render() -> str:
    """Return all settings as Markdown: a heading and a table for each group."""
    lines = []
    for group in GROUPS:
        lines += [f"### {section_title(group)}", ""]
        lines += ["| variable | option | default | unit | meaning |", "|---|---|---|---|---|"]
        for name, field in group.model_fields.items():
            default = f"`{shown}`" if (shown := shown_default(field)) else "unset"
            meaning = (field.description or "").replace("|", "\\|")
            lines.append(
                f"| `{env_name(field)}` | `{option_name(name)}` | {default} | {unit_of(field)} | {meaning} |"
            )
        lines.append("")
    return "\n".join(lines)
