"""The main job: a byte-level ReformerLM trained on files, resumable at any step.

Everything random in step n follows from (seed, n) and every schedule from n, so a run that was
killed and resumed goes through the same losses as one that was not: on one machine and, on a CPU,
with one number of threads, bit for bit. The checkpoint holds that number; resuming with another one
says so, and is as good but not the same (torch adds up some gradients thread by thread).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import naming
from .data import Corpus, load_corpus, sample_batch, step_seed
from .generate import autocast, generate
from .nn import ReformerConfig, ReformerLM
from .optim import learning_rate_factor
from .plots import draw_losses, why_no_drawing
from .recipe import Recipe, default_recipe
from .runs import Interruptions, Run, TrainError, build, locked, restore
from .terminal import Progress, clock, device_name, readable, shown

__all__ = ["Recipe", "TrainError", "default_recipe", "evaluate", "train", "yardsticks"]

EXIT_INTERRUPTED = 130
_PROMPT_BYTES = 64
_SAMPLE_BYTES = 400
_PROBE_BYTES = 1024  # held-out bytes that a model predicts before it is saved
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
        0, or 130 after SIGINT, SIGTERM or SIGHUP, or once nobody reads the progress any more (the
        step is finished and a checkpoint written).

    Raises:
        TrainError, CorpusError, CheckpointError, ValueError, OSError: with a message for the user.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: expected at least 1, got {checkpoint_every}")
    checkpoint = out / "checkpoint.pt"
    with locked(out):
        if checkpoint.exists() and not (resume or overwrite):
            raise TrainError(
                f"train: {shown(checkpoint)} is another run's; --resume goes on with it, "
                "--overwrite replaces it, --out names another folder"
            )
        if resume and checkpoint.exists():
            run = restore(checkpoint, paths, options or {}, device)
            print(
                f"resumed from {shown(checkpoint)} at step {run.step:,} of {run.recipe.steps:,}",
                flush=True,
            )
        else:
            run = _start(paths, options or {}, device)
        if not _go_on(run, out, device, checkpoint_every):
            with contextlib.suppress(OSError):  # nobody may be there to read it
                print(
                    f"interrupted: {shown(checkpoint)} holds step {run.step:,}; --resume goes on",
                    flush=True,
                )
            return EXIT_INTERRUPTED
        _finish(run, out)
    return 0


def _go_on(run: Run, out: Path, device: torch.device, checkpoint_every: int) -> bool:
    """Trains and saves, to the end or until interrupted: whether it is the end."""
    checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
    recipe, model = run.recipe, run.model
    print(run.corpus.describe(), flush=True)
    print(
        f"{' '.join(run.model.config.kinds)}, dim {run.model.config.dim}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, on {device_name(device)}; "
        f"{_describe(recipe)} bytes",
        flush=True,  # before the progress on the standard error
    )
    log.write_text("".join(json.dumps(line) + "\n" for line in run.history))
    if run.step == 0:
        for name in ("loss.png", "sample.txt"):
            (out / name).unlink(missing_ok=True)
        run.save(checkpoint)

    last_saved = run.step
    with Interruptions() as interrupted, naming(log), open(log, "a") as log_file:
        progress = Progress(recipe.steps, device)
        while run.step < recipe.steps and not interrupted:
            started = time.perf_counter()
            record: dict[str, float] = {"step": run.step + 1, "loss": _step(run, device)}
            if recipe.schedule:
                record["context"] = recipe.at(run.step)[1]
            _check_finite("loss", record["loss"], run.step + 1, last_saved)
            run.step += 1
            if run.step % recipe.eval_every == 0:
                record["held_out"] = evaluate(
                    model, run.corpus.held_out, recipe.context, recipe.batch, _QUICK_EVALUATION
                )
                _check_finite("held-out loss", record["held_out"], run.step, last_saved)
            elapsed = time.perf_counter() - started
            run.seconds += elapsed
            run.history.append(record)
            log_file.write(json.dumps(record) + "\n")
            log_file.flush()
            try:
                progress.update(record, recipe.batch * recipe.context, elapsed)
            except OSError:  # the reader is gone, or the terminal
                interrupted.came = True
            if run.step % checkpoint_every == 0:
                _save(run, checkpoint, last_saved)
                last_saved = run.step
        if run.step != last_saved:
            _save(run, checkpoint, last_saved)
        with contextlib.suppress(OSError):
            progress.close()
    return run.step == recipe.steps


def _save(run: Run, checkpoint: Path, last_saved: int) -> None:
    """Unless the model has diverged, with weights that may be finite still."""
    some = run.corpus.held_out[: _PROBE_BYTES + 1]
    bits = evaluate(run.model, some, min(run.recipe.context, _PROBE_BYTES), 1)
    _check_finite("held-out loss", bits, run.step, last_saved)
    run.save(checkpoint)


def _check_finite(name: str, value: float, step: int, last_saved: int) -> None:
    if not math.isfinite(value):
        raise TrainError(
            f"train: the {name} is {value} at step {step}; the checkpoint of step {last_saved} is "
            "kept; start again with a lower --lr"
        )


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
    config = ReformerConfig(**{"max_length": recipe.longest, **config_fields})
    corpus = load_corpus(paths)
    _check_sizes(corpus, recipe)
    torch.manual_seed(step_seed(recipe.seed, -1))
    model = ReformerLM(config)
    return build(model, recipe, [str(path.absolute()) for path in paths], corpus, device)


def _describe(recipe: Recipe) -> str:
    parts = [f"{steps:,} of {batch} x {context:,}" for steps, batch, context in recipe.stages()]
    if len(parts) == 1:
        return f"{recipe.steps:,} steps of {recipe.batch} x {recipe.context:,}"
    return f"{recipe.steps:,} steps, {', then '.join(parts)}"


def _check_sizes(corpus: Corpus, recipe: Recipe) -> None:
    if len(corpus.train) <= recipe.longest:
        raise TrainError(
            f"train: expected more than --context = {recipe.longest:,} bytes to train on, got "
            f"{len(corpus.train):,} ({corpus.name}); name more files or lower --context"
        )


def _step(run: Run, device: torch.device) -> float:
    """One optimiser step; the loss in bits per byte."""
    recipe = run.recipe
    torch.manual_seed(step_seed(recipe.seed, run.step))  # dropout
    batch, context = recipe.at(run.step)
    tokens = sample_batch(run.corpus.train, batch, context, recipe.seed, run.step).to(device)
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
    """Evaluation on all held-out bytes, the picture and the sample: first written, then told."""
    recipe = run.recipe
    held_out = bytes(run.corpus.held_out.tolist())
    bits = evaluate(run.model, run.corpus.held_out, recipe.context, recipe.batch)
    others = yardsticks(held_out)
    result = {"step": run.step, "held_out_all": bits, "seconds": run.seconds, **others}
    with naming(out / "log.jsonl"), open(out / "log.jsonl", "a") as log_file:
        log_file.write(json.dumps(result) + "\n")
    prompt = held_out[:_PROMPT_BYTES]
    run.model.eval()
    text = b"".join(generate(run.model, prompt, _SAMPLE_BYTES))
    with naming(out / "sample.txt"):
        (out / "sample.txt").write_bytes(prompt + text)
    names = ["checkpoint.pt", "log.jsonl", "sample.txt"]
    no_drawing = why_no_drawing()
    if not no_drawing:
        title = f"Reformer on the bytes of {run.corpus.name}"
        draw_losses(title, run.history, {"all held out": bits, **others}, out / "loss.png")
        names.append("loss.png")

    total = recipe.steps * recipe.batch * recipe.context
    print(f"trained on {total:,} bytes in {clock(run.seconds)}")
    print(
        f"held-out: {bits:.3f} bits per byte "
        f"({', '.join(f'{name} {value:.3f}' for name, value in others.items())})"
    )
    if no_drawing:
        print(f"loss.png not drawn: matplotlib {no_drawing}; after that, --resume draws it")
    print(f"sample, after the first {len(prompt)} held-out bytes and a |:")
    sample = f"{prompt.decode(errors='replace')}|{text.decode(errors='replace')}"
    if sys.stdout is not None and sys.stdout.isatty():
        sample = readable(sample)
    print(textwrap.indent(sample, "    ", lambda line: True))
    print(f"in {shown(out)}: {', '.join(names)}; for more of the like:")
    print(f"  reformer generate --checkpoint {shlex.quote(shown(out / 'checkpoint.pt'))}")
