"""Draws time and memory of forward and backward against the length, as .svg and .png.

python -m benchmarks.plot benchmarks/results/h200_lsh_attention_bf16.json --out docs/speed_h200
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from . import report
from .case import Case

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


def family(result: report.Report) -> tuple[Case, list[report.Row]]:
    """The entries that differ in length alone, by length: the largest such group of the report."""
    groups: dict[Case, list[report.Row]] = {}
    for entry in result["cases"]:
        groups.setdefault(replace(report.case_of(entry), length=0), []).append(entry)
    case, entries = max(groups.items(), key=lambda group: len(group[1]))
    return case, sorted(entries, key=lambda entry: entry["length"])


def curves(entries: list[report.Row], key: str) -> dict[str, tuple[list[int], list[float]]]:
    """Lengths and figures by row prefix."""
    result: dict[str, tuple[list[int], list[float]]] = {}
    for entry in entries:
        for name, row in entry["results"].items():
            prefix, _, mode = f": {name}".rpartition(": ")
            if mode == MODE and row.get(key) is not None:
                lengths, values = result.setdefault(prefix.removeprefix(": "), ([], []))
                lengths.append(entry["length"])
                values.append(row[key])
    return result


def draw(result: report.Report, out: Path) -> None:
    """Writes ``out`` with the suffixes .svg and .png. Exits if nothing was timed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same file every time
    from matplotlib import pyplot

    case, entries = family(result)
    panels = [
        ("time of forward and backward, ms", curves(entries, "ms")),
        ("memory beyond the inputs, MiB", curves(entries, "memory_mib")),
    ]
    panels = [(label, lines) for label, lines in panels if lines]
    if not panels:
        raise SystemExit(f"benchmarks.plot: expected rows named {MODE!r}, got none")
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.9 * len(panels), 4.6), squeeze=False, layout="constrained"
    )
    for axis, (label, lines) in zip(axes[0], panels, strict=True):
        for prefix, (lengths, values) in lines.items():
            name, colour = SERIES.get(prefix, (prefix, None))
            ours = prefix == ""
            axis.loglog(
                lengths, values, "o-", label=name, color=colour, markersize=6 if ours else 4,
                linewidth=3 if ours else 1.6, zorder=3 if ours else 2,
            )  # fmt: skip
        ticks = [entry["length"] for entry in entries]
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in ticks])
        axis.set_xlabel("sequence length")
        axis.set_title(label, loc="left", fontsize=11)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)),
                  frameon=False)  # fmt: skip
    machine = result.get("gpu") or f"{result.get('cpu') or 'CPU'}, {result['threads']} threads"
    rounds = "local" if case.local else f"{case.n_hashes} rounds"
    figure.supxlabel(
        f"{machine}, torch {result['versions']['torch']}, {case.dtype}, B={case.batch} "
        f"H={case.heads} D={case.head_dim}, {rounds}, chunks of {case.chunk_size}, "
        f"{'causal' if case.causal else 'not causal'}",
        fontsize=9,
        color="#555555",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(out.with_suffix(".png"), dpi=160)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("report", type=Path, help="what benchmarks.ops --json wrote")
    parser.add_argument("--out", type=Path, required=True, help="file to draw; suffixes are added")
    args = parser.parse_args()
    draw(report.read(args.report), args.out)


if __name__ == "__main__":
    main()
