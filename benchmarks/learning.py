"""What helps a model learn: a ladder of ablations by the clock, on the bytes of a file.

python -m benchmarks.learning CORPUS --out runs/ladder --arms lsh,lsh+next,lsh+next+no-rotary
python -m benchmarks.learning CORPUS --out runs/ladder --arms lsh+next --seconds 120 --seeds 0,1
python -m benchmarks.learning CORPUS --out runs/long --arms lsh+next --seconds 400 \\
    --contexts 8192,65536 --shares 0.8,0.2
python -m benchmarks.learning --list

An arm is a base and changes to it, joined by +; "ladder" and "controls" are lists of arms. All arms
see the same bytes at the same step, start from the same weights where they have them, and train for
the same seconds of wall time; evaluation is not counted. The corpus is a file, or one packed by xz;
its first bytes train, the next validate.

Of each arm: bits per byte of validation windows of the last context, with its standard error over
windows; by position in the window; of the last 2,000 positions; of the windows of half a context
that are shown twice, on the first and on the second copy (less 64 bytes to get going); tokens/s and
the peak of allocated memory. JSON, an arm a file, and table.md of all in the folder. A second call
runs what is not finished. clock.py says how time is counted.
"""

from __future__ import annotations

import argparse
import lzma
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reformer_ext.generate import autocast
from reformer_ext.nn import ReformerConfig, ReformerLM

from . import clock
from .clock import Recipe, Row
from .ops import comma_separated
from .variants import Changes, change

EDGES = (0, 128, 1024, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)
MOBA = (512, 3)  # their blocks at 8,192 positions


@dataclass(frozen=True)
class Base:
    """Local layers and "far" ones of a kind by turns, or one kind alone."""

    about: str
    far: str
    alone: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """Fields of the configuration, of the changes to far and to local layers; ``places`` says of
    ``(index, depth)`` whether a layer is far."""

    about: str
    config: Mapping[str, Any] = field(default_factory=dict)
    far: Mapping[str, Any] = field(default_factory=dict)
    local: Mapping[str, Any] = field(default_factory=dict)
    places: Callable[[int, int], bool] | None = None


BASES = {
    "lsh": Base("local, LSH by turns", "lsh"),
    "lsh-only": Base("LSH in all layers", "lsh", alone=True),
    "local": Base("local in all layers", "local", alone=True),
    "exact": Base("local, exact by turns", "full"),
    "exact-only": Base("exact in all layers", "full", alone=True),
    "shared": Base(
        "local, exact with shared QK by turns: what LSH approximates",
        "full",
        config={"full_shared_qk": True},
    ),
    "moba": Base("local, the best blocks (MoBA) by turns", "full", changes={"moba": MOBA}),
}

