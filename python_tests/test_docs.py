"""README.md and docs/: Python and commands run, tables are current, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import PAGES, ROOT, blocks, small_python, title

import reformer_ext
import reformer_ext.nn
from benchmarks import tables
from reformer_ext import cli

TOY = shlex.split(
    "--dim 16 --heads 2 --layers local,lsh --n-hashes 1 --batch 2 --context 64 --chunk-size 16 "
    "--local-chunk-size 16 --steps 2 --warmup 1 --eval-every 2"
)


@pytest.fixture
def given(page: Path) -> dict[str, Any]:
    """The names that the examples of a page take for granted."""
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[0, :7] = True
    names = {
        "tokens": torch.randint(256, (1, 200)),
        "prompts": torch.randint(256, (2, 20)),
        "padding": padding,
    }
    if page.name == "migrating.md":
        from transformers import ReformerConfig, ReformerModelWithLMHead

        theirs = ReformerConfig(
            attn_layers=["local", "lsh"],
            hidden_size=32,
            num_attention_heads=2,
            attention_head_size=16,
            axial_pos_shape=(4, 16),
            axial_pos_embds_dim=(16, 16),
            num_buckets=4,
            lsh_attn_chunk_length=8,
            local_attn_chunk_length=8,
            is_decoder=True,
        )
        names["hf_model"] = ReformerModelWithLMHead(theirs).eval()
    return names


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=title)
def test_python_runs(page: Path, given: dict[str, Any]) -> None:
    for block in small_python(page):
        exec(compile(block, page.name, "exec"), given)
    outcome = {
        "models.md": lambda: given["out"].shape == given["near"].shape,
        "decoding.md": lambda: given["logits"].shape == (2, 1, 256),
        "migrating.md": lambda: given["weights"].keys() == given["hf_model"].state_dict().keys(),
    }
    if page.name in outcome:
        assert outcome[page.name]()


@pytest.mark.parametrize("page", [ROOT / "docs" / "cli.md"], ids=title)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = b"def main(argument):\n    return argument + 1\n\n\n" * 40
    (tmp_path / "src").mkdir()
    for name in ("book.txt", "genome.fa", *(f"src/{n}.py" for n in range(20))):
        (tmp_path / name).write_bytes(text + name.encode())
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    assert len(lines) >= 8
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert program == "reformer"
        if command == "train":
            arguments += TOY
        if command == "generate":
            arguments += ["--length", "5"]
        assert cli.main([command, *arguments]) == 0, line
    assert {"checkpoint.pt", "log.jsonl", "sample.txt", "inspect.html"} <= {
        path.name for path in (tmp_path / "runs" / "mine").iterdir()
    }


def test_tables_are_current() -> None:
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.MARKED.findall(text), page
        assert tables.current(text) == text, f"{page.name}: run python -m benchmarks.tables"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_api_pages_list_the_modules() -> None:
    pages = [(ROOT / "docs" / "api" / name).read_text() for name in ("attention.md", "models.md")]
    listed = re.findall(r"^        - (\w+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(listed) == sorted(reformer_ext.nn.__all__)


def test_versions_agree() -> None:
    changes = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert changes is not None
    assert citation is not None
    assert changes[1] == citation[1] == reformer_ext.__version__
