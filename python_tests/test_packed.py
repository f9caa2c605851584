"""Packed sequences: what the sequences give one by one, values and gradients."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from conftest import gpu
from torch import Tensor, nn

import reformer_ext
from python_tests.cases import tiny_config
from reformer_ext import reference
from reformer_ext.nn import (
    FullSelfAttention,
    LocalSelfAttention,
    LSHSelfAttention,
    Reformer,
    ReformerConfig,
    ReformerLM,
    RotaryPositions,
)
from reformer_ext.packed import map_sequences, sequence_lengths

# Equal lengths apart, an empty sequence, one position, chunks short and whole.
CU_SEQLENS = (0, 21, 26, 26, 58, 79, 80, 85)
LENGTHS = [21, 5, 0, 32, 21, 1, 5]


def heads(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Leaves ``(1, 2, 85, 8)``."""
    return [torch.randn(1, 2, 85, 8, dtype=dtype, requires_grad=True) for _ in range(n)]


def ranges() -> list[tuple[int, int]]:
    return [(start, end) for start, end in pairwise(CU_SEQLENS) if end > start]


def assert_same_with_gradients(
    got: Tensor, expected: Tensor, inputs: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    dout = torch.randn_like(got)
    found = torch.autograd.grad(got, list(inputs.values()), dout, allow_unused=True)
    wanted = torch.autograd.grad(expected, list(inputs.values()), dout, allow_unused=True)
    for name, grad, target in zip(inputs, found, wanted, strict=True):
        assert grad is not None and target is not None, name
        assert grad.abs().max() > 0, name
        error = (grad - target).abs().max()
        assert error <= tolerance * target.abs().max().clamp(min=1.0), f"{name}: off by {error:.1e}"


# Operators


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared-qk", "separate-k"])
def test_lsh_attention_is_the_reference_one_by_one(shared: bool, causal: bool) -> None:
    qk, v, k = heads(3)
    keys = None if shared else k
    rotations = reformer_ext.sample_rotations(2, 8, 3, [4, 2], dtype=torch.float64)
    options = {"chunk_size": 4, "causal": causal, "look_ahead": 1}
    out, lse, buckets = reformer_ext.lsh_attention_packed(
        qk,
        v,
        CU_SEQLENS,
        k=keys,
        rotations=rotations,
        n_buckets=[4, 2],
        return_lse=True,
        return_buckets=True,
        **options,
    )
    parts = [
        reference.lsh_attention(
            qk[:, :, start:end],
            v[:, :, start:end],
            rotations,
            [4, 2],
            k=None if keys is None else keys[:, :, start:end],
            **options,
        )
        for start, end in ranges()
    ]
    expected_out, expected_lse, expected_buckets = (
        torch.cat(tensors, dim=dim)
        for tensors, dim in zip(zip(*parts, strict=True), (2, 2, 3), strict=True)
    )
    assert torch.equal(buckets, expected_buckets)
    inputs = {"qk": qk, "v": v} if shared else {"qk": qk, "v": v, "k": k}
    finite = torch.where(expected_lse.isfinite(), expected_lse, 0.0)
    torch.testing.assert_close(torch.where(lse.isfinite(), lse, 0.0), finite)
    assert_same_with_gradients(out, expected_out, inputs)
    again = reformer_ext.lsh_attention_packed(
        qk, v, CU_SEQLENS, k=keys, buckets=buckets, n_buckets=[4, 2], **options
    )
    assert torch.equal(again, out)


def test_lsh_attention_takes_the_default_buckets_of_each_length() -> None:
    """Different lengths draw their rotations in turn, as one by one."""
    qk, v = torch.randn(2, 1, 2, 85, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 40, 45, 66, 85], dtype=torch.int32)
    generator = torch.Generator().manual_seed(3)
    out, buckets = reformer_ext.lsh_attention_packed(
        qk, v, cu_seqlens, chunk_size=4, generator=generator, return_buckets=True
    )
    generator.manual_seed(3)
    for start, end in pairwise(cu_seqlens.tolist()):
        part, part_buckets = reformer_ext.lsh_attention(
            qk[:, :, start:end],
            v[:, :, start:end],
            chunk_size=4,
            generator=generator,
            return_buckets=True,
        )
        assert torch.equal(part_buckets, buckets[..., start:end])
        torch.testing.assert_close(part, out[:, :, start:end])


