"""Writes the tables of README.md and docs/ that show results, from the JSON that has them.

python -m benchmarks.tables            # after new results, or with --check: exit 1 if any is old

A table stands between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a function
of this file. What is outside of them is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from .report import Report, Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(ROOT / name for name in ("README.md", "docs/performance.md", "docs/learning.md"))
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
TOGETHER = "\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}"
FORWARD, BOTH = "forward", "forward+backward"
CUDNN, FLASH, SDPA = "sdpa cudnn: ", "sdpa flash: ", "sdpa: "
TRANSFORMERS, REFORMER_PYTORCH = "transformers (with projections): ", "reformer_pytorch: "


def load(name: str) -> Report:
    report: Report = json.loads((RESULTS / f"{name}.json").read_text())
    return report


def number(value: float) -> str:
    """In at least three figures, of small numbers to a thousandth."""
    if value >= 100:
        return f"{value:,.0f}"
    digits = 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def pair(entry: Row, prefix: str = "", key: str = "ms") -> str:
    """Forward / forward and backward; empty if not run."""
    rows = [entry["results"].get(prefix + mode, {}) for mode in (FORWARD, BOTH)]
    if any(key not in row for row in rows):
        return ""
    return TOGETHER.join(number(row[key]) for row in rows)


def memory(entry: Row, prefixes: Sequence[str] = ("",)) -> str:
    """MiB of forward and backward beyond the inputs."""
    rows = [entry["results"].get(prefix + BOTH, {}) for prefix in prefixes]
    return TOGETHER.join(f"{row['memory_mib']:,.0f}" for row in rows if "memory_mib" in row)


def bold(text: str) -> str:
    return f"**{text}**"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def source(name: str) -> str:
    """Which run a table is of."""
    report = load(name)
    machine = report.get("gpu") or f"{report['threads']} cores of an {report['cpu']} processor"
    command = re.sub(r" --json \S+", "", report["command"])
    return (
        f"{machine}, torch {report['versions']['torch'].removesuffix('+cpu')}, "
        f"commit {report['commit'][:7]}: `{command}`"
        + "".join(
            f". Note: {text}"
            for key, text in report.items()
            if key.endswith("note") and key != "commit_note"
        )
    )


def sources(*names: str) -> Iterator[str]:
    yield ""
    for name in names:
        yield f"- `benchmarks/results/{name}.json`: {source(name)}"


def lengths() -> Iterator[str]:
    """Time and memory by length, and the peers: the README's table."""
    head = (
        "L",
        "this library",
        "exact attention, cuDNN",
        "exact attention, flash",
        "transformers' Reformer",
        "against cuDNN",
        "memory, MiB: this / transformers",
    )

    def row(entry: Row) -> list[str]:
        ours = [entry["results"][mode]["ms"] for mode in (FORWARD, BOTH)]
        exact = [entry["results"].get(CUDNN + mode, {}).get("ms") for mode in (FORWARD, BOTH)]
        ratios = [f"{number(b / a)}x" for a, b in zip(ours, exact, strict=True) if b is not None]
        return [
            f"{entry['length']:,}",
            bold(pair(entry)),
            *(pair(entry, prefix) for prefix in (CUDNN, FLASH, TRANSFORMERS)),
            TOGETHER.join(ratios),
            memory(entry, ("", TRANSFORMERS)),
        ]

    yield from table(head, map(row, load("h200_lsh_attention_bf16")["cases"]))


def variants() -> Iterator[str]:
    """Flags, dtypes and head dimensions at one length, and how many times the plain call."""
    masks, plain = "h200_masks", "h200_workspace_default"
    flex = "flex_attention: ", "flex_attention, window of 1024: "
    # Label, report, what tells the case, prefix of its rows, report with the plain call beside it.
    lines: tuple[tuple[str, str, Row, str, str], ...] = (
        ("plain", masks, {"variant": "plain"}, "", masks),
        ("padding", masks, {"variant": "padding"}, "", masks),
        ("same bucket only", masks, {"variant": "same-bucket"}, "", masks),
        ("dropout", masks, {"variant": "dropout"}, "", masks),
        ("duplicates counted once", masks, {"variant": "duplicates"}, "", masks),
        ("4 rounds", "h200_n_hashes", {"n_hashes": 4}, "", "h200_n_hashes"),
        ("head dimension 32", "h200_head_dims", {"head_dim": 32}, "", "h200_head_dims"),
        ("head dimension 128", "h200_head_dims", {"head_dim": 128}, "", "h200_head_dims"),
        ("float16", "h200_dtypes", {"dtype": "fp16"}, "", "h200_dtypes"),
        ("float32", "h200_dtypes", {"dtype": "fp32"}, "", "h200_dtypes"),
        ("scratch memory capped at 256 MiB", "h200_workspace_256mib", {}, "", plain),
        ("mma.sync (`REFORMER_FORCE_SM80=1`)", "h200_force_sm80", {}, "", masks),
        ("FlexAttention, exact", "h200_flex_attention", {}, flex[0], "h200_flex_attention"),
        ("FlexAttention, window 1,024", "h200_flex_attention", {}, flex[1], "h200_flex_attention"),
    )

    def find(name: str, fields: Row) -> Row:
        wanted = {"length": 65536, **fields}
        cases = load(name)["cases"]
        (entry,) = (e for e in cases if all(e[key] == value for key, value in wanted.items()))
        return entry

    def row(label: str, name: str, fields: Row, prefix: str, beside: str) -> list[str]:
        entry = find(name, fields)
        usual = {"variant": "plain", "dtype": "bf16", "head_dim": 64, "n_hashes": 8}
        unit = find(beside, usual)
        ratios = [
            number(entry["results"][prefix + mode]["ms"] / unit["results"][mode]["ms"])
            for mode in (FORWARD, BOTH)
        ]
        return [label, pair(entry, prefix), TOGETHER.join(ratios), memory(entry, (prefix,))]

    head = ("65,536 positions", "ms", "times plain", "memory, MiB")
    yield from table(head, (row(*line) for line in lines))
    yield from sources(*dict.fromkeys(name for line in lines for name in (line[1], line[4])))


