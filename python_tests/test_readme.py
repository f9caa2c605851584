"""The README is short and its Python runs as it stands, but for sizes and the device."""

from __future__ import annotations

from typing import Any

from pages import README, small_python


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_python_runs() -> None:
    names: dict[str, Any] = {}
    (block,) = small_python(README)
    exec(compile(block, README.name, "exec"), names)
    assert names["loss"].isfinite()
    assert names["model"].reformer.embedding.weight.grad.isfinite().all()