@pytest.mark.parametrize("sorted_by", ["position", "bucket"])
def test_chunked_attention_is_the_reference_one_by_one(sorted_by: str) -> None:
    q, k, v = heads(3)
    order = buckets = None
    if sorted_by == "bucket":
        buckets = torch.randint(3, (1, 2, 2, 85), dtype=torch.int32)
        order = torch.cat(
            [reference.bucket_sort(buckets[..., start:end], 3) for start, end in ranges()], dim=-1
        )
    options = {"chunk_size": 4, "causal": True, "correct_duplicates": True}
    out, lse = reformer_ext.chunked_attention_packed(
        q, k, v, CU_SEQLENS, order, buckets=buckets, **options
    )
    parts = [
        reference.chunked_attention(
            q[:, :, start:end],
            k[:, :, start:end],
            v[:, :, start:end],
            None if order is None else order[..., start:end],
            buckets=None if buckets is None else buckets[..., start:end],
            **options,
        )
        for start, end in ranges()
    ]
    torch.testing.assert_close(lse, torch.cat([part[1] for part in parts], dim=2))
    expected = torch.cat([part[0] for part in parts], dim=2)
    assert_same_with_gradients(out, expected, {"q": q, "k": k, "v": v})


def test_sequences_have_dropout_of_their_own() -> None:
    one = torch.randn(3, 1, 2, 8, 8)
    q, k, v = torch.cat([one, one[:, :, :, :7], one], dim=3)

    def attend(seed: int | Tensor | None, dropout_p: float = 0.5) -> Tensor:
        return reformer_ext.chunked_attention_packed(
            q, k, v, [0, 8, 15, 23], causal=True, dropout_p=dropout_p, dropout_seed=seed
        )[0]

    for dropout_p in (0.0, 0.5):
        out = attend(7, dropout_p)
        first, second, third = out[:, :, :7], out[:, :, 8:15], out[:, :, 15:22]
        assert torch.allclose(first, third) == (dropout_p == 0.0)  # one batch
        assert torch.allclose(first, second) == (dropout_p == 0.0)  # two batches
    assert torch.equal(attend(7), out)
    assert torch.equal(attend(torch.tensor([7])), out)
    assert not torch.equal(attend(2**63 - 1), out)
    assert not torch.equal(attend(None), attend(None))


def test_equal_lengths_are_one_batch() -> None:
    x = torch.randn(1, 85, 2)
    batches = []

    def function(group: int, x: Tensor, nothing: None) -> tuple[Tensor, Tensor]:
        assert nothing is None
        batches.append((group, tuple(x.shape)))
        return 2 * x, x.sum(dim=-1)

    double, total = map_sequences(function, LENGTHS, [(x, 1), (None, 1)], (1, 1))
    assert batches == [(0, (2, 21, 2)), (1, (2, 5, 2)), (2, (1, 32, 2)), (3, (1, 1, 2))]
    assert torch.equal(double, 2 * x)
    assert torch.equal(total, x.sum(dim=-1))


# Modules


