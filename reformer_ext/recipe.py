"""How a model is trained: the fields of a run that are not the model's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Recipe", "default_recipe"]

_MOST_TOKENS = 1 << 31  # of a step: beyond, the tokens alone would fill most machines


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. All fields are part of a run: resuming keeps them.

    Attributes:
        steps: optimiser steps.
        batch: sequences per step.
        context: bytes per sequence, in training and where it is evaluated.
        schedule: pairs of a context and its share of the steps, in order, the last that of
            ``context``; steps of another context have as many sequences as make the same number of
            bytes. Empty: ``context`` in all steps.
        lr: of the weight matrices (Muon); linear warm-up, then linear decay to zero.
        lr_other: of embeddings, biases and norms (AdamW), same schedule.
        warmup: steps.
        weight_decay: of the weight matrices.
        seed: of initial weights, data and dropout.
        eval_every: steps between evaluations on a part of the held-out bytes.

    Raises:
        ValueError: naming the field, what was expected and what came.
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
    schedule: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name, least in (
            *(("steps", 1), ("batch", 1), ("context", 1), ("eval_every", 1)),
            *(("warmup", 0), ("seed", 0)),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}: expected an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("lr", "lr_other", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"{name}: expected a number, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number, at least 0, got {value}")
        if self.batch * self.context > _MOST_TOKENS:
            raise ValueError(
                f"batch: expected at most {_MOST_TOKENS:,} bytes a step, got {self.batch:,} "
                f"sequences of {self.context:,}"
            )
        self._check_schedule()

    def _check_schedule(self) -> None:
        for stage in self.schedule:
            if not (
                isinstance(stage, tuple)
                and len(stage) == 2
                and isinstance(stage[0], int)
                and isinstance(stage[1], (int, float))
                and not any(isinstance(value, bool) for value in stage)
                and stage[0] >= 1
                and stage[1] > 0
            ):
                raise ValueError(
                    f"context: expected contexts of at least 1 with shares above 0, got {stage!r}"
                )
        if not self.schedule:
            return
        if self.schedule[-1][0] != self.context:
            raise ValueError(
                f"context: expected the last of the schedule, {self.schedule[-1][0]}, "
                f"got {self.context}"
            )
        shares = [share for _, share in self.schedule]
        if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(
                "context: expected shares that add up to 1, got "
                f"{' + '.join(f'{share:g}' for share in shares)} = {sum(shares):g}"
            )
        for steps, batch, context in self.stages():
            if batch * context != self.batch * self.context:
                raise ValueError(
                    f"context: expected a divisor of the {self.batch * self.context:,} bytes of a "
                    f"step ({self.batch:,} x {self.context:,}), got {context:,}"
                )
            if steps < 1:
                raise ValueError(
                    f"context: expected at least one of {self.steps:,} steps for each context, "
                    f"got none for {context:,}"
                )

    @property
    def longest(self) -> int:
        """The longest context of any step."""
        return max([self.context, *(context for context, _ in self.schedule)])

    def stages(self) -> list[tuple[int, int, int]]:
        """Steps, batch and context of each part of the training, in order."""
        if not self.schedule:
            return [(self.steps, self.batch, self.context)]
        done, share_done, result = 0, 0.0, []
        for context, share in self.schedule:
            share_done += share
            end = round(share_done * self.steps)
            result.append((end - done, self.batch * self.context // context, context))
            done = end
        return result

    def at(self, step: int) -> tuple[int, int]:
        """Batch and context of a step, which counts from 0."""
        for steps, batch, context in self.stages():
            if step < steps:
                return batch, context
            step -= steps
        return self.batch, self.context


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
