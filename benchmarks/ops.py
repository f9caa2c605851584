"""Times LSH and local attention, stage by stage, beside exact attention and published Reformers.

python -m benchmarks.ops --lengths 4096,65536 --dtype bf16 --peers --json out.json --plot out
python -m benchmarks.ops --shapes 8x16x8192x64,32x16x2048x64 --n-hashes 2,4,8 --peers sdpa
python -m benchmarks.ops --variants local --chunk-size 64,128,256 --peers --compare out.json

Every option that takes a list takes commas; all combinations are timed. A case is timed only after
its result matched float64 (check.py); the error stands beside the time. measure.py says how time,
memory and the machine's limits are measured, case.py which FLOP and bytes are counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import reformer_ext
from python_tests.cases import VARIANTS

from . import measure, plot, report
from .case import DTYPES, Call, Case, Workload, cases
from .check import check, check_peer
from .peers import Peer, peers


def comma_separated(kind: Callable[[str], object], allowed: tuple[str, ...] = ()) -> Callable:
    def parse(text: str) -> list:
        values = [kind(part) for part in text.split(",")]
        for value in values:
            if allowed and value not in allowed:
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join(allowed)}, got {value}"
                )
        return values

    return parse


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"expected BxHxLxD, got {text}")
    return sizes


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=comma_separated(int), default="4096,16384,65536")
    for name, default in {"batch": "1", "heads": "8", "head-dim": "64"}.items():
        parser.add_argument(f"--{name}", type=comma_separated(int), default=default)
    parser.add_argument(
        "--shapes", type=comma_separated(shape), help="BxHxLxD, in place of the four above"
    )
    for name, default in {"n-hashes": "8", "chunk-size": "64"}.items():
        parser.add_argument(f"--{name}", type=comma_separated(int), default=default)
    parser.add_argument(
        "--variants",
        type=comma_separated(str, tuple(VARIANTS)),
        default="plain",
        help=", ".join(VARIANTS),
    )
    parser.add_argument(
        "--dtype", type=comma_separated(str, tuple(DTYPES)), default="bf16", help=", ".join(DTYPES)
    )
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=best)
    parser.add_argument(
        "--modes", type=comma_separated(str, ("fwd", "bwd")), default="fwd,bwd", help="fwd, bwd"
    )
    parser.add_argument(
        "--workspace-mib", type=int, help="cap of the scratch memory (set_workspace_limit)"
    )
    parser.add_argument(
        "--peers",
        type=comma_separated(str),
        nargs="?",
        const=[""],
        default=[],
        help="time the peers that can run too: all, or those with one of these words in their name",
    )
    parser.add_argument(
        "--kernels", action="store_true", help="profile the kernels (on the CPU: operators)"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--plot", type=Path, help="draw this file, as .svg and .png")
    parser.add_argument(
        "--compare", type=Path, help="a report to compare with; exit status 1 if over 5%% worse"
    )
    return parser


def measure_case(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """Checks and times one case."""
    work = Workload(case)
    errors, counts, modes = check(work), case.counts(), set(args.modes)
    rows: dict[str, dict] = {}
    for name, calls in work.stages(modes).items():
        rows[name] = {**measure.timed(calls, case.device), "error": errors[name]}
        if name in counts:
            report.rates(rows[name], *counts[name])
        if args.kernels and name in report.OURS:
            rows[name]["kernels"] = measure.kernels(calls[0], case.device)
    for peer in peers(case) if args.peers else ():  # making them takes time
        if not any(word in peer.name for word in args.peers):
            continue
        rows |= measure_peer(peer, work, modes)
        if case.device == "cuda":
            torch.cuda.empty_cache()
    return {**vars(case), "n_buckets": None if case.local else case.n_buckets, "results": rows}


def measure_peer(peer: Peer, work: Workload, modes: set[str]) -> dict[str, dict]:
    """Its rows, or one that says why it cannot run."""
    if isinstance(peer.forward, str):
        return {peer.name: {"skipped": peer.forward}}
    ways: dict[str, Callable[..., list[Call]]] = {}
    if "fwd" in modes:
        ways["forward"] = work.forwards
    if "bwd" in modes:
        ways["forward+backward"] = work.both
    rows: dict[str, dict] = {}
    error = None
    for mode, calls_of in ways.items():
        name = f"{peer.name}: {mode}"
        try:
            if peer.sees is not None and error is None:
                error = check_peer(peer.forward, peer.sees, work)
            rows[name] = {
                **measure.timed(calls_of(peer.forward), work.case.device),
                "error": error,
            }
        except (RuntimeError, ValueError) as reason:  # out of memory, or not supported
            message = str(reason).strip() or type(reason).__name__
            rows[name] = {"skipped": message.splitlines()[0]}
    return rows


def main() -> None:
    args = arguments().parse_args()
    device = args.device
    shapes = args.shapes or [
        (batch, heads, length, head_dim)
        for length in args.lengths
        for batch in args.batch
        for heads in args.heads
        for head_dim in args.head_dim
    ]
    old = report.read(args.compare) if args.compare else None
    wanted = cases(
        shapes,
        variant=args.variants,
        dtype=args.dtype,
        n_hashes=args.n_hashes,
        chunk_size=args.chunk_size,
        causal=[args.causal],
        device=[device],
    )
    torch.manual_seed(0)
    if args.workspace_mib is not None:
        reformer_ext.set_workspace_limit(args.workspace_mib * 2**20)
    result: report.Report = {
        "format": report.FORMAT,
        **measure.environment(device, "benchmarks.ops"),
        "ceilings": measure.ceilings(device),
        "cases": [],
    }
    for name, value in result.items():
        if name != "cases":
            print(f"{name}: {value}")
    for case in wanted:
        entry = measure_case(case, args)
        result["cases"].append(entry)
        print(f"\n{case}; n_buckets {entry['n_buckets']}")
        print(*report.lines(entry, result["ceilings"]), sep="\n", flush=True)
        if args.json:
            report.write(result, args.json)
    if args.plot:
        plot.draw(result, args.plot)
    if old is not None:
        regressions = report.compare(result, old)
        print(*regressions or ["\nno regression over 5%"], sep="\n")
        if regressions:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