def one_by_one(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([model(x[:, start:end]) for start, end in ranges()], dim=1)


@pytest.mark.parametrize(
    "layer",
    [
        LSHSelfAttention(16, 2, n_hashes=2, chunk_size=4),
        LSHSelfAttention(16, 2, n_hashes=2, chunk_size=4, causal=True, rotary_before_hash=True),
        LocalSelfAttention(16, 2, chunk_size=4),
        LocalSelfAttention(16, 2, chunk_size=4, causal=True),
        FullSelfAttention(16, 2, causal=True),
        FullSelfAttention(16, 2, shared_qk=True),
    ],
    ids=["lsh", "lsh-causal", "local", "local-causal", "full-causal", "full-shared"],
)
def test_attention_layers_one_by_one(layer: nn.Module) -> None:
    layer = layer.double()
    x = torch.randn(1, 85, 16, dtype=torch.float64, requires_grad=True)
    tables = RotaryPositions(8)(32)
    rotary = tuple(torch.cat([table[:length] for length in LENGTHS]) for table in tables)
    got = layer(x, rotary=rotary, cu_seqlens=torch.tensor(CU_SEQLENS))
    expected = one_by_one(lambda x: layer(x, rotary=RotaryPositions(8)(x.shape[1])), x)
    assert_same_with_gradients(got, expected, {"x": x, **dict(layer.named_parameters())})


@pytest.mark.parametrize("kind", [LSHSelfAttention, LocalSelfAttention])
def test_sequences_of_a_layer_have_dropout_of_their_own(kind: type[nn.Module]) -> None:
    one = torch.randn(1, 8, 16)
    x = torch.cat([one[:, :7], one], dim=1)
    for dropout in (0.0, 0.5):
        layer = kind(16, 2, chunk_size=16, causal=True, dropout=dropout)
        for seed in (7, torch.tensor([7]), None):
            out = layer(x, cu_seqlens=[0, 7, 15], dropout_seed=seed)
            assert torch.allclose(out[:, :7], out[:, 7:14], atol=1e-6) == (dropout == 0.0)


def test_lsh_layer_replays_its_buckets() -> None:
    layer = LSHSelfAttention(16, 2, n_hashes=2, chunk_size=4)
    x = torch.randn(1, 85, 16)
    out, buckets = layer(x, cu_seqlens=CU_SEQLENS, return_buckets=True)
    assert buckets.dtype == torch.int16
    assert buckets.shape == (1, 2, 2, 85)
    assert torch.equal(layer(x, cu_seqlens=CU_SEQLENS, hash_step=1, buckets=buckets), out)
    assert not torch.equal(layer(x, cu_seqlens=CU_SEQLENS, hash_step=1), out)


def small_config(**fields: object) -> ReformerConfig:
    return tiny_config(
        **{
            "vocab_size": 50,
            "layers": ("local", "lsh", "full"),
            "max_length": 36,
            "hash_seed": 3,
            **fields,
        }
    )


@pytest.mark.parametrize("positions", ["rotary", "axial", "absolute", "none"])
@pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "plain"])
def test_reformer_one_by_one(reversible: bool, positions: str) -> None:
    """The line is longer than max_length; the sequences are not."""
    model = Reformer(small_config(positions=positions, reversible=reversible)).double().eval()
    tokens = torch.randint(50, (1, 85))
    got = model(tokens, cu_seqlens=CU_SEQLENS)
    expected = one_by_one(model, tokens)
    assert_same_with_gradients(got, expected, dict(model.named_parameters()), 1e-9)


def test_language_model_loss_one_by_one_in_training() -> None:
    model = ReformerLM(small_config(loss_chunk_size=7)).double()
    tokens, targets = torch.randint(50, (2, 1, 85))
    loss = model.loss(tokens, targets, "sum", cu_seqlens=CU_SEQLENS)
    expected = []
    for start, end in ranges():
        model.reformer.hash_step.zero_()  # all of one training step
        expected.append(model.loss(tokens[:, start:end], targets[:, start:end], "sum"))
    assert model.reformer.hash_step.item() == 1
    parameters = dict(model.named_parameters())
    assert_same_with_gradients(loss, torch.stack(expected).sum(), parameters, 1e-9)
    model.eval()
    torch.testing.assert_close(
        model(tokens, cu_seqlens=CU_SEQLENS), one_by_one(model, tokens), rtol=1e-9, atol=1e-9
    )


