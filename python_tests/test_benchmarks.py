"""The benchmark suite in tiny sizes: what it refuses to time, writes, compares and draws."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import reformer_ext
from benchmarks import measure, ops, plot, report
from benchmarks.case import Case, Workload, cases
from benchmarks.check import check_peer, sampled_attention
from benchmarks.peers import exact, peers, seen_before, within, within_chunks
from python_tests.cases import VARIANTS
from reformer_ext import reference

ROOT = Path(__file__).resolve().parent.parent

TINY = {"batch": 2, "heads": 2, "head_dim": 8, "n_hashes": 2, "chunk_size": 8}
TINY_FLAGS = ["--device=cpu", "--dtype=fp32", "--batch=2", "--heads=2", "--head-dim=8"]
TINY_FLAGS += ["--n-hashes=2", "--chunk-size=8"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WARM_UP": 1, "MIN_REPS": 3, "MAX_REPS": 3}.items():
        monkeypatch.setattr(measure, name, value)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command, with tiny sizes; the machine's limits are not measured."""
    limits = {"copy_gbs": 10.0, "matmul_tflops": 0.5, "matmul_dtype": "float32"}
    monkeypatch.setattr(measure, "ceilings", lambda device: limits)

    def command(*flags: object) -> None:
        monkeypatch.setattr(sys, "argv", ["ops", *TINY_FLAGS, *map(str, flags)])
        ops.main()

    return command


