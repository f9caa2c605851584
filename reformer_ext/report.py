"""``reformer inspect``: the diagnostics of a trained model as a table, a page and a picture."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .ablation import ablated_losses
from .checkpoint import load_checkpoint, load_model, naming
from .data import SEPARATOR, CorpusError, find_files, load_corpus
from .diagnostics import (
    LayerReport,
    LSHLayerReport,
    inspect_model,
)
from .generate import autocast
from .plots import by_round, draw, why_no_drawing
from .terminal import shown

__all__ = [
    "distance_table",
    "draw",
    "html_page",
    "inspect_checkpoint",
    "layer_numbers",
    "loss_table",
    "text_table",
]

_DEFAULT_BYTES = 8192  # looked at, in as many sequences as that takes
_LAST = 2000  # tokens at the end of a sequence, whose loss says what a long context is worth
_LOSS_NAMES = {"trained": "as trained", "local": "lsh as local", "zero": "lsh zeroed"}


class _Column(NamedTuple):
    key: str
    heading: str
    digits: int
    meaning: str


_COLUMNS = (
    _Column(
        "mass",
        "mass",
        3,
        "share of the exact softmax attention that falls on the keys a query meets in any round",
    ),
    _Column(
        "best",
        "best",
        3,
        "the same for as many of the likeliest keys: no choice of them holds more",
    ),
    _Column(
        "uniform",
        "random",
        3,
        "the same for as many keys at random, on average: the share of the keys that are met",
    ),
    _Column("recall", "top keys", 3, "share of a query's likeliest keys that it meets"),
    _Column("repeated", "repeated", 3, "share of the slots whose key an earlier slot has already"),
    _Column("load", "fullest", 2, "positions in the fullest bucket, in chunks"),
    _Column("empty", "empty", 3, "share of the buckets without a position"),
    _Column("entropy", "entropy", 3, "evenness of the buckets: 1 if all are equally full"),
)

_NOTE = """\
mass: share of exact attention on the keys that queries meet; best, random: on as many of the
likeliest keys, on as many at random"""

_READING = """\
Queries are compared with exact attention over all valid keys, in float64. Where mass is far below
best, the hash misses keys that matter: more rounds (--n-hashes) or larger chunks find more of them.
Where best is low too, attention is spread over more keys than a query meets, and no hash of this
size can hold it. Rounds whose keys are mostly known cost time and bring little. Positions of a
bucket much fuller than a chunk do not all meet."""

_LOSS_READING = """\
Bits per byte by the number of the byte in its sequence, of the model as it was trained, with its
LSH layers attending to their chunks in natural order, and with LSH layers that add nothing. Where
all three agree, the model does not use its LSH layers; where only the last is worse, local
attention would do. Long contexts pay where later bytes cost less than earlier ones."""

_DISTANCE_READING = """\
Where the mass of exact attention is, by the distance of key and query in positions, and how much of
that the keys have that queries meet: means over sequences, heads and queries."""

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2em auto;
  max-width: 75em; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; } p { max-width: 50em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2em 0.8em; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom-color: #888; }
dt { font-weight: 600; float: left; clear: left; } dd { margin-left: 7em; }
img { max-width: 100%; } .wide { overflow-x: auto; }"""


