"""Self-attention layers over ``(B, L, dim)``: LSH, local and full."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..packed import chunked_attention_packed, group_seed, map_sequences, sequence_lengths
from .cache import FullCache, LocalCache, LSHCache
from .positions import apply_rotary

__all__ = ["FullSelfAttention", "LSHSelfAttention", "LocalSelfAttention", "hash_rotations"]


def hash_rotations(
    seed: int,
    step: int | Tensor,
    n_heads: int,
    head_dim: int,
    n_hashes: int,
    n_buckets: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Random rotations as a pure function of ``(seed, step)``, for :func:`reformer_ext.lsh_hash`.

    No generator is involved, so the function can be traced, exported and captured in a CUDA graph,
    and the integer arithmetic gives the same bits on every device. An entry is a centred sum of
    four uniform 7-bit numbers: what is compared are projections of whole vectors, sums of
    ``head_dim`` such entries, which are as good as Gaussian, and their scale does not matter.

    Args:
        seed: tells modules apart.
        step: tells calls apart: an int, or an int64 tensor with one element on the device.
        n_heads, head_dim, n_hashes, n_buckets: as in :func:`reformer_ext.sample_rotations`.

    Returns:
        ``(n_heads, head_dim, n_hashes, sum(n_buckets) / 2)``, mean 0, variance 4/3, exact in
        bfloat16.
    """
    shape = (n_heads, head_dim, n_hashes, sum(n_buckets) // 2)
    counter = torch.arange(math.prod(shape), device=device)
    key = _mix(_mix(seed & 0xFFFFFFFF) ^ 0x9E3779B9)
    words = _mix(_mix(counter ^ key) ^ _mix(step & 0xFFFFFFFF))
    total = (words & 127) + (words >> 8 & 127) + (words >> 16 & 127) + (words >> 24 & 127)
    # -254 .. 254 over 64: exact in bfloat16, so no compiler can skip a rounding.
    return ((total - 254).to(torch.float32) / 64).to(dtype).view(shape)


@overload
def _mix(x: int) -> int: ...
@overload
def _mix(x: Tensor) -> Tensor: ...
def _mix(x: int | Tensor) -> int | Tensor:
    """A bijection of 32-bit words. The factors are below 2**31: products fit an int64."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


class _Attention(nn.Module):
    """Projections into heads and back, and what all kinds have in common."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None,
        n_projections: int,
        *,
        causal: bool,
        scale: float | None,
        dropout: float,
        bias: bool,
        out_bias: bool | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if head_dim is None:
            if heads < 1 or dim % heads:
                raise ValueError(f"{name}: expected dim divisible by heads, got {dim} and {heads}")
            head_dim = dim // heads
        if heads < 1 or not 1 <= head_dim <= 256:
            raise ValueError(
                f"{name}: expected heads >= 1 and head_dim in 1 .. 256, got {heads} and {head_dim}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{name}: expected dropout in [0, 1), got {dropout}")
        self.heads = heads
        self.head_dim = head_dim
        self.causal = causal
        self.scale = scale
        self.dropout = dropout
        self.n_projections = n_projections
        self.in_proj = nn.Linear(dim, n_projections * heads * head_dim, bias=bias)
        out_bias = bias if out_bias is None else out_bias
        self.out_proj = nn.Linear(heads * head_dim, dim, bias=out_bias)

    def _project_in(
        self, x: Tensor, norm: nn.Module | None = None, heads: tuple[int, int] | None = None
    ) -> Tensor:
        """``(B, L, dim) -> (n_projections, B, H, L, D)``, a view of one matrix product; H those of
        ``heads``, default all. What a norm before it gives is computed again for the backward, not
        kept."""
        if x.dim() != 3 or x.shape[-1] != self.in_proj.in_features:
            raise ValueError(
                f"{type(self).__name__}: expected x [B, L, {self.in_proj.in_features}], "
                f"got {list(x.shape)}"
            )
        in_proj = self.in_proj if heads is None else self._part_of_in_proj(*heads)
        if norm is None:
            projected = in_proj(x)
        else:  # checkpoint stops early: the product is not computed again
            projected = checkpoint(
                lambda x: in_proj(norm(x)), x, use_reentrant=False, preserve_rng_state=False
            )
        projected = projected.unflatten(-1, (self.n_projections, -1, self.head_dim))
        return projected.permute(2, 0, 3, 1, 4)

    def _part_of_in_proj(self, first: int, end: int) -> Callable[[Tensor], Tensor]:
        """``in_proj`` to the heads ``first .. end - 1`` alone."""

        def rows(parameter: Tensor) -> Tensor:
            by_head = torch.unflatten(parameter, 0, (self.n_projections, -1, self.head_dim))
            return by_head[:, first:end].flatten(0, 2)

        weight, bias = self.in_proj.weight, self.in_proj.bias
        return lambda x: F.linear(x, rows(weight), None if bias is None else rows(bias))

    def _turn(self, projected: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Sequence[Tensor]:
        """Queries, keys and values ``(B, H, L, D)``, all but the values in their positions."""
        if rotary is None:
            return projected.unbind()
        if torch.is_grad_enabled():
            # Values as a view would keep the unturned rest for the backward, which would gather
            # the projection's gradient from pieces.
            rows = projected.permute(1, 3, 0, 2, 4).flatten(2)
            return ops.split_heads(rows, self.n_projections, *rotary)
        return *apply_rotary(projected[:-1], rotary), projected[-1]

    def _project_out(self, out: Tensor, heads: tuple[int, int] | None = None) -> Tensor:
        """``(B, H, L, D) -> (B, L, dim)``, of all heads or the share of some in the sum."""
        out = out.transpose(1, 2).flatten(2)
        if heads is None:
            return self.out_proj(out)
        first, end = heads
        columns = self.out_proj.weight[:, first * self.head_dim : end * self.head_dim]
        return F.linear(out, columns, self.out_proj.bias if first == 0 else None)  # bias once

    def _check_heads(self, heads: tuple[int, int] | None, cache: nn.Module | None) -> None:
        """Raises ValueError unless there are such heads, and no cache of all."""
        if heads is None:
            return
        if cache is not None or not 0 <= heads[0] < heads[1] <= self.heads:
            raise ValueError(
                f"{type(self).__name__}: expected heads (first, end) with 0 <= first < end <= "
                f"{self.heads} and no cache, got {heads} and "
                f"{'no cache' if cache is None else 'one'}"
            )

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


def check_padding(expected: str, mask: Tensor | None, x: Tensor) -> None:
    """Raises ValueError unless the mask is that of ``x (B, L, ...)``, or None."""
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"{expected} {list(x.shape[:2])} of torch.bool, got {list(mask.shape)} of {mask.dtype}"
        )


def _narrow(buckets: Tensor, n_buckets: Sequence[int]) -> Tensor:
    """Buckets in int16 where they fit, else int32; that of padding is ``prod(n_buckets)``."""
    small = math.prod(n_buckets) <= torch.iinfo(torch.int16).max
    return buckets.to(torch.int16 if small else torch.int32)


def _prompt_lengths(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Of the sequences ``x (B, L, dim)``, padded at their ends."""
    if key_padding_mask is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
    return (~key_padding_mask).sum(1)


class LSHSelfAttention(_Attention):
    """LSH self-attention with shared queries and keys (Reformer, section 2).

    The hash is a pure function of ``hash_seed`` and the ``hash_step`` of the call; the layer holds
    no state and never uses a global generator. Without a ``hash_step`` every call hashes alike, in
    training too; :class:`Reformer` passes the number of the training step, so that its layers see
    new rotations at each step, as the published Reformers do, and always the same in evaluation.

    Args:
        dim: width of input and output.
        heads: H.
        head_dim: D; default ``dim / heads``.
        n_hashes: rounds R.
        chunk_size: positions in a chunk.
        n_buckets: an even number or a list of even factors; default
            :func:`reformer_ext.default_n_buckets` of each call's length.
        causal: positions attend to themselves and earlier ones only.
        look_back, look_ahead: chunks before and after its own that a query attends to. look_ahead
            defaults to 0 if causal, else 1: without causality both sides of the sorted list count.
        same_bucket: only pairs in the same bucket attend (as in the paper; not so in its code).
        correct_duplicates: a pair that meets in several rounds counts once (paper, appendix A; not
            so in its code).
        scale: of the logits, query times unit-length key; default ``D ** -0.5``.
        dropout: of the attention weights, in training.
        bias: of the projections.
        out_bias: of the output projection; default: as bias.
        hash_seed: of the rotations; layers of one model should differ in it.
        rotary_before_hash: hash what rotary positions have turned; default: hash the content alone.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        n_hashes: int = 8,
        chunk_size: int = 64,
        n_buckets: int | Sequence[int] | None = None,
        causal: bool = False,
        look_back: int = 1,
        look_ahead: int | None = None,
        same_bucket: bool = False,
        correct_duplicates: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        out_bias: bool | None = None,
        hash_seed: int = 0,
        rotary_before_hash: bool = False,
    ) -> None:
        super().__init__(
            dim,
            heads,
            head_dim,
            2,
            causal=causal,
            scale=scale,
            dropout=dropout,
            bias=bias,
            out_bias=out_bias,
        )
        if n_hashes < 1 or chunk_size < 1:
            raise ValueError(
                f"LSHSelfAttention: expected n_hashes and chunk_size >= 1, "
                f"got {n_hashes} and {chunk_size}"
            )
        self.n_hashes = n_hashes
        self.chunk_size = chunk_size
        self.n_buckets = [n_buckets] if isinstance(n_buckets, int) else n_buckets
        self.look_back = look_back
        self.look_ahead = look_ahead if look_ahead is not None else 0 if causal else 1
        self.same_bucket = same_bucket
        self.correct_duplicates = correct_duplicates
        self.hash_seed = hash_seed
        self.rotary_before_hash = rotary_before_hash

    def rotations(
        self,
        n_buckets: Sequence[int],
        n_hashes: int | None = None,
        hash_step: int | Tensor = 0,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Of the layer's hash, ``(H, D, R, sum(n_buckets) / 2)``; see :func:`hash_rotations`."""
        return hash_rotations(
            self.hash_seed,
            hash_step,
            self.heads,
            self.head_dim,
            self.n_hashes if n_hashes is None else n_hashes,
            n_buckets,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        n_hashes: int | None = None,
        hash_step: int | Tensor = 0,
        dropout_seed: int | Tensor | None = None,
        buckets: Tensor | None = None,
        return_buckets: bool = False,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        norm: nn.Module | None = None,
        heads: tuple[int, int] | None = None,
        cache: LSHCache | None = None,
        cache_lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends within x, or to a cache.

        Args:
            x: ``(B, L, dim)``.
            key_padding_mask: bool ``(B, L)``, True = padding.
            rotary: from :class:`RotaryPositions`; with cu_seqlens, of the positions within each
                sequence.
            n_hashes: rounds of this call.
            hash_step: changes the hash; an int, or an int64 tensor with one element.
            dropout_seed: as in :func:`reformer_ext.lsh_attention`; default: drawn from the global
                generator if there is dropout.
            buckets: of an earlier call on x, to attend alike: nothing is hashed.
            return_buckets: return the buckets too.
            cu_seqlens: x is packed sequences, ``(1, total, dim)``, each of which attends within
                itself, as alone; see :mod:`reformer_ext.packed`.
            norm: applied to x first, and once more in the backward, rather than keeping what it
                gave.
            heads: ``(first, end)``: compute these only, and what they add to the result; the sum
                over groups of heads that are all of them is the whole. Not with a cache.
            cache: with ``cache_lengths``, int64 ``(B,)``, the positions that it holds, x continues
                those; without, x begins the sequences (padded at their ends) and fills the cache,
                whose hash is then used.

        Returns:
            ``(B, L, dim)``, and with return_buckets ``(B, H, R, L)`` of int16 where they fit, else
            int32.
        """
        self._check_heads(heads, cache)
        projected = self._project_in(x, norm, heads)
        qk, v = self._turn(projected, rotary)
        # With buckets given, the unturned heads can go.
        hashed = qk if self.rotary_before_hash or buckets is not None else projected[0]
        del projected
        if cache is not None and cache_lengths is not None:
            continued = cache.attend(
                qk,
                hashed,
                v,
                cache_lengths,
                scale=self.scale,
                correct_duplicates=self.correct_duplicates,
            )
            return self._project_out(continued)
        longest = x.shape[1]
        if cu_seqlens is None:
            out, buckets = self._attend(
                qk,
                hashed,
                v,
                buckets,
                key_padding_mask,
                n_hashes,
                hash_step,
                dropout_seed,
                heads,
                cache,
            )
        else:
            lengths = sequence_lengths(
                type(self).__name__, cu_seqlens, x.shape[:2], key_padding_mask
            )
            longest = max(lengths)
            inputs = [(qk, 2), (hashed, 2), (v, 2), (buckets, 3)]

            def attend(
                group: int, qk: Tensor, hashed: Tensor, v: Tensor, buckets: Tensor | None
            ) -> tuple[Tensor, Tensor]:
                seed = group_seed(dropout_seed, group)
                return self._attend(qk, hashed, v, buckets, None, n_hashes, hash_step, seed, heads)

            out, buckets = map_sequences(attend, lengths, inputs, (2, 3))
        y = self._project_out(out, heads)
        if not return_buckets:
            return y
        return y, _narrow(buckets, self._n_buckets(longest))

    def _n_buckets(self, length: int) -> Sequence[int]:
        return self.n_buckets or ops.default_n_buckets(length, self.chunk_size)

    def _attend(
        self,
        qk: Tensor,
        hashed: Tensor,
        v: Tensor,
        buckets: Tensor | None,
        key_padding_mask: Tensor | None,
        n_hashes: int | None,
        hash_step: int | Tensor,
        dropout_seed: int | Tensor | None,
        heads: tuple[int, int] | None = None,
        cache: LSHCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(B, H, L, D)`` of the heads, and the buckets."""
        n_buckets = self._n_buckets(qk.shape[2]) if cache is None else cache.n_buckets
        if buckets is None:
            rotations = (
                self.rotations(n_buckets, n_hashes, hash_step, device=qk.device, dtype=qk.dtype)
                if cache is None
                else cache.rotations.to(qk.dtype)
            )
            if heads is not None:
                rotations = rotations[slice(*heads)]
            buckets = ops.lsh_hash(hashed.detach(), rotations, n_buckets, key_padding_mask)
        if cache is not None:
            start = torch.zeros(qk.shape[0], dtype=torch.int64, device=qk.device)
            cache.append(qk, v, buckets.to(torch.int32), start)
        out = ops.lsh_attention(
            qk,
            v,
            n_buckets=n_buckets,
            buckets=buckets.to(torch.int32),
            chunk_size=self.chunk_size,
            look_back=self.look_back,
            look_ahead=self.look_ahead,
            causal=self.causal,
            scale=self.scale,
            key_padding_mask=key_padding_mask,
            same_bucket=self.same_bucket,
            correct_duplicates=self.correct_duplicates,
            dropout_p=self._dropout_p(),
            dropout_seed=dropout_seed,
        )
        assert isinstance(out, Tensor)
        return out, buckets


class LocalSelfAttention(_Attention):
    """Self-attention within chunks of neighbouring positions and the chunks beside them.

    Args:
        dim, heads, head_dim, causal, scale, dropout, bias, out_bias: as in
            :class:`LSHSelfAttention`, with separate queries and keys.
        chunk_size: positions in a chunk.
        look_back, look_ahead: chunks before and after its own that a query attends to; look_ahead
            defaults to 0 if causal, else 1.
        wrap: the first and the last chunk are neighbours (as in transformers).

    Raises:
        ValueError: naming the argument.
    """

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
        )
        if chunk_size < 1:
            raise ValueError(f"LocalSelfAttention: expected chunk_size >= 1, got {chunk_size}")
        self.chunk_size = chunk_size
        self.look_back = look_back
        self.look_ahead = look_ahead if look_ahead is not None else 0 if causal else 1
        self.wrap = wrap

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
        self._check_heads(heads, cache)
        q, k, v = self._turn(self._project_in(x, norm, heads), rotary)
        if cache is not None and cache_windows is not None:
            return self._project_out(cache.attend(q, k, v, cache_windows, scale=self.scale))
        if cache is not None:
            cache.append(k, v, _prompt_lengths(x, key_padding_mask))
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
            dropout_p=self._dropout_p(),
            dropout_seed=dropout_seed,
        )
        return self._project_out(out, heads)


class FullSelfAttention(_Attention):
    """Exact self-attention (:func:`torch.nn.functional.scaled_dot_product_attention`).

    Args:
        dim, heads, head_dim, causal, scale, dropout, bias, out_bias: as in
            :class:`LSHSelfAttention`.
        shared_qk: keys are the length-normalised queries, and a position attends to itself only if
            nothing else is allowed, as the first one of a causal sequence: what LSH attention
            approximates, and its exact limit. Takes an ``L x L`` mask.

    Raises:
        ValueError: naming the argument.
    """

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
        )
        self.shared_qk = shared_qk

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
        self._check_heads(heads, cache)
        *qk, v = self._turn(self._project_in(x, norm, heads), rotary)
        check_padding("FullSelfAttention: expected key_padding_mask", key_padding_mask, x)
        q, k = qk if not self.shared_qk else (qk[0], F.normalize(qk[0], dim=-1))
        if cache is not None and cache_lengths is not None:
            out = cache.attend(q, k, v, cache_lengths, scale=self.scale, mask_self=self.shared_qk)
            return self._project_out(out)
        if cache is not None:
            cache.append(k, v, torch.zeros_like(_prompt_lengths(x, None)))
        if cu_seqlens is None:
            out = self._attend(q, k, v, key_padding_mask)
        else:
            lengths = sequence_lengths(
                type(self).__name__, cu_seqlens, x.shape[:2], key_padding_mask
            )

            def attend(group: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
                return (self._attend(q, k, v, None),)

            (out,) = map_sequences(attend, lengths, [(q, 2), (k, 2), (v, 2)], (2,))
        return self._project_out(out, heads)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        mask, self_only = self._mask(q.shape[2], key_padding_mask, q.device)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self._dropout_p(),
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
