"""Recall: what a small model finds again, in what it has read, and from how far.

python -m benchmarks.recall --out runs/recall --tasks mqar,needle --train-lengths 4096 \\
    --lengths 4096,16384,65536 --seconds 20
python -m benchmarks.recall --out runs/recall --tasks mqar+tracking+needle+copying --seconds 60

Tasks joined by + are trained together, one a step by turns: variable tracking, whose first hop is
associative recall, begins to learn much sooner so. An arm is one of benchmarks.learning; of LSH
arms there is one for each of --rounds. Every model is trained for so many seconds, at one length or
at some one after the other, and evaluated at each of --lengths, LSH and shared-QK arms with each of
--eval-rounds and, by the same weights, with exact attention over shared queries and keys: what LSH
approximates.

JSON, a model a file, and of each task and training length two grids: by length and rounds of the
evaluation, and by depth, hops or place at the rounds of training. A second call runs what is not
finished; --draw draws again what a folder holds. clock.py says how time is counted.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_ext.generate import autocast
from reformer_ext.nn import ReformerConfig, ReformerLM

from . import clock, pictures
from .clock import Recipe, Row
from .learning import Schedule, build
from .ops import comma_separated
from .plot import short

BLANK, ASK, NEEDLE, LET, START = range(5)
SPECIAL = 8  # keys follow, then values, then the filler, ``alphabet`` of each
IGNORED = -100
NEEDLES, NEEDLE_VALUE, HOPS = 8, 4, 4
PAIRS_END = 3 / 8  # of the length: what is asked for lies before, the questions after the middle


@dataclass(frozen=True)
class Sample:
    """``tokens (B, L)``; ``targets (B, L)``, what follows those that count, else -100; ``groups
    (B, L)``, the index of each such answer's name in :attr:`Task.groups`. All int64."""

    tokens: Tensor
    targets: Tensor
    groups: Tensor


@dataclass(frozen=True)
class Sizes:
    length: int
    batch: int
    alphabet: int

    @property
    def vocabulary(self) -> int:
        return SPECIAL + 3 * self.alphabet


class Draw:
    """Random numbers of one batch, on one device."""

    def __init__(self, sizes: Sizes, generator: torch.Generator) -> None:
        self.sizes, self.generator = sizes, generator
        self.device = generator.device

    def distinct(self, count: int, among: int) -> Tensor:
        """``(B, count)`` different numbers below ``among``, in random order."""
        noise = torch.rand(self.sizes.batch, among, generator=self.generator, device=self.device)
        return noise.argsort(1)[:, :count]

    def below(self, limit: int, *shape: int) -> Tensor:
        """``(B, *shape)`` numbers below the limit."""
        size = (self.sizes.batch, *shape)
        return torch.randint(limit, size, generator=self.generator, device=self.device)

    def keys(self, count: int) -> Tensor:
        return SPECIAL + self.distinct(count, self.sizes.alphabet)

    def values(self, *shape: int) -> Tensor:
        return SPECIAL + self.sizes.alphabet + self.below(self.sizes.alphabet, *shape)

    def filler(self) -> Tensor:
        """``(B, L)``, never a key or a value."""
        first = SPECIAL + 2 * self.sizes.alphabet
        return first + self.below(self.sizes.alphabet, self.sizes.length)

    def blank_answers(self) -> Tensor:
        return torch.full((self.sizes.batch, self.sizes.length), IGNORED, device=self.device)

    def slots(self, count: int, width: int, begin: int, end: int) -> Tensor:
        """``(B, count)`` places of ``width`` positions each between two positions, apart."""
        room = (end - begin) // width
        if count > room:
            raise ValueError(
                f"recall: expected room for {count} x {width} positions between {begin} and {end}; "
                "take a greater length"
            )
        return begin + width * self.distinct(count, room)