CHANGES = {
    "next": Change("far layers attend with next values", far={"next_values": True}),
    "no-rotary": Change("far layers without rotary positions", far={"rotary": "none"}),
    "half-rotary": Change(
        "only the fast half of the frequencies turns in far layers", far={"rotary": "fast half"}
    ),
    "conv-hash": Change("a convolution of what is hashed", far={"convolution": "hashed"}),
    "conv-keys": Change("a convolution of shared queries and keys", far={"convolution": "keys"}),
    "kv-far": Change("KV shifting in far layers", far={"kv_shift": True}),
    "kv-local": Change("KV shifting in local layers", local={"kv_shift": True}),
    "centred": Change("hashed less the mean so far", far={"centred": True}),
    "orthogonal": Change("orthogonal rotations", far={"orthogonal": True}),
    "gray": Change("buckets in Gray order", far={"gray": True}),
    "learnt-scale": Change("a learnt scale of the logits per head", far={"learnt_scale": True}),
    "fixed-hash": Change("the same rotations at every step", far={"fixed_hash": True}),
    "same-bucket": Change("only within the bucket", config={"same_bucket": True}),
    "duplicates": Change("a pair counts once", config={"correct_duplicates": True}),
    "stored": Change("activations stored, not recomputed", config={"reversible": False}),
    "every-3": Change("every third layer is far", places=lambda i, depth: i % 3 == 2),
    "every-6": Change("every sixth layer is far", places=lambda i, depth: i % 6 == 5),
    "upper": Change(
        "every second layer of the upper half is far",
        places=lambda i, depth: i >= depth // 2 and i % 2 == 1,
    ),
    "upper-all": Change(
        "all layers of the upper half are far", places=lambda i, depth: i >= depth // 2
    ),
    **{f"rounds-{n}": Change(f"{n} rounds", config={"n_hashes": n}) for n in (1, 2, 4, 8, 16)},
    **{f"chunk-{n}": Change(f"LSH chunks of {n}", config={"chunk_size": n}) for n in (32, 64, 128)},
    **{
        f"local-{n}": Change(f"local chunks of {n}", config={"local_chunk_size": n})
        for n in (32, 64, 128, 256)
    },
    **{
        f"scale-{n}": Change(
            f"logits with shared QK times {n}", config={"shared_qk_scale": float(n)}
        )
        for n in (2, 3, 4)
    },
    **{
        f"base-{base}": Change(f"rotary base {base}", config={"rotary_base": float(base)})
        for base in ("1e5", "1e6", "1e7")
    },
}


BOTH = "lsh+next+no-rotary"
# Lists of arms, by a name of their own.
LISTS = {
    "ladder": (
        "lsh",
        "lsh+next",
        "lsh+no-rotary",
        BOTH,
        "lsh+next+half-rotary",
        *(
            f"{BOTH}+{change}"
            for change in (
                "conv-hash", "conv-keys", "kv-local", "centred", "orthogonal", "gray",
                "learnt-scale", "rounds-1", "rounds-2", "rounds-4", "chunk-32", "chunk-128",
                "same-bucket", "duplicates", "every-3", "every-6", "upper", "local-128",
                "local-256", "stored", "fixed-hash",
            )
        ),
    ),
    "controls": ("local", "exact", "exact+kv-far+kv-local", "shared+next+no-rotary", "moba"),
}  # fmt: skip


def build(arm: str, config: ReformerConfig) -> ReformerLM:
    """The model of an arm, ``config`` less what the arm says; its number of layers is the depth.

    Raises ValueError: an unknown name, or changes that the base does not have.
    """
    name, *names = arm.split("+")
    if name not in BASES:
        raise ValueError(f"arm {arm}: expected a base among {', '.join(BASES)}, got {name}")
    unknown = [other for other in names if other not in CHANGES]
    if unknown:
        raise ValueError(f"arm {arm}: expected changes among {', '.join(CHANGES)}, got {unknown}")
    base, changes = BASES[name], [CHANGES[other] for other in names]
    depth = len(config.layers)
    places = base_places = (lambda i, depth: True) if base.alone else (lambda i, depth: i % 2 == 1)
    fields, far, local = dict(base.config), dict(base.changes), dict[str, Any]()
    for each in changes:
        fields.update(each.config)
        far.update(each.far)
        local.update(each.local)
        if each.places is not None:
            if places is not base_places or base.alone:
                raise ValueError(f"arm {arm}: expected one place for far layers")
            places = each.places
    if base.far == "local" and far:
        raise ValueError(f"arm {arm}: expected changes to local layers, got {far}")
    # The library's own options where they are; what stands in for exact layers has its own.
    own = base.far == "lsh"
    fields["next_values"] = own and far.pop("next_values", False)
    fields["shared_qk_rotary"] = not (own and far.get("rotary") == "none")
    if not fields["shared_qk_rotary"]:
        far.pop("rotary")
    layers = tuple(base.far if places(i, depth) else "local" for i in range(depth))
    model = ReformerLM(replace(config, layers=layers, **fields))
    by_kind = {base.far: Changes(**far), "local": Changes(**local)}
    if base.far == "full":  # shared QK without an L x L mask, and the same exact kernels for all
        return change(model, by_kind)
    return change(model, {kind: each for kind, each in by_kind.items() if each != Changes()})


