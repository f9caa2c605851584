"""What models are made of: the two halves of a reversible layer, and what goes around the stack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import exports_any
from .attention import SelfAttention
from .config import ReformerConfig
from .feed_forward import ChunkedFeedForward, map_positions

__all__ = [
    "AttentionBlock",
    "FeedForwardBlock",
    "autocast_dtype",
    "by_heads",
    "lm_head",
    "look_up",
    "with_cross",
    "without_padding",
]


class AttentionBlock(nn.Module):
    """F of a reversible layer: ``dropout(attention(norm(x)))``."""

    def __init__(self, config: ReformerConfig, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = attention
        takes_norm = isinstance(attention, SelfAttention) and attention.takes_norm
        self.chunk_size = config.ff_chunk_size if takes_norm else 0
        self.dropout = nn.Dropout(config.dropout)

    @property
    def self_attention(self) -> nn.Module:
        """The layer's."""
        return self.attention

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        if self._norms_again(x):
            kwargs["norm"] = self.norm
        else:
            x = self.norm(x)
            dtype = autocast_dtype(x.device)
            if x.dtype == torch.float32 and dtype is not None:
                # As the projection would, but without keeping the float32 beside it.
                x = x.to(dtype)
        result = self.attention(x, **kwargs)
        if isinstance(result, Tensor):
            return self.dropout(result)
        # The recomputed input differs by rounding: without the buckets it could hash differently.
        y, buckets = result
        return self.dropout(y), {"buckets": buckets}

    def _norms_again(self, x: Tensor) -> bool:
        """In the backward, to save memory, where a feed-forward layer takes chunks for it."""
        if self.chunk_size == 0 or not torch.is_grad_enabled() or exports_any(x.shape[1]):
            return False
        return x.shape[1] > self.chunk_size


class FeedForwardBlock(nn.Module):
    """G of a reversible layer: ``dropout(feed_forward(norm(x)))``, by chunks of positions."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.positionwise_chunk_size = config.ff_chunk_size
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = ChunkedFeedForward(
            config.dim,
            config.ff_hidden,
            activation=config.ff_activation,
            dropout=config.ff_dropout,
            glu=config.ff_glu,
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        drops = self.training and (self.dropout.p > 0.0 or self.feed_forward.dropout.p > 0.0)
        return map_positions(self._chunk, x, self.positionwise_chunk_size, preserve_rng_state=drops)

    def _chunk(self, x: Tensor) -> Tensor:
        return self.dropout(self.feed_forward(self.norm(x)))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of float32 there; None where it is off, or not known (meta)."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def look_up(embedding: nn.Embedding, tokens: Tensor) -> Tensor:
    """Their vectors. Raises ValueError for a token beyond the vocabulary on the CPU, whose
    embedding finds it; to find it on CUDA would take a synchronisation."""
    if torch.compiler.is_compiling():
        return embedding(tokens)
    try:
        return embedding(tokens)
    except IndexError:
        size = embedding.num_embeddings
        wrong = tokens[(tokens < 0) | (tokens >= size)]
        if wrong.numel() == 0:
            raise
        raise ValueError(
            f"Reformer: expected tokens in 0 .. {size - 1} (vocab_size = {size}), "
            f"got {int(wrong[0])}"
        ) from None


def by_heads(
    config: ReformerConfig, f_kwargs: list[dict[str, Any]]
) -> Sequence[dict[str, Any] | list[dict[str, Any]]]:
    """For each attention layer, in place of one call of it those for ``heads_at_once``."""
    heads, size = config.heads, config.heads_at_once or config.heads
    if size == heads or not torch.is_grad_enabled():
        return f_kwargs

    def parts(kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for index, first in enumerate(range(0, heads, size)):
            part = {**kwargs, "heads": (first, first + size)}
            if "dropout_seed" in kwargs:  # far from those of other layers and packed batches
                part["dropout_seed"] = kwargs["dropout_seed"] + (index << 50)
            yield part

    return [list(parts(kwargs)) for kwargs in f_kwargs]


def with_cross(
    kwargs: list[dict[str, Any]], cross_caches: Sequence[nn.Module]
) -> list[dict[str, Any]]:
    """What each attention layer gets beside x, in an encoder-decoder for both attentions."""
    if not cross_caches:
        return kwargs
    return [
        {"self_kwargs": of_self, "cross_kwargs": {"cache": cross}}
        for of_self, cross in zip(kwargs, cross_caches, strict=True)
    ]


def without_padding(tokens: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Embeddings ``(B, L, dim)`` with zeros for what is not finite at padding: the gradient of a
    weight would be 0 times NaN. Tokens as they are."""
    if key_padding_mask is None or not tokens.is_floating_point():
        return tokens
    return tokens.masked_fill(key_padding_mask[..., None] & ~tokens.isfinite(), 0.0)


def lm_head(config: ReformerConfig) -> nn.Linear | None:
    """From hidden states to the vocabulary; None if the embedding serves."""
    if config.tie_embeddings:
        return None
    head = nn.Linear(config.output_width, config.vocab_size, bias=config.head_bias)
    nn.init.normal_(head.weight, std=config.initializer_range)
    if config.head_bias:
        nn.init.zeros_(head.bias)
    return head
