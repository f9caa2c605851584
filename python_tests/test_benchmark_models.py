"""The benchmark of whole models runs, and refuses to time what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure, models
from reformer_ext.nn import cache

SMALL = ["--device=cpu", "--dim=32", "--heads=2", "--pairs=1", "--n-hashes=2", "--lengths=128,192"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARM_UP", 1)
    monkeypatch.setattr(measure, "MIN_REPS", 2)
    monkeypatch.setattr(measure, "MAX_REPS", 2)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["models", *arguments, *SMALL])
    models.main()


@pytest.mark.parametrize("job", ["train", "decode"])
def test_every_model_is_timed(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    run(monkeypatch, job, f"--json={path}")
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["job"] == job
    assert report["command"].startswith(f"python -m benchmarks.models {job} ")
    assert all(error < 1e-3 for error in report["errors"].values())
    for length in ("128", "192"):
        rows = report["lengths"][length]
        assert len(rows) == (4 if job == "train" else 3)
        for name, row in rows.items():
            assert row["ms"] > 0 and row["gib"] > 0, name
            assert name in printed


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = cache.LSHCache.attend
    monkeypatch.setattr(cache.LSHCache, "attend", lambda *a, **k: 1.1 * attend(*a, **k))
    monkeypatch.setattr(measure, "timed", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"wrong results, not timed: .*cached logits"):
        run(monkeypatch, "decode")


def test_what_cannot_run_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    def out_of_memory(*_: object) -> torch.nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "ExactLM", out_of_memory)
    run(monkeypatch, "train")
    printed = capsys.readouterr().out
    assert printed.count("skipped: import of transformers halted") == 4
    assert printed.count("skipped: CUDA out of memory") == 2
