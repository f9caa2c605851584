"""Times LSH attention, stage by stage, beside exact attention and the published Reformers.

python -m benchmarks.ops --lengths 4096,65536 --dtype bf16 --peers --json out.json

A length is timed only after the result matched float64: values and gradients of a small twin
against ``reformer_ext.reference``, and sampled queries of the length itself. Method: GPU time
between CUDA events around one call, launches hidden behind a spinning kernel, inputs rotated among
sets; wall time on the CPU; median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import reformer_ext
from reformer_ext import reference

from .peers import peers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}  # relative RMS
WARM_UP, MIN_REPS, MAX_REPS, MAX_SECONDS, SETS = 3, 5, 50, 4.0, 4

Call = Callable[[Tensor, Tensor], object]


def output_of(*command: str) -> str | None:
    root = Path(__file__).parent
    try:
        return subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL, cwd=root
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, object]:
    """What a reader needs to judge the numbers by."""
    gpu = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    return {
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "machine": f"{platform.platform()}, Python {platform.python_version()}",
        "threads": torch.get_num_threads(),
        gpu: output_of("nvidia-smi", f"--query-gpu={gpu}", "--format=csv,noheader"),
        "method": " ".join((__doc__ or "").split("Method:")[1].split()),
    }


def timed(call: Call, sets: list[tuple[Tensor, Tensor]], device: str) -> dict[str, float | None]:
    """Milliseconds (median, quartiles, calls) and the extra memory of one call in MiB."""

    def once(index: int) -> float:
        arguments = sets[index % len(sets)]
        if device == "cpu":
            begin = time.perf_counter()
            call(*arguments)
            return 1e3 * (time.perf_counter() - begin)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)  # about 5 ms: the host gets ahead
        start.record()
        call(*arguments)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    for index in range(WARM_UP):
        once(index)
    memory = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*sets[0])
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < MIN_REPS or (
        len(times) < MAX_REPS and time.perf_counter() - begin < MAX_SECONDS
    ):
        times.append(once(len(times)))
    low, median, high = statistics.quantiles(times, n=4)
    return {"ms": median, "q1": low, "q3": high, "calls": len(times), "memory_mib": memory}


def both(forward: Call, cotangent: Tensor) -> Call:
    """The call with its backward."""

    def call(qk: Tensor, v: Tensor) -> object:
        with torch.enable_grad():
            return torch.autograd.grad(forward(qk, v), (qk, v), cotangent)

    return call


def relative_rms(got: Tensor, expected: Tensor) -> float:
    error = (got.double() - expected).square().mean() / expected.square().mean()
    return math.sqrt(error.item())


def sampled_reference(
    qk: Tensor, v: Tensor, order: Tensor, queries: Tensor, chunk_size: int, causal: bool
) -> Tensor:
    """The outputs of some queries in float64, by the definition; whole chunks only."""
    batch, heads, rounds, length = order.shape
    line = order.long().flatten(2)  # the rounds' sorted lists end to end
    places = order.long().argsort(dim=-1)[..., queries]  # [B, H, R, n]
    places += length * torch.arange(rounds, device=order.device)[:, None]
    window = torch.arange(-chunk_size, chunk_size, device=order.device)
    slots = (places[..., None] // chunk_size * chunk_size + window) % line.shape[-1]
    keys = line.gather(-1, slots.transpose(2, 3).flatten(2)).view(batch, heads, len(queries), -1)
    valid = keys != queries[:, None]
    if causal:
        valid &= keys <= queries[:, None]

    def rows(x: Tensor) -> Tensor:
        index = keys.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
        return x.double().gather(2, index).view(*keys.shape, -1)

    logits = torch.einsum(
        "bhnd,bhnkd->bhnk", qk[:, :, queries].double(), F.normalize(rows(qk), dim=-1)
    )
    logits = (logits * qk.shape[-1] ** -0.5).masked_fill(~valid, -math.inf)
    out = torch.einsum("bhnk,bhnkd->bhnd", logits.softmax(-1), rows(v))
    return torch.where(valid.any(-1, keepdim=True), out, v[:, :, queries].double())


def check(
    qk: Tensor, v: Tensor, rotations: Tensor, n_buckets: list[int], options: dict
) -> dict[str, float]:
    """Relative RMS errors of a small twin and of sampled queries; exits if one is large."""
    small = slice(0, min(qk.shape[2], 1000))
    twin = [x[:1, :2, small].detach().clone().requires_grad_() for x in (qk, v)]
    turns = rotations[:2]
    out, buckets = reformer_ext.lsh_attention(
        *twin, rotations=turns, n_buckets=n_buckets, return_buckets=True, **options
    )
    oracle = [x.detach().double().requires_grad_() for x in twin]
    order = reference.bucket_sort(buckets, 0)
    expected, _ = reference.chunked_attention(oracle[0], None, oracle[1], order, **options)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, twin, cotangent)
    wanted = torch.autograd.grad(expected, oracle, cotangent.double())
    errors = {"twin out": relative_rms(out, expected)}
    for name, grad, want in zip(("qk", "v"), grads, wanted, strict=True):
        errors[f"twin grad_{name}"] = relative_rms(grad, want)
    if qk.shape[2] % options["chunk_size"] == 0:
        out, buckets = reformer_ext.lsh_attention(
            qk.detach(),
            v.detach(),
            rotations=rotations,
            n_buckets=n_buckets,
            return_buckets=True,
            **options,
        )
        queries = torch.linspace(0, qk.shape[2] - 1, 97, device=qk.device).long()
        order = reformer_ext.bucket_sort(buckets, math.prod(n_buckets) + 1)
        sampled = sampled_reference(
            qk.detach(), v.detach(), order, queries, options["chunk_size"], options["causal"]
        )
        errors["sampled queries"] = relative_rms(out[:, :, queries], sampled)
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCES[qk.dtype]}
    if wrong:
        raise SystemExit(f"benchmarks.ops: wrong results, not timed (relative RMS): {wrong}")
    return errors


def measure(args: argparse.Namespace, length: int) -> dict[str, object]:
    """Checks and times one length."""
    dtype, device = DTYPES[args.dtype], args.device
    shape = (args.batch, args.heads, length, args.head_dim)
    sets = [
        tuple(torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
        for _ in range(SETS)
    ]
    cotangent = torch.randn(shape, device=device, dtype=dtype)
    n_buckets = reformer_ext.default_n_buckets(length, args.chunk_size)
    rotations = reformer_ext.sample_rotations(
        args.heads, args.head_dim, args.n_hashes, n_buckets, device=device, dtype=dtype
    )
    options = {"chunk_size": args.chunk_size, "causal": args.causal}
    errors = check(*sets[0], rotations, n_buckets, options)
    buckets = reformer_ext.lsh_hash(sets[0][0], rotations, n_buckets)
    order = reformer_ext.bucket_sort(buckets, math.prod(n_buckets) + 1)

    def public(qk: Tensor, v: Tensor) -> Tensor:
        return reformer_ext.lsh_attention(
            qk, v, rotations=rotations, n_buckets=n_buckets, **options
        )

    stages: dict[str, Call] = {
        "hash": lambda qk, v: reformer_ext.lsh_hash(qk, rotations, n_buckets),
        "sort": lambda qk, v: reformer_ext.bucket_sort(buckets, math.prod(n_buckets) + 1),
        "attention forward": lambda qk, v: reformer_ext.chunked_attention(
            qk, None, v, order, **options
        ),
        "forward": public,
        "forward+backward": both(public, cotangent),
    }
    rows: dict[str, object] = {}

    def record(name: str, call: Call) -> None:
        try:
            with torch.no_grad():
                rows[name] = timed(call, sets, device)
        except (RuntimeError, ValueError) as error:  # out of memory, or not supported
            if name in stages:
                raise
            rows[name] = {"skipped": str(error).strip().splitlines()[0]}
        if device == "cuda":
            torch.cuda.empty_cache()

    for name, call in stages.items():
        record(name, call)
    for name, peer in peers(args, dtype, length, n_buckets) if args.peers else ():
        if isinstance(peer, str):
            rows[name] = {"skipped": peer}
        else:
            record(f"{name}: forward", peer)
            record(f"{name}: forward+backward", both(peer, cotangent))
    return {"length": length, "n_buckets": n_buckets, "relative_rms": errors, "results": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=["lsh_attention"], default="lsh_attention")
    parser.add_argument("--lengths", default="4096,16384,65536", help="separated by commas")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    sizes = {"batch": 1, "heads": 8, "head-dim": 64, "n-hashes": 8, "chunk-size": 64}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peers", action="store_true", help="time the peers that can run too")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, object] = {**vars(args), **environment()}
    del report["json"]
    print(json.dumps(report, indent=1))
    report["lengths"] = []
    for length in [int(text) for text in args.lengths.split(",")]:
        result = measure(args, length)
        report["lengths"].append(result)  # type: ignore[attr-defined]
        worst = max(result["relative_rms"].values())  # type: ignore[attr-defined]
        print(f"\nL = {length}, n_buckets = {result['n_buckets']}, relative RMS error {worst:.1e}")
        for name, row in result["results"].items():  # type: ignore[attr-defined]
            if "skipped" in row:
                print(f"  {name:46} skipped: {row['skipped']}")
                continue
            memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:10.1f} MiB"
            print(f"  {name:46}{row['ms']:10.4f} ms [{row['q1']:.4f}, {row['q3']:.4f}]{memory}")
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
