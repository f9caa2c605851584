"""The main job: a byte-level ReformerLM trained on files, resumable at any step.

Everything random in step n follows from (seed, n) and every schedule from n, so a run that was
killed and resumed goes through the same losses as one that was not: on one machine, bit for bit.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CheckpointError, load_checkpoint, model_of, save_checkpoint
from .data import Corpus, load_corpus, sample_batch, step_seed
from .generate import autocast, generate
from .nn import ReformerConfig, ReformerLM
from .optim import Muon, learning_rate_factor, split_parameters

__all__ = ["Recipe", "TrainError", "default_recipe", "evaluate", "train", "yardsticks"]

EXIT_INTERRUPTED = 130
_PROMPT_BYTES = 64
_SAMPLE_BYTES = 400
_QUICK_EVALUATION = 1 << 16  # held-out bytes evaluated during training; all of them at the end


class TrainError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. All fields are part of a run: resuming keeps them.

    Attributes:
        steps: optimiser steps.
        batch: sequences per step.
        context: bytes per sequence.
        lr: of the weight matrices (Muon); linear warm-up, then linear decay to zero.
        lr_other: of embeddings, biases and norms (AdamW), same schedule.
        warmup: steps.
        weight_decay: of the weight matrices.
        seed: of initial weights, data and dropout.
        eval_every: steps between evaluations on a part of the held-out bytes.
    """

    steps: int
    batch: int
    context: int
    lr: float = 0.01
    lr_other: float = 0.003
    warmup: int = 20
    weight_decay: float = 0.01
    seed: int = 0
    eval_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "lr_other", "warmup", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")


def default_recipe(device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the ReformerConfig and of the Recipe for a device.

    A GPU: 65,536 bytes of context, minutes on an H100. A CPU: a few minutes on two cores.
    """
    if device.type == "cuda":
        return (
            {"dim": 512, "heads": 8, "layers": ("local", "lsh") * 4, "n_hashes": 8},
            {"steps": 600, "batch": 1, "context": 65536, "warmup": 30, "eval_every": 50},
        )
    return (
        {
            "dim": 128,
            "heads": 4,
            "layers": ("local", "lsh") * 2,
            "n_hashes": 2,
            "chunk_size": 32,
            "initializer_range": 0.05,
        },
        {"steps": 1000, "batch": 4, "context": 512},
    )


@dataclass
class _Run:
    """The state of a run: all that a checkpoint holds."""

    recipe: Recipe
    paths: list[str]
    corpus: Corpus
    model: ReformerLM
    optimizers: list[torch.optim.Optimizer]
    step: int
    seconds: float
    history: list[dict[str, float]]  # the lines of log.jsonl

    def save(self, path: Path) -> None:
        save_checkpoint(
            path,
            {
                "config": dataclasses.asdict(self.model.config),
                "recipe": dataclasses.asdict(self.recipe),
                "paths": self.paths,
                "corpus": self.corpus.fingerprint,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
                "history": self.history,
            },
        )


def train(
    paths: Sequence[Path],
    out: Path,
    *,
    device: torch.device,
    options: dict[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int = 50,
) -> int:
    """Trains and leaves checkpoint.pt, log.jsonl, loss.png and sample.txt in ``out``.

    Args:
        paths: files and folders; none: the Python standard library.
        out: folder of the run, made if absent.
        device: where to train.
        options: fields of ReformerConfig and Recipe that differ from the device's defaults.
        resume: go on from the checkpoint in ``out``, if there is one.
        overwrite: replace the run in ``out``.
        checkpoint_every: steps between checkpoints.

    Returns:
        0, or 130 after SIGINT or SIGTERM (the step is finished and a checkpoint written).

    Raises:
        TrainError, CorpusError, CheckpointError, ValueError: with a message for the user.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: expected at least 1, got {checkpoint_every}")
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not (resume or overwrite):
        raise TrainError(
            f"train: {checkpoint} is another run's; --resume goes on with it, --overwrite replaces "
            "it, --out names another folder"
        )
    if resume and checkpoint.exists():
        run = _restore(checkpoint, paths, options or {}, device)
        print(f"resumed from {checkpoint} at step {run.step:,} of {run.recipe.steps:,}", flush=True)
    else:
        run = _start(paths, options or {}, device)
    recipe, model = run.recipe, run.model
    print(run.corpus.describe(), flush=True)
    print(
        f"{' '.join(run.model.config.layers)}, dim {run.model.config.dim}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, on {_name(device)}; "
        f"{recipe.steps:,} steps of {recipe.batch} x {recipe.context:,} bytes",
        flush=True,  # before the progress on the standard error
    )
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in run.history))
    if run.step == 0:
        for name in ("loss.png", "sample.txt"):
            (out / name).unlink(missing_ok=True)
        run.save(checkpoint)

    last_saved = run.step
    with _Interruptions() as interrupted, open(log, "a") as log_file:
        progress = _Progress(recipe.steps, device)
        while run.step < recipe.steps and not interrupted:
            started = time.perf_counter()
            record: dict[str, float] = {"step": run.step + 1, "loss": _step(run, device)}
            if not math.isfinite(record["loss"]):
                raise TrainError(
                    f"train: the loss is {record['loss']} at step {run.step + 1}; the checkpoint "
                    f"of step {last_saved} is kept; start again with a lower --lr"
                )
            run.step += 1
            if run.step % recipe.eval_every == 0:
                record["held_out"] = evaluate(
                    model, run.corpus.held_out, recipe.context, recipe.batch, _QUICK_EVALUATION
                )
            elapsed = time.perf_counter() - started
            run.seconds += elapsed
            run.history.append(record)
            log_file.write(json.dumps(record) + "\n")
            log_file.flush()
            progress.update(record, recipe.batch * recipe.context, elapsed)
            if run.step % checkpoint_every == 0:
                run.save(checkpoint)
                last_saved = run.step
        if run.step != last_saved:
            run.save(checkpoint)
        progress.close()
    if run.step < recipe.steps:
        print(f"interrupted: {checkpoint} holds step {run.step:,}; --resume goes on")
        return EXIT_INTERRUPTED
    _finish(run, out)
    return 0


