"""Runs of ``reformer train``: their state, saved and restored, and their interruptions."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .checkpoint import CheckpointError, load_checkpoint, model_of, save_checkpoint
from .data import Corpus, load_corpus
from .nn import ReformerLM
from .optim import Muon, split_parameters
from .recipe import Recipe

__all__ = ["Interruptions", "Run", "TrainError", "build", "restore"]


class TrainError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


@dataclass
class Run:
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


def build(
    model: ReformerLM, recipe: Recipe, paths: list[str], corpus: Corpus, device: torch.device
) -> Run:
    model = model.to(device).train()
    matrices, others = split_parameters(model, model.head)
    return Run(
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


def restore(
    checkpoint: Path, paths: Sequence[Path], options: dict[str, Any], device: torch.device
) -> Run:
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
        run = build(model, recipe, state["paths"], corpus, device)
        for optimizer, optimizer_state in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        run.step, run.seconds, run.history = state["step"], state["seconds"], state["history"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint: {checkpoint} does not fit this version: {error}"
        ) from error
    return run


class Interruptions:
    """True once SIGINT or SIGTERM has come; a second one then acts as usual."""

    def __init__(self) -> None:
        self.came = False
        self.previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.came

    def __enter__(self) -> Interruptions:
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
