"""Text from a trained byte-level model, one byte at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CheckpointError, load_checkpoint
from .nn import ReformerConfig, ReformerLM

__all__ = ["autocast", "generate", "load_model", "sample"]


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU; float32 stays float32 on the CPU, where not all have bfloat16 units."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def load_model(path: Path, device: torch.device) -> ReformerLM:
    """The model of a checkpoint of ``reformer train``, in evaluation mode.

    Raises:
        CheckpointError: no such file, truncated, or written by something else.
    """
    state = load_checkpoint(path)
    try:
        model = ReformerLM(ReformerConfig(**state["config"]))
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint: {path} does not fit this version: {error}") from error
    return model.to(device).eval()


def generate(
    model: ReformerLM,
    prompt: bytes,
    length: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[bytes]:
    """Continues ``prompt`` by ``length`` bytes, yielding them one by one.

    Every byte takes a forward pass over at most the last ``max_length`` bytes. An empty prompt
    stands for the beginning of a file. The same seed gives the same bytes.

    Args:
        model: with a vocabulary of at least 256, in evaluation mode.
        prompt: any bytes.
        length: how many to generate.
        temperature: divides the logits; 0 takes the most probable byte.
        top_k: sample among the k most probable; 0: all.
        top_p: sample among the fewest whose probabilities sum to at least p.
        seed: of the sampling.

    Raises:
        ValueError: an argument is out of range.
    """
    for name, value, valid, expected in (
        ("length", length, length >= 0, ">= 0"),
        ("temperature", temperature, temperature >= 0, ">= 0"),
        ("top_k", top_k, top_k >= 0, ">= 0"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
    ):
        if not valid:
            raise ValueError(f"generate: expected {name} {expected}, got {value}")
    return _generate(model, prompt, length, temperature, top_k, top_p, seed)


def _generate(
    model: ReformerLM,
    prompt: bytes,
    length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Iterator[bytes]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    context = model.config.max_length
    tokens = list(prompt[-context:]) or [0]
    for _ in range(length):
        with torch.inference_mode(), autocast(device):
            logits = model(torch.tensor([tokens[-context:]], device=device))[0, -1, :256]
        token = sample(logits.float().cpu(), temperature, top_k, top_p, generator)
        tokens.append(token)
        yield bytes([token])


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """Draws an index from ``logits (V,)`` on the CPU; arguments as in :func:`generate`."""
    if temperature == 0:
        return int(logits.argmax())
    values, indices = logits.sort(descending=True, stable=True)
    probabilities = torch.softmax(values / temperature, dim=0)
    if top_k:
        probabilities[top_k:] = 0
    # Those before which less than p has been summed, so at least one.
    probabilities[probabilities.cumsum(0) - probabilities >= top_p * probabilities.sum()] = 0
    return int(indices[torch.multinomial(probabilities, 1, generator=generator)])
