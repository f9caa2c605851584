"""Training by the clock: one loop, one kind of result, for the benchmarks of what models learn.

An arm is trained for so many seconds of wall time, evaluation not counted, on the data that its
step numbers say, whatever the arm. Its result is a JSON file of its own, written anew at every mark
and once more at the end, with ``finished: true``: what was killed leaves what it had, and a second
call with the same folder runs the arms that are not finished.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reformer_ext.data import step_seed
from reformer_ext.generate import autocast
from reformer_ext.nn import ReformerLM
from reformer_ext.optim import Muon, split_parameters

from . import measure

Batch = tuple[Tensor, Tensor]  # tokens and targets, int64 (B, L); -100 does not count
Row = dict[str, Any]


BESIDE = 15.0  # seconds of an arm beside its training, as long as none has shown that it takes more


@dataclass(frozen=True)
class Recipe:
    """How an arm is trained.

    Attributes:
        seconds: of wall time.
        steps: stop after so many, if that comes first; 0: by the clock alone.
        lr: of the weight matrices (Muon), or of all parameters without it.
        lr_other: of embeddings, norms and the rest (AdamW).
        muon: for the weight matrices; else AdamW for all.
        betas: of AdamW.
        weight_decay: of the weight matrices, without Muon of all parameters.
        warmup: steps of linear warm-up.
        decay: the share of the run, at its end, over which rates fall to zero.
        seed: of initial weights and data.
    """

    seconds: float
    steps: int = 0
    lr: float = 5e-3
    lr_other: float = 1e-3
    muon: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 100
    decay: float = 0.7
    seed: int = 0

    def optimizers(self, model: ReformerLM) -> list[tuple[torch.optim.Optimizer, float]]:
        """Each with its learning rate."""
        options: Row = {"betas": self.betas, "fused": True}
        if not self.muon:
            decay = {"weight_decay": self.weight_decay}
            return [
                (torch.optim.AdamW(model.parameters(), lr=self.lr, **decay, **options), self.lr)
            ]
        matrices, others = split_parameters(model, model.head)
        return [
            (Muon(matrices, lr=self.lr, weight_decay=self.weight_decay), self.lr),
            (
                torch.optim.AdamW(others, lr=self.lr_other, weight_decay=0.0, **options),
                self.lr_other,
            ),
        ]

    def factor(self, step: int, done: float) -> float:
        """Of the learning rates at a step, when this share of the run is done."""
        return min(1.0, (step + 1) / self.warmup) * min(1.0, (1 - done) / self.decay)


def train(
    model: ReformerLM,
    batch: Callable[[int, float], Batch],
    recipe: Recipe,
    *,
    shapes: Iterator[Batch] | None = None,
    at_mark: Callable[[Row], None] | None = None,
    marks: int = 4,
    log_every: int = 50,
) -> Row:
    """Trains and returns steps, tokens, seconds, tokens/s, peak GiB and the curve of the loss.

    Args:
        batch: the data of a step, by its number and the share of the run that is done.
        shapes: batches whose gradients are computed once before the clock starts and thrown away,
            so that no arm pays for the loading of kernels; default: the first batch.
        at_mark: called after each of ``marks`` equal parts of the run but the last, with what has
            come so far, in evaluation mode; its time does not count.
        log_every: steps between points of the curve.
    """
    device = next(model.parameters()).device
    model.train()
    step_count = model.reformer.hash_step.clone()
    for tokens, targets in [batch(0, 0.0)] if shapes is None else shapes:
        _gradients(model, tokens, targets)
    model.zero_grad()
    model.reformer.hash_step.copy_(step_count)
    optimizers = recipe.optimizers(model)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    result: Row = {"steps": 0, "tokens": 0, "seconds": 0.0, "curve": []}
    begin, paused, marked, loss = time.perf_counter(), 0.0, 0, None
    while True:
        seconds = time.perf_counter() - begin - paused
        step = result["steps"]
        done = max(seconds / recipe.seconds, step / recipe.steps if recipe.steps else 0.0)
        if done >= 1:
            break
        if loss is not None and step % log_every == 0:
            result["curve"].append([step, round(seconds, 2), loss.item() / math.log(2)])
            if not math.isfinite(result["curve"][-1][-1]):
                result["diverged"] = True
                break
        if at_mark is not None and done * marks >= marked + 1:
            marked = int(done * marks)
            _synchronize(device)
            pause = time.perf_counter()
            result["seconds"] = pause - begin - paused
            model.eval()
            at_mark(_rates(result, device))
            model.train()
            _synchronize(device)
            paused += time.perf_counter() - pause
        factor = recipe.factor(step, done)
        tokens, targets = batch(step, done)
        loss = _gradients(model, tokens, targets)
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        result["steps"] += 1
        result["tokens"] += tokens.numel()
    _synchronize(device)
    result["seconds"] = time.perf_counter() - begin - paused
    model.eval()
    return _rates(result, device)


def _gradients(model: ReformerLM, tokens: Tensor, targets: Tensor) -> Tensor:
    with autocast(tokens.device):
        loss = model.loss(tokens, targets)
    loss.backward()
    return loss.detach()


def _rates(result: Row, device: torch.device) -> Row:
    result["tokens_per_s"] = result["tokens"] / max(result["seconds"], 1e-9)
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def generator(device: torch.device, *numbers: int) -> torch.Generator:
    """Of what is random in one step: the same for every arm."""
    seed = 0
    for number in numbers:
        seed = step_seed(seed, number)
    return torch.Generator(device).manual_seed(seed)


class Folder:
    """Where the results of a benchmark go, an arm a file. ``timed``: by measure.py."""

    def __init__(self, path: Path, module: str, device: torch.device, timed: bool = False) -> None:
        self.path = path
        self.environment = measure.environment(device.type, module)
        if not timed:
            self.environment.pop("method")  # how calls are timed
        path.mkdir(parents=True, exist_ok=True)

    def finished(self, name: str) -> bool:
        path = self.path / f"{name}.json"
        return path.exists() and bool(json.loads(path.read_text()).get("finished"))

    def save(self, name: str, result: Row, *, finished: bool) -> None:
        """Writes the result and where it comes from; a reader never sees half a file."""
        path = self.path / f"{name}.json"
        temporary = path.with_name(f".{path.name}.tmp")
        whole = {**self.environment, "finished": finished, **result}
        temporary.write_text(json.dumps(whole, indent=1) + "\n")
        temporary.replace(path)

    def results(self) -> dict[str, Row]:
        """By name, the unfinished ones too."""
        return {
            path.stem: json.loads(path.read_text()) for path in sorted(self.path.glob("[!.]*.json"))
        }


class Budget:
    """The seconds of one call of a benchmark: an arm that would not end within them is left to the
    next call."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def allows(self, seconds: float) -> bool:
        return time.monotonic() + seconds <= self.end


def run_arms(
    folder: Folder,
    arms: dict[str, Callable[[], Row]],
    seconds: float,
    budget: Budget,
) -> bool:
    """Runs what is not finished, each of so many seconds of training; whether all are finished now.

    One that fails is written down with its error, and the others go on.
    """
    complete, beside = True, BESIDE
    for name, arm in arms.items():
        if folder.finished(name):
            print(f"{name}: finished before", flush=True)
            continue
        if not budget.allows(seconds + beside):
            print(f"{name}: left to the next call", flush=True)
            complete = False
            continue
        begin = time.monotonic()
        try:
            folder.save(name, arm(), finished=True)
            beside = max(beside, time.monotonic() - begin - seconds)
        except Exception as error:  # out of memory, a kernel that is missing
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name}: failed: {message}", file=sys.stderr, flush=True)
            too_large = isinstance(error, torch.OutOfMemoryError)  # as it will be the next time
            folder.save(name, {"failed": message}, finished=too_large)
            complete = complete and too_large
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return complete


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
