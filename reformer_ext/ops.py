"""The operators: typed, documented functions over ``torch.ops.reformer``.

Shapes: B batch, H heads, L length, D head dimension, R hash rounds. Heads come second, as in
:func:`torch.nn.functional.scaled_dot_product_attention`; any strides with a contiguous last
dimension; outputs keep the memory layout of the queries. Float32, float16 and bfloat16 on CPU and
CUDA, float64 on the CPU; D up to 256, on CUDA a multiple of 8. Any L >= 1, no padding needed.
All of them work under autograd, autocast, ``torch.compile(fullgraph=True)`` and ``torch.export``,
run on the current stream without synchronising, and give the same bits run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._extension import _C  # registers torch.ops.reformer

__all__ = [
    "apply_rotary",
    "bucket_sort",
    "chunked_attention",
    "default_n_buckets",
    "lsh_attention",
    "lsh_cache_append",
    "lsh_cross_attention",
    "lsh_decode",
    "lsh_hash",
    "merge_attention",
    "merge_heads",
    "next_values",
    "plan",
    "sample_rotations",
    "set_workspace_limit",
    "split_heads",
    "workspace_limit",
]

_MAX_FACTOR_BITS = 6


def default_n_buckets(length: int, chunk_size: int = 64) -> list[int]:
    """About ``2 * length / chunk_size`` buckets (half a chunk each), as a list of even factors.

    The number is the power of two at or below that. The work of hashing follows the sum of the
    factors, so numbers above 64 are split into near-equal powers of two of at most 64:
    65,536 positions in chunks of 64 give ``[32, 64]``. Raises ValueError if either is below 1, and
    in ``torch.export`` for a length whose range has more than one answer: a graph has one.
    """
    for size in (length, chunk_size):
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise ValueError(
                f"default_n_buckets: expected integers length and chunk_size, "
                f"got {length} and {chunk_size}"
            )
    if exports_any(length):
        return _default_factors(_exported_bits(length, chunk_size))
    if length < 1 or chunk_size < 1:
        raise ValueError(
            f"default_n_buckets: expected length and chunk_size >= 1, got {length} and {chunk_size}"
        )
    bits = 1
    while (chunk_size << bits) <= length:
        bits += 1
    return _default_factors(bits)


def _exported_bits(length: int, chunk_size: int) -> int:
    """As :func:`default_n_buckets`, for all lengths of a dynamic dimension."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for bits in range(1, 63):
        enough = bits == 1 or statically_known_true((chunk_size << (bits - 1)) <= length)
        if enough and statically_known_true((chunk_size << bits) > length):
            return bits
    raise ValueError(
        "default_n_buckets: expected n_buckets to be given where torch.export makes the length "
        f"dynamic, since their default number follows the length; got n_buckets None for {length}"
    )


def exports_any(length: int) -> bool:
    """Whether ``torch.export`` is tracing a graph for any such length, which must not depend on
    it."""
    return torch.compiler.is_exporting() and isinstance(length, torch.SymInt)


