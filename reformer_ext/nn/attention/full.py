"""Exact self-attention, with separate or shared queries and keys, and its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ... import ops
from ...packed import map_sequences, sequence_lengths
from ..cache import CacheSizes
from ..checks import check_bool, check_dropout, check_scale
from ..config import ReformerConfig
from .base import (
    AttentionOptions,
    RowCache,
    SelfAttention,
    check_padding,
    prompt_lengths,
)

__all__ = ["FullCache", "FullOptions", "FullSelfAttention"]


@dataclass(frozen=True)
class FullOptions(AttentionOptions):
    """Options of a layer of :class:`FullSelfAttention`."""

    config_fields: ClassVar[Mapping[str, str]] = {
        "shared_qk": "full_shared_qk",
        "dropout": "attention_dropout",
        "out_bias": "attention_out_bias",
    }

    shared_qk: bool = False
    scale: float | None = None
    dropout: float = 0.0
    out_bias: bool | None = None
    rotary: bool = True
    next_values: bool = False

    def check(self, name: str) -> None:
        check_scale(name, self.scale)
        check_dropout(name, self.dropout)
        check_bool(name, "shared_qk", self.shared_qk)
        check_bool(name, "rotary", self.rotary)
        check_bool(name, "next_values", self.next_values)
        if self.next_values and not self.shared_qk:
            raise ValueError(
                f"{name}: expected next_values with shared_qk alone, got separate queries and keys"
            )

    @classmethod
    def of(cls, config: ReformerConfig, given: Mapping[str, Any], name: str) -> Self:
        if given.get("shared_qk", config.full_shared_qk):
            given = {
                "scale": config.shared_qk_scale,
                "rotary": config.turns_shared_qk,
                "next_values": config.mixes_next_values,
                **given,
            }
        return super().of(config, given, name)


class FullSelfAttention(SelfAttention):
    """Exact self-attention (:func:`torch.nn.functional.scaled_dot_product_attention`).

    Args:
        dim, heads, head_dim, causal, scale, dropout, bias, out_bias, rotary: as in
            :class:`LSHSelfAttention`.
        shared_qk: keys are the length-normalised queries, and a position attends to itself only if
            nothing else is allowed, as the first one of a causal sequence: what LSH attention
            approximates, and its exact limit. Takes an ``L x L`` mask where it is not causal or
            there is padding.
        next_values: with shared_qk, as in :class:`LSHSelfAttention`.

    Raises:
        ValueError: naming the argument.
    """

    Options = FullOptions

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        causal: bool = False,
        shared_qk: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        out_bias: bool | None = None,
        rotary: bool = True,
        next_values: bool = False,
    ) -> None:
        super().__init__(
            dim,
            heads,
            head_dim,
            2 if shared_qk else 3,
            causal=causal,
            scale=scale,
            dropout=dropout,
            bias=bias,
            out_bias=out_bias,
            rotary=rotary,
        )
        FullOptions(shared_qk=shared_qk, rotary=rotary, next_values=next_values).check(
            "FullSelfAttention"
        )
        self.shared_qk = shared_qk
        if next_values:
            self._mix_values()

    def new_cache(self, sizes: CacheSizes) -> FullCache:
        return FullCache(
            sizes.batch,
            self.heads,
            self.head_dim,
            sizes.capacity,
            dtype=sizes.dtype,
            device=sizes.device,
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        norm: nn.Module | None = None,
        heads: tuple[int, int] | None = None,
        cache: FullCache | None = None,
        cache_lengths: Tensor | None = None,
    ) -> Tensor:
        """``(B, L, dim) -> (B, L, dim)``; arguments as in :meth:`LSHSelfAttention.forward`.
        Dropout draws from the global generator."""
        self.check_heads(heads, cache)
        check_padding("FullSelfAttention: expected key_padding_mask", key_padding_mask, x)
        projected = self.project_in(x, norm, heads)
        if key_padding_mask is not None:  # its weights are 0, but 0 times NaN is NaN
            unfit = key_padding_mask[:, None, :, None] & ~projected.isfinite()
            projected = projected.masked_fill(unfit, 0.0)
        *qk, v = self.turn(projected, rotary)
        q, k = qk if not self.shared_qk else (qk[0], F.normalize(qk[0], dim=-1))
        if cache is not None and cache_lengths is not None:
            out = cache.attend(
                q,
                k,
                v,
                cache_lengths,
                value_mix=self.value_mix,
                scale=self.scale,
                mask_self=self.shared_qk,
            )
            return self.project_out(out)
        if cache is not None:
            cache.append(k, v, torch.zeros_like(prompt_lengths(x, None)))
        if cu_seqlens is None:
            out = self._attend(q, k, v, key_padding_mask, heads)
        else:
            lengths = sequence_lengths(
                type(self).__name__, cu_seqlens, x.shape[:2], key_padding_mask
            )

            def attend(group: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
                return (self._attend(q, k, v, None, heads),)

            (out,) = map_sequences(attend, lengths, [(q, 2), (k, 2), (v, 2)], (2,))
        return self.project_out(out, heads)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        heads: tuple[int, int] | None,
    ) -> Tensor:
        value_mix, w = self._value_mix_of(heads), v
        if value_mix is not None:
            w = ops.next_values(v, value_mix, key_padding_mask, causal=self.causal)
        unmasked = key_padding_mask is None and not torch.compiler.is_exporting()
        if self.shared_qk and self.causal and unmasked:
            # Never itself is causal over the keys before: no mask, so memory linear in L.
            if q.shape[2] == 1:
                return v
            rest = F.scaled_dot_product_attention(
                q[:, :, 1:],
                k[:, :, :-1],
                w[:, :, :-1],
                dropout_p=self.dropout_p(),
                is_causal=True,
                scale=self.scale,
            )
            return torch.cat([v[:, :, :1], rest], dim=2)
        mask, self_only = self._mask(q.shape[2], key_padding_mask, q.device)
        out = F.scaled_dot_product_attention(
            q,
            k,
            w,
            attn_mask=mask,
            dropout_p=self.dropout_p(),
            is_causal=self.causal and mask is None,
            scale=self.scale,
        )
        if self_only is not None:  # exactly its value, whatever dropout did
            out = torch.where(self_only, v, out)
        return out

    def _mask(
        self, length: int, key_padding_mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """What may attend to what ``(B or 1, 1, L, L)``, and who sees itself alone ``(B or 1, 1,
        L, 1)``."""
        if not self.shared_qk and key_padding_mask is None:
            return None, None
        allowed = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
        if self.causal:
            allowed = allowed.tril()
        if key_padding_mask is not None:
            allowed = allowed & ~key_padding_mask[:, None, None, :]
        itself = torch.eye(length, dtype=torch.bool, device=device)
        if self.shared_qk:
            allowed = allowed & ~itself
        nothing = ~allowed.any(dim=-1, keepdim=True)
        # Padding without a key sees itself too: finite, and nobody reads it.
        return allowed | (nothing & itself), nothing if self.shared_qk else None


class FullCache(RowCache):
    """Everything a causal full layer has seen. ``shared_qk``: keys are normalised queries."""

    def append(self, k: Tensor, v: Tensor, lengths: Tensor) -> None:
        """Adds T positions ``(B, H, T, D)`` after ``lengths (B,)``."""
        k, v = k[:, :, : self.keys.shape[2]], v[:, :, : self.keys.shape[2]]  # padding may go beyond
        places = lengths[:, None] + torch.arange(k.shape[2], device=k.device)
        self.write(k, v, places.clamp(max=self.keys.shape[2] - 1))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        *,
        value_mix: Tensor | None = None,
        scale: float | None,
        mask_self: bool,
    ) -> Tensor:
        """T new positions ``(B, H, T, D)`` are added and attend to what is not after them."""
        self.append(k, v, lengths)
        queries = lengths[:, None, None] + torch.arange(q.shape[2], device=q.device)[:, None]
        places = torch.arange(self.keys.shape[2], device=q.device)
        if not mask_self:
            return self.attend_to(q, places <= queries, scale)
        values = self.values
        if value_mix is not None:  # of what is there; the newest is seen by none yet
            values = ops.next_values(values, value_mix)
        out = self.attend_to(q, places < queries.clamp(min=1), scale, values)
        return torch.where(queries[:, None] == 0, v, out)  # the first has nothing but itself