def stages() -> Iterator[str]:
    """Where the time goes at one length."""
    cases = load("h200_lsh_attention_bf16")["cases"]
    entries = [entry for entry in cases if entry["length"] <= 2**18]
    names = ("hash", "sort", "attention forward", FORWARD, "attention backward", BOTH)

    def row(name: str) -> list[str]:
        found = [entry["results"][name] for entry in entries]
        last = found[-2]
        rates = [f"{last[key]:,.0f}" if last.get(key) else "" for key in ("tflops", "gbs")]
        return [name, *(number(row["ms"]) for row in found), *rates]

    head = [f"{entry['length']:,}" for entry in entries]
    at = head[-2]
    yield from table(("ms of a stage", *head, f"TFLOP/s at {at}", f"GB/s at {at}"), map(row, names))
    ceilings = load("h200_lsh_attention_bf16")["ceilings"]
    yield ""
    yield (
        f"In the same run a large matrix product reached {ceilings['matmul_tflops']:,.0f} TFLOP/s "
        f"and a copy {ceilings['copy_gbs']:,.0f} GB/s."
    )
    yield from sources("h200_lsh_attention_bf16")


def training_shapes() -> Iterator[str]:
    """Batches of many heads of shorter sequences."""
    entries = load("h200_training_shapes")["cases"]
    shapes = sorted({(entry["length"], entry["batch"], entry["heads"]) for entry in entries})

    def row(shape: tuple[int, int, int]) -> list[str]:
        found = [e for e in entries if (e["length"], e["batch"], e["heads"]) == shape]
        found.sort(key=lambda entry: entry["n_hashes"])
        length, batch, heads = shape
        return [f"B={batch} H={heads} L={length:,}", *map(pair, found), pair(found[-1], CUDNN)]

    rounds = sorted({entry["n_hashes"] for entry in entries})
    head = ("", *(f"{n} rounds" for n in rounds), "exact attention, cuDNN")
    yield from table(head, map(row, shapes))
    yield from sources("h200_training_shapes")


def local() -> Iterator[str]:
    """Local attention by the size of its chunks."""
    flex = "flex_attention, same window: "
    yield from table(
        ("chunks of", "this library", "FlexAttention, the same window"),
        (
            [str(entry["chunk_size"]), bold(pair(entry)), pair(entry, flex)]
            for entry in load("h200_local_attention")["cases"]
        ),
    )
    yield from sources("h200_local_attention")


def cpu() -> Iterator[str]:
    """The operators on two cores."""
    prefixes = ("", SDPA, TRANSFORMERS, REFORMER_PYTORCH)

    def row(entry: Row) -> list[str]:
        figures = [pair(entry, prefix) for prefix in prefixes]
        return [
            f"{entry['length']:,}",
            "float32" if entry["dtype"] == "fp32" else "bfloat16",
            bold(figures[0]),
            *figures[1:],
            memory(entry, ("", TRANSFORMERS, REFORMER_PYTORCH)),
        ]

    head = (
        "L",
        "dtype",
        "this library",
        "exact attention",
        "transformers' Reformer",
        "reformer-pytorch",
        "memory, MiB: this / transformers / reformer-pytorch",
    )
    yield from table(head, map(row, load("cpu_lsh_attention")["cases"]))
    yield from sources("cpu_lsh_attention")


# Models by name in benchmarks.models.
MODELS = {
    "reformer_ext": "this library",
    "reformer_ext (compiled blocks)": "blocks compiled",
    "reformer_ext (plain autograd)": "activations stored",
    "exact (checkpointed)": "exact attention, checkpointed",
    "exact (cached)": "exact attention, cached",
    "transformers": "transformers",
    "transformers (accelerated)": "transformers after `accelerate`",
}


