"""Bad input raises an exception naming operator, argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reformer_ext

ops = torch.ops.reformer


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape or (2, 3, 20, 16), dtype=dtype, device=device)


def order(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    shape = shape or (2, 3, 2, 20)
    return torch.arange(shape[-1], dtype=dtype).expand(shape).contiguous()


def mask(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.zeros(shape or (2, 20), dtype=dtype)


def spoilt(value: int) -> Tensor:
    result = order()
    result[1, 2, 1, 7] = value
    return result


def attend(*args: object, **kwargs: object) -> Callable[[], object]:
    """A call of ``chunked_attention`` that is right but for what is given."""
    values = dict(zip(("q", "k", "v", "order"), args, strict=False))
    arguments = {
        "q": x(),
        "k": None,
        "v": x(),
        "order": order(),
        "chunk_size": 4,
        **values,
        **kwargs,
    }
    return lambda: reformer_ext.chunked_attention(**arguments)


def hash_(**kwargs: object) -> Callable[[], object]:
    arguments = {"x": x(), "rotations": x(3, 16, 2, 4), "n_buckets": 8, **kwargs}
    return lambda: reformer_ext.lsh_hash(**arguments)


def lsh(**kwargs: object) -> Callable[[], object]:
    arguments = {"qk": x(), "v": x(), "n_hashes": 2, "chunk_size": 4, **kwargs}
    return lambda: reformer_ext.lsh_attention(**arguments)


def merge(outs: list[Tensor], lses: list[Tensor]) -> Callable[[], object]:
    return lambda: reformer_ext.merge_attention(outs, lses)


OUT, LSE = x(2, 3, 20, 16), x(2, 3, 20)

# (call, message)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    # chunked_attention: tensors
    "q-rank": (
        attend(x(3, 20, 16)),
        "chunked_attention: expected q of shape [B, H, L, D], got [3, 20, 16]",
    ),
    "q-dtype": (
        attend(x(dtype=torch.int32), v=x(dtype=torch.int32)),
        "chunked_attention: expected q of dtype float32, float16, bfloat16 or float64, got Int",
    ),
    "q-empty-length": (
        attend(x(2, 3, 0, 16), v=x(2, 3, 0, 16), order=None),
        "chunked_attention: expected q with at least one head and one position, got [2, 3, 0, 16]",
    ),
    "q-head_dim": (
        attend(x(2, 3, 20, 264), v=x(2, 3, 20, 264)),
        "chunked_attention: expected q with a head dimension in 1 ... 256, got [2, 3, 20, 264]",
    ),
    "v-shape": (
        attend(v=x(2, 3, 21, 16)),
        "chunked_attention: expected v of shape [2, 3, 20, 16] like q, got [2, 3, 21, 16]",
    ),
    "v-dtype": (
        attend(v=x(dtype=torch.float64)),
        "chunked_attention: expected v of dtype Float, got Double",
    ),
    "k-shape": (
        attend(k=x(2, 3, 20, 8)),
        "chunked_attention: expected k of shape [2, 3, 20, 16] like q, got [2, 3, 20, 8]",
    ),
    "k-dtype": (
        attend(k=x(dtype=torch.float16)),
        "chunked_attention: expected k of dtype Float, got Half",
    ),
    "order-dtype": (
        attend(order=order(dtype=torch.int64)),
        "chunked_attention: expected order of dtype Int, got Long",
    ),
    "order-rank": (
        attend(order=order(2, 3, 20)),
        "chunked_attention: expected order of shape [B, H, R, L], got [2, 3, 20]",
    ),
    "order-shape": (
        attend(order=order(2, 3, 2, 21)),
        "chunked_attention: expected order of shape [2, 3, 2, 20] (batch, heads, rounds, length), "
        "got [2, 3, 2, 21]",
    ),
    "order-heads": (
        attend(order=order(2, 1, 2, 20)),
        "chunked_attention: expected order of shape [2, 3, 2, 20] (batch, heads, rounds, length), "
        "got [2, 1, 2, 20]",
    ),
    "order-no-rounds": (
        attend(order=order(2, 3, 0, 20)),
        "chunked_attention: expected order with at least one round, got [2, 3, 0, 20]",
    ),
    "order-negative": (
        attend(order=spoilt(-1)),
        "chunked_attention: expected order with positions in [0, 20), got -1",
    ),
    "order-too-large": (
        attend(order=spoilt(20)),
        "chunked_attention: expected order with positions in [0, 20), got 20",
    ),
    "buckets-dtype": (
        attend(buckets=order(dtype=torch.int64)),
        "chunked_attention: expected buckets of dtype Int, got Long",
    ),
    "buckets-shape": (
        attend(buckets=order(2, 3, 1, 20)),
        "chunked_attention: expected buckets of shape [2, 3, 2, 20] (batch, heads, rounds, "
        "length), got [2, 3, 1, 20]",
    ),
    "mask-dtype": (
        attend(key_padding_mask=mask(dtype=torch.float32)),
        "chunked_attention: expected key_padding_mask of dtype Bool, got Float",
    ),
    "mask-shape": (
        attend(key_padding_mask=mask(2, 19)),
        "chunked_attention: expected key_padding_mask of shape [2, 20] (batch, length), "
        "got [2, 19]",
    ),
    # chunked_attention: numbers
    "chunk_size": (attend(chunk_size=0), "chunked_attention: expected chunk_size >= 1, got 0"),
    "look_back": (attend(look_back=-1), "chunked_attention: expected look_back >= 0, got -1"),
    "look_ahead": (attend(look_ahead=-2), "chunked_attention: expected look_ahead >= 0, got -2"),
    "dropout_p-one": (
        attend(dropout_p=1.0, dropout_seed=1),
        "chunked_attention: expected 0 <= dropout_p < 1, got 1.000000",
    ),
    "dropout_p-negative": (
        attend(dropout_p=-0.5, dropout_seed=1),
        "chunked_attention: expected 0 <= dropout_p < 1, got -0.500000",
    ),
    "dropout_p-nan": (
        attend(dropout_p=float("nan"), dropout_seed=1),
        "chunked_attention: expected 0 <= dropout_p < 1, got nan",
    ),
    "dropout_seed-missing": (
        lambda: ops.chunked_attention(x(), None, x(), order(), dropout_p=0.5),
        "chunked_attention: expected a dropout_seed exactly if dropout_p > 0, "
        "got none with dropout_p = 0.500000",
    ),
    "dropout_seed-dtype": (
        attend(dropout_p=0.5, dropout_seed=torch.tensor([1], dtype=torch.int32)),
        "chunked_attention: expected dropout_seed of dtype Long, got Int",
    ),
    "dropout_seed-numel": (
        attend(dropout_p=0.5, dropout_seed=torch.tensor([1, 2])),
        "chunked_attention: expected dropout_seed with one element, got shape [2]",
    ),
    # lsh_hash
    "hash-x-rank": (hash_(x=x(20, 16)), "lsh_hash: expected x of shape [B, H, L, D], got [20, 16]"),
    "hash-x-dtype": (
        hash_(x=x(dtype=torch.int64)),
        "lsh_hash: expected x of dtype float32, float16, bfloat16 or float64, got Long",
    ),
    "hash-x-head_dim": (
        hash_(x=x(2, 3, 20, 264), rotations=x(3, 264, 2, 4)),
        "lsh_hash: expected x with a head dimension in 1 ... 256, got [2, 3, 20, 264]",
    ),
    "hash-odd": (hash_(n_buckets=7), "lsh_hash: expected n_buckets to be even and >= 2, got 7"),
    "hash-odd-factor": (
        hash_(n_buckets=[4, 3]),
        "lsh_hash: expected n_buckets to be even and >= 2, got [4, 3]",
    ),
    "hash-zero": (hash_(n_buckets=0), "lsh_hash: expected n_buckets to be even and >= 2, got 0"),
    "hash-no-factor": (
        hash_(n_buckets=[]),
        "lsh_hash: expected n_buckets to be even and >= 2, got []",
    ),
    "hash-nine-factors": (
        hash_(n_buckets=[2] * 9, rotations=x(3, 16, 2, 9)),
        "lsh_hash: expected 1 ... 8 factors in n_buckets, got [2, 2, 2, 2, 2, 2, 2, 2, 2]",
    ),
    "hash-too-many": (
        hash_(n_buckets=[2**16, 2**16], rotations=x(3, 16, 2, 2**16)),
        "lsh_hash: expected the product of n_buckets to be below 2^30, got [65536, 65536]",
    ),
    "hash-raw-odd": (
        lambda: ops.lsh_hash(x(), x(3, 16, 2, 4), [7], None),
        "lsh_hash: expected n_buckets to be even and >= 2, got [7]",
    ),
    "rotations-rank": (
        hash_(rotations=x(16, 2, 4)),
        "lsh_hash: expected rotations of shape [H or 1, D, R, sum(n_buckets) / 2], got [16, 2, 4]",
    ),
    "rotations-heads": (
        hash_(rotations=x(2, 16, 2, 4)),
        "lsh_hash: expected rotations of shape [3 or 1, 16, R, 4], got [2, 16, 2, 4]",
    ),
    "rotations-head_dim": (
        hash_(rotations=x(3, 8, 2, 4)),
        "lsh_hash: expected rotations of shape [3 or 1, 16, R, 4], got [3, 8, 2, 4]",
    ),
    "rotations-columns": (
        hash_(rotations=x(3, 16, 2, 5)),
        "lsh_hash: expected rotations of shape [3 or 1, 16, R, 4], got [3, 16, 2, 5]",
    ),
    "rotations-no-rounds": (
        hash_(rotations=x(3, 16, 0, 4)),
        "lsh_hash: expected rotations of shape [3 or 1, 16, R, 4], got [3, 16, 0, 4]",
    ),
    "rotations-dtype": (
        hash_(rotations=x(3, 16, 2, 4, dtype=torch.int32)),
        "lsh_hash: expected rotations of dtype float32, float16, bfloat16 or float64, got Int",
    ),
    "hash-mask": (
        hash_(key_padding_mask=mask(3, 20)),
        "lsh_hash: expected key_padding_mask of shape [2, 20] (batch, length), got [3, 20]",
    ),
    # bucket_sort
    "sort-rank": (
        lambda: reformer_ext.bucket_sort(order(2, 20), 20),
        "bucket_sort: expected buckets of shape [B, H, R, L], got [2, 20]",
    ),
    "sort-dtype": (
        lambda: reformer_ext.bucket_sort(order(dtype=torch.int64), 20),
        "bucket_sort: expected buckets of dtype Int, got Long",
    ),
    "sort-n_buckets": (
        lambda: reformer_ext.bucket_sort(order(), 0),
        "bucket_sort: expected n_buckets in 1 ... 2^30, got 0",
    ),
    "sort-too-large": (
        lambda: reformer_ext.bucket_sort(order(), 19),
        "bucket_sort: expected buckets in [0, 19), got 19",
    ),
    "sort-negative": (
        lambda: reformer_ext.bucket_sort(spoilt(-3), 20),
        "bucket_sort: expected buckets in [0, 20), got -3",
    ),
    # lsh_attention
    "lsh-rank": (lsh(qk=x(20, 16)), "lsh_attention: expected qk [B, H, L, D], got [20, 16]"),
    "lsh-odd": (lsh(n_buckets=5), "lsh_attention: expected n_buckets to be even and >= 2, got 5"),
    "lsh-v": (
        lsh(v=x(2, 3, 20, 8)),
        "lsh_attention: expected v of shape [2, 3, 20, 16] like qk, got [2, 3, 20, 8]",
    ),
    "lsh-k": (
        lsh(k=x(2, 3, 20, 8)),
        "chunked_attention: expected k of shape [2, 3, 20, 16] like q, got [2, 3, 20, 8]",
    ),
    "lsh-rotations": (
        lsh(n_buckets=8, rotations=x(3, 16, 2, 3)),
        "lsh_hash: expected rotations of shape [3 or 1, 16, R, 4], got [3, 16, 2, 3]",
    ),
    "lsh-buckets-range": (
        lsh(n_buckets=8, buckets=order()),
        "bucket_sort: expected buckets in [0, 8), got 19",
    ),
    "lsh-buckets-shape": (
        lsh(n_buckets=20, buckets=order(2, 3, 2, 19)),
        "chunked_attention: expected order of shape [2, 3, 2, 20] (batch, heads, rounds, length), "
        "got [2, 3, 2, 19]",
    ),
    "lsh-neither": (
        lambda: ops.lsh_attention(x(), x(), None, [8]),
        "lsh_attention: expected rotations or buckets, got neither",
    ),
    "lsh-n_hashes": (
        lsh(n_hashes=0),
        "lsh_hash: expected rotations of shape [3 or 1, 16, R, 4], got [3, 16, 0, 4]",
    ),
    "lsh-chunk_size": (
        lsh(chunk_size=0, n_buckets=4),
        "chunked_attention: expected chunk_size >= 1, got 0",
    ),
    # merge_attention
    "merge-empty": (
        merge([], []),
        "merge_attention: expected as many lses as outs and at least one, got 0 outs and 0 lses",
    ),
    "merge-lengths": (
        merge([OUT, OUT], [LSE]),
        "merge_attention: expected as many lses as outs and at least one, got 2 outs and 1 lses",
    ),
    "merge-out-shape": (
        merge([OUT, x(2, 3, 19, 16)], [LSE, LSE]),
        "merge_attention: expected outs of shape [2, 3, 20, 16] like the first, got [2, 3, 19, 16]",
    ),
    "merge-lse-shape": (
        merge([OUT, OUT], [LSE, x(2, 3, 19)]),
        "merge_attention: expected lses of shape [2, 3, 20] (batch, heads, length), got [2, 3, 19]",
    ),
    "merge-out-dtype": (
        merge([OUT, OUT.double()], [LSE, LSE]),
        "merge_attention: expected outs of dtype Float, got Double",
    ),
    "merge-lse-dtype": (
        merge([OUT, OUT], [LSE, LSE.half()]),
        "merge_attention: expected lses of dtype Float, got Half",
    ),
    "merge-rank": (
        merge([x(3, 20, 16)], [x(3, 20)]),
        "merge_attention: expected outs of shape [B, H, L, D], got [3, 20, 16]",
    ),
    # helpers
    "set_workspace_limit": (
        lambda: reformer_ext.set_workspace_limit(-1),
        "set_workspace_limit: expected bytes >= 0, got -1",
    ),
    "default_n_buckets-length": (
        lambda: reformer_ext.default_n_buckets(0),
        "default_n_buckets: expected length and chunk_size >= 1, got 0 and 64",
    ),
    "default_n_buckets-chunk": (
        lambda: reformer_ext.default_n_buckets(64, 0),
        "default_n_buckets: expected length and chunk_size >= 1, got 64 and 0",
    ),
    "sample_rotations": (
        lambda: reformer_ext.sample_rotations(1, 16, 2, 3),
        "sample_rotations: expected n_buckets to be even and >= 2, got 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises((RuntimeError, ValueError)) as raised:
        call()
    assert str(raised.value) == message


def test_the_right_calls_are_right() -> None:
    """What the cases above spoil is valid before: they fail for the reason they name."""
    attend()()
    attend(k=x(), buckets=order(), key_padding_mask=mask(), dropout_p=0.5, dropout_seed=1)()
    hash_(key_padding_mask=mask())()
    lsh(n_buckets=20, buckets=order(), same_bucket=True)()
    merge([OUT, OUT], [LSE, LSE])()
    reformer_ext.bucket_sort(order(), 20)


def test_a_last_dimension_with_a_stride_is_right_too() -> None:
    q, v = torch.randn(2, 2, 3, 16, 20).transpose(-1, -2)
    assert q.stride(-1) != 1
    got = reformer_ext.chunked_attention(q, None, v, order())
    expected = reformer_ext.chunked_attention(q.contiguous(), None, v.contiguous(), order())
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want)


def cuda(call: str) -> Callable[[], object]:
    """Calls with one argument left on the CPU, or that only CUDA refuses."""
    there = {"device": "cuda"}
    calls: dict[str, Callable[[], object]] = {
        "v": lambda: reformer_ext.chunked_attention(x(**there), None, x()),
        "order": lambda: reformer_ext.chunked_attention(x(**there), None, x(**there), order()),
        "buckets": lambda: reformer_ext.chunked_attention(
            x(**there), None, x(**there), order().cuda(), buckets=order()
        ),
        "key_padding_mask": lambda: reformer_ext.chunked_attention(
            x(**there), None, x(**there), key_padding_mask=mask()
        ),
        "dropout_seed": lambda: reformer_ext.chunked_attention(
            x(**there), None, x(**there), dropout_p=0.1, dropout_seed=torch.tensor([1])
        ),
        "rotations": lambda: reformer_ext.lsh_hash(x(**there), x(3, 16, 2, 4), 8),
        "lses": lambda: reformer_ext.merge_attention([OUT.cuda()], [LSE]),
        "head_dim": lambda: reformer_ext.chunked_attention(
            x(2, 3, 20, 20, **there), None, x(2, 3, 20, 20, **there)
        ),
        "float64": lambda: reformer_ext.chunked_attention(
            x(dtype=torch.float64, **there), None, x(dtype=torch.float64, **there)
        ),
        "length": lambda: reformer_ext.chunked_attention(
            x(1, 1, 1, 16, **there).expand(1, 1, 2**28, 16),
            None,
            x(1, 1, 1, 16, **there).expand(1, 1, 2**28, 16),
            torch.zeros(1, 1, 1, 1, dtype=torch.int32, **there).expand(1, 1, 8, 2**28),
        ),
    }
    return calls[call]


@pytest.mark.gpu
@pytest.mark.parametrize("argument", ["v", "order", "buckets", "key_padding_mask", "dropout_seed"])
def test_another_device(argument: str) -> None:
    with pytest.raises(RuntimeError, match=rf"chunked_attention: expected .*\b{argument}\b.*cpu"):
        cuda(argument)()


@pytest.mark.gpu
def test_another_device_in_the_other_operators() -> None:
    with pytest.raises(RuntimeError, match=r"lsh_hash: expected .*\brotations\b.*cpu"):
        cuda("rotations")()
    with pytest.raises(RuntimeError, match=r"merge_attention: expected .*\blses\b.*cpu"):
        cuda("lses")()


@pytest.mark.gpu
def test_what_only_cuda_refuses() -> None:
    with pytest.raises(RuntimeError, match=r"chunked_attention: expected .*multiple of 8.*20"):
        cuda("head_dim")()
    with pytest.raises(RuntimeError, match=r"chunked_attention: expected .*([Dd]ouble|float64)"):
        cuda("float64")()
    with pytest.raises(RuntimeError, match=r"chunked_attention: expected at most 2\^30 positions"):
        cuda("length")()