def evaluate(
    model: ReformerLM, data: Tensor, context: int, batch: int, max_bytes: int | None = None
) -> float:
    """Bits per byte of ``data``, uint8 ``(n,)``, in windows of ``context`` bytes side by side.

    Each byte but the first is predicted once, from those before it in its window. With
    ``max_bytes``, only as many evenly spaced windows as make about that. Touches neither the
    model's mode nor the training's random numbers.
    """
    starts = list(range(0, len(data) - 1, context))
    if max_bytes is not None and len(starts) * context > max_bytes:
        count = max(max_bytes // context, 1)
        starts = [starts[i * len(starts) // count] for i in range(count)]
    whole = [s for s in starts if s + context < len(data)]
    groups = [whole[i : i + batch] for i in range(0, len(whole), batch)]
    groups += [[s] for s in starts[len(whole) :]]  # at most one: the last, shorter
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    nats, count = 0.0, 0
    with torch.inference_mode(), autocast(device):
        for group in groups:
            windows = torch.stack([data[s : s + context + 1] for s in group]).to(device).long()
            nats += model.loss(windows[:, :-1], windows[:, 1:], "sum").item()
            count += windows[:, 1:].numel()
    model.train(training)
    return nats / count / math.log(2)


def yardsticks(data: bytes) -> dict[str, float]:
    """Bits per byte of ``data`` under general compressors at their highest level."""
    sizes = {"gzip -9": len(gzip.compress(data, 9))}
    try:
        import lzma
    except ImportError:  # a Python built without liblzma
        pass
    else:
        sizes["xz -9"] = len(lzma.compress(data, preset=9))
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def _start(paths: Sequence[Path], options: dict[str, Any], device: torch.device) -> _Run:
    config_fields, recipe_fields = default_recipe(device)
    for name, value in options.items():
        fields = recipe_fields if name in Recipe.__dataclass_fields__ else config_fields
        fields[name] = value
    recipe = Recipe(**recipe_fields)
    config = ReformerConfig(**{"max_length": recipe.context, **config_fields})
    corpus = load_corpus(paths)
    _check_sizes(corpus, recipe)
    torch.manual_seed(step_seed(recipe.seed, -1))
    model = ReformerLM(config)
    return _build(model, recipe, [str(path.absolute()) for path in paths], corpus, device)


def _restore(
    checkpoint: Path, paths: Sequence[Path], options: dict[str, Any], device: torch.device
) -> _Run:
    state = load_checkpoint(checkpoint)
    try:
        model = model_of(state, checkpoint)
        recipe = Recipe(**state["recipe"])
        stored = {**state["config"], **state["recipe"]}
        for name, value in options.items():
            if stored[name] != value:
                raise TrainError(
                    f"train: --resume keeps {name} = {stored[name]}, got {value}; leave it out, or "
                    "start another run"
                )
        corpus = load_corpus(paths or [Path(path) for path in state["paths"]])
        if corpus.fingerprint != state["corpus"]:
            raise TrainError(
                f"train: the files ({corpus.name}) are not those that {checkpoint} was trained on; "
                "start another run"
            )
        run = _build(model, recipe, state["paths"], corpus, device)
        for optimizer, optimizer_state in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        run.step, run.seconds, run.history = state["step"], state["seconds"], state["history"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint: {checkpoint} does not fit this version: {error}"
        ) from error
    return run


def _build(
    model: ReformerLM, recipe: Recipe, paths: list[str], corpus: Corpus, device: torch.device
) -> _Run:
    model = model.to(device).train()
    matrices, others = split_parameters(model, model.head)
    return _Run(
        recipe=recipe,
        paths=paths,
        corpus=corpus,
        model=model,
        optimizers=[
            Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(
                others, lr=recipe.lr_other, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            ),
        ],
        step=0,
        seconds=0.0,
        history=[],
    )


def _check_sizes(corpus: Corpus, recipe: Recipe) -> None:
    if len(corpus.train) <= recipe.context:
        raise TrainError(
            f"train: expected more than --context = {recipe.context:,} bytes to train on, got "
            f"{len(corpus.train):,} ({corpus.name}); name more files or lower --context"
        )


def _step(run: _Run, device: torch.device) -> float:
    """One optimiser step; the loss in bits per byte."""
    recipe = run.recipe
    torch.manual_seed(step_seed(recipe.seed, run.step))  # dropout
    data = run.corpus.train
    tokens = sample_batch(data, recipe.batch, recipe.context, recipe.seed, run.step).to(device)
    with autocast(device):
        loss = run.model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()  # type: ignore[no-untyped-call]
    factor = learning_rate_factor(run.step, recipe.steps, recipe.warmup)
    for optimizer, lr in zip(run.optimizers, (recipe.lr, recipe.lr_other), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad()
    return loss.item() / math.log(2)


def _finish(run: _Run, out: Path) -> None:
    """Evaluation on all held-out bytes, the picture and the sample."""
    recipe = run.recipe
    held_out = bytes(run.corpus.held_out.tolist())
    bits = evaluate(run.model, run.corpus.held_out, recipe.context, recipe.batch)
    others = yardsticks(held_out)
    with open(out / "log.jsonl", "a") as log_file:
        result = {"step": run.step, "held_out_all": bits, "seconds": run.seconds, **others}
        log_file.write(json.dumps(result) + "\n")
    total = recipe.steps * recipe.batch * recipe.context
    print(f"trained on {total:,} bytes in {_clock(run.seconds)}")
    print(
        f"held-out: {bits:.3f} bits per byte "
        f"({', '.join(f'{name} {value:.3f}' for name, value in others.items())})"
    )
    names = ["checkpoint.pt", "log.jsonl", "sample.txt"]
    try:
        title = f"Reformer on the bytes of {run.corpus.name}"
        _plot(title, run.history, {"all held out": bits, **others}, out / "loss.png")
        names.append("loss.png")
    except ImportError:
        print("loss.png not drawn: matplotlib is absent (pip install matplotlib; then --resume)")

    prompt = held_out[:_PROMPT_BYTES]
    run.model.eval()
    text = b"".join(generate(run.model, prompt, _SAMPLE_BYTES))
    (out / "sample.txt").write_bytes(prompt + text)
    print(f"sample, after the first {len(prompt)} held-out bytes and a |:")
    shown = f"{prompt.decode(errors='replace')}|{text.decode(errors='replace')}"
    print(textwrap.indent(shown, "    ", lambda line: True))
    print(f"in {out}: {', '.join(names)}; for more of the like:")
    print(f"  reformer generate --checkpoint {shlex.quote(str(out / 'checkpoint.pt'))}")


def _plot(title: str, history: list[dict[str, float]], lines: dict[str, float], path: Path) -> None:
    """Loss by step, and the final held-out results as lines. ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in history]
    losses = [line["loss"] for line in history]
    width = max(len(losses) // 50, 1)
    windows = [losses[max(i - width, 0) : i + width + 1] for i in range(len(losses))]
    smooth = [sum(window) / len(window) for window in windows]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte", title=title)
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
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


class _Progress:
    """A bar on a terminal; elsewhere a line per evaluation."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = steps
        self.device = device
        self.terminal = sys.stderr.isatty()
        self.loss: float | None = None
        self.rate: float | None = None  # tokens per second
        self.held_out = ""

    def update(self, record: dict[str, float], tokens: int, seconds: float) -> None:
        loss, rate = record["loss"], tokens / seconds
        # Means over some 20 steps.
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self.rate = rate if self.rate is None else 0.95 * self.rate + 0.05 * rate
        if "held_out" in record:
            self.held_out = f", held-out {record['held_out']:.3f}"
        step = int(record["step"])
        line = (
            f"{step:,}/{self.steps:,}  {self.loss:.3f} bits/byte{self.held_out}  "
            f"{self.rate:,.0f} tokens/s  {_memory(self.device)}  "
            f"{_clock((self.steps - step) * tokens / self.rate)} left"
        )
        if self.terminal:
            filled = 20 * step // self.steps
            bar = "#" * filled + "." * (20 - filled)
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{f'[{bar}] {line}':<{width}.{width}}", end="", file=sys.stderr, flush=True)
        elif "held_out" in record or step == self.steps:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _memory(device: torch.device) -> str:
    """The peak so far: of the GPU's allocator, else of the process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / 2**30 if sys.platform == 'darwin' else peak / 2**20:.1f} GiB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class _Interruptions:
    """True once SIGINT or SIGTERM has come; a second one then acts as usual."""

    def __init__(self) -> None:
        self.came = False
        self.previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.came

    def __enter__(self) -> _Interruptions:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self.__exit__()
