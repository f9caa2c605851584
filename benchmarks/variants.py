"""Attention layers that differ from the library's in what is on trial, on its public operators.

:func:`change` replaces the attention of a built model by one of the same weights. A layer with no
change is the library's, to the same numbers; where the library gains an option, the change here
becomes a field of the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from reformer_ext import ops
from reformer_ext.nn import (
    FullSelfAttention,
    LocalSelfAttention,
    LSHSelfAttention,
    ReformerLM,
    apply_rotary,
    hash_rotations,
)

Rotary = tuple[Tensor, Tensor] | None
# cuDNN's is the fastest on Hopper; the others take what it refuses, the CPU among it.
EXACT_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Changes:
    """What is on trial in a layer.

    Attributes:
        rotary: "as configured", "none", or "fast half": of the frequencies, the slow half does not
            turn.
        next_values: of exact attention with shared QK (LSH layers have it themselves): ``a v_j + b
            v_{j+1}``, a and b learnt per head, 0.5 at the start; a query that meets only itself
            gets its own ``v_i``.
        kv_shift: of separate keys and values, those of the position before are mixed in (KV
            shifting attention, arXiv 2411.19574, eq. 5): ``a1 k_j + a2 k_{j-1}`` before rotary
            positions and ``b1 v_j + b2 v_{j-1}``, learnt per head; a1 and b1 start uniform in
            [0, 1], a2 and b2 as what is left to 1 (free afterwards), zeros before the first.
        convolution: a causal one of width 3 along the positions, "none", of what is "hashed" alone
            (unit vectors, fixed weights 1, 0.7, 0.5), or of queries and "keys" (depthwise, learnt
            from 1, 0.5, 0.25; FlashMoBA, arXiv 2511.11571, has one on keys).
        centred: unit vectors are hashed less their mean over the positions so far (MagicPIG, arXiv
            2410.16179, centres keys).
        orthogonal: the columns of a factor's rotations are orthonormal.
        fixed_hash: the same rotations at every step of training.
        gray: buckets of several factors in reflected order, so that neighbours in the sorted list
            differ in one factor.
        learnt_scale: of the logits, per head, 3 times the layer's at the start.
        moba: block size and number of blocks of mixture of block attention (arXiv 2502.13189):
            each query attends causally to its own block and those of its past whose mean keys give
            the highest products. By a mask over all pairs: as good as theirs, not as fast.
    """

    rotary: str = "as configured"
    next_values: bool = False
    kv_shift: bool = False
    convolution: str = "none"
    centred: bool = False
    orthogonal: bool = False
    fixed_hash: bool = False
    gray: bool = False
    learnt_scale: bool = False
    moba: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Changes.{name}: expected one of {choices}, got {getattr(self, name)!r}"
                )


CHOICES = {
    "rotary": ("as configured", "none", "fast half"),
    "convolution": ("none", "hashed", "keys"),
}
KINDS = {"lsh": LSHSelfAttention, "local": LocalSelfAttention, "full": FullSelfAttention}


def change(model: ReformerLM, by_kind: Mapping[str, Changes]) -> ReformerLM:
    """Replaces the attention of the kinds named, "lsh", "local" or "full", keeping its weights.

    Raises ValueError for a change that a kind has not.
    """
    makers: dict[type[nn.Module], Callable[..., nn.Module]] = {
        LSHSelfAttention: ChangedLSH,
        LocalSelfAttention: ChangedLocal,
        FullSelfAttention: ChangedFull,
    }
    for block in model.reformer.layers.blocks:
        layer = block.f.attention
        for kind, changes in by_kind.items():
            if type(layer) is KINDS[kind]:
                block.f.attention = makers[KINDS[kind]](layer, changes)
    return model


class _Changed(nn.Module):
    """What changed layers of all kinds share; takes over the attributes and the parameters of the
    library's layer that it stands in for."""

    ALLOWED: tuple[str, ...] = ()

    def __init__(self, layer: nn.Module, changes: Changes) -> None:
        nn.Module.__init__(self)
        vars(self).update({name: copy(value) for name, value in vars(layer).items()})
        self.changes = changes
        off = Changes()
        for name in changes.__dataclass_fields__:
            if getattr(changes, name) != getattr(off, name) and name not in self.ALLOWED:
                raise ValueError(
                    f"{type(layer).__name__}: expected changes among {self.ALLOWED}, got {name}"
                )

    def heads_of(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """``(B, L, dim) -> (n_projections, B, H, L, D)``."""
        x = self.in_proj(x if norm is None else norm(x))
        return x.unflatten(-1, (self.n_projections, self.heads, self.head_dim)).permute(
            2, 0, 3, 1, 4
        )

    def joined(self, out: Tensor) -> Tensor:
        """``(B, H, L, D) -> (B, L, dim)``."""
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def turning(self, rotary: Rotary) -> Rotary:
        """The factors that remain."""
        if rotary is None or not self.rotary or self.changes.rotary == "none":
            return None
        if self.changes.rotary == "as configured":
            return rotary
        cos, sin = rotary
        half = cos.shape[-1] // 2  # pairs (d, d + half), fast ones first
        turns = torch.arange(2 * half, device=cos.device) % half < half // 2
        return torch.where(turns, cos, 1.0), torch.where(turns, sin, 0.0)

    def per_head(self, *values: float, shape: Sequence[int] = ()) -> nn.Parameter:
        """``(len(values), H, *shape)``, of these values at the start."""
        weight = self.in_proj.weight
        start = weight.new_tensor(values).view(-1, *[1] * (1 + len(shape)))
        return nn.Parameter(start.repeat(1, self.heads, *shape))

    def refuse(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for arguments of the library's layer that are not taken here."""
        for name, value in options.items():
            if value is not None:
                raise ValueError(f"{type(self).__name__}: expected no {name}, got {value!r}")


class ChangedLSH(_Changed, LSHSelfAttention):
    ALLOWED = (
        "rotary",
        "convolution",
        "centred",
        "orthogonal",
        "fixed_hash",
        "gray",
        "learnt_scale",
    )

    def __init__(self, layer: LSHSelfAttention, changes: Changes) -> None:
        super().__init__(layer, changes)
        if changes.convolution == "keys":
            self.taps = self.per_head(1.0, 0.5, 0.25, shape=(1, self.head_dim))
        if changes.learnt_scale:
            self.log_scale = self.per_head(math.log(3.0), shape=(1, 1))

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary = None,
        n_hashes: int | None = None,
        hash_step: int | Tensor = 0,
        buckets: Tensor | None = None,
        return_buckets: bool = False,
        norm: nn.Module | None = None,
        **others: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        self.refuse(others)
        changes = self.changes
        projected, rotary = self.heads_of(x, norm), self.turning(rotary)
        if changes.convolution == "keys":
            taps = self.taps.to(projected.dtype)
            qk, v = projected
            qk = taps[0] * qk + taps[1] * before(qk) + taps[2] * before(qk, 2)
            hashed = qk
            if rotary is not None:
                qk = apply_rotary(qk, rotary)
        elif rotary is not None:
            hashed = projected[0]
            qk, v = ops.split_heads(
                projected.permute(1, 3, 0, 2, 4).flatten(2), self.n_projections, *rotary
            )
        else:
            qk, v = projected
            hashed = qk
        if changes.learnt_scale:  # keys are normalised, so that it scales queries alone
            qk = qk * self.log_scale[0].exp().to(qk.dtype)
        n_buckets = self.n_buckets or ops.default_n_buckets(x.shape[1], self.chunk_size)
        if buckets is None:
            buckets = self.hashed(hashed.detach(), n_buckets, n_hashes, hash_step)
        out = ops.lsh_attention(
            qk,
            v,
            value_mix=self.value_mix,
            n_buckets=n_buckets,
            buckets=buckets.to(torch.int32),
            chunk_size=self.chunk_size,
            look_back=self.look_back,
            look_ahead=self.look_ahead,
            causal=self.causal,
            scale=self.scale,
            same_bucket=self.same_bucket,
            correct_duplicates=self.correct_duplicates,
        )
        y = self.joined(out)
        return (y, buckets) if return_buckets else y

    def hashed(
        self, x: Tensor, n_buckets: Sequence[int], n_hashes: int | None, hash_step: int | Tensor
    ) -> Tensor:
        """Buckets ``(B, H, R, L)`` of ``x (B, H, L, D)``."""
        changes = self.changes
        if changes.convolution == "hashed":
            unit = F.normalize(x, dim=-1)
            x = unit + 0.7 * before(unit) + 0.5 * before(unit, 2)
        if changes.centred:
            unit = F.normalize(x.float(), dim=-1)
            count = torch.arange(1, x.shape[2] + 1, device=x.device)[:, None]
            x = (unit - unit.cumsum(2) / count).to(x.dtype)
        rotations = hash_rotations(
            self.hash_seed,
            0 if changes.fixed_hash else hash_step,
            self.heads,
            self.head_dim,
            self.n_hashes if n_hashes is None else n_hashes,
            n_buckets,
            device=x.device,
            dtype=x.dtype,
        )
        if changes.orthogonal:
            rotations = orthonormal(rotations, n_buckets)
        buckets = ops.lsh_hash(x, rotations, n_buckets)
        return reflected(buckets, n_buckets) if changes.gray else buckets


class ChangedLocal(_Changed, LocalSelfAttention):
    ALLOWED = ("rotary", "kv_shift")

    def __init__(self, layer: LocalSelfAttention, changes: Changes) -> None:
        super().__init__(layer, changes)
        if changes.kv_shift:
            self.key_shift, self.value_shift = shift_weights(self), shift_weights(self)

    def forward(
        self, x: Tensor, *, rotary: Rotary = None, norm: nn.Module | None = None, **others: Any
    ) -> Tensor:
        self.refuse(others)
        q, k, v = shifted_and_turned(self, self.heads_of(x, norm), rotary)
        out, _ = ops.chunked_attention(
            q,
            k,
            v,
            chunk_size=self.chunk_size,
            look_back=self.look_back,
            look_ahead=self.look_ahead,
            wrap=self.wrap,
            causal=self.causal,
            scale=self.scale,
        )
        return self.joined(out)


class ChangedFull(_Changed, FullSelfAttention):
    """Causal. Shared QK needs no mask: who never attends to itself sees what causal attention over
    the keys before shows."""

    def __init__(self, layer: FullSelfAttention, changes: Changes) -> None:
        self.ALLOWED = (
            ("rotary", "next_values") if layer.shared_qk else ("rotary", "kv_shift", "moba")
        )
        super().__init__(layer, changes)
        if not self.causal:
            raise ValueError("ChangedFull: expected a causal layer")
        if changes.next_values:
            self.value_mix = self.per_head(0.5, 0.5)
        if changes.kv_shift:
            self.key_shift, self.value_shift = shift_weights(self), shift_weights(self)

    def forward(
        self, x: Tensor, *, rotary: Rotary = None, norm: nn.Module | None = None, **others: Any
    ) -> Tensor:
        self.refuse(others)
        projected = self.heads_of(x, norm)
        if not self.shared_qk:
            q, k, v = shifted_and_turned(self, projected, rotary)
            if self.changes.moba is not None:
                return self.joined(block_attention(q, k, v, *self.changes.moba, scale=self.scale))
            return self.joined(exact(q, k, v, self.scale))
        rotary = self.turning(rotary)
        qk, v = projected
        if rotary is not None:
            qk = apply_rotary(qk, rotary)
        w = ops.next_values(v, self.value_mix) if self.changes.next_values else v
        k = F.normalize(qk, dim=-1)
        # Query i in row i - 1; the last row, in place of none, is dropped: even lengths are fast.
        rows = torch.cat([qk[:, :, 1:], qk[:, :, :1]], dim=2)
        rest = exact(rows, k, w, self.scale)[:, :, :-1]
        return self.joined(torch.cat([v[:, :, :1], rest], dim=2))


class ResidualStack(nn.Module):
    """One residual stream in place of a :class:`ReversibleStack`'s two: ``x + F(x)``, ``x + G(x)``
    (the published Transformer, normalisation first)."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(
        self,
        x: Tensor,
        f_kwargs: Sequence[Mapping[str, Any]],
        context: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        for block, kwargs in zip(self.blocks, f_kwargs, strict=True):
            y = block.f(x, **kwargs, **(context or {}))
            x = x + (y[0] if isinstance(y, tuple) else y)
            x = x + block.g(x)
        return x, x


def shift_weights(layer: _Changed) -> nn.Parameter:
    """``(2, H, 1, 1)``: of a position and of the one before, per head."""
    own = torch.rand(layer.heads, 1, 1, device=layer.in_proj.weight.device)
    return nn.Parameter(torch.stack([own, 1 - own]))


def shifted_and_turned(layer: _Changed, projected: Tensor, rotary: Rotary) -> Sequence[Tensor]:
    """Queries, keys and values ``(B, H, L, D)``."""
    rotary = layer.turning(rotary)
    if layer.changes.kv_shift:
        q, k, v = projected
        a, b = layer.key_shift.to(k.dtype), layer.value_shift.to(v.dtype)
        k, v = a[0] * k + a[1] * before(k), b[0] * v + b[1] * before(v)
        return (q, k, v) if rotary is None else (*apply_rotary(torch.stack([q, k]), rotary), v)
    if rotary is None:
        return projected.unbind()
    return ops.split_heads(projected.permute(1, 3, 0, 2, 4).flatten(2), 3, *rotary)


def before(x: Tensor, positions: int = 1) -> Tensor:
    """``x (B, H, L, D)`` of so many positions before, zeros at the start."""
    return F.pad(x, (0, 0, positions, 0))[:, :, : x.shape[2]]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention ``(B, H, L, D)``."""
    with sdpa_kernel(EXACT_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, size: int, count: int, *, scale: float | None
) -> Tensor:
    """Mixture of block attention (arXiv 2502.13189, section 2.2), causal.

    A query sees its own block, causally, and of the whole blocks before it the ``count - 1`` whose
    mean key has the highest product with it.
    """
    length = q.shape[2]
    n_blocks = -(-length // size)
    own = torch.arange(length, device=q.device) // size
    padded = F.pad(k, (0, 0, 0, n_blocks * size - length))
    means = padded.unflatten(2, (n_blocks, size)).float().mean(3)
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    outs = []
    for head in range(q.shape[1]):  # the mask of one head at a time
        with torch.no_grad():
            gate = q[:, head].float() @ means[:, head].transpose(-1, -2)
            blocks = torch.arange(n_blocks, device=q.device)
            gate = gate.masked_fill(blocks >= own[:, None], -math.inf)
            gate = gate.masked_fill(blocks == own[:, None], math.inf)
            chosen = gate.topk(min(count, n_blocks), dim=-1).indices
            seen = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, chosen, True)
            mask = seen.repeat_interleave(size, dim=-1)[..., :length] & causal
        part = slice(head, head + 1)
        with sdpa_kernel(EXACT_BACKENDS[1:], set_priority=True):
            outs.append(
                F.scaled_dot_product_attention(
                    q[:, part], k[:, part], v[:, part], attn_mask=mask[:, None], scale=scale
                )
            )
    return torch.cat(outs, dim=1)


def orthonormal(rotations: Tensor, n_buckets: Sequence[int]) -> Tensor:
    """The columns of each factor orthonormal, where there are no more than rows.

    ``rotations (H, D, R, columns)``, as from :func:`hash_rotations`.
    """
    parts = []
    for part in rotations.split([n // 2 for n in n_buckets], dim=-1):
        if part.shape[-1] > part.shape[1]:
            raise ValueError(
                f"orthonormal: expected at most {part.shape[1]} columns a factor, "
                f"got {part.shape[-1]}"
            )
        # By Cholesky: torch's batched QR on CUDA goes through the matrices one by one.
        columns = part.double().transpose(1, 2)
        lower = torch.linalg.cholesky_ex(columns.mT @ columns).L
        unit = torch.linalg.solve_triangular(lower.mT, columns, upper=True, left=False)
        parts.append(unit.transpose(1, 2))
    return torch.cat(parts, dim=-1).to(rotations.dtype)


def reflected(buckets: Tensor, n_buckets: Sequence[int]) -> Tensor:
    """Renumbers ``b1 + n1 b2 + n1 n2 b3 ...`` so that neighbours differ in one factor, by one: the
    reflected mixed-radix Gray code."""
    result, size = buckets % n_buckets[0], n_buckets[0]
    for n in n_buckets[1:]:
        digit = buckets // size % n
        result = size * digit + torch.where(digit % 2 == 1, size - 1 - result, result)
        size *= n
    return result
