"""Laws of the operators, on random instances: hypothesis, derandomised, few examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import reformer_ext
from python_tests.cases import AttentionCase

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

from strategies import attention_cases, booleans, chunk_sizes  # noqa: E402 needs hypothesis

FEW = settings(derandomize=True, deadline=None, database=None, max_examples=30)


def run(
    implementation: object,
    case: AttentionCase,
    vectors: dict[str, Tensor],
    indices: dict[str, Tensor | None],
    **options: object,
) -> tuple[Tensor, Tensor]:
    return implementation.chunked_attention(  # type: ignore[attr-defined]
        vectors["q"],
        vectors.get("k"),
        vectors["v"],
        **indices,
        **{**case.options, **options},
    )


def tensors(case: AttentionCase) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    return case.vectors("cpu", torch.float64, requires_grad=False), case.indices("cpu")


def assert_equal(
    got: tuple[Tensor, ...], expected: tuple[Tensor, ...], at: Tensor | None = None
) -> None:
    for value, want in zip(got, expected, strict=True):
        if at is not None:
            value, want = value[at], want[at]
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10)


@FEW
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 300)),
    n_buckets=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_order_is_a_stable_permutation(
    shape: tuple[int, int, int, int], n_buckets: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(n_buckets, shape, generator=generator, dtype=torch.int32)
    order = reformer_ext.bucket_sort(buckets, n_buckets).long()
    positions = torch.arange(shape[-1]).expand(shape)
    assert torch.equal(order.sort(dim=-1).values, positions)
    ranks = buckets.gather(-1, order).long() * shape[-1] + order  # (bucket, position), both rising
    assert (ranks.diff(dim=-1) > 0).all()


@FEW
@given(
    case=attention_cases(causal=False, dropout_p=0.0, layout="contiguous", batch=1, padding="tail"),
    seed=st.integers(0, 99),
)
def test_renaming_positions_renames_the_result(case: AttentionCase, seed: int) -> None:
    """Non-causal attention knows positions only through the order of the chunks."""
    vectors, indices = tensors(case)
    permutation = torch.randperm(case.length, generator=torch.Generator().manual_seed(seed))
    inverse = permutation.argsort()
    if indices["order"] is None:
        identity = torch.arange(case.length, dtype=torch.int32)
        indices["order"] = identity.expand(1, case.heads, 1, -1).contiguous()
    wrap = case.rounds > 0 if case.wrap is None else case.wrap
    renamed_indices = {
        "order": inverse.to(torch.int32)[indices["order"].long()],
        "buckets": None if indices["buckets"] is None else indices["buckets"][..., permutation],
        "key_padding_mask": indices["key_padding_mask"][:, permutation],
    }
    renamed = {name: x[:, :, permutation] for name, x in vectors.items()}
    got = run(reformer_ext, case, renamed, renamed_indices, wrap=wrap)
    out, lse = run(reformer_ext, case, vectors, indices, wrap=wrap)
    assert_equal(got, (out[:, :, permutation], lse[:, :, permutation]))


@FEW
@given(case=attention_cases(padding="scattered"))
def test_nobody_sees_padding(case: AttentionCase) -> None:
    vectors, indices = tensors(case)
    padding = indices["key_padding_mask"][:, None, :].expand(-1, case.heads, -1)
    before = run(reformer_ext, case, vectors, indices)
    for x in vectors.values():
        x[padding] = 1e3 * torch.randn(int(padding.sum()), case.head_dim, dtype=torch.float64)
    assert_equal(run(reformer_ext, case, vectors, indices), before, at=~padding)


@FEW
@given(
    length=st.integers(1, 40),
    chunk=chunk_sizes,
    shared=booleans,
    causal=booleans,
    seed=st.integers(0, 9),
)
def test_merge_of_disjoint_keys_is_one_attention(
    length: int, chunk: int, shared: bool, causal: bool, seed: int
) -> None:
    """Padding out one half of the keys, then the other, splits an attention in two."""
    case = AttentionCase("merge", length=length, chunk_size=chunk, causal=causal, shared=False)
    vectors = case.vectors("cpu", torch.float64, seed)
    order = case.indices("cpu", seed)["order"]
    half = torch.rand(1, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    keys = None if shared else vectors["k"]
    options = {"chunk_size": chunk, "causal": causal, "mask_self": False}

    def attention(mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return reformer_ext.chunked_attention(
            vectors["q"], keys, vectors["v"], order, key_padding_mask=mask, **options
        )

    parts = [attention(half), attention(~half)]
    merged = reformer_ext.merge_attention([out for out, _ in parts], [lse for _, lse in parts])
    whole = attention(None)
    assert_equal(merged, whole)
    leaves = [vectors["q"], vectors["v"]]
    cotangents = [torch.ones_like(whole[0]).cumsum(-1), torch.ones_like(whole[1])]
    assert_equal(
        torch.autograd.grad(merged, leaves, cotangents),
        torch.autograd.grad(whole, leaves, cotangents),
    )


@FEW
@given(length=st.integers(1, 60), rounds=st.integers(0, 4), causal=booleans, seed=st.integers(0, 9))
def test_one_chunk_of_everything_is_dense_attention(
    length: int, rounds: int, causal: bool, seed: int
) -> None:
    case = AttentionCase(
        "dense", length=length, chunk_size=length, rounds=rounds, causal=causal, shared=False
    )
    vectors, indices = case.vectors("cpu", torch.float64, seed), case.indices("cpu", seed)
    out, _ = run(reformer_ext, case, vectors, indices, correct_duplicates=True)
    q, k, v = vectors["q"], vectors["k"], vectors["v"]
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert_equal((out,), (dense,))
    cotangent = torch.ones_like(dense).cumsum(-1)
    assert_equal(
        torch.autograd.grad(out, (q, k, v), cotangent),
        torch.autograd.grad(dense, (q, k, v), cotangent),
    )


@FEW
@given(case=attention_cases(rounds=1, dropout_p=0.0, wrap=False, correct_duplicates=True))
def test_a_repeated_round_changes_nothing(case: AttentionCase) -> None:
    vectors, indices = tensors(case)
    once = run(reformer_ext, case, vectors, indices)
    thrice = {
        name: x.repeat(1, 1, 3, 1) if x is not None and x.dim() == 4 else x
        for name, x in indices.items()
    }
    assert_equal(run(reformer_ext, case, vectors, thrice), once)


@FEW
@given(case=attention_cases(dropout_p=0.4), seed=st.integers(-(2**63), 2**63 - 1))
def test_dropout_replays_from_its_seed(case: AttentionCase, seed: int) -> None:
    vectors, indices = tensors(case)
    first = run(reformer_ext, case, vectors, indices, dropout_seed=seed)
    torch.manual_seed(seed % 1000)
    again = run(reformer_ext, case, vectors, indices, dropout_seed=torch.tensor([seed]))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    undropped = run(reformer_ext, case, vectors, indices, dropout_p=0.0, dropout_seed=None)
    assert torch.equal(first[1], undropped[1])  # lse does not see dropout


@FEW
@given(
    length=st.integers(1, 200),
    factors=st.lists(st.sampled_from([2, 4, 6, 10]), min_size=1, max_size=4),
    scale=st.floats(1e-3, 1e3),
)
def test_hash_sees_directions_only(length: int, factors: list[int], scale: float) -> None:
    x = torch.randn(1, 2, length, 8, dtype=torch.float64)
    rotations = reformer_ext.sample_rotations(2, 8, 3, factors, dtype=torch.float64)
    buckets = reformer_ext.lsh_hash(x, rotations, factors)
    assert ((buckets >= 0) & (buckets < math.prod(factors))).all()
    assert torch.equal(buckets, reformer_ext.lsh_hash(scale * x, rotations, factors))
    digits, opposite = buckets.clone(), reformer_ext.lsh_hash(-x, rotations, factors)
    for factor in factors:  # the opposite direction has the opposite digit
        assert torch.equal((digits % factor + factor // 2) % factor, opposite % factor)
        digits, opposite = digits // factor, opposite // factor
