"""The pages for people, README.md and docs/, as the tests read them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# What makes the examples small, and fit for a machine without a GPU.
SMALLER = {
    'device="cuda"': 'device="cpu"',
    'autocast("cuda"': 'autocast("cpu"',
    ".cuda()": "",
    "B, H, L, D = 1, 8, 65536, 64": "B, H, L, D = 1, 2, 1024, 16",
    "32 * 64": "4 * 8",
    "dim=512, heads=8": "dim=32, heads=2",
    "(512, 8, n_hashes": "(32, 2, n_hashes",
    "1000, 512,": "1000, 32,",
    "capacity=70_000": "capacity=100",
}


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of code in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def small_python(page: Path) -> list[str]:
    """The Python of a page with small sizes, on the CPU."""
    found = []
    for block in blocks(page, "python"):
        for large, small in SMALLER.items():
            block = block.replace(large, small)
        assert "cuda" not in block and "65536" not in block
        found.append(block)
    return found


def title(page: Path) -> str:
    return page.name
