"""What the site's build (mkdocs.yml) changes: whole files as pages, and the docstrings' markup."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent
# Pages that are files of the repository's root, so that nothing is written twice.
WHOLE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
ROLE = re.compile(r":\w+:`(?P<short>~?)(?P<name>[\w.]+)`")
EXAMPLE = re.compile(r"(?:^(?:>>>|\.\.\.)(?: .*)?\n?)+", re.MULTILINE)
LONG_LIST = re.compile(r"^    (?:\w+,\s+)+\w+:", re.MULTILINE)  # names over several lines
NO_PAGES = r"(?:\.\./)?(?:examples|benchmarks|csrc|LICENSE|CITATION)"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fills in a page that is a file of the root, and turns links to where things are here."""
    source = WHOLE.get(page.file.src_uri)
    if source is not None:
        markdown = (ROOT / source).read_text().replace("](docs/", "](")
    for name, original in WHOLE.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(original)}", f"]({name}", markdown)
    # Files that are no pages: their names alone.
    return re.sub(rf"(?<!!)\[([^\]]*)\]\({NO_PAGES}[^)]*\)", r"`\1`", markdown)


class Docstrings(griffe.Extension):
    """Turns the docstrings' Sphinx roles to links, and their ``>>>`` examples to code blocks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value
        text = ROLE.sub(lambda m: _link(obj, m["name"], short=bool(m["short"])), text)
        text = EXAMPLE.sub(lambda m: f"```python\n{m[0].rstrip()}\n```\n", text)
        obj.docstring.value = LONG_LIST.sub(lambda m: "    " + " ".join(m[0].split()), text)


def _link(obj: griffe.Object, name: str, *, short: bool) -> str:
    """A link where the site documents the object, else its name alone."""
    first, _, rest = name.partition(".")
    path = name
    if first != "reformer_ext":
        with suppress(griffe.NameResolutionError):
            path = ".".join(filter(None, (obj.resolve(first), rest)))
    label = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{path}" optional><code>{label}</code></autoref>'
