"""Pictures: of a training and of an inspection. They take matplotlib."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .diagnostics import BucketOccupancy, CapturedMass, LSHLayerReport, RoundCollisions
from .nn.pretrained import first_line

__all__ = ["by_round", "draw", "draw_losses", "why_no_drawing"]


def why_no_drawing() -> str:
    """What is wrong with matplotlib, for after its name; empty if nothing is."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # a library of another version raises anything
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        if name is not None and name.partition(".")[0] == "matplotlib":
            return "is absent (pip install matplotlib)"
        return f"is broken ({type(error).__name__}: {first_line(error)})"
    return ""


def draw_losses(
    title: str, history: list[dict[str, float]], lines: dict[str, float], path: Path
) -> None:
    """Loss by step, and the final held-out results as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in history]
    losses = [line["loss"] for line in history]
    width = max(len(losses) // 50, 1)
    windows = [losses[max(i - width, 0) : i + width + 1] for i in range(len(losses))]
    smooth = [sum(window) / len(window) for window in windows]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte")
    axes.set_title(title, parse_math=False)  # a file name may have dollars
    axes.plot(steps, losses, color="0.85", linewidth=0.5)
    axes.plot(steps, smooth, color="C0", label="training")
    held_out = [line for line in history if "held_out" in line]
    axes.plot(
        [line["step"] for line in held_out],
        [line["held_out"] for line in held_out],
        "o-",
        color="C1",
        markersize=3,
        label="held out, a part",
    )
    for index, (name, bits) in enumerate(lines.items()):
        axes.axhline(
            bits, color=f"C{index + 2}", linestyle="--", linewidth=1, label=f"{name}: {bits:.2f}"
        )
    axes.set_ylim(0, min(8.5, 1.05 * max(smooth)))
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def draw(layers: Sequence[LSHLayerReport], title: str | None = None) -> bytes:
    """A PNG with a row for each layer: captured mass, mass by distance, bucket sizes, new keys by
    round.

    With a title, the rows have theirs, too.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3.4 * len(layers)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title or "", parse_math=False)
    rows = figure.subfigures(len(layers), 1, squeeze=False)[:, 0]
    for row, layer in zip(rows, layers, strict=True):
        if title is not None:
            row.suptitle(f"layer {layer.index}", fontweight="bold")
        mass, distances, sizes, new = row.subplots(1, 4)
        _draw_mass(mass, layer.mass)
        _draw_distances(distances, layer.mass)
        _draw_sizes(sizes, layer.occupancy)
        _draw_new(new, layer.collisions)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_mass(axes: Any, mass: CapturedMass) -> None:
    heads = by_round(mass.mass)
    rounds = range(1, heads.shape[1] + 1)
    for number, head in enumerate(heads):
        axes.plot(rounds, head, color="C0", alpha=0.3, linewidth=1, label="" if number else "heads")
    for values, style, label in (
        (mass.best, {"color": "0.4", "linestyle": "--", "marker": "."}, "likeliest"),
        (mass.mass, {"color": "C0", "marker": "o", "markersize": 4}, "met"),
        (mass.uniform, {"color": "0.4", "linestyle": ":", "marker": "."}, "random"),
    ):
        axes.plot(rounds, by_round(values).mean(dim=0), label=label, **style)
    axes.set(title="attention captured by the keys", xlabel="hash rounds", ylim=(0, 1.02))
    axes.set_xlim(0.5, len(rounds) + 0.5)
    _finish(axes)


def _draw_distances(axes: Any, mass: CapturedMass) -> None:
    exact, met = (
        values.nanmean(dim=(0, 1)).tolist()[1:]  # without the query itself
        for values in (mass.at_distance, mass.met_at_distance)
    )
    bins = range(len(exact))
    axes.bar(bins, exact, color="0.85", label="all")
    axes.bar(bins, met, color="C0", label="met")
    axes.set(title="mass of attention by distance", xlabel="distance of the key")
    axes.set_xticks(bins[::2], [f"{1 << n:,}" for n in bins[::2]])
    _finish(axes, ticks=False)


def _draw_sizes(axes: Any, occupancy: BucketOccupancy) -> None:
    counts = occupancy.counts.cpu()
    sizes = counts.sort(dim=-1, descending=True).values.double().mean(dim=(0, 2))
    ranks = range(1, sizes.shape[1] + 1)
    for number, head in enumerate(sizes):
        axes.plot(ranks, head, color="C0", alpha=0.3, linewidth=1, label="" if number else "heads")
    axes.plot(ranks, sizes.mean(dim=0), color="C0", label="mean")
    axes.axhline(occupancy.chunk_size, color="0.4", linestyle="--", label="a chunk")
    axes.axhline(counts.double().mean(), color="0.4", linestyle=":", label="even buckets")
    axes.set(title="positions in a bucket", xlabel="buckets, fullest first", yscale="log")
    axes.set_ylim(bottom=0.5)
    axes.yaxis.set_major_formatter("{x:g}")
    _finish(axes)


def _draw_new(axes: Any, collisions: RoundCollisions) -> None:
    new, again = (x.mean(dim=(0, 1)).tolist() for x in (collisions.new, collisions.again))
    rounds = range(1, len(new) + 1)
    axes.bar(rounds, new, color="C0", label="new")
    axes.bar(rounds, again, bottom=new, color="0.85", label="met before")
    axes.set(title="keys that a query meets", xlabel="hash round")
    axes.set_xlim(0.5, len(rounds) + 0.5)
    _finish(axes)


def _finish(axes: Any, *, ticks: bool = True) -> None:
    if ticks:
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.18),
        ncols=4,
        frameon=False,
        fontsize="small",
        columnspacing=1.2,
        handlelength=1.6,
    )


def by_round(values: Tensor) -> Tensor:
    """``(B, H, R, S)`` -> means over sequences and queries with anything to capture, ``(H, R)``."""
    return values.nanmean(dim=(0, 3)).cpu()