def test_training_with_all_dropout_is_reproducible() -> None:
    model = ReformerLM(small_config(dropout=0.1, attention_dropout=0.2))
    tokens = torch.randint(50, (1, 85))
    found = []
    for _ in range(2):
        model.zero_grad()
        model.reformer.hash_step.zero_()
        torch.manual_seed(1)
        model.loss(tokens, tokens, cu_seqlens=CU_SEQLENS).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = Reformer(small_config()).double().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(50, (1, 85))
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(tokens, cu_seqlens=CU_SEQLENS), model(tokens, cu_seqlens=CU_SEQLENS)
        )


# Errors


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (
            [1, 10],
            "expected cu_seqlens of 2 or more numbers that start at 0, got 2 that start at 1",
        ),
        ([], "expected cu_seqlens of 2 or more numbers that start at 0, got 0 that start at None"),
        ([0, 6, 4, 10], "expected cu_seqlens not to decrease, got 6 and then 4 at index 2"),
        ([0, 4, 9], "expected cu_seqlens to end at the total length, 10, and that >= 1, got 9"),
        (
            torch.zeros(1, 2).int(),
            r"expected cu_seqlens \[n \+ 1\] of int32 or int64, got \[1, 2\]",
        ),
        (torch.tensor([0.0, 10.0]), r"expected cu_seqlens .*, got \[2\] of torch.float32"),
        ([0.0, 10.0], r"expected cu_seqlens of integers, got \[0.0, 10.0\]"),
    ],
    ids=["start", "empty", "decrease", "end", "matrix", "float", "floats"],
)
@pytest.mark.parametrize("name", ["lsh_attention_packed", "chunked_attention_packed", "Reformer"])
def test_cu_seqlens_errors(name: str, cu_seqlens: Sequence[int] | Tensor, message: str) -> None:
    x = torch.randn(1, 2, 10, 8)
    calls = {
        "lsh_attention_packed": lambda: reformer_ext.lsh_attention_packed(x, x, cu_seqlens),
        "chunked_attention_packed": lambda: reformer_ext.chunked_attention_packed(
            x, x, x, cu_seqlens
        ),
        "Reformer": lambda: Reformer(small_config())(
            torch.zeros(1, 10).long(), cu_seqlens=cu_seqlens
        ),
    }
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        calls[name]()