def test_a_table_and_a_report(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "report.json"
    run("--lengths", "40,64", "--variants", ",".join(VARIANTS), "--kernels", "--json", path)
    table = capsys.readouterr().out
    result = report.read(path)
    assert result["method"].startswith("GPU time between CUDA events") and result["cpu"]
    assert result["versions"]["torch"] == torch.__version__
    assert len(result["cases"]) == 2 * len(VARIANTS)
    for entry in result["cases"]:
        case, rows = report.case_of(entry), entry["results"]
        assert str(case) in table
        names = ["forward", "attention backward", "forward+backward"]
        if not case.local:
            names = ["hash", "sort", "attention forward", *names]
        assert list(rows) == names
        for name, row in rows.items():
            assert 0 < row["q1"] <= row["ms"] <= row["q3"] and row["calls"] == 3
            assert 0 <= row["error"] < 1e-4
            if name in case.counts():
                flop, moved = case.counts()[name]
                assert row["tflops"] == pytest.approx(flop / row["ms"] / 1e9)
                assert row["gbs"] == pytest.approx(moved / row["ms"] / 1e6)
                assert f"({row['gbs'] / 10.0:.0%})" in table
        for name in report.OURS:
            assert "reformer::chunked_attention" in rows[name]["kernels"]


def test_modes(run: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    run("--lengths=32", "--modes=bwd", "--json", path)
    assert list(report.read(path)["cases"][0]["results"]) == [
        "attention backward",
        "forward+backward",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variants=plain,dense"], "expected some of plain, padding, .* got dense"),
        (["--shapes=1x2x3"], "expected BxHxLxD, got 1x2x3"),
        (["--modes=both"], "expected some of fwd, bwd, got both"),
    ],
)
def test_flags_are_checked(
    flags: list[str], message: str, run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*flags)
    assert re.search(message, capsys.readouterr().err)


def test_cases_are_all_combinations() -> None:
    got = cases([(1, 2, 64, 8), (2, 4, 32, 16)], variant=["plain", "local"], n_hashes=[2, 4])
    assert len(got) == 2 * (2 + 1)  # rounds are nothing to local attention
    assert Case(32, "plain", batch=2, heads=4, head_dim=16, n_hashes=4) in got


def test_counts_are_those_of_the_design_notes() -> None:
    """64K positions, 8 rounds: 137 and 344 GFLOP, 0.22 and 0.42 GB."""
    counts = Case(65536, dtype="bf16").counts()
    flop, moved = counts["attention forward"]
    assert (round(flop / 1e9), round(moved / 1e9, 2)) == (137, 0.22)
    flop, moved = counts["attention backward"]
    assert (round(flop / 1e9), round(moved / 1e9, 2)) == (344, 0.42)


# Nothing is timed that is wrong -------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 24, 43])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sampled_attention_is_the_reference(variant: str, causal: bool, length: int) -> None:
    work = Workload(Case(length, variant, causal=causal, **TINY))
    inputs = [x.detach().double() for x in work.sets[0]]
    *query_key, v = inputs
    options = {**work.options, "dropout_p": 0.0}
    expected = reference.chunked_attention(
        query_key[0],
        query_key[1] if variant == "local" else None,
        v,
        work.order,
        buckets=work.buckets if work.same_bucket else None,
        **options,
    )

    def all_heads(x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    got = sampled_attention(work, [*map(all_heads, inputs)], torch.arange(length), all_heads)
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, all_heads(want), rtol=1e-10, atol=1e-10)


def slightly_wrong(x: Tensor) -> Tensor:
    return x + 0.01 * x.roll(1, -1) if x.is_floating_point() else x.flip(-1)


def wrong_gradient(x: Tensor) -> Tensor:
    return x * 1.01 - 0.01 * x.detach()


@pytest.mark.parametrize(
    ("name", "damage", "variant", "length"),
    [
        ("lsh_hash", slightly_wrong, "plain", 64),
        ("bucket_sort", slightly_wrong, "plain", 64),
        ("lsh_attention", slightly_wrong, "plain", 64),
        ("lsh_attention", slightly_wrong, "dropout", 64),
        ("lsh_attention", wrong_gradient, "padding", 64),
        ("chunked_attention", slightly_wrong, "local", 64),
        ("chunked_attention", wrong_gradient, "local", 64),
        ("lsh_attention", slightly_wrong, "plain", 1100),  # and right in the small twin
        ("lsh_attention", wrong_gradient, "duplicates", 1100),
    ],
)
def test_a_wrong_result_is_not_timed(
    name: str,
    damage: Callable[[Tensor], Tensor],
    variant: str,
    length: int,
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, timed = getattr(reformer_ext, name), []

    def wrong(x: Tensor, *args: object, **options: object) -> object:
        result = right(x, *args, **options)
        if x.requires_grad is False and damage is wrong_gradient:
            return result
        if length > 1000 and x.shape[2] <= 1000:
            return result
        if isinstance(result, Tensor):
            return damage(result)
        return (damage(result[0]), *result[1:])

    monkeypatch.setattr(reformer_ext, name, wrong)
    monkeypatch.setattr(measure, "timed", lambda *args: timed.append(args))
    with pytest.raises(SystemExit, match="wrong results, nothing timed"):
        run("--lengths", length, "--variants", variant)
    assert not timed


# Peers --------------------------------------------------------------------------------------------


def test_peers(run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run have their times, and an error where they compute what can be checked."""
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("reformer_pytorch", reason="needs reformer_pytorch")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # for speed
    path = tmp_path / "report.json"
    run("--lengths=32", "--variants=plain,local,padding", "--peers", "--json", path)
    plain, local, padding = (entry["results"] for entry in report.read(path)["cases"])
    for name in ("sdpa", "transformers (with projections)", "reformer_pytorch"):
        for mode in report.OURS:
            assert plain[f"{name}: {mode}"]["ms"] > 0
    for name in ("sdpa", "flex_attention", "flex_attention, window of 32"):
        assert plain[f"{name}: forward"]["error"] < 1e-5
    assert "backward on CPU" in plain["flex_attention: forward+backward"]["skipped"]
    assert local["flex_attention, same window: forward"]["error"] < 1e-5
    assert not any(":" in name for name in padding)

    run("--lengths=32", "--peers=sdpa,nobody", "--json", path)
    (entry,) = report.read(path)["cases"]
    assert {name.split(":")[0] for name in entry["results"] if ":" in name} == {"sdpa"}


def test_a_missing_peer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    reasons = {peer.name: peer.forward for peer in peers(Case(36, **TINY))}
    assert "not installed" in reasons["transformers (with projections)"]
    assert reasons["reformer_pytorch"] == "needs a length divisible by 16"


def test_a_wrong_peer_is_not_timed() -> None:
    work = Workload(Case(64, **TINY))
    assert check_peer(exact(None, causal=True), seen_before, work) < 1e-5
    with pytest.raises(SystemExit, match="wrong results of a peer"):
        check_peer(exact(None, causal=False), seen_before, work)
    with pytest.raises(SystemExit, match="wrong results of a peer"):
        check_peer(exact(None, causal=True), within(16), work)


@pytest.mark.parametrize("causal", [True, False])
def test_the_peers_window_is_that_of_local_attention(causal: bool) -> None:
    work = Workload(Case(43, "local", causal=causal, **TINY))
    assert check_peer(work.forward, within_chunks(8, causal), work) < 1e-5


# Measuring ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_of_a_call() -> None:
    torch.ones(2**26).sum()  # freed before: must not hide the call's own
    for _ in range(2):
        peak = measure.peak_memory(lambda: torch.ones(2**24).add_(1), "cpu")
        assert peak == pytest.approx(64.0, abs=4.0)
    assert measure.peak_memory(lambda: None, "cpu") < 1.0


def test_ceilings() -> None:
    limits = measure.ceilings("cpu")
    assert limits["matmul_dtype"] == "float32"
    assert 0.1 < limits["copy_gbs"] < 1e5 and 1e-4 < limits["matmul_tflops"] < 1e3


@pytest.mark.gpu
def test_on_cuda(run: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    variants = ",".join(VARIANTS)
    run("--device=cuda", "--dtype=bf16,fp32", "--lengths=512", "--variants", variants,
        "--kernels", "--peers", "--json", path)  # fmt: skip
    for entry in report.read(path)["cases"]:
        for name, row in entry["results"].items():
            if "skipped" in row:  # ours never are
                assert ":" in name or row["skipped"].startswith("not installed"), name
            else:
                assert row["ms"] > 0, name
        assert entry["results"]["forward+backward"]["kernels"]


# Reports: compared and drawn ----------------------------------------------------------------------


def report_of(ms: float, memory: float | None, length: int = 64) -> report.Report:
    row = {"ms": ms, "q1": ms, "q3": ms, "calls": 5, "memory_mib": memory}
    results = {"forward": row, "reformer_pytorch": {"skipped": "not installed"}}
    return {"format": report.FORMAT, "cases": [{**vars(Case(length)), "results": results}]}


def test_compare_flags_what_became_worse() -> None:
    old = report_of(1.0, 100.0)
    assert report.compare(report_of(1.04, 104.0), old) == []
    assert report.compare(report_of(0.5, 50.0), old) == []
    assert report.compare(report_of(1.0, None), old) == []
    (slower,) = report.compare(report_of(1.06, 100.0), old)
    assert str(Case(64)) in slower and "forward: 1.0000 -> 1.0600 ms (+6%)" in slower
    (larger,) = report.compare(report_of(1.0, 107.0), old)
    assert "100.0000 -> 107.0000 MiB (+7%)" in larger
    with pytest.raises(SystemExit, match="nothing to compare"):
        report.compare(report_of(9.0, 9.0, length=128), old)


def test_compare_decides_the_exit_status(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    run("--lengths=32", "--json", path)
    old = json.loads(path.read_text())
    rows = old["cases"][0]["results"].values()
    for factor, status in ((1e6, None), (1e-6, 1)):
        for row in rows:
            row.update(ms=factor, memory_mib=None)
        path.write_text(json.dumps(old))
        if status is None:
            run("--lengths=32", "--compare", path)
            assert "no regression over 5%" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit, match=str(status)):
                run("--lengths=32", "--compare", path)
            assert capsys.readouterr().out.count(" ms (+") == len(rows)


def test_read_refuses_another_format(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"lengths": []}')
    with pytest.raises(SystemExit, match="expected format 2, got None"):
        report.read(path)


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_can_be_compared_and_drawn(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    result = report.read(path)
    assert report.compare(result, result) == []
    out = tmp_path / "figure"
    monkeypatch.setattr(sys, "argv", ["plot", str(path), "--out", str(out)])
    plot.main()
    assert out.with_suffix(".svg").read_text().rstrip().endswith("</svg>")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_the_rows() -> None:
    result = report.read(ROOT / "benchmarks" / "results" / "h200_lsh_attention_bf16.json")
    case, entries = plot.family(result)
    assert (case.heads, case.dtype, case.n_hashes) == (8, "bf16", 8)
    lines = plot.curves(entries, "ms")
    assert {"", "sdpa cudnn", "sdpa flash", "transformers (with projections)"} <= set(lines)
    for prefix, (lengths, values) in lines.items():
        name = f"{prefix}: forward+backward" if prefix else "forward+backward"
        timed = [entry for entry in entries if "ms" in entry["results"].get(name, {})]
        assert lengths == [entry["length"] for entry in timed]
        assert values == [entry["results"][name]["ms"] for entry in timed]
    assert len(lines[""][0]) == len(entries)
