"""The site of the pages: `make docs` builds it with Sphinx from the Markdown files as they stand.

The pages are written for a reader of the repository. So the source directory is the repository's root, the
README is the first page, and links to code become downloads. Every warning is an error: a link that leads
nowhere, a page that the contents lack, a block of code that its lexer cannot read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

CONTENTS: Final[Mapping[str, Sequence[str]]] = {
    "Operate": (
        "docs/operations",
        "docs/managed-redis",
        "docs/scaling",
        "docs/troubleshooting",
        "docs/kubernetes",
        "docs/settings",
        "docs/request-planes",
        "docs/health-and-metrics",
        "docs/observability",
        "docs/dashboard",
        "docs/moving-a-deployment",
        "docs/migration",
        "docs/security",
        "docs/tls",
        "docs/guarantees",
        "docs/replaces",
    ),
    "Build on it": (
        "docs/http-api",
        "docs/parameters",
        "docs/tool-calls",
        "docs/kserve",
        "docs/write-your-engine",
        "docs/engines",
        "docs/moving-from-dynamo",
        "docs/python-api",
        "docs/python-api/*",
        "docs/dynamo-names",
        "docs/dynamo-llm-names",
        "docs/testing",
    ),
    "Work on it": (
        "docs/architecture",
        "docs/wire-protocol",
        "docs/redis-schema",
        "docs/router",
        "docs/decisions/README",
        "docs/decisions/0*",
        "benchmarks/README",
        "faults/README",
    ),
    "New here": ("docs/glossary", "CHANGELOG", "SECURITY"),
}
"""The pages in the order of the site's contents, by reader; a pattern stands for all pages that match it."""

project = "dynamo_redis"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
root_doc = "README"
include_patterns = ["*.md", "docs/**", "benchmarks/README.md", "faults/README.md"]
exclude_patterns = [".*", "src", "tests"]

myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = "dynamo_redis"
html_additional_pages = {"index": "index.html"}
templates_path = ["."]


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the contents behind the text of the first page, where Sphinx wants them."""
    if page == app.config.root_doc:
        for caption, pages in CONTENTS.items():
            listed = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{listed}\n```\n"


def show_folders_as_text(app: Sphinx, document: nodes.document) -> None:
    """Take out the links to folders of the repository, which have no page, and leave their text."""
    for link in list(document.findall(pending_xref)):
        if (Path(app.srcdir, link["refdoc"]).parent / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("doctree-read", show_folders_as_text)
