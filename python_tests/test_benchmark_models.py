"""The benchmark of whole models runs, and refuses to time what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure, models, plot
from reformer_ext.nn.attention.lsh import LSHCache

SMALL = ["--device=cpu", "--dim=32", "--heads=2", "--pairs=1", "--n-hashes=2", "--lengths=128,192"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARM_UP", 1)
    monkeypatch.setattr(measure, "MIN_REPS", 2)
    monkeypatch.setattr(measure, "MAX_REPS", 2)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["models", *arguments, *SMALL])
    models.main()


@pytest.mark.parametrize("job", list(models.JOBS))
def test_every_model_is_timed(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    run(monkeypatch, job, "--heads-at-once=1", f"--json={path}")
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["job"] == job
    assert report["config"]["heads_at_once"] == 1
    assert report["command"].startswith(f"python -m benchmarks.models {job} ")
    assert all(error < 1e-3 for error in report["errors"].values())
    for length in ("128", "192"):
        rows = report["lengths"][length]
        assert len(rows) == {"train": 5, "prefill": 4, "decode": 3}[job]
        for name, row in rows.items():
            assert row["ms"] > 0 and row["gib"] > 0 and row["calls"] == 2, name
            tokens = 1 if job == "decode" else int(length)
            assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["ms"])
            assert name in printed


@pytest.mark.parametrize("job", list(models.JOBS))
def test_figure(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path, out = tmp_path / "out.json", tmp_path / "figure"
    run(monkeypatch, job, "--models=reformer_ext", f"--json={path}", f"--plot={out}")
    svg = out.with_suffix(".svg").read_text()
    assert svg.rstrip().endswith("</svg>")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # The same from the report, and with another run's models.
    result = json.loads(path.read_text())
    again, both = tmp_path / "again", tmp_path / "both"
    plot.draw_models([result], again)
    assert again.with_suffix(".svg").read_text() == svg
    peers = {"128": {"transformers": {"ms": 2.0, "tokens_per_s": 6.4e4, "gib": 1.0}}}
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**result, "lengths": peers}))
    monkeypatch.setattr(sys, "argv", ["plot", str(path), str(other), "--out", str(both)])
    plot.main()
    peer = "<!-- transformers' Reformer -->"  # the legend's
    assert peer in both.with_suffix(".svg").read_text() and peer not in svg
    other.write_text(json.dumps({**result, "job": "another"}))
    with pytest.raises(SystemExit, match="one job and configuration"):
        plot.main()


def test_curves_leave_out_what_was_skipped() -> None:
    lengths = {
        "2048": {"a": {"gib": 2.0}, "b": {"skipped": "out of memory"}},
        "1024": {"a": {"gib": 1.0}, "b": {"gib": 3.0}},
    }
    assert plot.model_curves(lengths, "gib") == {
        "a": ([1024, 2048], [1.0, 2.0]),
        "b": ([1024], [3.0]),
    }


def test_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "decode", "--models=reformer_ext", "--kernels")
    printed = capsys.readouterr().out
    assert printed.count(" launches\n") == 2
    assert printed.count("1 x reformer::lsh_decode\n") == 2


def test_slow_models_are_timed_less_and_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "VERY_SLOW", 0.0)
    path = tmp_path / "out.json"
    run(monkeypatch, "train", "--models=reformer_ext", "--longest-step=0", f"--json={path}")
    first, second = (
        rows["reformer_ext"] for rows in json.loads(path.read_text())["lengths"].values()
    )
    assert first["calls"] == 1 and first["ms"] > 0
    assert second["skipped"] == "a step took 0 s at 128 tokens"


def test_every_model_is_written_when_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"

    def interrupted(*_: object) -> torch.nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "ExactLM", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "train", f"--json={path}")
    done = list(json.loads(path.read_text())["lengths"]["128"])
    assert done == ["reformer_ext", "reformer_ext (plain autograd)"]


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = LSHCache.attend
    monkeypatch.setattr(LSHCache, "attend", lambda *a, **k: 1.1 * attend(*a, **k))
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
    assert printed.count("skipped: CUDA out of memory") == 1
    assert printed.count("skipped: out of memory at 128 tokens") == 1