def test_other_errors() -> None:
    x, mask = torch.randn(1, 2, 10, 8), torch.zeros(1, 10, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"lsh_attention_packed: expected queries \[1, H, total"):
        reformer_ext.lsh_attention_packed(x[0], x[0], [0, 10])
    with pytest.raises(ValueError, match=r"expected batch and length \[1, total\] .*, got \[2, 10"):
        reformer_ext.lsh_attention_packed(*x.expand(2, 2, -1, -1, -1), [0, 10])
    with pytest.raises(RuntimeError, match=r"lsh_attention_packed: expected v \[1, 2, 10, 8\], as"):
        reformer_ext.lsh_attention_packed(x, x[:, :, :9], [0, 10])
    with pytest.raises(RuntimeError, match=r"chunked_attention_packed: expected k \[1, 2, 10, 8\]"):
        reformer_ext.chunked_attention_packed(x, x[:, :1], x, [0, 10])
    lists = torch.zeros(1, 2, 3, 10, dtype=torch.int32)
    for bad in (lists[..., :9], lists.long(), lists[:, :1], lists.expand(2, -1, -1, -1), lists[0]):
        got = re.escape(f"got {list(bad.shape)} of {bad.dtype}")
        expected = r"\[1, 2, (3|R), 10\] of torch.int32, "
        with pytest.raises(
            RuntimeError, match=f"^lsh_attention_packed: expected buckets {expected}{got}$"
        ):
            reformer_ext.lsh_attention_packed(x, x, [0, 10], buckets=bad)
        for argument in ("order", "buckets"):
            options = {"order": lists, argument: bad}
            message = f"^chunked_attention_packed: expected {argument} {expected}{got}$"
            with pytest.raises(RuntimeError, match=message):
                reformer_ext.chunked_attention_packed(x, None, x, [0, 10], **options)
    for name, call in {
        "chunked_attention_packed": lambda: reformer_ext.chunked_attention_packed(
            x, x, x, [0, 10], key_padding_mask=mask
        ),
        "Reformer": lambda: Reformer(small_config())(
            torch.zeros(1, 10).long(), cu_seqlens=[0, 10], key_padding_mask=mask
        ),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected no key_padding_mask .*1, 10"):
            call()
    for kind in (LSHSelfAttention, FullSelfAttention):
        with pytest.raises(ValueError, match=f"{kind.__name__}: expected cu_seqlens to end at"):
            kind(16, 2)(torch.randn(1, 10, 16), cu_seqlens=[0, 9])
    with pytest.raises(
        ValueError, match="Reformer: expected at most max_length = 36 positions, got 40"
    ):
        Reformer(small_config(positions="absolute"))(
            torch.zeros(1, 41).long(), cu_seqlens=[0, 1, 41]
        )


# CUDA


@pytest.mark.parametrize("device", [gpu("cuda")])
def test_cuda_does_not_synchronise_and_agrees_with_cpu(device: str) -> None:
    lengths = [96, 130, 96, 1]
    cu_seqlens = [0, 96, 226, 322, 323]
    assert sequence_lengths("test", torch.tensor(cu_seqlens).to(device), (1, 323)) == lengths
    qk, v = (torch.randn(1, 2, 323, 32, requires_grad=True) for _ in range(2))
    rotations = reformer_ext.sample_rotations(2, 32, 2, 4)
    options = {"n_buckets": 4, "chunk_size": 32, "return_buckets": True}
    out, buckets = reformer_ext.lsh_attention_packed(
        qk, v, cu_seqlens, rotations=rotations, **options
    )
    dout = torch.randn_like(out)
    expected = [out, *torch.autograd.grad(out, [qk, v], dout)]
    inputs = [x.detach().to(device).requires_grad_() for x in (qk, v)]
    rotations, buckets, dout = (x.to(device) for x in (rotations, buckets, dout))

    def step(**given: Tensor) -> tuple[list[Tensor], Tensor]:
        out, hashed = reformer_ext.lsh_attention_packed(*inputs, cu_seqlens, **given, **options)
        return [out, *torch.autograd.grad(out, inputs, dout)], hashed

    step(rotations=rotations)  # warm-up
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, hashed = step(rotations=rotations)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (hashed != buckets).double().mean() < 0.01  # near the border of two buckets
    got, _ = step(buckets=buckets)
    for name, x, target in zip(("out", "grad_qk", "grad_v"), got, expected, strict=True):
        error = (x.cpu() - target).abs().max().item()
        assert error < 1e-4, f"{name}: off by {error:.1e}"


def test_next_values_do_not_cross_the_border_of_sequences() -> None:
    """Own values are split with the others; values are mixed within each sequence."""
    lengths, cu_seqlens = [40, 1, 23], [0, 40, 41, 64]
    qk, v, own = torch.randn(3, 1, 2, 64, 16, dtype=torch.float64)
    mix = torch.rand(2, 2).double()
    options = {"n_hashes": 2, "chunk_size": 8, "n_buckets": 4, "causal": True}
    rotations = reformer_ext.sample_rotations(2, 16, 2, 4, dtype=torch.float64)
    parts = [x.split(lengths, dim=2) for x in (qk, v, own)]
    for given in ({"own_values": own}, {"value_mix": mix}):
        out = reformer_ext.lsh_attention_packed(
            qk, v, cu_seqlens, rotations=rotations, **given, **options
        )
        for part, q, values, theirs in zip(out.split(lengths, dim=2), *parts, strict=True):
            more = {"own_values": theirs} if "own_values" in given else given
            one = reformer_ext.lsh_attention(q, values, rotations=rotations, **more, **options)
            torch.testing.assert_close(part, one, rtol=0, atol=0)
