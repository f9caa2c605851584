"""The operators in plain torch, written to be read: what they compute, not how fast.

Every function takes any floating dtype; in float64 it is the oracle of the tests. Attention is
dense here, O(R L^2) memory: the set of slots a query meets is a count per (round, query, key), and
one softmax over that multiset is the whole semantics. Everything differentiates through autograd.

Shapes: B batch, H heads, L length, D head dimension, R hash rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SELF_ONLY_LSE = -1e5
NORM_EPS = 1e-12


def lsh_hash(
    x: Tensor,
    rotations: Tensor,
    n_buckets: int | Sequence[int],
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Buckets of ``x (B, H, L, D)`` by ``rotations (H or 1, D, R, sum(n_buckets) / 2)``.

    Per factor ``argmax([xR; -xR])``; the factors' digits make one number, the first the lowest.
    Padding gets the bucket after the last. Returns int32 ``(B, H, R, L)``. Reformer, section 2.
    """
    factors = [n_buckets] if isinstance(n_buckets, int) else list(n_buckets)
    rotated = torch.einsum(
        "bhld,hdrc->bhrlc", x, rotations.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    )
    buckets = torch.zeros(rotated.shape[:-1], dtype=torch.int64, device=x.device)
    place, column = 1, 0
    for factor in factors:
        projection = rotated[..., column : column + factor // 2]
        digit = torch.cat([projection, -projection], dim=-1).argmax(dim=-1)
        buckets += place * digit
        place, column = place * factor, column + factor // 2
    if key_padding_mask is not None:
        buckets = buckets.masked_fill(key_padding_mask[:, None, None, :], place)
    return buckets.to(torch.int32)


def bucket_sort(buckets: Tensor, n_buckets: int) -> Tensor:
    """``order[b, h, r, :]`` lists the positions by (bucket, position). int32 ``(B, H, R, L)``."""
    return torch.argsort(buckets, dim=-1, stable=True).to(torch.int32)


def slot_counts(
    length: int,
    order: Tensor | None,
    *,
    chunk_size: int,
    look_back: int,
    look_ahead: int,
    causal: bool,
    mask_self: bool,
    wrap: bool,
    key_padding_mask: Tensor | None,
    buckets: Tensor | None,
    batch: int,
    heads: int,
    device: torch.device,
) -> Tensor:
    """How often query i meets key j validly in its window of round r: int64 ``(B, H, R, L, L)``.

    Chunks are numbered over all rounds laid end to end. The window of a query in chunk c is the set
    of chunks c - look_back ... c + look_ahead, modulo the whole line with ``wrap``, else within the
    round.
    """
    if order is None:
        order = torch.arange(length, device=device).expand(batch, heads, 1, length)
    rounds = order.shape[2]
    chunks_per_round = math.ceil(length / chunk_size)
    n_chunks = rounds * chunks_per_round
    sorted_chunk = torch.arange(length, device=device) // chunk_size
    chunk_of = torch.empty_like(order, dtype=torch.int64)
    chunk_of.scatter_(-1, order.long(), sorted_chunk.expand_as(order))

    positions = torch.arange(length, device=device)
    allowed = torch.ones(batch, 1, length, length, dtype=torch.bool, device=device)
    if causal:
        allowed = allowed & (positions[None, :] <= positions[:, None])
    if mask_self:
        allowed = allowed & (positions[None, :] != positions[:, None])
    if key_padding_mask is not None:
        allowed = allowed & ~key_padding_mask[:, None, None, :]

    counts = torch.zeros(batch, heads, rounds, length, length, dtype=torch.int64, device=device)
    for query_round in range(rounds):
        query_chunk = chunk_of[:, :, query_round, :, None] + query_round * chunks_per_round
        for key_round in range(rounds):
            if key_round != query_round and (not wrap or buckets is not None):
                continue
            key_chunk = chunk_of[:, :, key_round, None, :] + key_round * chunks_per_round
            behind, ahead = query_chunk - key_chunk, key_chunk - query_chunk
            if wrap:
                behind, ahead = behind % n_chunks, ahead % n_chunks
            near = ((behind >= 0) & (behind <= look_back)) | ((ahead >= 0) & (ahead <= look_ahead))
            if buckets is not None:
                digits = buckets[:, :, query_round]
                near = near & (digits[..., :, None] == digits[..., None, :])
            counts[:, :, query_round] += near & allowed
    return counts


def _mix32(x: Tensor) -> Tensor:
    """csrc/kernels/common/dropout.h: mix32 on int64 tensors holding 32-bit words."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def dropout_keep(
    seed: int, p: float, *, batch: int, heads: int, rounds: int, length: int, device: torch.device
) -> Tensor:
    """Which weights dropout keeps: bool ``(B, H, R, L, L)``, a function of the arguments alone."""

    def counter(n: int, *shape: int) -> Tensor:
        return torch.arange(n, device=device).view(*shape)

    key = _mix32(torch.tensor((seed & 0xFFFFFFFF) ^ 0x9E3779B9, device=device))
    key = _mix32(key ^ ((seed >> 32) & 0xFFFFFFFF))
    key = _mix32(key ^ counter(batch * heads, batch, heads, 1, 1, 1))
    key = _mix32(key ^ counter(rounds, rounds, 1, 1))
    query_part = _mix32(key ^ counter(length, length, 1)) | 1
    key_part = _mix32((counter(length, length) * 0x9E3779B9) & 0xFFFFFFFF) | 1
    word = (query_part * key_part) & 0xFFFFFFFF
    return word >= min(int(p * 2**32), 2**32 - 1)


def chunked_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor | None = None,
    *,
    chunk_size: int = 64,
    look_back: int = 1,
    look_ahead: int = 0,
    causal: bool = False,
    mask_self: bool | None = None,
    wrap: bool | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    buckets: Tensor | None = None,
    correct_duplicates: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    own_values: Tensor | None = None,
    value_mix: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the multiset of valid slots. See :func:`reformer_ext.chunked_attention`."""
    batch, heads, length, head_dim = q.shape
    mask_self = k is None if mask_self is None else mask_self
    wrap = order is not None if wrap is None else wrap
    scale = head_dim**-0.5 if scale is None else scale
    keys = F.normalize(q, dim=-1, eps=NORM_EPS) if k is None else k
    own_values = v if own_values is None else own_values
    if value_mix is not None:
        v = next_values(v, value_mix, key_padding_mask, causal=causal)

    counts = slot_counts(
        length,
        order,
        chunk_size=chunk_size,
        look_back=look_back,
        look_ahead=look_ahead,
        causal=causal,
        mask_self=mask_self,
        wrap=wrap,
        key_padding_mask=key_padding_mask,
        buckets=buckets,
        batch=batch,
        heads=heads,
        device=q.device,
    )
    total = counts.sum(dim=2)
    valid = total > 0
    has_key = valid.any(dim=-1)

    logits = scale * (q @ keys.transpose(-1, -2))
    if not correct_duplicates:
        logits = logits + total.clamp(min=1).to(logits.dtype).log()
    # Rows without a key get a harmless softmax, replaced below: their gradients stay finite.
    logits = logits.masked_fill(~valid & has_key[..., None], -math.inf)
    lse = torch.logsumexp(logits.to(torch.promote_types(q.dtype, torch.float32)), dim=-1)
    weights = torch.exp(logits - lse[..., None]).to(q.dtype)
    if dropout_p > 0.0:
        if dropout_seed is None:
            raise ValueError(
                "chunked_attention: expected a dropout_seed with dropout_p > 0, got None"
            )
        keep = dropout_keep(
            int(dropout_seed),
            dropout_p,
            batch=batch,
            heads=heads,
            rounds=counts.shape[2],
            length=length,
            device=q.device,
        )
        kept = (counts * keep).sum(dim=2)
        share = kept.to(lse.dtype) / total.clamp(min=1) / (1.0 - dropout_p)
        weights = weights * share.to(weights.dtype)
    out = weights @ v

    self_only = ~has_key if mask_self else torch.zeros_like(has_key)
    if key_padding_mask is not None:
        self_only = self_only & ~key_padding_mask[:, None, :]
    nothing = ~has_key & ~self_only
    out = torch.where(self_only[..., None], own_values, out).masked_fill(nothing[..., None], 0.0)
    lse = lse.masked_fill(self_only, SELF_ONLY_LSE).masked_fill(nothing, -math.inf)
    return out, lse


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    rotations: Tensor,
    n_buckets: int | Sequence[int],
    *,
    k: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    same_bucket: bool = False,
    **attention: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hash, sort, attend: ``(out, lse, buckets)``. See :func:`reformer_ext.lsh_attention`."""
    buckets = lsh_hash(qk, rotations, n_buckets, key_padding_mask)
    factors = [n_buckets] if isinstance(n_buckets, int) else list(n_buckets)
    order = bucket_sort(buckets, math.prod(factors) + 1)
    out, lse = chunked_attention(
        qk,
        k,
        v,
        order,
        key_padding_mask=key_padding_mask,
        buckets=buckets if same_bucket else None,
        **attention,  # type: ignore[arg-type]
    )
    return out, lse, buckets


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs ``(x[d], x[d + D/2])`` by angles; see :func:`reformer_ext.apply_rotary`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def split_heads(x: Tensor, parts: int, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """A projection's heads, all but the values turned; see :func:`reformer_ext.split_heads`."""
    heads = torch.unflatten(x, 2, (parts, -1, cos.shape[-1]))
    *queries_and_keys, v = heads.permute(2, 0, 3, 1, 4).unbind()
    return [*(apply_rotary(part, cos, sin) for part in queries_and_keys), v]


def merge_heads(q: Tensor, k: Tensor | None, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads turned and side by side; see :func:`reformer_ext.merge_heads`."""
    turned = [apply_rotary(part, cos, sin) for part in (q, k) if part is not None]
    return torch.stack([*turned, v], dim=2).permute(0, 3, 2, 1, 4).flatten(2)


def next_values(
    v: Tensor,
    value_mix: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """A sum of each value and its neighbours; see :func:`reformer_ext.next_values`."""
    batch, _, length, _ = v.shape
    padding = torch.zeros(batch, length, dtype=torch.bool, device=v.device)
    if key_padding_mask is not None:
        padding = key_padding_mask
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    wide = wide.masked_fill(padding[:, None, :, None], 0.0)
    steps = (0, 1) if causal else (-1, 0, 1)
    result = torch.zeros_like(wide)
    for step, factors in zip(steps, value_mix.to(wide.dtype), strict=True):
        at = torch.arange(length, device=v.device) + step
        inside = (at >= 0) & (at < length)
        at = at.clamp(0, length - 1)
        exists = (inside & ~padding[:, at])[:, None, :, None]
        result = result + factors[:, None, None] * torch.where(exists, wide[:, :, at], wide)
    return result.masked_fill(padding[:, None, :, None], 0.0).to(v.dtype)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins attentions of the same queries over disjoint key sets by their log-sum-exp."""
    stacked = torch.stack(list(lses))
    peak = stacked.amax(dim=0).detach()
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = torch.exp(stacked - peak)
    total = weights.sum(dim=0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    shares = (weights / total)[..., None]
    out = sum(share.to(part.dtype) * part for share, part in zip(shares, outs, strict=True))
    assert isinstance(out, Tensor)
    return out, (total.log() + peak).masked_fill(nothing, -math.inf)