def mqar(sizes: Sizes, generator: torch.Generator) -> Sample:
    """Multi-query associative recall (Zoology, arXiv 2312.04927, section 3): pairs of a key and a
    value, and later every key again, once: its value is to be predicted.

    Keys differ within a sequence, values are any; keys and values are of halves of the vocabulary
    of their own. As in the paper's code the value does not follow the question. Other than there:
    pairs lie anywhere in the first three eighths, not packed at the start; questions anywhere in
    the second half (its power law of distances with exponent 1), so that none is nearer than an
    eighth of the length; and what lies between is of a third alphabet, so that it cannot contradict
    a pair. One pair in 16 positions, at most half of the keys.
    """
    draw = Draw(sizes, generator)
    length = sizes.length
    count = max(1, min(length // 16, sizes.alphabet // 2))
    keys, values = draw.keys(count), draw.values(count)
    tokens, targets = draw.filler(), draw.blank_answers()
    pairs = draw.slots(count, 2, 0, int(PAIRS_END * length))
    tokens.scatter_(1, pairs, keys).scatter_(1, pairs + 1, values)
    asked = draw.slots(count, 2, length // 2, length)
    tokens.scatter_(1, asked, keys).scatter_(1, asked + 1, BLANK)
    targets.scatter_(1, asked, values)
    return Sample(tokens, targets, torch.zeros_like(targets))


def needle(sizes: Sizes, generator: torch.Generator) -> Sample:
    """Needles in a haystack (RULER, arXiv 2404.06654, multi-key): eight of them, one in each eighth
    of the text, a marker, a key and a value of four symbols; at the end all keys are asked for in
    random order, each followed by its value. Groups are the depths."""
    draw = Draw(sizes, generator)
    width = 2 + NEEDLE_VALUE
    tail = NEEDLES * width
    text = sizes.length - tail
    if text < NEEDLES * width:
        raise ValueError(f"recall: expected a length of at least {2 * tail}, got {sizes.length}")
    keys, values = draw.keys(NEEDLES), draw.values(NEEDLES, NEEDLE_VALUE)
    borders = torch.arange(NEEDLES + 1, device=draw.device) * text // NEEDLES
    room = borders[1:] - borders[:-1] - width
    share = torch.rand(sizes.batch, NEEDLES, generator=generator, device=draw.device)
    places = borders[:-1] + (share * (room + 1)).long().clamp(max=room)
    tokens, targets = draw.filler(), draw.blank_answers()
    groups = torch.zeros_like(targets)
    order = draw.distinct(NEEDLES, NEEDLES)
    asked = text + width * order  # of each needle
    for at, marker in ((places, NEEDLE), (asked, ASK)):
        tokens.scatter_(1, at, marker).scatter_(1, at + 1, keys)
        for i in range(NEEDLE_VALUE):
            tokens.scatter_(1, at + 2 + i, values[..., i])
    depth = torch.arange(NEEDLES, device=draw.device).expand(sizes.batch, -1)
    for i in range(NEEDLE_VALUE):
        targets.scatter_(1, asked + 1 + i, values[..., i])
        groups.scatter_(1, asked + 1 + i, depth)
    return Sample(tokens, targets, groups)


def tracking(sizes: Sizes, generator: torch.Generator) -> Sample:
    """Variable tracking (RULER, arXiv 2404.06654, section 3.2: chains of assignments, scattered in
    order among others and noise). ``LET x1 v``, ``LET x2 x1`` ... in the first three eighths,
    chains of 1 to 4 assignments by turns; in the second half ``ASK x`` for every variable, in
    random order, whose value is to be predicted and does not follow. RULER asks for the names that
    have a value; here one answer takes all hops at once, whose number, 1 to 4, is the group."""
    draw = Draw(sizes, generator)
    length = sizes.length
    chains = max(HOPS, min(length // 64, sizes.alphabet // (2 * HOPS)))
    names = draw.keys(chains * HOPS).view(-1, chains, HOPS)
    values = draw.values(chains)
    sources = torch.cat([values[..., None], names[..., :-1]], dim=2)
    answers = values[..., None].expand_as(names)
    places = draw.slots(chains * HOPS, 3, 0, int(PAIRS_END * length))
    places = places.view(-1, chains, HOPS).sort(2).values
    hops = torch.arange(HOPS, device=draw.device).expand(chains, -1)
    there = hops <= torch.arange(chains, device=draw.device)[:, None] % HOPS
    names, sources, answers, places = (x[:, there] for x in (names, sources, answers, places))
    tokens, targets = draw.filler(), draw.blank_answers()
    tokens.scatter_(1, places, LET).scatter_(1, places + 1, names)
    tokens.scatter_(1, places + 2, sources)
    asked = draw.slots(names.shape[1], 3, length // 2, length)
    tokens.scatter_(1, asked, ASK).scatter_(1, asked + 1, names)
    tokens.scatter_(1, asked + 2, BLANK)
    targets.scatter_(1, asked + 1, answers)
    groups = hops[there].expand(sizes.batch, -1)
    return Sample(tokens, targets, torch.zeros_like(targets).scatter_(1, asked + 1, groups))


def copying(sizes: Sizes, generator: torch.Generator) -> Sample:
    """Duplication (Reformer, section 2, "Analysis on a synthetic task"): 0w0w, w of random symbols;
    all of the second w is to be predicted. Groups are the eighths of it."""
    draw = Draw(sizes, generator)
    half = sizes.length // 2
    word = draw.values(half - 1)
    marker = torch.full((sizes.batch, 1), START, device=draw.device)
    tokens = torch.cat([marker, word, marker, word], dim=1)
    targets, groups = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    targets[:, half:-1] = word
    groups[:, half:-1] = torch.arange(half - 1, device=draw.device) * 8 // (half - 1)
    if sizes.length % 2:
        pad = (0, 1)
        return Sample(F.pad(tokens, pad), F.pad(targets, pad, value=IGNORED), F.pad(groups, pad))
    return Sample(tokens, targets, groups)


EIGHTHS = tuple(f"{i}/8" for i in range(8))


@dataclass(frozen=True)
class Task:
    about: str
    make: Callable[[Sizes, torch.Generator], Sample]
    groups: tuple[str, ...]  # what the groups of answers are called
    grouped_by: str


TASKS = {
    "mqar": Task("multi-query associative recall", mqar, ("all",), ""),
    "needle": Task("needles", needle, EIGHTHS, "depth, of the length"),
    "tracking": Task("variable tracking", tracking, ("1", "2", "3", "4"), "hops"),
    "copying": Task("copying", copying, EIGHTHS, "place, of the copy"),
}


@torch.no_grad()
def right_answers(model: ReformerLM, sample: Sample, n_hashes: int | None) -> Tensor:
    """Of the answers that count, in order: bool ``(n,)``."""
    with autocast(sample.tokens.device):
        hidden = model.reformer(sample.tokens, n_hashes=n_hashes)[sample.targets != IGNORED]
        wanted = sample.targets[sample.targets != IGNORED]
        right = [
            F.linear(part, model.output_weight, model.output_bias).argmax(-1) == answer
            for part, answer in zip(hidden.split(8192), wanted.split(8192), strict=True)
        ]
    return torch.cat(right)


def accuracy(
    model: ReformerLM, task: Task, sizes: Sizes, count: int, n_hashes: int | None, seed: int
) -> Row:
    """Percent of the answers of ``count`` sequences, in all and by group."""
    device = next(model.parameters()).device
    right = torch.zeros(len(task.groups), dtype=torch.float64, device=device)
    total = torch.zeros_like(right)
    for index in range(-(-count // sizes.batch)):
        sample = task.make(sizes, clock.generator(device, seed, index))
        answers = right_answers(model, sample, n_hashes).double()
        groups = sample.groups[sample.targets != IGNORED]
        right.index_add_(0, groups, answers)
        total.index_add_(0, groups, torch.ones_like(answers))
    return {
        "all": 100 * (right.sum() / total.sum()).item(),
        "by_group": (100 * right / total).tolist(),
        "answers": int(total.sum().item()),
    }


def evaluated_as(arm: str, rounds: list[int]) -> dict[str, tuple[str, int | None]]:
    """By name, the ways to run the weights of an arm, its own among them: an arm and rounds."""
    base, *changes = arm.split("+")
    kept = [name for name in changes if not name.startswith("rounds-")]
    if base not in ("lsh", "shared"):
        return {"as trained": (arm, None)}
    lsh, shared = ("+".join([name, *kept]) for name in ("lsh", "shared"))
    trained = trained_as(arm)
    if trained != "exact":
        rounds = [*rounds, int(trained)]
    return {"exact": (shared, None)} | {str(n): (lsh, n) for n in sorted(set(rounds), reverse=True)}


def trained_as(arm: str) -> str:
    """The way of :func:`evaluated_as` that is the training's."""
    base, *changes = arm.split("+")
    if base == "lsh":
        rounds = [name for name in changes if name.startswith("rounds-")]
        return rounds[0].removeprefix("rounds-") if rounds else "8"
    return "exact" if base == "shared" else "as trained"


def run_cell(
    names: list[str],
    arm: str,
    name: str,
    config: ReformerConfig,
    recipe: Recipe,
    schedule: Schedule,
    folder: clock.Folder,
    args: argparse.Namespace,
) -> Row:
    """Trains one model on tasks by turns and evaluates it; its curve goes to the folder."""
    device = torch.device(args.device)
    tasks = [TASKS[task] for task in names]
    torch.manual_seed(recipe.seed)
    model = build(arm, config).to(device)
    row: Row = {
        "tasks": names,
        "arm": arm,
        "schedule": asdict(schedule),
        "alphabet": args.alphabet,
        "config": asdict(model.config),
        "recipe": asdict(recipe),
        "parameters": clock.parameters(model),
    }

    def batch(step: int, done: float) -> clock.Batch:
        task, length = tasks[step % len(tasks)], schedule.context(done)
        sizes = Sizes(length, schedule.tokens // length, args.alphabet)
        sample = task.make(sizes, clock.generator(device, recipe.seed, step))
        return sample.tokens, sample.targets

    def at_mark(trained: Row) -> None:
        folder.save(name, {**row, "trained": trained}, finished=False)
        print(f"  {trained['seconds']:5.0f} s {trained['steps']:6,} steps", flush=True)

    shapes = (batch(0, done) for done in schedule.beginnings())
    row["trained"] = clock.train(model, batch, recipe, shapes=shapes, at_mark=at_mark)
    weights = model.state_dict()
    row["accuracy"] = {task: {} for task in names}
    for way, (variant, n_hashes) in evaluated_as(arm, args.eval_rounds).items():
        twin = build(variant, config).to(device).eval()
        twin.load_state_dict(weights)
        for length in args.lengths:
            at_once = Sizes(length, max(1, args.eval_tokens // 4 // length), args.alphabet)
            count = max(1, args.eval_tokens // length)
            for task in names:
                try:
                    found = accuracy(twin, TASKS[task], at_once, count, n_hashes, -1 - recipe.seed)
                except torch.OutOfMemoryError:
                    found = {"skipped": "out of memory"}
                row["accuracy"][task].setdefault(str(length), {})[way] = found
        folder.save(name, row, finished=False)
    way = trained_as(arm)
    for task, by_length in row["accuracy"].items():
        figures = ", ".join(
            f"{length}: {figure(ways.get(way))}" for length, ways in by_length.items()
        )
        print(f"{name}: {task}, as trained, {figures}", flush=True)
    return row


def figure(found: Row | None) -> str:
    return "none" if found is None or "all" not in found else f"{found['all']:.1f}"


def draw(results: Mapping[str, Row], out: Path) -> list[Path]:
    """Two grids of every task and training length; the files without suffix."""
    cells: dict[tuple[str, tuple[int, ...]], list[Row]] = defaultdict(list)
    for row in results.values():
        for task in row.get("accuracy", {}):
            cells[task, tuple(row["schedule"]["contexts"])].append(row)
    made = []
    for (task, trained), rows in sorted(cells.items()):
        name = f"{task}_{'-'.join(map(str, trained))}"
        trained_at = f"trained at {', '.join(f'{length:,}' for length in trained)} positions"
        rows.sort(key=lambda row: row["arm"])
        labels = [f"{row['arm']}, {row['trained']['seconds']:.0f} s" for row in rows]
        lengths = sorted({at for row in rows for at in row["accuracy"][task]}, key=int)
        ways = sorted(
            {way for row in rows for found in row["accuracy"][task].values() for way in found},
            key=lambda way: -int(way) if way.isdigit() else -math.inf,
        )
        about = TASKS[task].about
        gpu = rows[0].get("gpu") or rows[0].get("cpu")
        caption = f"{gpu}, commit {str(rows[0]['commit'])[:12]}"

        def at(row: Row, length: str, way: str, task: str = task) -> Row:
            return row["accuracy"][task].get(length, {}).get(way, {})

        path = out / f"{name}_rounds"
        pictures.grid(
            path,
            f"{about}, {trained_at}: % right",
            labels,
            [f"{short(int(n))}\n{way}" for n in lengths for way in ways],
            [[at(row, n, way).get("all") for n in lengths for way in ways] for row in rows],
            column_label="evaluated: length, and rounds",
            caption=caption,
        )
        made.append(path)
        groups = TASKS[task].groups
        if len(groups) > 1:
            path = out / f"{name}_groups"
            pictures.grid(
                path,
                f"{about}, {trained_at}, evaluated as trained: % right",
                labels,
                [f"{short(int(n))}\n{group}" for n in lengths for group in groups],
                [
                    [
                        value
                        for n in lengths
                        for value in at(row, n, trained_as(row["arm"])).get(
                            "by_group", [None] * len(groups)
                        )
                    ]
                    for row in rows
                ],
                column_label=f"length, and {TASKS[task].grouped_by}",
                caption=caption,
            )
            made.append(path)
    return made


ARMS = "lsh,lsh+next+no-rotary,exact,exact+kv-far,shared+next+no-rotary,local"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tasks",
        type=comma_separated(str),
        default="mqar+tracking,needle,copying",
        help="joined by +: together",
    )
    parser.add_argument("--arms", type=comma_separated(str), default=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/recall"))
    parser.add_argument(
        "--train-lengths", type=comma_separated(int), default="4096", help="one after the other"
    )
    parser.add_argument(
        "--shares", type=comma_separated(float), default="1.0", help="of the run, a length each"
    )
    parser.add_argument("--lengths", type=comma_separated(int), default="4096,16384,65536,262144")
    parser.add_argument("--rounds", type=comma_separated(int), default="8", help="to train with")
    parser.add_argument("--eval-rounds", type=comma_separated(int), default="8,4,2,1")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, each model")
    parser.add_argument("--steps", type=int, default=0, help="at most so many (default: no limit)")
    parser.add_argument("--tokens", type=int, default=65536, help="a step")
    parser.add_argument("--eval-tokens", type=int, default=262144, help="each length and way")
    parser.add_argument("--alphabet", type=int, default=1024, help="of keys, values and filler")
    parser.add_argument("--lr", type=float, default=0.01, help="of Muon")
    parser.add_argument("--lr-other", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--seeds", type=comma_separated(int), default="0")
    for name, default in {"dim": 256, "heads": 4, "depth": 4, "chunk-size": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds of this call")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=best)
    parser.add_argument("--draw", action="store_true", help="only draw what the folder holds")
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    device = torch.device(args.device)
    budget = clock.Budget(args.budget)
    folder = clock.Folder(args.out, "benchmarks.recall", device)
    if args.draw:
        print(*draw(folder.results(), args.out), sep="\n")
        return
    together = [text.split("+") for text in args.tasks]
    unknown = {task for names in together for task in names} - set(TASKS)
    if unknown:
        parser.error(f"expected tasks among {', '.join(TASKS)}, got {sorted(unknown)}")
    config = ReformerConfig(
        vocab_size=Sizes(1, 1, args.alphabet).vocabulary,
        dim=args.dim,
        heads=args.heads,
        layers=("local",) * args.depth,
        chunk_size=args.chunk_size,
        local_chunk_size=args.chunk_size,
        initializer_range=0.05,
        ff_chunk_size=16384,
    )
    arms = []
    for arm in args.arms:
        rounds = args.rounds if arm.split("+")[0] == "lsh" and "+rounds-" not in arm else [0]
        arms += [f"{arm}+rounds-{n}" if n else arm for n in rounds]
    cells: dict[str, Callable[[], Row]] = {}
    try:
        for arm in arms:
            for variant, _ in evaluated_as(arm, args.eval_rounds).values():
                build(variant, replace(config, dim=2 * args.heads, ff_hidden=1))
            build(arm, replace(config, dim=2 * args.heads, ff_hidden=1))
        sample = torch.Generator(device)
        schedule = Schedule(tuple(args.train_lengths), tuple(args.shares), args.tokens)
        for length in (*args.train_lengths, *args.lengths):
            for task in {task for names in together for task in names}:
                TASKS[task].make(Sizes(length, 1, args.alphabet), sample)
    except ValueError as error:
        parser.error(str(error))
    for seed in args.seeds:
        recipe = Recipe(
            args.seconds, steps=args.steps, lr=args.lr, lr_other=args.lr_other, seed=seed
        )
        for names in together:
            for arm in arms:
                lengths = "-".join(map(str, args.train_lengths))
                name = f"{'.'.join(names)}_{lengths}_{arm.replace('+', '.')}"
                name = f"{name}_{args.seconds:g}s_seed{seed}"
                cells[name] = partial(
                    run_cell, names, arm, name, config, recipe, schedule, folder, args
                )
    complete = clock.run_arms(folder, cells, args.seconds, budget)
    print(*draw(folder.results(), args.out), sep="\n")
    if not complete:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