@dataclass(frozen=True)
class Schedule:
    """Contexts one after the other, each for its share of the run, at the same tokens a step."""

    contexts: tuple[int, ...]
    shares: tuple[float, ...]
    tokens: int

    def __post_init__(self) -> None:
        if len(self.contexts) != len(self.shares) or not math.isclose(sum(self.shares), 1.0):
            raise ValueError(
                f"schedule: expected a share for each of {self.contexts} that sum to 1, "
                f"got {self.shares}"
            )
        if any(self.tokens % context for context in self.contexts):
            raise ValueError(
                f"schedule: expected contexts that divide {self.tokens} tokens, got {self.contexts}"
            )

    def context(self, done: float) -> int:
        """Of the step when this share of the run is done."""
        end = 0.0
        for context, share in zip(self.contexts, self.shares, strict=True):
            end += share
            if done < end:
                return context
        return self.contexts[-1]

    def beginnings(self) -> list[float]:
        """The share of the run that is done when each context begins."""
        return [sum(self.shares[:i]) for i in range(len(self.shares))]


def load(path: Path, train_bytes: int, validation_bytes: int, least: int) -> tuple[Tensor, Tensor]:
    """Two uint8 parts of the file; 0 bytes to train on: nine tenths, to validate: a twentieth.

    Raises SystemExit: fewer than ``least`` in one of them.
    """
    data = path.read_bytes()
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    train_bytes = train_bytes or 9 * len(data) // 10
    validation_bytes = validation_bytes or len(data) // 20
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = whole[:train_bytes], whole[train_bytes : train_bytes + validation_bytes]
    if min(map(len, parts)) < least:
        raise SystemExit(
            f"benchmarks.learning: expected at least {least:,} bytes to train on and to validate, "
            f"got {len(parts[0]):,} and {len(parts[1]):,} of {path}"
        )
    return parts


def windows(data: Tensor, starts: list[int], length: int) -> Tensor:
    """int64 ``(len(starts), length)``."""
    return torch.stack([data[start : start + length] for start in starts]).long()