def models(names: Sequence[str], cell: Callable[[Row], str], head: str = "tokens") -> Iterator[str]:
    """Whole models: a row by length, a column by model; of two rows the later report's."""
    lengths: dict[int, dict[str, Row]] = {}
    for name in names:
        for length, rows in load(name)["lengths"].items():
            lengths.setdefault(int(length), {}).update(rows)
    columns = [name for name in MODELS if any(name in rows for rows in lengths.values())]

    def text(row: Row | None) -> str:
        if row is None:
            return ""
        if "skipped" in row:
            reason = str(row["skipped"])
            return "out of memory" if "out of memory" in reason else f"({reason})"
        figure = cell(row)
        if row.get("heads_at_once"):
            figure += f", `heads_at_once={row['heads_at_once']}`"
        return figure

    yield from table(
        (head, *(MODELS[name] for name in columns)),
        (
            [f"{length:,}", *(text(rows.get(name)) for name in columns)]
            for length, rows in sorted(lengths.items())
        ),
    )
    yield from sources(*names)


def rate_and_memory(row: Row) -> str:
    return f"{row['tokens_per_s']:,.0f}, {row['gib']:.1f} GiB"


def rate(row: Row) -> str:
    return f"{row['tokens_per_s']:,.0f}"


def milliseconds(row: Row) -> str:
    return number(row["ms"])


def training() -> Iterator[str]:
    yield from models(["models/h200_train_peers", "models/h200_train"], rate_and_memory)


def training_compiled() -> Iterator[str]:
    yield from models(["models/h200_train_compiled"], rate_and_memory)


def prefill() -> Iterator[str]:
    yield from models(["models/h200_prefill"], rate)


def decoding() -> Iterator[str]:
    yield from models(["models/h200_decode"], milliseconds, "after so many tokens")


def cpu_training() -> Iterator[str]:
    yield from models(["models/cpu_train"], rate_and_memory)


def cpu_reversible() -> Iterator[str]:
    yield from models(["models/cpu_reversible"], rate_and_memory)


def cpu_prefill() -> Iterator[str]:
    yield from models(["models/cpu_prefill"], rate)


def cpu_decoding() -> Iterator[str]:
    yield from models(
        ["models/cpu_decode", "models/cpu_decode_long"], milliseconds, "after so many tokens"
    )


# What was changed in the arms of the ladder.
ARMS = {
    "lsh": "local and LSH attention by turns, as published",
    "lsh+next": "the same with **next values**",
    "lsh+next+partial": "next values, rotary positions of the fast half of frequencies alone",
    "lsh+next+nope": "**next values, no rotary positions in LSH layers** (below: both)",
    "lsh+next+nope+plain": "both, activations stored: not reversible",
    "lsh+next+nope+every3": "both, LSH in every third layer",
    "lsh+next+nope+r4": "both, 4 rounds for 8",
    "lsh+next+nope+scale": "both, logit scale learnt, from 3",
    "lsh+next+nope+same": "both, same bucket only",
    "lsh+next+nope+convqk": "both, causal convolution of width 3 over queries (plain torch: slow)",
    "lsh+next+nope+kvlocal": "both, KV shifting in local layers (plain torch: slow)",
    "fullqk+nope": "both, exact attention with shared QK for LSH: its limit",
    "mix+kvlocal+kvfull": "local and exact attention by turns, KV shifting in all layers",
}


def ladder() -> Iterator[str]:
    """Arms by the clock: what helps a model learn."""
    lines = (RESULTS / "learning" / "h200_ladder_60s.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: list(ARMS).index(row["arm"]))

    def row(found: Row) -> list[str]:
        label = ARMS[found["arm"]]
        if found["lr"] != 5e-3:
            label = f"both, Muon at {found['lr']:g}"
        figures = (
            found["val"],
            found["by_position"]["4096-8192"],
            found["repeat_first"],
            found["repeat_second"],
        )
        return [
            label,
            str(found["steps"]),
            *(f"{figure:.3f}" for figure in figures),
            f"{found['peak_GiB']:.1f}",
        ]

    head = (
        "arm",
        "steps",
        "bits a byte",
        "of these from 4,096 on",
        "first copy",
        "second copy",
        "GiB",
    )
    yield from table(head, map(row, rows))
    yield ""
    yield "- `benchmarks/results/learning/h200_ladder_60s.jsonl`"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    function.__name__: function
    for function in (
        lengths,
        variants,
        stages,
        training_shapes,
        local,
        cpu,
        training,
        training_compiled,
        prefill,
        decoding,
        cpu_training,
        cpu_reversible,
        cpu_prefill,
        cpu_decoding,
        ladder,
    )
}


def current(text: str) -> str:
    """``text`` of a page with its tables as the results have them."""
    return MARKED.sub(lambda m: m[1] + "\n".join(TABLES[m[2]]()) + "\n" + m[3], text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one is old")
    args = parser.parse_args(argv)
    old = [page for page in PAGES if current(page.read_text()) != page.read_text()]
    if args.check and old:
        raise SystemExit(f"benchmarks.tables: not current: {', '.join(page.name for page in old)}")
    for page in old:
        page.write_text(current(page.read_text()))
        print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
