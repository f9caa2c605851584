"""LSH self-attention (Reformer, section 2), its hash and its cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from ... import ops
from ...packed import group_seed, map_sequences, sequence_lengths
from ..cache import CacheSizes, LayerCache
from ..checks import check_bool, check_dropout, check_scale, check_window, is_int
from ..config import ReformerConfig
from .base import AttentionCall, AttentionOptions, SelfAttention, join_positions

__all__ = ["LSHCache", "LSHOptions", "LSHSelfAttention", "hash_rotations", "narrow_buckets"]


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


def narrow_buckets(buckets: Tensor, n_buckets: Sequence[int]) -> Tensor:
    """Buckets in int16 where they fit, else int32; that of padding is ``prod(n_buckets)``."""
    small = math.prod(n_buckets) <= torch.iinfo(torch.int16).max
    return buckets.to(torch.int16 if small else torch.int32)


@dataclass(frozen=True)
class LSHOptions(AttentionOptions):
    """Options of a layer of :class:`LSHSelfAttention`."""

    config_fields: ClassVar[Mapping[str, str]] = {
        **{name: name for name in ("n_hashes", "chunk_size", "n_buckets", "look_back")},
        **{name: name for name in ("look_ahead", "same_bucket", "correct_duplicates")},
        "scale": "shared_qk_scale",
        "dropout": "attention_dropout",
        "out_bias": "attention_out_bias",
        "rotary": "turns_shared_qk",
        "rotary_before_hash": "rotary_before_hash",
        "next_values": "mixes_next_values",
    }

    n_hashes: int = 8
    chunk_size: int = 64
    n_buckets: int | Sequence[int] | None = None
    look_back: int = 1
    look_ahead: int | None = None
    same_bucket: bool = False
    correct_duplicates: bool = False
    scale: float | None = None
    dropout: float = 0.0
    out_bias: bool | None = None
    rotary: bool = True
    rotary_before_hash: bool = False
    next_values: bool = False

    def check(self, name: str) -> None:
        if not (is_int(self.n_hashes, 1) and is_int(self.chunk_size, 1)):
            raise ValueError(
                f"{name}: expected n_hashes and chunk_size >= 1, "
                f"got {self.n_hashes!r} and {self.chunk_size!r}"
            )
        check_window(name, self.look_back, self.look_ahead)
        factors: Any = [self.n_buckets] if is_int(self.n_buckets, 0) else self.n_buckets
        if factors is not None and not (
            isinstance(factors, Sequence)
            and len(factors) > 0
            and all(is_int(n, 2) and n % 2 == 0 for n in factors)
        ):
            raise ValueError(
                f"{name}: expected n_buckets to be None, an even number >= 2 or a list of such, "
                f"got {self.n_buckets!r}"
            )
        check_scale(name, self.scale)
        check_dropout(name, self.dropout)
        for option in ("same_bucket", "correct_duplicates", "rotary", "rotary_before_hash"):
            check_bool(name, option, getattr(self, option))
        check_bool(name, "next_values", self.next_values)


class LSHSelfAttention(SelfAttention):
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
        rotary: whether queries and keys turn by the rotary positions of the model.
        rotary_before_hash: hash what rotary positions have turned; default: hash the content alone.
        next_values: attend to ``a v_j + b v_{j+1}`` in place of ``v_j``, so that a match says what
            followed it; a and b are the learnt parameter ``value_mix (2, H)``, 0.5 at the start
            (not causal: ``(3, H)``, the value before too, 0.25, 0.5, 0.25). A position that meets
            only itself gets its own ``v_i``. See :func:`reformer_ext.next_values`.

    Raises:
        ValueError: naming the argument.
    """

    Options = LSHOptions

    @classmethod
    def arguments_of_layer(cls, config: ReformerConfig, index: int) -> dict[str, Any]:
        return {"hash_seed": config.hash_seed + index}

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
        rotary: bool = True,
        rotary_before_hash: bool = False,
        next_values: bool = False,
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
            rotary=rotary,
        )
        LSHOptions(
            n_hashes=n_hashes,
            chunk_size=chunk_size,
            n_buckets=n_buckets,
            look_back=look_back,
            look_ahead=look_ahead,
            same_bucket=same_bucket,
            correct_duplicates=correct_duplicates,
            rotary=rotary,
            rotary_before_hash=rotary_before_hash,
            next_values=next_values,
        ).check("LSHSelfAttention")
        self.n_hashes = n_hashes
        self.chunk_size = chunk_size
        self.n_buckets = [n_buckets] if isinstance(n_buckets, int) else n_buckets
        self.look_back = look_back
        self.look_ahead = look_ahead if look_ahead is not None else 0 if causal else 1
        self.same_bucket = same_bucket
        self.correct_duplicates = correct_duplicates
        self.hash_seed = hash_seed
        self.rotary_before_hash = rotary_before_hash
        if next_values:
            self._mix_values()

    @property
    def draws(self) -> bool:
        return False  # dropout has its own seed

    def call_kwargs(self, call: AttentionCall) -> dict[str, Any]:
        kwargs = {
            **call.common,
            "n_hashes": call.n_hashes,
            "hash_step": call.hash_step,
            "return_buckets": True,
        }
        if call.shift:
            kwargs["hash_seed"] = self.hash_seed + call.shift
        if call.dropout_seed is not None:
            kwargs["dropout_seed"] = call.dropout_seed
        return kwargs

    def new_cache(self, sizes: CacheSizes) -> LSHCache:
        factors = sizes.n_buckets or self._n_buckets(sizes.hash_length or sizes.capacity)
        return LSHCache(
            sizes.batch,
            self.heads,
            self.head_dim,
            sizes.capacity,
            rotations=self.rotations(
                factors,
                sizes.n_hashes,
                device=sizes.device,
                dtype=sizes.dtype,
                hash_seed=self.hash_seed + sizes.shift,
            ),
            n_buckets=factors,
            window=min(sizes.window or self.chunk_size, sizes.capacity),
            next_values=self.value_mix is not None,
            dtype=sizes.dtype,
        )

    def rotations(
        self,
        n_buckets: Sequence[int],
        n_hashes: int | None = None,
        hash_step: int | Tensor = 0,
        *,
        device: torch.device,
        dtype: torch.dtype,
        hash_seed: int | None = None,
    ) -> Tensor:
        """Of the layer's hash, ``(H, D, R, sum(n_buckets) / 2)``; see :func:`hash_rotations`."""
        return hash_rotations(
            self.hash_seed if hash_seed is None else hash_seed,
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
        hash_seed: int | None = None,
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
            hash_seed: of this call; default: the layer's.
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
        self.check_heads(heads, cache)
        projected = self.project_in(x, norm, heads)
        qk, v = self.turn(projected, rotary)
        # With buckets given, the unturned heads can go.
        hashed = qk if self.rotary_before_hash or buckets is not None else projected[0]
        del projected
        if cache is not None and cache_lengths is not None:
            continued = cache.attend(
                qk,
                hashed,
                v,
                cache_lengths,
                value_mix=self.value_mix,
                scale=self.scale,
                correct_duplicates=self.correct_duplicates,
            )
            return self.project_out(continued)
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
                hash_seed,
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
                hashing = (n_hashes, hash_step, hash_seed)
                return self._attend(qk, hashed, v, buckets, None, *hashing, seed, heads)

            out, buckets = map_sequences(attend, lengths, inputs, (2, 3))
        y = self.project_out(out, heads)
        if not return_buckets:
            return y
        return y, narrow_buckets(buckets, self._n_buckets(longest))

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
        hash_seed: int | None,
        dropout_seed: int | Tensor | None,
        heads: tuple[int, int] | None = None,
        cache: LSHCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(B, H, L, D)`` of the heads, and the buckets."""
        n_buckets = self._n_buckets(qk.shape[2]) if cache is None else cache.n_buckets
        if buckets is None:
            rotations = (
                self.rotations(
                    n_buckets,
                    n_hashes,
                    hash_step,
                    device=qk.device,
                    dtype=qk.dtype,
                    hash_seed=hash_seed,
                )
                if cache is None
                else cache.rotations.to(qk.dtype)
            )
            if heads is not None:
                rotations = rotations[slice(*heads)]
            buckets = ops.lsh_hash(hashed.detach(), rotations, n_buckets, key_padding_mask)
        if cache is not None:
            start = torch.zeros(qk.shape[0], dtype=torch.int64, device=qk.device)
            cache.append(qk, v, buckets.to(torch.int32), start, self.value_mix)
        out = ops.lsh_attention(
            qk,
            v,
            value_mix=self._value_mix_of(heads),
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
            dropout_p=self.dropout_p(),
            dropout_seed=dropout_seed,
        )
        assert isinstance(out, Tensor)
        return out, buckets


class LSHCache(LayerCache):
    """Keys, values and, per head, round and bucket, the last positions that fell into the bucket; a
    new position attends to those in its own buckets. See :func:`reformer_ext.lsh_decode`.

    Args:
        batch, heads, head_dim: B, H, D.
        capacity: C positions.
        rotations: ``(H, D, R, sum(n_buckets) / 2)``, of the layer's hash.
        n_buckets: even factors.
        window: W positions that a bucket remembers.
        next_values: of a layer with next values: each is completed when the next position comes.
        dtype: of keys and values.
    """

    not_by_sequence = ("rotations",)

    keys: Tensor
    values: Tensor
    table: Tensor
    counts: Tensor
    rotations: Tensor
    last_values: Tensor | None

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        capacity: int,
        *,
        rotations: Tensor,
        n_buckets: Sequence[int],
        window: int,
        next_values: bool = False,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        device = rotations.device
        table = (batch, heads, rotations.shape[2], math.prod(n_buckets))
        rows = (batch, heads, capacity, head_dim)
        self.n_buckets = list(n_buckets)
        for name, buffer in {
            "keys": torch.zeros(rows, dtype=dtype, device=device),
            "values": torch.zeros(rows, dtype=dtype, device=device),
            "table": torch.zeros(*table, window, dtype=torch.int32, device=device),
            "counts": torch.zeros(table, dtype=torch.int32, device=device),
            "rotations": rotations,
            "last_values": torch.zeros(batch, heads, head_dim, dtype=dtype, device=device)
            if next_values
            else None,
        }.items():
            self.register_buffer(name, buffer, persistent=False)

    def reset(self) -> None:
        self.counts.zero_()

    def append(
        self,
        qk: Tensor,
        v: Tensor,
        buckets: Tensor,
        lengths: Tensor,
        value_mix: Tensor | None = None,
    ) -> None:
        """Adds positions ``(B, H, T, D)`` with buckets int32 ``(B, H, R, T)`` after ``lengths``."""
        ops.lsh_cache_append(
            self.keys,
            self.values,
            self.table,
            self.counts,
            qk.to(self.keys.dtype),
            v.to(self.values.dtype),
            buckets,
            lengths,
            normalize=True,
            value_mix=value_mix,
            last_values=self.last_values,
        )

    def attend(
        self,
        qk: Tensor,
        hashed: Tensor,
        v: Tensor,
        lengths: Tensor,
        *,
        value_mix: Tensor | None = None,
        scale: float | None,
        correct_duplicates: bool,
    ) -> Tensor:
        """Each of T new positions ``(B, H, T, D)`` attends to those before it and is added."""
        dtype = self.keys.dtype
        buckets = ops.lsh_hash(hashed, self.rotations.to(hashed.dtype), self.n_buckets)
        outs = []
        for t in range(qk.shape[2]):
            now = slice(t, t + 1)
            at = lengths + t if t else lengths
            new = (qk[:, :, now], v[:, :, now], buckets[..., now], at)
            if value_mix is not None:  # which the new position completes for the one before it
                self.append(*new, value_mix)
            out, _ = ops.lsh_decode(
                qk[:, :, now].to(dtype),
                self.keys,
                self.values,
                self.table,
                self.counts,
                buckets[..., now],
                own_values=v[:, :, now].to(dtype),
                before=None if value_mix is None else at,
                scale=scale,
                correct_duplicates=correct_duplicates,
            )
            if value_mix is None:
                self.append(*new)
            outs.append(out)
        return join_positions(outs).to(qk.dtype)
