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
        context: bytes per sequence.
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
