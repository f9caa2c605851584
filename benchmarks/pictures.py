"""Pictures of what was learnt: grids of figures, and curves. Each as .svg and .png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same file every time
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, out: Path) -> None:
    from matplotlib import pyplot

    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{out}.svg", metadata={"Date": None})
    figure.savefig(f"{out}.png", dpi=160)
    pyplot.close(figure)


def grid(
    out: Path,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    row_label: str = "",
    column_label: str = "",
    caption: str = "",
) -> None:
    """Percentages by row and column; empty where there is none."""
    figure, axes = _figure(2.4 + 0.14 * max(map(len, rows)) + 0.62 * len(columns),
                           1.9 + 0.36 * len(rows))  # fmt: skip
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    axes.imshow(shown, cmap="viridis", vmin=0.0, vmax=100.0, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                text = "100" if value >= 99.95 else f"{value:.1f}"
                colour = "white" if value < 60 else "black"
                axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xlabel(column_label)
    axes.set_ylabel(row_label)
    axes.set_title(title, loc="left", fontsize=10)
    figure.supxlabel(caption, fontsize=7, color="#555555")
    _save(figure, out)


def curves(
    out: Path,
    title: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    caption: str = "",
) -> None:
    """Lines of ``(x, y)`` by name."""
    figure, axes = _figure(6.4, 4.4)
    for name, (x, y) in lines.items():
        axes.plot(x, y, "o-", label=name, markersize=3)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.supxlabel(caption, fontsize=7, color="#555555")
    _save(figure, out)
