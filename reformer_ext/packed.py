"""Packed sequences: several of any lengths, laid end to end in one line of a batch of one.

``cu_seqlens``, as in flash-attention's varlen functions: ``n + 1`` numbers from 0 to the total
length, sequence i being the positions ``cu_seqlens[i] .. cu_seqlens[i + 1] - 1``. Nothing crosses
from one sequence to another: the result is that of the sequences one by one. Sequences of equal
length run as one batch, so that the number of launches follows the number of different lengths.

The lengths are needed on the host. Give ``cu_seqlens`` as ints or as a CPU tensor (as ints under
``torch.compile``, which compiles for these lengths); a CUDA tensor is accepted and costs a
synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import ops

__all__ = [
    "chunked_attention_packed",
    "lsh_attention_packed",
    "map_sequences",
    "sequence_lengths",
]


def chunked_attention_packed(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    order: Tensor | None = None,
    *,
    buckets: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_seed: int | Tensor | None = None,
    own_values: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`reformer_ext.chunked_attention` within each of several packed sequences.

    Args:
        q: ``(1, H, total, D)``.
        k: the same shape, or None for shared QK.
        v: the same shape.
        cu_seqlens: int32 or int64 ``(n + 1,)`` or as many ints; see this module.
        order: int32 ``(1, H, R, total)``; positions count from the start of each sequence.
        buckets: int32 ``(1, H, R, total)``.
        key_padding_mask: must be None, since a packed line has no padding.
        dropout_seed: as there. Sequences get masks of their own, other than one by one.
        own_values: the same shape as v.
        **options: the other keyword arguments of :func:`reformer_ext.chunked_attention`.

    Returns:
        ``out (1, H, total, D)`` and ``lse (1, H, total)``.

    Raises:
        ValueError: cu_seqlens does not start at 0, decreases or does not end at the total length.
        RuntimeError: naming the argument, what was expected and what came.
    """
    name = "chunked_attention_packed"
    lengths = sequence_lengths(name, cu_seqlens, _line(name, q, k, v), key_padding_mask)
    _check_lists(name, q, order=order, buckets=buckets)
    seed = ops.seed_tensor(dropout_seed, options.get("dropout_p", 0.0), q.device)

    def attend(
        group: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        order: Tensor | None,
        buckets: Tensor | None,
        own_values: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return ops.chunked_attention(
            q,
            k,
            v,
            order,
            buckets=buckets,
            dropout_seed=group_seed(seed, group),
            own_values=own_values,
            **options,
        )

    inputs = [(q, 2), (k, 2), (v, 2), (order, 3), (buckets, 3), (own_values, 2)]
    out, lse = map_sequences(attend, lengths, inputs, (2, 2))
    return out, lse


def lsh_attention_packed(
    qk: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    *,
    k: Tensor | None = None,
    buckets: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_seed: int | Tensor | None = None,
    own_values: Tensor | None = None,
    return_lse: bool = False,
    return_buckets: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`reformer_ext.lsh_attention` within each of several packed sequences.

    Hash, sort and chunks are those of the sequence alone; so is the default of ``n_buckets``.

    Args:
        qk: ``(1, H, total, D)``.
        v: the same shape.
        cu_seqlens: int32 or int64 ``(n + 1,)`` or as many ints; see this module.
        k: separate keys of the same shape.
        buckets: int32 ``(1, H, R, total)``, of an earlier call.
        key_padding_mask: must be None, since a packed line has no padding.
        dropout_seed: as there. Sequences get masks of their own, other than one by one.
        own_values: the same shape as v.
        return_lse: also return the log-sum-exps, ``(1, H, total)``.
        return_buckets: also return the buckets, int32 ``(1, H, R, total)``.
        **options: the other keyword arguments of :func:`reformer_ext.lsh_attention`. Rotations that
            are not given are drawn once for each different length, in the order of appearance.

    Returns:
        ``out (1, H, total, D)``, or a tuple of it and what else was asked for, in the order above.

    Raises:
        ValueError: cu_seqlens does not start at 0, decreases or does not end at the total length.
        RuntimeError: naming the argument, what was expected and what came.
    """
    name = "lsh_attention_packed"
    lengths = sequence_lengths(name, cu_seqlens, _line(name, qk, k, v), key_padding_mask)
    _check_lists(name, qk, buckets=buckets)
    seed = ops.seed_tensor(dropout_seed, options.get("dropout_p", 0.0), qk.device)

    def attend(
        group: int,
        qk: Tensor,
        v: Tensor,
        k: Tensor | None,
        buckets: Tensor | None,
        own_values: Tensor | None,
    ) -> tuple[Tensor, ...]:
        results = ops.lsh_attention(
            qk,
            v,
            k=k,
            buckets=buckets,
            dropout_seed=group_seed(seed, group),
            own_values=own_values,
            return_lse=True,
            return_buckets=True,
            **options,
        )
        assert isinstance(results, tuple)
        return results

    inputs = [(qk, 2), (v, 2), (k, 2), (buckets, 3), (own_values, 2)]
    out, lse, buckets = map_sequences(attend, lengths, inputs, (2, 2, 3))
    if not (return_lse or return_buckets):
        return out
    return (out, *([lse] if return_lse else []), *([buckets] if return_buckets else []))


def sequence_lengths(
    name: str,
    cu_seqlens: Sequence[int] | Tensor,
    line: Sequence[int],
    key_padding_mask: Tensor | None = None,
) -> list[int]:
    """The lengths of packed sequences, checked.

    Args:
        name: of the caller, for the messages.
        cu_seqlens: ints, or an integer tensor ``(n + 1,)``; on CUDA it costs a synchronisation.
        line: the batch size and length of what is packed.
        key_padding_mask: of the caller's caller; must be None.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if key_padding_mask is not None:
        raise ValueError(
            f"{name}: expected no key_padding_mask with cu_seqlens, since a packed line has no "
            f"padding, got {list(key_padding_mask.shape)}"
        )
    if len(line) != 2 or line[0] != 1:
        raise ValueError(
            f"{name}: expected batch and length [1, total] with cu_seqlens, got {list(line)}"
        )
    total = line[1]
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name}: expected cu_seqlens [n + 1] of int32 or int64, "
                f"got {list(cu_seqlens.shape)} of {cu_seqlens.dtype}"
            )
        cu_seqlens = cu_seqlens.tolist()
    ends = list(cu_seqlens)
    if any(isinstance(end, float) for end in ends):
        raise ValueError(f"{name}: expected cu_seqlens of integers, got {ends}")
    if len(ends) < 2 or ends[0] != 0:
        raise ValueError(
            f"{name}: expected cu_seqlens of 2 or more numbers that start at 0, "
            f"got {len(ends)} that start at {ends[0] if ends else None}"
        )
    lengths = [end - start for start, end in pairwise(ends)]
    for index, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"{name}: expected cu_seqlens not to decrease, "
                f"got {ends[index]} and then {ends[index + 1]} at index {index + 1}"
            )
    if ends[-1] != total or total < 1:
        raise ValueError(
            f"{name}: expected cu_seqlens to end at the total length, {total}, and that >= 1, "
            f"got {ends[-1]}"
        )
    return lengths


