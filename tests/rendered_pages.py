"""The pages as a reader sees them: the text, links, headings and code blocks of each Markdown file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "benchmarks" / "README.md",
        ROOT / "faults" / "README.md",
    ]
)

_CELL_BORDER = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True, slots=True)
class Link:
    """A link or picture of a page that leads into this repository."""

    page: Path
    target: Path
    anchor: str

    def __str__(self) -> str:
        return f"{self.target.relative_to(ROOT)}#{self.anchor}"


def name(page: Path) -> str:
    """Return the path of a page from the root of the repository."""
    return str(page.relative_to(ROOT))


@cache
def tokens(page: Path) -> list[Token]:
    """Return the tokens of a page: CommonMark with GitHub's tables."""
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def inline(page: Path) -> Iterator[Token]:
    """Iterate over the pieces of a page's running text: texts, code spans, links, pictures."""
    for token in tokens(page):
        yield from token.children or []


def links(page: Path) -> Iterator[Link]:
    """Iterate over the links of a page that stay in this repository."""
    for piece in inline(page):
        address = piece.attrs.get("href") or piece.attrs.get("src")
        if isinstance(address, str) and not re.match(r"[a-z]+:", address):
            path, _, anchor = address.partition("#")
            target = (page.parent / path).resolve() if path else page
            yield Link(page, target / "README.md" if (target / "README.md").exists() else target, anchor)


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    made = set()
    for heading, text in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type == "heading_open":
            shown = "".join(piece.content for piece in text.children or [])
            slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            count = found[slug] = found.get(slug, -1) + 1
            made.add(f"{slug}-{count}" if count else slug)
    return frozenset(made)


def rows_of_another_width(page: Path) -> list[str]:
    """Return the rows of tables that have more or fewer cells than their table's head."""
    lines = page.read_text(encoding="utf-8").splitlines()
    wrong = []
    for token in tokens(page):
        if token.type == "table_open" and token.map is not None:
            rows = lines[token.map[0] : token.map[1]]
            borders = {row: len(_CELL_BORDER.findall(row)) for row in rows}
            wrong += [row for row in rows if borders[row] != borders[rows[0]]]
    return wrong


def code_blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return [
        token.content for token in tokens(page) if token.type == "fence" and token.info.strip() == language
    ]


def clicks_from(start: Path) -> Mapping[Path, int]:
    """Return for each page that links lead to from `start` how many it takes at least."""
    clicks = {start: 0}
    reached = [start]
    for page in reached:
        for link in links(page):
            if link.target in PAGES and link.target not in clicks:
                clicks[link.target] = clicks[page] + 1
                reached.append(link.target)
    return clicks
