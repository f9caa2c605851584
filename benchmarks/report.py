"""The JSON of a run, its table, and the comparison of two runs.

A report is ``{"format", environment..., "ceilings", "cases"}``; an entry of ``cases`` holds the
case's fields, and under ``results`` a row by name: ``ms``, ``q1``, ``q3``, ``calls``,
``memory_mib``, ``error``, ``tflops``, ``gbs``, ``kernels`` as far as known, or ``skipped``: why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from .case import Case

FORMAT = 2
SLOWER = 1.05  # a regression is more than this times the old figure
MEMORY_SLACK = 1.0  # MiB that no one is blamed for
KERNEL_SHARE = 0.01  # of a call: shorter kernels are in the JSON alone
OURS = ("forward", "forward+backward")

Report = dict[str, Any]
Row = dict[str, Any]


def read(path: Path) -> Report:
    report: Report = json.loads(path.read_text())
    if report.get("format") != FORMAT:
        raise SystemExit(f"{path}: expected format {FORMAT}, got {report.get('format')}")
    return report


def write(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def case_of(entry: Row) -> Case:
    return Case(**{field.name: entry[field.name] for field in fields(Case)})


def rates(row: Row, flop: float, moved: float) -> None:
    """Adds the TFLOP/s and GB/s of so many FLOP and bytes."""
    row["tflops"] = flop / row["ms"] / 1e9
    row["gbs"] = moved / row["ms"] / 1e6


def lines(entry: Row, ceilings: Row) -> Iterator[str]:
    """The table of one case."""
    results = entry["results"]
    yield (
        f"  {'':46}{'ms':>10} {'[quartiles]':^21}{'error':>8}{'MiB':>9}"
        f"{'TFLOP/s (roof)':>16}{'GB/s (roof)':>16}{'/ ours':>9}"
    )
    for name, row in results.items():
        if "skipped" in row:
            yield f"  {name:46} skipped: {row['skipped']}"
            continue
        quartiles = f"[{row['q1']:.4g}, {row['q3']:.4g}]"
        error = "" if row.get("error") is None else f"{row['error']:.1e}"
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.1f}"
        achieved = ""
        for key, roof in (("tflops", "matmul_tflops"), ("gbs", "copy_gbs")):
            share = f"{row[key]:.4g} ({row[key] / ceilings[roof]:.0%})" if row.get(key) else ""
            achieved += f"{share:>16}"
        ratio = ""
        mode = name.rsplit(": ", 1)[-1]
        if mode != name and mode in results:
            ratio = f"{row['ms'] / results[mode]['ms']:.2f}x"
        yield (
            f"  {name:46}{row['ms']:10.4f} {quartiles:^21}{error:>8}{memory:>9}{achieved}{ratio:>9}"
        )
        for kernel, part in row.get("kernels", {}).items():
            if part["ms"] >= KERNEL_SHARE * row["ms"]:
                yield f"    {part['ms']:10.4f} ms {part['calls']:4.0f} x {kernel[:90]}"


def compare(new: Report, old: Report) -> list[str]:
    """What became slower or takes more memory, by more than 5%, among the rows of both reports.

    Rows are the same if every field of the case and the name are. Exits if there is none.
    """
    before = {
        (case_of(entry), name): row
        for entry in old["cases"]
        for name, row in entry["results"].items()
    }
    matched, regressions = 0, []
    for entry in new["cases"]:
        case = case_of(entry)
        for name, row in entry["results"].items():
            was = before.get((case, name), {"skipped": ""})
            if "skipped" in row or "skipped" in was:
                continue
            matched += 1
            for key, unit, slack in (("ms", "ms", 0.0), ("memory_mib", "MiB", MEMORY_SLACK)):
                then, now = was.get(key), row.get(key)
                if then is None or now is None or now <= SLOWER * then + slack:
                    continue
                change = f"{then:.4f} -> {now:.4f} {unit}"
                regressions.append(f"{case}: {name}: {change} ({now / max(then, 1e-9) - 1:+.0%})")
    if matched == 0:
        raise SystemExit("benchmarks.ops: nothing to compare: no case is in both reports")
    return regressions