def map_sequences(
    function: Callable[..., tuple[Tensor, ...]],
    lengths: Sequence[int],
    inputs: Sequence[tuple[Tensor | None, int]],
    output_dims: Sequence[int],
) -> tuple[Tensor, ...]:
    """``function`` of each packed sequence, those of equal length as one batch.

    Splits and joins only: no index tensors, no synchronisation, and a backward pass of linear cost.

    Args:
        function: gets the number of the batch, then the inputs, ``(sequences, ...)`` instead of
            ``(1, ...)``; returns a tuple of tensors with as many sequences.
        lengths: of the sequences; empty ones are left out.
        inputs: tensors of batch size 1 (or None), each with its dimension of positions.
        output_dims: the dimensions of positions of what function returns.

    Returns:
        What the function returned, packed as the inputs are.

    Raises:
        ValueError: an input is not of batch size 1 and the sum of the lengths.
    """
    total = sum(lengths)
    for x, dim in inputs:
        if x is not None and (x.shape[0] != 1 or x.shape[dim] != total):
            raise ValueError(
                f"map_sequences: expected batch size 1 and {total} positions in dimension {dim}, "
                f"got {list(x.shape)}"
            )
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length > 0:
            groups.setdefault(length, []).append(index)
    split = [None if x is None else torch.split(x, list(lengths), dim) for x, dim in inputs]
    joined: list[dict[int, Tensor]] = [{} for _ in output_dims]
    for number, members in enumerate(groups.values()):
        batch = [None if parts is None else _cat([parts[i] for i in members], 0) for parts in split]
        for found, output in zip(joined, function(number, *batch), strict=True):
            found.update(zip(members, torch.split(output, 1), strict=True))
    return tuple(
        _cat([found[index] for index in sorted(found)], dim)
        for found, dim in zip(joined, output_dims, strict=True)
    )


def group_seed(seed: int | Tensor | None, group: int) -> int | Tensor | None:
    """The dropout seed of the group-th batch of :func:`map_sequences`.

    Far apart, since the layers of a model have neighbouring seeds.
    """
    if seed is None or group == 0:
        return seed
    if isinstance(seed, Tensor):
        return seed + (group << 40)  # wraps around
    return (seed + (group << 40)) % 2**63


def _line(name: str, q: Tensor, k: Tensor | None, v: Tensor) -> tuple[int, int]:
    if q.dim() != 4:
        raise RuntimeError(f"{name}: expected queries [1, H, total, D], got {list(q.shape)}")
    for argument, x in (("k", k), ("v", v)):
        if x is not None and x.shape != q.shape:
            raise RuntimeError(
                f"{name}: expected {argument} {list(q.shape)}, as the queries, got {list(x.shape)}"
            )
    return q.shape[0], q.shape[2]


def _check_lists(name: str, q: Tensor, **lists: Tensor | None) -> None:
    """Raises RuntimeError unless each is None or int32 ``(1, H, R, total)``."""
    for argument, x in lists.items():
        if x is None:
            continue
        expected = [1, q.shape[1], x.shape[2] if x.dim() == 4 else "R", q.shape[2]]
        if list(x.shape) != expected or x.dtype != torch.int32:
            shape = ", ".join(map(str, expected))
            raise RuntimeError(
                f"{name}: expected {argument} [{shape}] of torch.int32, "
                f"got {list(x.shape)} of {x.dtype}"
            )


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
