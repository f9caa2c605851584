"""reformer_ext.plan: which kernel runs where. The plans are plain C++, so no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reformer_ext

SHAPE = (2, 8, 16384, 64)
LOCAL = {"n_hashes": 0, "keys": True, "chunk_size": 128}


def choices(plan: reformer_ext.ops.Plan) -> tuple[str | None, ...]:
    named = (plan.hash, plan.sort, plan.forward, plan.backward)
    return tuple(None if choice is None else choice.kernel for choice in named)


# docs/kernels.md as a table: shape, arch, what else is asked for -> hash, sort, forward, backward.
TABLE = [
    (SHAPE, 90, {}, ("wgmma", "cluster", "wgmma", "wgmma")),
    (SHAPE, 90, {"dtype": torch.float16}, ("wgmma", "cluster", "wgmma", "wgmma")),
    (SHAPE, 90, {"dtype": torch.float32}, ("simt", "cluster", "generic", "generic")),
    (SHAPE, 80, {}, ("mma_sync", "tiles", "mma_sync", "mma_sync")),
    (SHAPE, 86, {}, ("mma_sync", "tiles", "mma_sync", "mma_sync")),
    (SHAPE, 100, {}, ("mma_sync", "tiles", "mma_sync", "mma_sync")),
    # Head dims: 128 has no instance by mma.sync, others none but the generic.
    ((2, 8, 16384, 128), 90, {}, ("wgmma", "cluster", "wgmma", "wgmma")),
    ((2, 8, 16384, 128), 80, {}, ("mma_sync", "tiles", "generic", "generic")),
    ((2, 8, 16384, 32), 90, {}, ("wgmma", "cluster", "wgmma", "wgmma")),
    ((2, 8, 16384, 48), 90, {}, ("wgmma", "cluster", "generic", "generic")),
    # What the tiled kernels do not take.
    (SHAPE, 90, {"chunk_size": 32}, ("wgmma", "cluster", "generic", "generic")),
    (SHAPE, 90, {"look_ahead": 1}, ("wgmma", "cluster", "generic", "generic")),
    (SHAPE, 90, {"keys": True}, ("wgmma", "cluster", "generic", "generic")),
    (SHAPE, 90, {"scale": -1.0}, ("wgmma", "cluster", "generic", "generic")),
    # Masks of pairs they do take, but not duplicates beside another.
    (SHAPE, 90, {"same_bucket": True}, ("wgmma", "cluster", "wgmma", "wgmma")),
    (SHAPE, 90, {"dropout_p": 0.1}, ("wgmma", "cluster", "wgmma", "wgmma")),
    (SHAPE, 90, {"correct_duplicates": True}, ("wgmma", "cluster", "wgmma", "wgmma")),
    (
        SHAPE,
        90,
        {"correct_duplicates": True, "same_bucket": True},
        ("wgmma", "cluster", "generic", "generic"),
    ),
    (
        SHAPE,
        90,
        {"correct_duplicates": True, "dropout_p": 0.1},
        ("wgmma", "cluster", "generic", "generic"),
    ),
    # One round of one chunk, wrapped, would meet that chunk twice.
    ((1, 1, 64, 64), 90, {"n_hashes": 1}, ("wgmma", "cluster", "generic", "generic")),
    ((1, 1, 64, 64), 90, {"n_hashes": 1, "wrap": False}, ("wgmma", "cluster", "wgmma", "wgmma")),
    # A few tokens, as in decoding.
    ((1, 8, 8, 64), 90, {"n_buckets": 64}, ("direct", "cluster", "wgmma", "wgmma")),
    ((1, 8, 9, 64), 90, {"n_buckets": 64}, ("wgmma", "cluster", "wgmma", "wgmma")),
    # Local attention.
    (SHAPE, 90, LOCAL, (None, None, "local", "local")),
    (SHAPE, 90, {**LOCAL, "chunk_size": 96}, (None, None, "generic", "generic")),
    (SHAPE, 90, {**LOCAL, "dropout_p": 0.1}, (None, None, "generic", "generic")),
    (SHAPE, 90, {**LOCAL, "dtype": torch.float32}, (None, None, "generic", "generic")),
    (SHAPE, 80, LOCAL, (None, None, "generic", "generic")),
    # Many buckets: counters of a tile, then digits; in 32 bits if bucket and position fit them.
    ((1, 1, 16384, 64), 90, {"n_buckets": [64, 32]}, ("wgmma", "cluster", "wgmma", "wgmma")),
    ((1, 1, 16384, 64), 90, {"n_buckets": [64, 64]}, ("wgmma", "tiles", "wgmma", "wgmma")),
    ((1, 1, 16384, 64), 90, {"n_buckets": [64, 64, 2]}, ("wgmma", "packed", "wgmma", "wgmma")),
    ((1, 1, 1 << 20, 64), 90, {"n_buckets": [64] * 4}, ("wgmma", "wide", "wgmma", "wgmma")),
]


@pytest.mark.parametrize(("shape", "arch", "options", "expected"), TABLE)
def test_table(
    shape: tuple[int, int, int, int],
    arch: int,
    options: dict[str, Any],
    expected: tuple[str | None, ...],
) -> None:
    assert choices(reformer_ext.plan(shape, arch=arch, **options)) == expected


def test_device() -> None:
    assert reformer_ext.plan(SHAPE, arch=90).multiprocessors == 132
    assert reformer_ext.plan(SHAPE, arch=80).multiprocessors == 108
    few = reformer_ext.plan(SHAPE, arch=90, multiprocessors=16)
    assert (few.arch, few.multiprocessors) == (90, 16)


def test_workspace_of_attention() -> None:
    # Per round and position a row of partial results and its lse.
    plan = reformer_ext.plan((1, 1, 128, 64), n_hashes=2, arch=90)
    rows = 2 * 128
    assert plan.forward == reformer_ext.ops.KernelChoice("wgmma", rows * 64 * 2 + rows * 4, 1)
    # Gradients of queries (keys' added) and values; the row's constants lie in those of values.
    assert plan.backward == reformer_ext.ops.KernelChoice("wgmma", 2 * rows * 64 * 2, 1)
    local = reformer_ext.plan((1, 2, 100, 64), arch=90, **LOCAL)
    assert local.forward == reformer_ext.ops.KernelChoice("local", 0, 2)
    assert local.backward == reformer_ext.ops.KernelChoice("local", 2 * 2 * 128 * 4, 2)


def test_heads_share_the_workspace_within_the_limit() -> None:
    limit = reformer_ext.workspace_limit()
    one = reformer_ext.plan((1, 1, 4096, 64), arch=90).forward
    try:
        for heads, expected in ((0, 1), (1, 1), (3, 3), (100, 16)):
            reformer_ext.set_workspace_limit(heads * one.workspace)
            found = reformer_ext.plan((2, 8, 4096, 64), arch=90).forward
            assert (found.group, found.workspace) == (expected, expected * one.workspace)
    finally:
        reformer_ext.set_workspace_limit(limit)


def test_workspace_of_hash_and_sort() -> None:
    plan = reformer_ext.plan((1, 2, 4096, 64), n_hashes=4, n_buckets=128, arch=90)
    # Packed rotations: a row of 128 bytes for each of the 64 columns of 4 rounds and 2 heads.
    assert plan.hash == reformer_ext.ops.KernelChoice("wgmma", 2 * 4 * 64 * 128, 2)
    assert plan.sort == reformer_ext.ops.KernelChoice("cluster", 0, 2 * 4)
    tiles = reformer_ext.plan((1, 2, 4096, 64), n_hashes=4, n_buckets=128, arch=80).sort
    assert tiles is not None
    # Per segment the histogram of its one tile, and one for the scan, of 128 counters.
    assert tiles == reformer_ext.ops.KernelChoice("tiles", 2 * 4 * 2 * 128 * 4, 2 * 4)
    padded = reformer_ext.plan((1, 2, 4096, 64), n_hashes=4, n_buckets=128, padding=True, arch=80)
    assert padded.sort is not None
    assert padded.sort.workspace > tiles.workspace


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (SHAPE, {"arch": 75}, "plan: expected arch 80, 86, 89, 90, 100 or 120, got 75"),
        (
            SHAPE,
            {"dtype": torch.float64},
            "plan: expected dtype float32, float16 or bfloat16, got Double",
        ),
        (
            (0, 8, 64, 64),
            {},
            "plan: expected batch, heads and length >= 1, got 0, 8 and 64",
        ),
        (SHAPE, {"n_hashes": -1}, "plan: expected n_hashes >= 0, got -1"),
        (SHAPE, {"n_buckets": 3}, "plan: expected n_buckets to be even and >= 2, got 3"),
        (
            (1, 1, 64, 60),
            {},
            "plan: expected sizes and options that chunked_attention takes on CUDA, got length 64 "
            "in 8 rounds, head_dim 60, chunk_size 64",
        ),
    ],
)
def test_errors(shape: tuple[int, int, int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        reformer_ext.plan(shape, **options)
    assert str(error.value).splitlines()[0] == message
