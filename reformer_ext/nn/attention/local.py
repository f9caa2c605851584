"""Local self-attention and its cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import ops
from ...packed import chunked_attention_packed
from ..cache import CacheSizes
from ..checks import check_bool, check_dropout, check_scale, check_window, is_int
from .base import (
    AttentionCall,
    AttentionOptions,
    RowCache,
    SelfAttention,
    join_positions,
    prompt_lengths,
)

__all__ = ["LocalCache", "LocalOptions", "LocalSelfAttention"]


@dataclass(frozen=True)
class LocalOptions(AttentionOptions):
    """Options of a layer of :class:`LocalSelfAttention`."""

    config_fields: ClassVar[Mapping[str, str]] = {
        "chunk_size": "local_chunk_size",
        "look_back": "local_look_back",
        "look_ahead": "local_look_ahead",
        "wrap": "local_wrap",
        "dropout": "local_dropout",
        "out_bias": "attention_out_bias",
    }

    chunk_size: int = 64
    look_back: int = 1
    look_ahead: int | None = None
    wrap: bool = False
    scale: float | None = None
    dropout: float = 0.0
    out_bias: bool | None = None
    rotary: bool = True

    def check(self, name: str) -> None:
        if not is_int(self.chunk_size, 1):
            raise ValueError(f"{name}: expected chunk_size >= 1, got {self.chunk_size!r}")
        check_window(name, self.look_back, self.look_ahead)
        check_scale(name, self.scale)
        check_dropout(name, self.dropout)
        check_bool(name, "wrap", self.wrap)
        check_bool(name, "rotary", self.rotary)


class LocalSelfAttention(SelfAttention):
    """Self-attention within chunks of neighbouring positions and the chunks beside them.

    Args:
        dim, heads, head_dim, causal, scale, dropout, bias, out_bias, rotary: as in
            :class:`LSHSelfAttention`, with separate queries and keys.
        chunk_size: positions in a chunk.
        look_back, look_ahead: chunks before and after its own that a query attends to; look_ahead
            defaults to 0 if causal, else 1.
        wrap: the first and the last chunk are neighbours (as in transformers).

    Raises:
        ValueError: naming the argument.
    """

    Options = LocalOptions

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        chunk_size: int = 64,
        causal: bool = False,
        look_back: int = 1,
        look_ahead: int | None = None,
        wrap: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        out_bias: bool | None = None,
        rotary: bool = True,
    ) -> None:
        super().__init__(
            dim,
            heads,
            head_dim,
            3,
            causal=causal,
            scale=scale,
            dropout=dropout,
            bias=bias,
            out_bias=out_bias,
            rotary=rotary,
        )
        LocalOptions(
            chunk_size=chunk_size,
            look_back=look_back,
            look_ahead=look_ahead,
            wrap=wrap,
            rotary=rotary,
        ).check("LocalSelfAttention")
        self.chunk_size = chunk_size
        self.look_back = look_back
        self.look_ahead = look_ahead if look_ahead is not None else 0 if causal else 1
        self.wrap = wrap

    @property
    def draws(self) -> bool:
        return False  # dropout has its own seed

    def call_kwargs(self, call: AttentionCall) -> dict[str, Any]:
        kwargs = dict(call.common)
        if call.dropout_seed is not None:
            kwargs["dropout_seed"] = call.dropout_seed
        return kwargs

    def new_cache(self, sizes: CacheSizes) -> LocalCache:
        return LocalCache(
            sizes.batch,
            self.heads,
            self.head_dim,
            self.chunk_size,
            self.look_back,
            capacity=sizes.capacity,
            dtype=sizes.dtype,
            device=sizes.device,
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        dropout_seed: int | Tensor | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        norm: nn.Module | None = None,
        heads: tuple[int, int] | None = None,
        cache: LocalCache | None = None,
        cache_windows: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """``(B, L, dim) -> (B, L, dim)``; arguments as in :meth:`LSHSelfAttention.forward`, but for
        cache_windows, from :meth:`LocalCache.windows`, in place of cache_lengths."""
        self.check_heads(heads, cache)
        q, k, v = self.turn(self.project_in(x, norm, heads), rotary)
        if cache is not None and cache_windows is not None:
            return self.project_out(cache.attend(q, k, v, cache_windows, scale=self.scale))
        if cache is not None:
            cache.append(k, v, prompt_lengths(x, key_padding_mask))
        attend = (
            ops.chunked_attention
            if cu_seqlens is None
            else partial(chunked_attention_packed, cu_seqlens=cu_seqlens)
        )
        out, _ = attend(
            q,
            k,
            v,
            chunk_size=self.chunk_size,
            look_back=self.look_back,
            look_ahead=self.look_ahead,
            wrap=self.wrap,
            causal=self.causal,
            scale=self.scale,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p(),
            dropout_seed=dropout_seed,
        )
        return self.project_out(out, heads)


class LocalCache(RowCache):
    """The chunks that a causal local layer looks at: position p is at place ``p % places``. With a
    capacity, of at most so many positions."""

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        chunk_size: int,
        look_back: int,
        *,
        capacity: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.chunk_size, self.look_back = chunk_size, look_back
        places = (1 + look_back) * chunk_size
        if capacity is not None:
            places = min(places, capacity)
        super().__init__(batch, heads, head_dim, places, dtype=dtype, device=device)

    def step(self, lengths: Tensor, n: int, common: dict[Any, Any]) -> dict[str, Any]:
        shape = ("windows", self.chunk_size, self.look_back)
        if shape not in common:  # the same in all layers of such windows
            common[shape] = self.windows(lengths, n)
        return {"cache": self, "cache_windows": common[shape]}

    def append(self, k: Tensor, v: Tensor, lengths: Tensor) -> None:
        """Adds the first ``lengths (B,)`` of T positions ``(B, H, T, D)`` to an empty cache."""
        # Every place looks up the newest position that belongs there: no two writes meet.
        last = lengths - 1
        positions = (last[:, None] - self._ages(last)).clamp(0, k.shape[2] - 1)
        index = positions[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        self.keys.copy_(k.gather(2, index))
        self.values.copy_(v.gather(2, index))

    def windows(self, lengths: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
        """For each of n positions after ``lengths (B,)``: its place ``(B, 1)``, and what is added
        to its logits ``(B, 1, places)``. The same for all such caches."""
        result = []
        for t in range(n):
            last = lengths + t if t else lengths
            age = self._ages(last)
            oldest = torch.minimum(last, last % self.chunk_size + self.look_back * self.chunk_size)
            bias = torch.zeros_like(age, dtype=self.keys.dtype)
            bias.masked_fill_(age > oldest[:, None], -math.inf)
            result.append(((last % self.keys.shape[2])[:, None], bias[:, None]))
        return result

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        windows: Sequence[tuple[Tensor, Tensor]],
        *,
        scale: float | None,
    ) -> Tensor:
        """Each of T new positions ``(B, H, T, D)`` is added and attends to its window; see
        :meth:`windows`."""
        outs = []
        for t, (place, bias) in enumerate(windows):
            now = slice(t, t + 1)
            self.write(k[:, :, now], v[:, :, now], place)
            outs.append(self.attend_to(q[:, :, now], bias, scale))
        return join_positions(outs)

    def _ages(self, last: Tensor) -> Tensor:
        """How far before ``last (B,)`` is the newest position of each place, ``(B, places)``."""
        places = torch.arange(self.keys.shape[2], device=last.device)
        return (last[:, None] - places) % self.keys.shape[2]