def inspect_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    data: Sequence[Path] = (),
    length: int | None = None,
    sequences: int | None = None,
    n_hashes: int | None = None,
    n_queries: int = 256,
    top_k: int = 16,
    loss_bytes: int = 1 << 16,
    device: torch.device,
) -> None:
    """Inspects the model of a checkpoint of ``reformer train``: prints a table, writes a report.

    Args:
        checkpoint: its file, or the folder of a saved model.
        out: the report: a page ending in .html, which needs no other file, or a picture ending in
            .png.
        data: files and folders whose bytes the model reads; none: those held out in training.
        length: bytes per sequence; default: the model's context.
        sequences: how many, evenly spaced in the data; default: as many as make 8,192 bytes.
        n_hashes: hash rounds; default: the model's.
        n_queries: at most how many queries of each sequence to look at.
        top_k: how many of a query's likeliest keys to look for.
        loss_bytes: about how many bytes to take the losses of, with and without LSH layers, in
            sequences evenly spaced in the data, at least one; 0: none.
        device: where to run.

    Raises:
        CheckpointError, CorpusError, ValueError, OSError: with a message for the user.
    """
    if out.suffix not in (".html", ".png"):
        raise ValueError(f"inspect: expected --out to end in .html or .png, got {out}")
    no_drawing = why_no_drawing()
    if out.suffix == ".png" and no_drawing:
        raise ValueError(
            f"inspect: {shown(out)} needs matplotlib, which {no_drawing}; a report ending in .html "
            "does without"
        )
    for option, number in (
        ("--length", length),
        ("--sequences", sequences),
        ("--n-hashes", n_hashes),
        ("--queries", n_queries),
        ("--top-k", top_k),
    ):
        if number is not None and number < 1:
            raise ValueError(f"inspect: expected {option} to be at least 1, got {number}")
    if loss_bytes < 0:
        raise ValueError(f"inspect: expected --loss-bytes to be at least 0, got {loss_bytes}")
    model = load_model(checkpoint, device)
    config = model.config
    if "lsh" not in config.kinds:
        raise ValueError(
            f"inspect: expected a model with lsh layers, got layers {','.join(config.kinds)} "
            f"in {shown(checkpoint)}"
        )
    length = config.max_length if length is None else length
    sequences = max(1, _DEFAULT_BYTES // length) if sequences is None else sequences
    name, text = _read(data, checkpoint)
    tokens = _windows(text, length, sequences, name)
    with autocast(device):
        layers = inspect_model(
            model, tokens.to(device), n_hashes=n_hashes, n_queries=n_queries, top_k=top_k
        )
        losses = {}
        if loss_bytes and len(text) > 1:
            window = min(length + 1, len(text))
            count = max(1, min(loss_bytes, len(text)) // length)
            losses = ablated_losses(
                model,
                _windows(text, window, count, name).to(device),
                n_hashes=n_hashes,
                batch=max(1, _DEFAULT_BYTES // length),
            )
    rounds = config.n_hashes if n_hashes is None else n_hashes
    facts = {
        "checkpoint": shown(checkpoint),
        "model": f"{' '.join(config.kinds)}, dim {config.dim}, {config.heads} heads",
        "lsh layers": f"{rounds} hash rounds, chunks of {config.chunk_size}",
        "data": f"{name}: {sequences:,} x {length:,} of {len(text):,} bytes",
        "queries": f"{min(n_queries, length):,} of each sequence; top keys: {top_k}",
    }
    if out.suffix == ".png":
        title = f"{shown(checkpoint)}: {facts['lsh layers']}, {sequences:,} x {length:,} bytes"
        content = draw(_lsh_layers(layers), title)
    else:
        content = html_page(layers, facts, losses, no_drawing=no_drawing).encode()
    _write(out, content)  # before all that is printed: the reader may be gone
    for key, value in facts.items():
        print(f"{key + ':':<12}{value}")
    print(f"\n{text_table(layers)}\n{_NOTE}\n")
    for table in (distance_table(layers), loss_table(losses) if losses else []):
        if table:
            print("\n".join(_align(table)) + "\n")
    absent = f" without pictures: matplotlib {no_drawing}" if no_drawing else ""
    print(f"report: {shown(out)}{absent}")


def layer_numbers(layer: LayerReport) -> dict[str, Tensor]:
    """What the tables show of a layer, ``(H,)`` each: the whole of its rounds.

    Means over sequences, queries and rounds, but of ``load`` the largest. Nothing of full layers.
    """
    numbers = {}
    if layer.mass is not None:
        for name in ("mass", "best", "uniform", "recall"):
            numbers[name] = by_round(getattr(layer.mass, name))[:, -1]
    if isinstance(layer, LSHLayerReport):
        numbers["repeated"] = layer.collisions.repeated.nanmean(dim=0)
        numbers["load"] = layer.occupancy.load.amax(dim=(0, 2))
        numbers["empty"] = layer.occupancy.empty.mean(dim=(0, 2))
        numbers["entropy"] = layer.occupancy.entropy.nanmean(dim=(0, 2))
    return {name: value.cpu() for name, value in numbers.items()}


def text_table(layers: Sequence[LayerReport]) -> str:
    """A line per layer, and the captured mass of LSH layers by the number of rounds."""
    text = _align(_summary(layers))
    for layer in _lsh_layers(layers):
        mass = by_round(layer.mass.mass).mean(dim=0)
        shown = "  ".join(f"{r}: {mass[r - 1]:.3f}" for r in _shown_rounds(len(mass)))
        text.append(f"layer {layer.index}, mass by hash rounds  {shown}")
    return "\n".join(text)


def distance_table(layers: Sequence[LayerReport]) -> list[list[str]]:
    """Rows for the LSH layers, the headings first: how far from the query the mass of exact
    attention is, and how much of it is met."""
    rows: list[list[str]] = []
    for layer in _lsh_layers(layers):
        mass = layer.mass
        bins = mass.at_distance.shape[-1]
        # The first is of the query itself, which shared queries and keys never attend to.
        parts = [range(1), *(range(n, min(n + 2, bins)) for n in range(1, bins, 2))]
        if not rows:
            headings = [f"{1 << part[0] >> 1:,}-{(1 << part[-1]) - 1:,}" for part in parts]
            rows.append(["layer", "mass by distance", "0", *headings[1:]])
        for name, values in (("all", mass.at_distance), ("met", mass.met_at_distance)):
            mean = values.nanmean(dim=(0, 1))
            cells = [f"{float(mean[part.start : part.stop].sum()):.3f}" for part in parts]
            rows.append([str(layer.index), name, *cells])
    return rows


def loss_table(losses: Mapping[str, Tensor]) -> list[list[str]]:
    """Rows for the models of :func:`reformer_ext.ablation.ablated_losses`, the headings first:
    bits per byte of all positions, of ranges of them, and of the last 2,000."""
    length = next(iter(losses.values())).shape[1]
    edges = [0, *(4**n for n in range(3, length.bit_length()) if 4**n < length), length]
    ranges = [range(length), *map(range, edges[:-1], edges[1:])]
    headings = ["all", *(f"{part.start + 1:,}-{part.stop:,}" for part in ranges[1:])]
    if length > _LAST:
        ranges.append(range(length - _LAST, length))
        headings.append(f"last {_LAST:,}")
    rows = [["bits per byte", *headings]]
    for name, bits in losses.items():
        mean = bits.mean(dim=0)
        cells = [f"{float(mean[part.start : part.stop].mean()):.3f}" for part in ranges]
        rows.append([_LOSS_NAMES[name], *cells])
    return rows


def html_page(
    layers: Sequence[LayerReport],
    facts: dict[str, str],
    losses: Mapping[str, Tensor] | None = None,
    *,
    no_drawing: str = "",
) -> str:
    """The report as a page that refers to nothing outside itself.

    Args:
        layers: of :func:`reformer_ext.diagnostics.inspect_model`.
        facts: names and values to show at the top.
        losses: of :func:`reformer_ext.ablation.ablated_losses`; none: without their table.
        no_drawing: why there are no pictures, which take matplotlib.
    """
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>reformer inspect</title><style>\n{_STYLE}\n</style></head><body>",
        "<h1>What LSH attention sees</h1>",
        _definitions(facts),
        f"<p>{escape(_READING)}</p>",
        _html_table(_summary(layers)),
        _definitions({column.heading: column.meaning for column in _COLUMNS}),
    ]
    if losses:
        parts += ["<h2>What LSH attention is worth</h2>", f"<p>{escape(_LOSS_READING)}</p>"]
        parts.append(_html_table(loss_table(losses)))
    if _lsh_layers(layers):
        parts += ["<h2>How far it looks</h2>", f"<p>{escape(_DISTANCE_READING)}</p>"]
        parts.append(_html_table(distance_table(layers)))
    if no_drawing:
        parts.append(f"<p>Without pictures: matplotlib {escape(no_drawing)}.</p>")
    for layer in _lsh_layers(layers):
        parts.append(f"<h2>Layer {layer.index}</h2>")
        if not no_drawing:
            encoded = base64.b64encode(draw([layer])).decode()
            parts.append(
                f'<img src="data:image/png;base64,{encoded}" alt="Captured mass by hash rounds, '
                f'mass by distance, bucket sizes, and new keys by round, of layer {layer.index}">'
            )
        parts.append(_html_table(_heads(layer)))
        parts += [f"<p>{escape(sentence)}</p>" for sentence in _sentences(layer)]
    return "\n".join([*parts, "</body></html>\n"])


def _read(data: Sequence[Path], checkpoint: Path) -> tuple[str, Tensor]:
    """A name for the user and the bytes, uint8 ``(n,)``."""
    if data:
        name = ", ".join(map(shown, data))
        text = b"".join(path.read_bytes() + SEPARATOR for path in find_files(data))
        if not text:
            raise CorpusError(f"inspect: expected --data with files, got none in {name}")
        return name, torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if checkpoint.is_dir():
        raise ValueError(
            f"inspect: expected --data with the folder of a model, {shown(checkpoint)}, which does "
            "not say what it was trained on"
        )
    paths = [Path(path) for path in load_checkpoint(checkpoint).get("paths", [])]
    try:
        corpus = load_corpus(paths)
    except CorpusError as error:
        raise CorpusError(
            f"{error} (these are the files of the training; --data names others)"
        ) from error
    return f"held-out bytes of {corpus.name}", corpus.held_out


def _write(out: Path, content: bytes) -> None:
    """In one step: the old report or the new one, whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with naming(out):
            temporary.write_bytes(content)
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _windows(text: Tensor, length: int, count: int, name: str) -> Tensor:
    """``count`` evenly spaced windows, int64 ``(count, length)``."""
    if len(text) < length:
        raise ValueError(
            f"inspect: expected at least --length = {length:,} bytes, got {len(text):,} "
            f"({name}); name more files or lower --length"
        )
    starts = torch.arange(count) * (len(text) - length) // count
    return text[starts[:, None] + torch.arange(length)].long()


def _lsh_layers(layers: Sequence[LayerReport]) -> list[LSHLayerReport]:
    return [layer for layer in layers if isinstance(layer, LSHLayerReport)]


def _shown_rounds(rounds: int) -> list[int]:
    """1, 2, 4 ... and the last."""
    return sorted({*(2**n for n in range(rounds.bit_length())), rounds})


def _summary(layers: Sequence[LayerReport]) -> list[list[str]]:
    """Rows of the table of all layers, the headings first."""
    rows = [["layer", "kind", *(column.heading for column in _COLUMNS)]]
    for layer in layers:
        numbers = layer_numbers(layer)
        means = {
            key: float(value.max() if key == "load" else value.mean())
            for key, value in numbers.items()
        }
        cells = [_cell(means.get(column.key), column.digits) for column in _COLUMNS]
        rows.append([str(layer.index), layer.kind, *cells])
    return rows


def _heads(layer: LSHLayerReport) -> list[list[str]]:
    """Rows of the table of an LSH layer's heads, the headings first."""
    mass = by_round(layer.mass.mass)
    shown = _shown_rounds(mass.shape[1])
    numbers = layer_numbers(layer)
    rest = [column for column in _COLUMNS if column.key != "mass"]
    rows = [["head", *(f"mass, R={r}" for r in shown), *(column.heading for column in rest)]]
    for head in range(len(mass)):
        shares = [_cell(float(mass[head, r - 1]), 3) for r in shown]
        cells = [_cell(float(numbers[column.key][head]), column.digits) for column in rest]
        rows.append([str(head), *shares, *cells])
    return rows


def _sentences(layer: LSHLayerReport) -> list[str]:
    """What the tables leave out of an LSH layer."""
    low, median, high = layer.occupancy.quantiles().mean(dim=(0, 1, 2)).tolist()
    counts = layer.occupancy.counts
    pairs = layer.collisions.multiplicity.sum(dim=(0, 1)).double()
    shares = (pairs / pairs.sum()).tolist()
    return [
        f"{counts.shape[-1]:,} buckets of {float(layer.occupancy.mean.mean()):.1f} positions on "
        f"average; a tenth of them has at most {low:.1f}, half {median:.1f}, nine tenths "
        f"{high:.1f}, the fullest {int(counts.max()):,}; a chunk has {layer.occupancy.chunk_size}.",
        "Pairs of query and key that meet, by how often: "
        + ", ".join(f"{n}: {share:.1%}" for n, share in enumerate(shares, 1))
        + " (the last: and more).",
    ]


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def _html_table(rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    lines = [line(rows[0], "th"), *(line(row, "td") for row in rows[1:])]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _definitions(terms: dict[str, str]) -> str:
    entries = (f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return "<dl>" + "\n".join(entries) + "</dl>"