def spread(count: int, room: int) -> list[int]:
    """So many starts, evenly over ``0 .. room``."""
    return [i * room // max(count - 1, 1) for i in range(count)]


@torch.no_grad()
def bits(model: ReformerLM, tokens: Tensor) -> Tensor:
    """Of each byte but the first, given those before: ``(B, L) -> (B, L - 1)``, float64."""
    with autocast(tokens.device):
        nats = model.loss(tokens[:, :-1], tokens[:, 1:], "none")
    return nats.double() / math.log(2)


def evaluate(model: ReformerLM, data: Tensor, context: int, tokens: int, count: int) -> Row:
    """The figures of an arm at a context, from ``count`` windows, ``tokens`` at a time."""
    at_once = max(1, tokens // context)

    def batched(starts: list[int], length: int) -> list[Tensor]:
        return [
            windows(data, starts[i : i + at_once], length) for i in range(0, len(starts), at_once)
        ]

    starts = spread(count, len(data) - context - 1)
    seen = torch.cat([bits(model, part) for part in batched(starts, context + 1)])
    half = context // 2
    starts = spread(min(24, 4 * count), len(data) - half)
    twice = torch.cat(
        [bits(model, torch.cat([x, x, x[:, :1]], dim=1)) for x in batched(starts, half)]
    )
    by_position = seen.mean(0)
    skipped = min(64, half // 2)  # until it has seen that it is a copy
    return {
        "bits_per_byte": seen.mean().item(),
        "standard_error": (seen.mean(1).std() / count**0.5).item() if count > 1 else None,
        "by_position": {
            f"{low}-{min(high, context)}": by_position[low:high].mean().item()
            for low, high in zip(EDGES, (*EDGES[1:], context), strict=True)
            if low < context
        },
        "last_2000": by_position[-2000:].mean().item(),
        "repeat_first": twice[:, :half].mean().item(),
        "repeat_second": twice[:, half + skipped :].mean().item(),
    }


def batches(data: Tensor, schedule: Schedule, seed: int) -> Callable[[int, float], clock.Batch]:
    """Windows of the data at places that the seed and the number of the step say."""

    def batch(step: int, done: float) -> clock.Batch:
        context = schedule.context(done)
        generator = clock.generator(torch.device("cpu"), seed, step)
        starts = torch.randint(
            len(data) - context, (schedule.tokens // context,), generator=generator
        )
        x = windows(data, starts.tolist(), context + 1)
        return x[:, :-1], x[:, 1:]

    return batch


def some_bits(model: ReformerLM, data: Tensor, context: int, count: int) -> float:
    """Bits per byte of so many windows, one at a time."""
    starts = spread(count, len(data) - context - 1)
    found = [bits(model, windows(data, [start], context + 1)).mean() for start in starts]
    return torch.stack(found).mean().item()


def run_arm(
    arm: str,
    name: str,
    config: ReformerConfig,
    recipe: Recipe,
    schedule: Schedule,
    parts: tuple[Tensor, Tensor],
    folder: clock.Folder,
    args: argparse.Namespace,
) -> Row:
    """Trains and evaluates one arm; its result so far goes to the folder at every mark."""
    training, validation = parts
    torch.manual_seed(recipe.seed)
    model = build(arm, config).to(training.device)
    longest = schedule.contexts[-1]
    row: Row = {
        "arm": arm,
        "corpus": {"name": args.corpus.name, "train": len(training), "validate": len(validation)},
        "config": asdict(model.config),
        "recipe": asdict(recipe),
        "schedule": asdict(schedule),
        "parameters": clock.parameters(model),
        "validation": [],
    }

    batch = batches(training, schedule, recipe.seed)

    def count(context: int) -> int:
        return max(1, min(args.validation_windows, len(validation) // context))

    def at_mark(trained: Row) -> None:
        figure = some_bits(model, validation, longest, max(1, count(longest) // 16))
        row["validation"].append([trained["steps"], trained["seconds"], figure])
        folder.save(name, {**row, "trained": trained}, finished=False)
        print(f"  {trained['seconds']:5.0f} s {trained['steps']:6,} steps {figure:.4f}", flush=True)

    shapes = (batch(0, done) for done in schedule.beginnings())
    trained = clock.train(model, batch, recipe, shapes=shapes, at_mark=at_mark)
    row["trained"] = trained
    row |= evaluate(model, validation, longest, schedule.tokens, count(longest))
    row["at"] = {
        str(context): evaluate(model, validation, context, schedule.tokens, count(context))
        for context in args.also
    }
    row["value_mix"] = [
        parameter.tolist()
        for key, parameter in model.named_parameters()
        if key.endswith("value_mix")
    ]
    print(line(row), flush=True)
    return row


HEAD = (
    "| arm | context | s | lr | seed | M tokens | bits/byte | last 2,000 | repeat: first -> second "
    "| K tokens/s | GiB |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """A line of the table."""
    trained, recipe = row["trained"], row["recipe"]
    contexts = ", ".join(str(context) for context in row["schedule"]["contexts"])
    error = row["standard_error"]
    gib = trained.get("peak_gib")
    return (
        f"| {row['arm']} | {contexts} | {recipe['seconds']:g} | {recipe['lr']:g} | {recipe['seed']}"
        f" | {trained['tokens'] / 1e6:.1f} | {row['bits_per_byte']:.4f}"
        f"{f' +- {error:.4f}' if error is not None else ''} | {row['last_2000']:.4f}"
        f" | {row['repeat_first']:.3f} -> {row['repeat_second']:.3f}"
        f" | {trained['tokens_per_s'] / 1e3:.1f} | {f'{gib:.1f}' if gib is not None else ''} |"
    )


def table(results: Mapping[str, Row]) -> str:
    """Of the finished arms, the best first; then what failed."""
    rows = [row for row in results.values() if "bits_per_byte" in row]
    rows.sort(key=lambda row: row["bits_per_byte"])
    failed = [f"\n{name}: {row['failed']}" for name, row in results.items() if "failed" in row]
    return "\n".join([HEAD, *map(line, rows), *failed]) + "\n"


def listing() -> str:
    names = {name: each.about for name, each in {**BASES, **CHANGES}.items()}
    names |= {name: ", ".join(arms) for name, arms in LISTS.items()}
    return "\n".join(f"{name:14} {about}" for name, about in names.items())


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", type=Path, nargs="?", help="a file, or one packed by xz")
    parser.add_argument("--list", action="store_true", help="the names that arms are made of")
    parser.add_argument("--arms", type=comma_separated(str), default="lsh,lsh+next+no-rotary")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, each arm")
    parser.add_argument("--steps", type=int, default=0, help="at most so many (default: no limit)")
    parser.add_argument("--lr", type=comma_separated(float), default="0.005", help="of Muon")
    parser.add_argument("--lr-other", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--seeds", type=comma_separated(int), default="0")
    parser.add_argument("--contexts", type=comma_separated(int), default="8192")
    parser.add_argument(
        "--shares", type=comma_separated(float), default="1.0", help="of the run, a context each"
    )
    parser.add_argument("--tokens", type=int, default=65536, help="a step")
    parser.add_argument(
        "--also", type=comma_separated(int), default=[], help="contexts to evaluate at as well"
    )
    parser.add_argument("--train-bytes", type=int, default=0)
    parser.add_argument("--validation-bytes", type=int, default=0)
    parser.add_argument("--validation-windows", type=int, default=128, help="at most")
    for name, default in {"dim": 768, "heads": 12, "depth": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds of this call; see --seconds"
    )
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=best)
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if args.list:
        print(listing())
        return
    if args.corpus is None:
        parser.error("expected a corpus")
    args.arms = [arm for name in args.arms for arm in LISTS.get(name, (name,))]
    device = torch.device(args.device)
    try:
        schedule = Schedule(tuple(args.contexts), tuple(args.shares), args.tokens)
        config = ReformerConfig(
            dim=args.dim,
            heads=args.heads,
            layers=("local",) * args.depth,
            n_hashes=8,
            ff_chunk_size=16384,
            max_length=max(args.contexts),
        )
        tiny = replace(config, dim=2 * args.heads, ff_hidden=1)
        for arm in args.arms:
            build(arm, tiny)  # names its mistake before the first step
    except ValueError as error:
        parser.error(str(error))
    budget = clock.Budget(args.budget)
    least = max([*args.contexts, *args.also]) + 2
    train_part, validation_part = load(args.corpus, args.train_bytes, args.validation_bytes, least)
    parts = train_part.to(device), validation_part.to(device)
    folder = clock.Folder(args.out, "benchmarks.learning", device)
    arms: dict[str, Callable[[], Row]] = {}
    for seed in args.seeds:
        for lr in args.lr:
            recipe = Recipe(
                args.seconds, steps=args.steps, lr=lr, lr_other=args.lr_other, seed=seed
            )
            for arm in args.arms:
                contexts = "-".join(map(str, args.contexts))
                name = f"{arm.replace('+', '.')}_{contexts}_{args.seconds:g}s_lr{lr:g}_seed{seed}"
                arms[name] = partial(
                    run_arm, arm, name, config, recipe, schedule, parts, folder, args
                )
    complete = clock.run_arms(folder, arms, args.seconds, budget)
    text = table(folder.results())
    (args.out / "table.md").write_text(text)
    print(text, end="")
    if not complete:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