def _default_factors(bits: int) -> list[int]:
    n_factors = -(-bits // _MAX_FACTOR_BITS)
    small, larger = divmod(bits, n_factors)
    return [1 << small] * (n_factors - larger) + [1 << (small + 1)] * larger


def sample_rotations(
    n_heads: int,
    head_dim: int,
    n_hashes: int,
    n_buckets: int | Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gaussian rotations for :func:`lsh_hash` (Reformer, section 2).

    Returns ``(n_heads, head_dim, n_hashes, sum(n_buckets) / 2)`` of ``dtype``. The values are
    rounded to bfloat16 first, so that every dtype and device hashes with the same rotations.

    Args:
        n_heads: number of heads with rotations of their own; 1 to share one set.
        head_dim: D of the hashed vectors.
        n_hashes: rounds.
        n_buckets: an even number of buckets, or a list of even factors of it.
        generator: draws from it (and its device) instead of the global generator.
        device: of the result; default: the generator's, else torch's default device.
        dtype: of the result.
    """
    columns = sum(_factors("sample_rotations", n_buckets)) // 2
    draw_device = generator.device if generator is not None else device
    shape = (n_heads, head_dim, n_hashes, columns)
    if generator is None:  # this overload takes symbolic sizes
        rotations = torch.randn(shape, device=draw_device)
    else:
        rotations = torch.randn(shape, generator=generator, device=draw_device)
    return rotations.to(torch.bfloat16).to(device=device or draw_device, dtype=dtype)


def lsh_hash(
    x: Tensor,
    rotations: Tensor,
    n_buckets: int | Sequence[int],
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Buckets of ``x`` by random rotations: ``argmax([xR; -xR])`` per factor (Reformer, section 2).

    Equal directions tend to equal buckets, whatever the length of the vectors. The factors' digits
    make one number, the first the lowest: ``b1 + n1 * b2 + n1 * n2 * b3 ...``; ties go to the
    lowest index. Products are accumulated in float32 (float64 for float64) and never materialised
    as a whole. Not differentiable.

    Args:
        x: ``(B, H, L, D)``.
        rotations: ``(H or 1, D, R, sum(n_buckets) / 2)``, as from :func:`sample_rotations`. In
            x's own half-precision dtype the hash runs on tensor cores.
        n_buckets: an even number of buckets, or up to 8 even factors of it.
        key_padding_mask: bool ``(B, L)``, True = padding, which gets the bucket
            ``prod(n_buckets)``.

    Returns:
        int32 ``(B, H, R, L)``.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    factors = _factors("lsh_hash", n_buckets)
    return torch.ops.reformer.lsh_hash.default(x, rotations, factors, key_padding_mask)


def bucket_sort(buckets: Tensor, n_buckets: int) -> Tensor:
    """Stable sort of positions by bucket: ``order[b, h, r, :]`` lists them by (bucket, position).

    Args:
        buckets: int32 ``(B, H, R, L)``, values in ``[0, n_buckets)`` (out of range: an error on the
            CPU, clamped on CUDA).
        n_buckets: number of different buckets, the padding bucket included.

    Returns:
        int32 ``(B, H, R, L)``.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return torch.ops.reformer.bucket_sort.default(buckets, n_buckets)


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
    dropout_seed: int | Tensor | None = None,
    own_values: Tensor | None = None,
    value_mix: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention inside the chunks of a permutation and between neighbouring chunks.

    Each round's sorted list is cut into chunks of ``chunk_size`` (the last may be short); a query
    attends to its own chunk, ``look_back`` before and ``look_ahead`` after it. One softmax runs
    over all (round, key) slots, which equals combining the rounds by their log-sum-exp (Reformer,
    section 2, equation 6). Memory is linear in L. Differentiable in q, k, v, own_values and
    value_mix through both outputs.

    Args:
        q: ``(B, H, L, D)``.
        k: the same shape, or None for shared QK: the keys are then ``q / |q|``.
        v: the same shape.
        order: int32 ``(B, H, R, L)``, a permutation of the positions per round, as from
            :func:`bucket_sort`; None: one round in natural order, which is local attention.
        chunk_size: positions in a chunk.
        look_back: chunks before a query's own that it attends to.
        look_ahead: chunks after it.
        causal: a query attends to positions up to its own.
        mask_self: a query attends to itself only if no other key is valid in any round; its output
            is then exactly its value and its lse -1e5. Default: True for shared QK, else False.
        wrap: neighbours are taken circularly over all rounds laid end to end, as in the published
            Reformers; otherwise they stop at the ends of a round. Default: True with an order.
        scale: of the logits. Default ``D ** -0.5``; trax and transformers use 1.0 with shared QK.
        key_padding_mask: bool ``(B, L)``, True = padding, which nobody attends to.
        buckets: int32 ``(B, H, R, L)``: only pairs of the same bucket (in the same round) attend.
        correct_duplicates: a pair that meets in several rounds counts once (Reformer, appendix A).
        dropout_p: probability of dropping a weight, after normalisation.
        dropout_seed: an int, or an int64 tensor with one element on q's device (for CUDA graphs and
            torch.compile). The mask depends on it and on the pair alone, not on the device.
            Default: drawn from torch's global generator when ``dropout_p > 0``.
        own_values: the same shape as v, only with mask_self: what a query gets in place of its v
            that meets only itself.
        value_mix: ``(2, H)``, not causal ``(3, H)``, only with mask_self: attends to
            ``next_values(v, value_mix, key_padding_mask, causal=causal)`` with v as own_values. The
            same as those two calls, with fewer passes over the gradients.

    Returns:
        ``out (B, H, L, D)`` and ``lse (B, H, L)``, the natural log of each query's sum of
        exponentials, float32 (float64 for float64). A query without any valid key gets 0 and -inf.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return torch.ops.reformer.chunked_attention.default(
        q,
        k,
        v,
        order,
        chunk_size=chunk_size,
        look_back=look_back,
        look_ahead=look_ahead,
        causal=causal,
        mask_self=mask_self,
        wrap=wrap,
        scale=scale,
        key_padding_mask=key_padding_mask,
        buckets=buckets,
        correct_duplicates=correct_duplicates,
        dropout_p=dropout_p,
        dropout_seed=seed_tensor(dropout_seed, dropout_p, q.device),
        own_values=own_values,
        value_mix=value_mix,
    )


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    k: Tensor | None = None,
    n_hashes: int = 8,
    chunk_size: int = 64,
    n_buckets: int | Sequence[int] | None = None,
    rotations: Tensor | None = None,
    generator: torch.Generator | None = None,
    buckets: Tensor | None = None,
    look_back: int = 1,
    look_ahead: int = 0,
    causal: bool = False,
    mask_self: bool | None = None,
    wrap: bool | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    same_bucket: bool = False,
    correct_duplicates: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    own_values: Tensor | None = None,
    value_mix: Tensor | None = None,
    return_lse: bool = False,
    return_buckets: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """LSH attention: hash the queries, sort by bucket, attend within chunks (Reformer, section 2).

    O(L log L) time and linear memory, for ``n_hashes`` rounds over lists of L positions.

    Args:
        qk: shared queries and keys, ``(B, H, L, D)``.
        v: the same shape.
        k: separate keys of the same shape; query and key of a position then sit where the hash of
            ``qk`` puts the position.
        n_hashes: rounds R; ignored with ``rotations`` or ``buckets``, which bring their own.
        chunk_size: positions in a chunk.
        n_buckets: an even number, or a list of even factors; default :func:`default_n_buckets`.
        rotations: ``(H or 1, D, R, sum(n_buckets) / 2)``; default: drawn anew by
            :func:`sample_rotations`, per head. Pass them (or a generator) for a reproducible hash.
        generator: where the rotations are drawn from.
        buckets: int32 ``(B, H, R, L)`` from an earlier call with the same ``n_buckets``: nothing is
            hashed, as in the recomputation of a reversible layer.
        same_bucket: only pairs of the same bucket attend.
        look_back, look_ahead, causal, mask_self, wrap, scale, key_padding_mask, correct_duplicates,
            dropout_p, dropout_seed, own_values, value_mix: as in :func:`chunked_attention`;
            padding is hashed to a bucket of its own.
        return_lse: also return the log-sum-exps, ``(B, H, L)``.
        return_buckets: also return the buckets, int32 ``(B, H, R, L)``.

    Returns:
        ``out (B, H, L, D)``, or a tuple of it and what else was asked for, in the order above.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    if qk.dim() != 4:
        raise RuntimeError(f"lsh_attention: expected qk [B, H, L, D], got {list(qk.shape)}")
    if n_buckets is None:
        n_buckets = default_n_buckets(qk.shape[2], chunk_size)
    factors = _factors("lsh_attention", n_buckets)
    if rotations is None and buckets is None:
        rotations = sample_rotations(
            qk.shape[1],
            qk.shape[3],
            n_hashes,
            factors,
            generator=generator,
            device=qk.device,
            dtype=qk.dtype,
        )
    out, lse, buckets = torch.ops.reformer.lsh_attention.default(
        qk,
        v,
        rotations,
        factors,
        k=k,
        buckets=buckets,
        same_bucket=same_bucket,
        chunk_size=chunk_size,
        look_back=look_back,
        look_ahead=look_ahead,
        causal=causal,
        mask_self=mask_self,
        wrap=wrap,
        scale=scale,
        key_padding_mask=key_padding_mask,
        correct_duplicates=correct_duplicates,
        dropout_p=dropout_p,
        dropout_seed=seed_tensor(dropout_seed, dropout_p, qk.device),
        own_values=own_values,
        value_mix=value_mix,
    )
    if not (return_lse or return_buckets):
        return out
    return (out, *([lse] if return_lse else []), *([buckets] if return_buckets else []))


def lsh_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    n_hashes: int = 8,
    chunk_size: int = 64,
    n_buckets: int | Sequence[int] | None = None,
    rotations: Tensor | None = None,
    generator: torch.Generator | None = None,
    buckets: Tensor | None = None,
    look_back: int = 1,
    look_ahead: int = 1,
    wrap: bool | None = None,
    scale: float | None = None,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    same_bucket: bool = False,
    correct_duplicates: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_buckets: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """LSH attention of queries over the keys of another sequence, of any length.

    Both sides are hashed by the same rotations. Each round sorts queries and keys in one list of
    Lq + Lk rows, by bucket, in a bucket the queries first, and cuts it into chunks; a query attends
    to the keys in its own chunk, ``look_back`` before and ``look_ahead`` after it. So time and
    memory are those of :func:`lsh_attention` over Lq + Lk positions. A query that meets no key in
    any round gets 0. As there, where chunks begin, and so which keys a query meets, depends on the
    other rows too.

    Args:
        q: ``(B, H, Lq, D)``.
        k: ``(B, H, Lk, D)``, of q's dtype (but under autocast).
        v: the same shape and dtype as k.
        n_hashes: rounds R; ignored with ``rotations`` or ``buckets``, which bring their own.
        chunk_size: rows of the joint list in a chunk.
        n_buckets: an even number, or a list of even factors; default :func:`default_n_buckets` of
            Lq + Lk.
        rotations, generator: as in :func:`lsh_attention`.
        buckets: int32 ``(B, H, R, Lq + Lk)``, the queries' first, from an earlier call with the
            same ``n_buckets``: nothing is hashed.
        look_back, look_ahead, wrap, scale, correct_duplicates, dropout_p, dropout_seed: as in
            :func:`chunked_attention`.
        query_padding_mask: bool ``(B, Lq)``, True = padding, whose results nobody reads.
        key_padding_mask: bool ``(B, Lk)``, True = padding, which nobody attends to. Padding of both
            is hashed to a bucket of its own.
        same_bucket: only pairs of the same bucket attend.
        return_lse: also return the log-sum-exps, ``(B, H, Lq)``.
        return_buckets: also return the buckets.

    Returns:
        ``out (B, H, Lq, D)``, or a tuple of it and what else was asked for, in the order above.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    if q.dim() != 4:
        raise RuntimeError(f"lsh_cross_attention: expected q [B, H, Lq, D], got {list(q.shape)}")
    if n_buckets is None:
        rows = q.shape[2] + (k.shape[2] if k.dim() == 4 else 1)  # any other rank is refused below
        n_buckets = default_n_buckets(rows, chunk_size)
    factors = _factors("lsh_cross_attention", n_buckets)
    if rotations is None and buckets is None:
        rotations = sample_rotations(
            q.shape[1],
            q.shape[3],
            n_hashes,
            factors,
            generator=generator,
            device=q.device,
            dtype=q.dtype,
        )
    out, lse, buckets = torch.ops.reformer.lsh_cross_attention.default(
        q,
        k,
        v,
        rotations,
        factors,
        query_padding_mask=query_padding_mask,
        buckets=buckets,
        same_bucket=same_bucket,
        chunk_size=chunk_size,
        look_back=look_back,
        look_ahead=look_ahead,
        wrap=wrap,
        scale=scale,
        key_padding_mask=key_padding_mask,
        correct_duplicates=correct_duplicates,
        dropout_p=dropout_p,
        dropout_seed=seed_tensor(dropout_seed, dropout_p, q.device),
    )
    if not (return_lse or return_buckets):
        return out
    return (out, *([lse] if return_lse else []), *([buckets] if return_buckets else []))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs ``(x[d], x[d + D/2])``: ``x * cos + roll(x, D/2) * sin``, in float32.

    Args:
        x: ``(B, H, L, D)`` or ``(N, B, H, L, D)``, D even.
        cos, sin: float32 ``(L, D)`` or ``(B, 1, L, D)``, ``[c, c]`` and ``[-s, s]`` of the angles,
            as :class:`reformer_ext.nn.RotaryPositions` makes them. No gradient.

    Returns:
        Shape and dtype of x. Differentiable in x.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return torch.ops.reformer.apply_rotary.default(x, cos, sin)


def split_heads(x: Tensor, parts: int, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Splits a projection into heads and turns queries and keys, in one pass; so does its backward.

    Args:
        x: ``(B, L, parts * H * D)``, D even: rows of queries, of keys unless parts is 2, and of
            values.
        parts: 2 for shared queries and keys, else 3.
        cos, sin: as in :func:`apply_rotary`.

    Returns:
        ``parts`` tensors ``(B, H, L, D)``, in memory ``(B, L, H, D)``. Differentiable in x.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    heads: list[Tensor] = torch.ops.reformer.split_heads.default(x, parts, cos, sin)
    return heads


def merge_heads(q: Tensor, k: Tensor | None, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns queries and keys and lays all heads side by side, as a projection has them.

    ``merge_heads(q, k, v, cos, -sin)`` is the inverse of :func:`split_heads`, and its derivative.

    Args:
        q, v: ``(B, H, L, D)``.
        k: the same, or None for shared queries and keys.
        cos, sin: as in :func:`apply_rotary`.

    Returns:
        ``(B, L, 2 * H * D)``, with keys ``(B, L, 3 * H * D)``. Differentiable in q, k and v.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return torch.ops.reformer.merge_heads.default(q, k, v, cos, sin)


def next_values(
    v: Tensor,
    value_mix: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """Values that say what comes next: ``w_j = a * v_j + b * v_{j+1}``, a and b per head.

    For a causal attention whose queries never attend to themselves (``mask_self``): a key that
    query i meets has ``j + 1 <= i``, so nothing of the future is seen, and a match tells what
    followed it. A query that meets only itself must get its own ``v_i``: pass v as ``own_values``.
    Relatives are KV shifting attention (arXiv 2411.19574), which looks back instead, and RWKV's
    token shift. A neighbour that does not exist or is padding is ``v_j`` itself; w is zero at
    padding.

    Args:
        v: ``(B, H, L, D)``.
        value_mix: ``(2, H)``, rows a and b; not causal: ``(3, H)``, factors of ``v_{j-1}``, ``v_j``
            and ``v_{j+1}``. Any floating dtype; computed with in float32 (float64 for float64 v).
        key_padding_mask: bool ``(B, L)``, True = padding.
        causal: mix in the next value only.

    Returns:
        Shape and dtype of v, dense, in the order of v's memory. Differentiable in v and value_mix.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return torch.ops.reformer.next_values.default(v, value_mix, key_padding_mask, causal=causal)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins attentions of the same queries over disjoint key sets, exactly, by log-sum-exp.

    Args:
        outs: n tensors ``(B, H, L, D)``.
        lses: their ``(B, H, L)`` log-sum-exps; -inf where a part had no key.

    Returns:
        ``out (B, H, L, D)`` and ``lse (B, H, L)``: what one softmax over all keys gives.
        Differentiable in everything.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return torch.ops.reformer.merge_attention.default(list(outs), list(lses))


def lsh_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    counts: Tensor,
    buckets: Tensor,
    *,
    own_values: Tensor | None = None,
    scale: float | None = None,
    correct_duplicates: bool = False,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of new queries to the cached positions that fell into their buckets.

    One softmax over the slots of all rounds, as in :func:`lsh_attention`. The cost follows
    ``R * W``, not the number of positions held. C is the capacity, N the number of buckets, W the
    positions that a bucket remembers.

    Args:
        q: ``(B, H, T, D)``. The T queries do not see each other, unless they are in the cache.
        keys, values: ``(B, H, C, D)`` of q's dtype; for shared QK unit-length keys.
        table: int32 ``(B, H, R, N, W)``, positions; number i of a bucket is in slot ``i % W``.
        counts: int32 ``(B, H, R, N)``, how many positions each bucket has had.
        buckets: int32 ``(B, H, R, T)`` of the queries; N or more: padding, which finds nothing.
        own_values: like q: what a query gets that finds no key; its lse is then -1e5.
        scale: of the logits. Default ``D ** -0.5``.
        correct_duplicates: a key found in several rounds counts once.
        before: int64 ``(B,)``: query t of sequence b finds only positions below ``before[b] + t``,
            for queries whose own positions are in the cache already.

    Returns:
        ``out (B, H, T, D)`` and ``lse (B, H, T)``, float32 (float64 for float64). Without
        own_values, a query that finds no key gets 0 and -inf. Not differentiable.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return torch.ops.reformer.lsh_decode.default(
        q,
        keys,
        values,
        table,
        counts,
        buckets,
        own_values=own_values,
        scale=scale,
        correct_duplicates=correct_duplicates,
        before=before,
    )


def lsh_cache_append(
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    counts: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: Tensor,
    lengths: Tensor,
    *,
    normalize: bool = False,
    value_mix: Tensor | None = None,
    last_values: Tensor | None = None,
) -> None:
    """Puts T new positions into the cache of :func:`lsh_decode`, in place.

    Args:
        keys, values, table, counts: the cache, contiguous; counts are zero at first.
        k, v: ``(B, H, T, D)`` of the keys' dtype.
        buckets: int32 ``(B, H, R, T)``; N or more: padding, which no bucket takes.
        lengths: int64 ``(B,)``: row t of sequence b becomes position ``lengths[b] + t``. Positions
            beyond the capacity are dropped.
        normalize: keys of length one are made of k, as of the queries of shared QK.
        value_mix: ``(2, H)``, with last_values: values are kept as :func:`next_values` makes them
            of all there have been; padding is what no bucket of the first round takes. The newest
            value is kept as it is until the next one comes. Query i meets the value of position
            i - 1, which ``v_i`` completes: append first, then decode with ``before``.
        last_values: ``(B, H, D)`` like values, contiguous: the newest v, changed in place. Not read
            where lengths is 0.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    torch.ops.reformer.lsh_cache_append.default(
        keys,
        values,
        table,
        counts,
        k,
        v,
        buckets,
        lengths,
        normalize=normalize,
        value_mix=value_mix,
        last_values=last_values,
    )


@dataclass(frozen=True)
class KernelChoice:
    """A kernel's name, its scratch memory in bytes, and how many heads share that at a time (for
    the sort: sequences, one for each head and round)."""

    kernel: str
    workspace: int
    group: int


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` answers. ``hash`` and ``sort`` are None for local attention.

    Kernels: hash ``direct``, ``wgmma``, ``mma_sync``, ``simt``; sort ``cluster``, ``tiles``,
    ``packed``, ``wide``; attention ``local``, ``wgmma``, ``mma_sync``, ``generic``.
    """

    arch: int
    multiprocessors: int
    hash: KernelChoice | None
    sort: KernelChoice | None
    forward: KernelChoice
    backward: KernelChoice


def plan(
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    n_hashes: int = 8,
    n_buckets: int | Sequence[int] | None = None,
    keys: bool = False,
    same_bucket: bool = False,
    padding: bool = False,
    chunk_size: int = 64,
    look_back: int = 1,
    look_ahead: int = 0,
    causal: bool = False,
    mask_self: bool | None = None,
    wrap: bool | None = None,
    scale: float | None = None,
    correct_duplicates: bool = False,
    dropout_p: float = 0.0,
    arch: int | None = None,
    multiprocessors: int | None = None,
) -> Plan:
    """Which CUDA kernels an attention of these sizes would run, without running them.

    Answered by the code that chooses them, for a build with code for 9.0a and PTX for 8.0; needs no
    GPU. Tensors are taken to be contiguous.

    Args:
        shape: ``(B, H, L, D)`` of the queries.
        dtype: of the tensors, the rotations included.
        n_hashes: rounds; 0: local attention, in natural order.
        n_buckets: as in :func:`lsh_attention`; default :func:`default_n_buckets` of L.
        keys: whether keys are given, not shared with the queries.
        padding: whether a key padding mask is given: its positions have a bucket of their own.
        same_bucket, chunk_size, look_back, look_ahead, causal, mask_self, wrap, scale,
            correct_duplicates, dropout_p: as in :func:`lsh_attention`.
        arch: 80, 86, 89, 90, 100 or 120: compute capability 8.0 and so on; default: the current
            GPU's, without one 90.
        multiprocessors: of the GPU; default: the current GPU's if ``arch`` is its own, else those
            of an A100, A40, L40S, H200, B200 or RTX PRO 6000.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties()
        if arch in (None, gpu.major * 10 + gpu.minor):
            arch = gpu.major * 10 + gpu.minor
            multiprocessors = multiprocessors or gpu.multi_processor_count
    options = _C.AttentionOptions()
    options.chunk_size = chunk_size
    options.look_back = look_back
    options.look_ahead = look_ahead
    options.causal = causal
    options.mask_self = mask_self
    options.wrap = wrap
    options.scale = scale
    options.key_padding_mask = torch.zeros(1) if padding else None  # whether there is one counts
    options.correct_duplicates = correct_duplicates
    options.dropout_p = dropout_p
    factors: list[int] = []
    if n_hashes > 0:
        if n_buckets is None:
            n_buckets = default_n_buckets(shape[2], chunk_size)
        factors = _factors("plan", n_buckets)
    found = _C.plan(
        shape,
        dtype,
        n_hashes,
        factors,
        shared_qk=not keys,
        same_bucket=same_bucket,
        options=options,
        arch=arch or 90,
        multiprocessors=multiprocessors or 0,
    )

    def choice(of: _C.KernelChoice) -> KernelChoice:
        return KernelChoice(of.kernel, of.workspace, of.group)

    return Plan(
        arch=found.arch,
        multiprocessors=found.multiprocessors,
        hash=choice(found.hash) if n_hashes > 0 else None,
        sort=choice(found.sort) if n_hashes > 0 else None,
        forward=choice(found.forward),
        backward=choice(found.backward),
    )


def set_workspace_limit(limit: int) -> None:
    """Caps the scratch memory of :func:`chunked_attention` on CUDA (default: 1.25 GiB).

    One call works on as many heads at a time as fit, one at least, with the same results; its time
    grows by a few per cent where heads must take turns. A head takes ``2 * R * L * D`` elements in
    the backward pass and half of that in the forward pass. Of the whole process.

    Args:
        limit: bytes, 0 or more.

    Raises:
        RuntimeError: if it is negative.
    """
    _C.set_workspace_limit(limit)


def workspace_limit() -> int:
    """Bytes; see :func:`set_workspace_limit`."""
    return _C.workspace_limit()


def _factors(op: str, n_buckets: int | Sequence[int]) -> list[int]:
    factors = [n_buckets] if isinstance(n_buckets, int) else list(n_buckets)
    if not factors or any(factor < 2 or factor % 2 for factor in factors):
        raise RuntimeError(f"{op}: expected n_buckets to be even and >= 2, got {n_buckets}")
    return factors


def seed_tensor(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    if isinstance(seed, Tensor):
        return seed
    if seed is not None and not isinstance(seed, (int, torch.SymInt)):
        raise RuntimeError(
            f"chunked_attention: expected dropout_seed to be an int or an int64 tensor, got {seed}"
        )
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)
