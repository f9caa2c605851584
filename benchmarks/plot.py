"""Draws what a benchmark measured against the length, as .svg and .png.

python -m benchmarks.plot --out docs/img/speed_h200 benchmarks/results/h200_lsh_attention_bf16.json
python -m benchmarks.plot --out docs/img/train_h200 benchmarks/results/models/h200_train{_peers,}.j*

Time and memory of forward and backward from ``benchmarks.ops``; tokens/s (or ms a token) and memory
of whole models from ``benchmarks.models``, of several runs with the lengths and models of all.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from . import report
from .case import Case

Lines = dict[str, tuple[list[int], list[float]]]  # lengths and figures by name

MODE = "forward+backward"
# Row prefix -> label and colour (Okabe and Ito's, distinct to colour-blind eyes).
SERIES = {
    "": ("this library", "#D55E00"),
    "sdpa cudnn": ("exact attention, cuDNN", "#0072B2"),
    "sdpa flash": ("exact attention, flash", "#56B4E9"),
    "sdpa": ("exact attention", "#0072B2"),
    "transformers (with projections)": ("transformers' Reformer", "#009E73"),
    "reformer_pytorch": ("reformer-pytorch", "#CC79A7"),
    "flex_attention": ("exact attention, FlexAttention", "#E69F00"),
    "flex_attention, same window": ("the same window, FlexAttention", "#999999"),
}
OURS = SERIES[""][0]
# The same by model.
MODEL_SERIES = {
    "reformer_ext": SERIES[""],
    "reformer_ext (compiled blocks)": ("this library, blocks compiled", "#56B4E9"),
    "reformer_ext (plain autograd)": ("this library, activations stored", "#E69F00"),
    "exact (checkpointed)": ("exact attention, checkpointed", "#0072B2"),
    "exact (cached)": ("exact attention, cached", "#0072B2"),
    "transformers": SERIES["transformers (with projections)"],
    "transformers (accelerated)": ("transformers' Reformer, accelerated", "#CC79A7"),
}
# By job of benchmarks.models: the panels' titles and keys.
MODEL_PANELS = {
    "train": [("training, tokens/s", "tokens_per_s"), ("peak memory, GiB", "gib")],
    "prefill": [("reading a prompt, tokens/s", "tokens_per_s"), ("peak memory, GiB", "gib")],
    "decode": [("decoding, ms a token", "ms"), ("peak memory, GiB", "gib")],
}


def family(result: report.Report) -> tuple[Case, list[report.Row]]:
    """The entries that differ in length alone, by length: the largest such group of the report."""
    groups: dict[Case, list[report.Row]] = {}
    for entry in result["cases"]:
        groups.setdefault(replace(report.case_of(entry), length=0), []).append(entry)
    case, entries = max(groups.items(), key=lambda group: len(group[1]))
    return case, sorted(entries, key=lambda entry: entry["length"])


def curves(entries: list[report.Row], key: str) -> Lines:
    """Lengths and figures by row prefix."""
    result: Lines = {}
    for entry in entries:
        for name, row in entry["results"].items():
            prefix, _, mode = f": {name}".rpartition(": ")
            if mode == MODE and row.get(key) is not None:
                lengths, values = result.setdefault(prefix.removeprefix(": "), ([], []))
                lengths.append(entry["length"])
                values.append(row[key])
    return result


def model_curves(lengths: report.Row, key: str) -> Lines:
    """Lengths and figures by model; ``lengths`` of a report of ``benchmarks.models``."""
    result: Lines = {}
    for length, rows in sorted(lengths.items(), key=lambda item: int(item[0])):
        for name, row in rows.items():
            if row.get(key) is not None:
                places, values = result.setdefault(name, ([], []))
                places.append(int(length))
                values.append(row[key])
    return result


def draw(result: report.Report, out: Path) -> None:
    """Draws a report of ``benchmarks.ops``; see :func:`draw_panels`."""
    case, entries = family(result)
    panels = [
        ("time of forward and backward, ms", curves(entries, "ms")),
        ("memory beyond the inputs, MiB", curves(entries, "memory_mib")),
    ]
    rounds = "local" if case.local else f"{case.n_hashes} rounds"
    caption = (
        f"{machine(result)}, {case.dtype}, B={case.batch} "
        f"H={case.heads} D={case.head_dim}, {rounds}, chunks of {case.chunk_size}, "
        f"{'causal' if case.causal else 'not causal'}"
    )
    draw_panels(panels, SERIES, caption, out)


def draw_models(results: list[report.Report], out: Path) -> None:
    """Draws reports of one job of ``benchmarks.models`` in one; see :func:`draw_panels`."""
    job, config = results[0]["job"], results[0]["config"]
    lengths: dict[int, report.Row] = {}
    for result in results:
        if (result["job"], result["config"]) != (job, config):
            raise SystemExit("benchmarks.plot: expected reports of one job and configuration")
        for length, rows in result["lengths"].items():
            lengths.setdefault(int(length), {}).update(rows)
    panels = [(title, model_curves(lengths, key)) for title, key in MODEL_PANELS[job]]
    caption = (
        f"{machine(results[0])}, {'bf16' if results[0].get('gpu') else 'fp32'}, "
        f"{len(config['layers'])} layers, width {config['dim']}, {config['heads']} heads, "
        f"{config['n_hashes']} rounds, batch of 1"
    )
    draw_panels(panels, MODEL_SERIES, caption, out)


def machine(result: report.Report) -> str:
    """What ran it."""
    name = result.get("gpu") or f"{result.get('cpu') or 'CPU'}, {result['threads']} threads"
    return f"{name}, torch {result['versions']['torch']}"


def draw_panels(
    panels: list[tuple[str, Lines]],
    series: dict[str, tuple[str, str]],
    caption: str,
    out: Path,
) -> None:
    """Writes ``out`` with the suffixes .svg and .png: panels by title, side by side, log-log,
    labels and colours from ``series``. Exits if nothing was timed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same file every time
    from matplotlib import pyplot

    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        raise SystemExit("benchmarks.plot: expected rows with times to draw, got none")
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.9 * len(panels), 4.6), squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[0], panels, strict=True):
        for name, (lengths, values) in lines.items():
            label, colour = series.get(name, (name, None))
            ours = label == OURS
            axis.loglog(
                lengths, values, "o-", label=label, color=colour, markersize=6 if ours else 4,
                linewidth=3 if ours else 1.6, zorder=3 if ours else 2,
            )  # fmt: skip
        ticks = sorted({length for lengths, _ in lines.values() for length in lengths})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [short(n) for n in ticks])
        axis.set_xlabel("sequence length")
        axis.set_title(title, loc="left", fontsize=11)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        low, high = axis.get_ylim()
        few = high < 100 * low  # powers of ten: then 2 and 5 times these have labels too
        axis.yaxis.set_minor_formatter(
            lambda value, _, few=few: f"{value:,.10g}" if few and f"{value:e}"[0] in "25" else ""
        )
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    columns = len(labels) if len(labels) < 5 else 3
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    figure.supxlabel(caption, fontsize=9, color="#555555")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(out.with_suffix(".png"), dpi=160)
    pyplot.close(figure)


def short(length: int) -> str:
    """65536 as 64K."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("reports", type=Path, nargs="+", help="what a benchmark's --json wrote")
    parser.add_argument("--out", type=Path, required=True, help="file to draw; suffixes are added")
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.reports]
    if all("job" in result for result in results):
        draw_models(results, args.out)
    elif len(results) == 1:
        draw(report.read(args.reports[0]), args.out)
    else:
        parser.error("expected one report of benchmarks.ops, or some of benchmarks.models")


if __name__ == "__main__":
    main()
