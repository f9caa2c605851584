"""Does LSH attention do anything in a trained model? Its loss without it, and by position.

A model whose LSH layers can be zeroed at no cost does not use them, whatever they capture.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .nn import LSHSelfAttention, ReformerLM

__all__ = ["REPLACEMENTS", "ablated_losses", "lsh_replaced", "position_bits"]

REPLACEMENTS = ("local", "zero")


@contextlib.contextmanager
def lsh_replaced(model: nn.Module, by: str) -> Iterator[None]:
    """Within the block, every LSH layer of a model attends otherwise, with the same weights.

    Args:
        model: any with :class:`LSHSelfAttention` inside; as it was afterwards.
        by: "local": to the keys of its chunk and of the neighbouring ones in natural order, as if
            the hash gave every position the same bucket; "zero": to nothing, and adds nothing.

    Raises:
        ValueError: another ``by``, or no LSH layer.
    """
    layers = [module for module in model.modules() if isinstance(module, LSHSelfAttention)]
    if by not in REPLACEMENTS:
        raise ValueError(f"lsh_replaced: expected by to be one of {REPLACEMENTS}, got {by!r}")
    if not layers:
        raise ValueError("lsh_replaced: expected a model with LSH layers, got one without")

    def one_bucket(
        module: LSHSelfAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0]
        # Sorted stably, positions of one bucket stay in order; one round of them is enough.
        buckets = x.new_zeros(x.shape[0], module.heads, 1, x.shape[1], dtype=torch.int32)
        return args, {**kwargs, "n_hashes": 1, "buckets": buckets}

    def nothing(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        if isinstance(result, Tensor):
            return torch.zeros_like(result)
        return (torch.zeros_like(result[0]), *result[1:])

    hooks = [
        layer.register_forward_pre_hook(one_bucket, with_kwargs=True)
        if by == "local"
        else layer.register_forward_hook(nothing)
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def position_bits(
    model: ReformerLM, tokens: Tensor, *, n_hashes: int | None = None, batch: int = 1
) -> Tensor:
    """Bits by which a model misses each token of some sequences.

    The pass is one of evaluation, in the autocast state of the caller; the model is left as it was.

    Args:
        model: causal.
        tokens: int64 ``(N, L + 1)``, L >= 1.
        n_hashes: hash rounds; default: the model's.
        batch: sequences at a time.

    Returns:
        float64 ``(N, L)`` on the CPU: of the token after 1, 2 ... L others.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"position_bits: expected tokens [N, L + 1], L >= 1, got {list(tokens.shape)}"
        )
    if batch < 1:
        raise ValueError(f"position_bits: expected batch >= 1, got {batch}")
    if not model.config.causal:
        raise ValueError("position_bits: expected a causal model, got causal=False")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        nats = [
            model.loss(part[:, :-1], part[:, 1:], "none", n_hashes=n_hashes).double().cpu()
            for part in torch.split(tokens, batch)
        ]
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(nats).view(len(tokens), -1) / math.log(2)


def ablated_losses(
    model: ReformerLM, tokens: Tensor, *, n_hashes: int | None = None, batch: int = 1
) -> dict[str, Tensor]:
    """:func:`position_bits` of a model as trained, and with its LSH layers replaced.

    Arguments and errors are those of :func:`position_bits` and :func:`lsh_replaced`.

    Returns:
        ``"trained"`` and each of ``REPLACEMENTS`` -> float64 ``(N, L)``.
    """
    losses = {"trained": position_bits(model, tokens, n_hashes=n_hashes, batch=batch)}
    for by in REPLACEMENTS:
        with lsh_replaced(model, by):
            losses[by] = position_bits(model, tokens, n_hashes=n_hashes, batch=batch)
    return losses
