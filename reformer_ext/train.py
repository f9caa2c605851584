"""The main job: a byte-level ReformerLM trained on files, resumable at any step.

Everything random in step n follows from (seed, n) and every schedule from n, so a run that was
killed and resumed goes through the same losses as one that was not: on one machine, bit for bit.
"""

from __future__ import annotations

import gzip
import json
import math
import shlex
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Corpus, load_corpus, sample_batch, step_seed
from .generate import autocast, generate
from .nn import ReformerConfig, ReformerLM
from .optim import learning_rate_factor
from .plots import draw_losses
from .recipe import Recipe, default_recipe
from .runs import Interruptions, Run, TrainError, build, restore
from .terminal import Progress, clock, device_name

__all__ = ["Recipe", "TrainError", "default_recipe", "evaluate", "train", "yardsticks"]

EXIT_INTERRUPTED = 130
_PROMPT_BYTES = 64
_SAMPLE_BYTES = 400
_QUICK_EVALUATION = 1 << 16  # held-out bytes evaluated during training; all of them at the end


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
        run = restore(checkpoint, paths, options or {}, device)
        print(f"resumed from {checkpoint} at step {run.step:,} of {run.recipe.steps:,}", flush=True)
    else:
        run = _start(paths, options or {}, device)
    recipe, model = run.recipe, run.model
    print(run.corpus.describe(), flush=True)
    print(
        f"{' '.join(run.model.config.layers)}, dim {run.model.config.dim}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, on {device_name(device)}; "
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
    with Interruptions() as interrupted, open(log, "a") as log_file:
        progress = Progress(recipe.steps, device)
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


def _start(paths: Sequence[Path], options: dict[str, Any], device: torch.device) -> Run:
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
    return build(model, recipe, [str(path.absolute()) for path in paths], corpus, device)


def _check_sizes(corpus: Corpus, recipe: Recipe) -> None:
    if len(corpus.train) <= recipe.context:
        raise TrainError(
            f"train: expected more than --context = {recipe.context:,} bytes to train on, got "
            f"{len(corpus.train):,} ({corpus.name}); name more files or lower --context"
        )


def _step(run: Run, device: torch.device) -> float:
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


def _finish(run: Run, out: Path) -> None:
    """Evaluation on all held-out bytes, the picture and the sample."""
    recipe = run.recipe
    held_out = bytes(run.corpus.held_out.tolist())
    bits = evaluate(run.model, run.corpus.held_out, recipe.context, recipe.batch)
    others = yardsticks(held_out)
    with open(out / "log.jsonl", "a") as log_file:
        result = {"step": run.step, "held_out_all": bits, "seconds": run.seconds, **others}
        log_file.write(json.dumps(result) + "\n")
    total = recipe.steps * recipe.batch * recipe.context
    print(f"trained on {total:,} bytes in {clock(run.seconds)}")
    print(
        f"held-out: {bits:.3f} bits per byte "
        f"({', '.join(f'{name} {value:.3f}' for name, value in others.items())})"
    )
    names = ["checkpoint.pt", "log.jsonl", "sample.txt"]
    try:
        title = f"Reformer on the bytes of {run.corpus.name}"
        draw_losses(title, run.history, {"all held out": bits, **others}, out / "loss.png")
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
