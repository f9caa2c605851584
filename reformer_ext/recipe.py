"""How a model is trained: the fields of a run that are not the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Recipe", "default_recipe"]


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
