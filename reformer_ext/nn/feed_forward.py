"""Position-wise parts in chunks of positions (Reformer, section 3): feed-forward layer and LM
loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import exports_any
from .checks import check_dropout, check_int, is_int

__all__ = ["ACTIVATIONS", "ChunkedFeedForward", "chunked_lm_loss", "map_positions"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def map_positions(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    chunk_size: int,
    *,
    preserve_rng_state: bool = True,
) -> Tensor:
    """``function(x)`` for a function of each position alone, ``chunk_size`` positions at a time.

    With gradients, each chunk is checkpointed: what the function stores exists for one chunk only,
    forward and backward.

    Args:
        function: maps ``(B, l, dim)`` to ``(B, l, any)`` for every l.
        x: ``(B, L, dim)``.
        chunk_size: 0 calls the function once, without a checkpoint; so does ``torch.export`` with a
            dynamic length, whose graph cannot depend on the number of chunks.
        preserve_rng_state: the function draws random numbers (dropout).
    """
    if chunk_size == 0 or exports_any(x.shape[1]) or x.shape[1] <= chunk_size:
        return function(x)
    parts = torch.split(x, chunk_size, dim=1)
    if not torch.is_grad_enabled():
        return torch.cat([function(part) for part in parts], dim=1)
    return torch.cat(
        [
            checkpoint(function, part, use_reentrant=False, preserve_rng_state=preserve_rng_state)
            for part in parts
        ],
        dim=1,
    )


class ChunkedFeedForward(nn.Module):
    """``W2 dropout(activation(W1 x))`` over ``(B, L, dim)``, chunk by chunk (Reformer, section 3).

    The hidden activations, ``(B, L, hidden)``, exist for ``chunk_size`` positions at a time, in the
    backward pass too. Any L; the result does not depend on the chunks.

    Args:
        dim: width of input and output.
        hidden: width between; default ``4 * dim``.
        chunk_size: positions at a time; 0: all.
        activation: "gelu", "relu" or "silu".
        dropout: of the hidden activations.
        glu: gate them by a second projection (GEGLU, SwiGLU).
        bias: of both projections.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        chunk_size: int = 0,
        activation: str = "gelu",
        dropout: float = 0.0,
        glu: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        name = "ChunkedFeedForward"
        check_int(name, "dim", dim)
        hidden = 4 * dim if hidden is None else hidden
        check_int(name, "hidden", hidden)
        if not is_int(chunk_size, 0):
            raise ValueError(f"{name}: expected chunk_size >= 0, got {chunk_size!r}")
        check_dropout(name, dropout)
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{name}: expected activation in {sorted(ACTIVATIONS)}, got {activation!r}"
            )
        self.chunk_size = chunk_size
        self.activation = activation
        self.glu = glu
        self.in_proj = nn.Linear(dim, 2 * hidden if glu else hidden, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden, dim, bias=bias)

    @property
    def positionwise_chunk_size(self) -> int:
        """Lets a :class:`ReversibleStack` run this layer's backward pass by chunks."""
        return self.chunk_size

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, dim) -> (B, L, dim)``."""
        drops = self.training and self.dropout.p > 0.0
        return map_positions(self._chunk, x, self.chunk_size, preserve_rng_state=drops)

    def _chunk(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        if self.glu:
            x, gate = x.chunk(2, dim=-1)
            x = ACTIVATIONS[self.activation](gate) * x
        else:
            x = ACTIVATIONS[self.activation](x)
        return self.out_proj(self.dropout(x))


def chunked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    chunk_size: int = 4096,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy in nats of ``hidden @ weight.T + bias`` against the targets (Reformer, section
    3).

    The logits exist for ``chunk_size`` positions at a time, forward and backward. The softmax is
    taken in float32 at least.

    Args:
        hidden: ``(..., dim)``.
        weight: ``(V, dim)``.
        bias: ``(V,)`` or None.
        targets: int64, the leading shape of hidden.
        chunk_size: positions at a time, over batch and length; 0: all.
        ignore_index: targets that do not count.
        reduction: "mean" over the targets that count (NaN if none does, as in
            :func:`torch.nn.functional.cross_entropy`), "sum" or "none".

    Returns:
        A scalar, or the shape of targets for "none"; float32 (float64 for float64).

    Raises:
        ValueError: naming the argument.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"chunked_lm_loss: expected targets {list(hidden.shape[:-1])}, "
            f"got {list(targets.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"chunked_lm_loss: expected reduction mean, sum or none, got {reduction!r}"
        )
    if not is_int(chunk_size, 0):
        raise ValueError(f"chunked_lm_loss: expected chunk_size >= 0, got {chunk_size!r}")
    each = "none" if reduction == "none" else "sum"

    def chunk_loss(x: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, y, ignore_index=ignore_index, reduction=each)

    x, y = hidden.flatten(0, -2), targets.flatten()
    size = chunk_size or max(x.shape[0], 1)
    parts = list(zip(torch.split(x, size), torch.split(y, size), strict=True))
    if len(parts) > 1 and torch.is_grad_enabled():
        losses = [
            checkpoint(chunk_loss, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
    else:
        losses = [chunk_loss(*part) for part in parts]
    if reduction == "none":
        return torch.cat(losses).view(targets.shape)
    total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()
