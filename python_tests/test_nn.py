"""Modules and models: against plain formulas, and what a user does with them."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from python_tests.cases import tiny_config
from reformer_ext.nn import (
    AbsolutePositions,
    AxialPositions,
    ChunkedFeedForward,
    FullSelfAttention,
    LocalSelfAttention,
    LSHSelfAttention,
    Reformer,
    ReformerConfig,
    ReformerLM,
    RotaryPositions,
    apply_rotary,
    chunked_lm_loss,
    hash_rotations,
)

CPU = torch.device("cpu")


def small_config(**fields: object) -> ReformerConfig:
    return tiny_config(
        **{"dim": 32, "chunk_size": 8, "local_chunk_size": 8, "max_length": 128, **fields}
    )


def random_mask(batch: int, length: int) -> Tensor:
    """Padding at the end of all sequences but the first, position 0 never."""
    lengths = torch.randint(1, length + 1, (batch, 1))
    lengths[0] = length
    return torch.arange(length) >= lengths


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


# Attention


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("length", [1, 2, 29])
def test_lsh_in_one_chunk_is_full_shared_qk_attention(
    length: int, masked: bool, causal: bool
) -> None:
    """With one chunk a round every pair meets, in every round alike: the exact limit."""
    lsh = LSHSelfAttention(24, 3, n_hashes=3, chunk_size=32, causal=causal).double()
    full = FullSelfAttention(24, 3, causal=causal, shared_qk=True).double()
    full.load_state_dict(lsh.state_dict())
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    mask = random_mask(2, length) if masked else None
    rotary = RotaryPositions(8)(length)
    keep = torch.ones(2, length, 1) if mask is None else ~mask[..., None]
    results = []
    for layer in (lsh, full):
        out = layer(x, key_padding_mask=mask, rotary=rotary) * keep
        grads = torch.autograd.grad(out.pow(2).sum(), [x, *layer.parameters()])
        results.append((out, grads))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_shared_qk_full_attention_by_hand() -> None:
    layer = FullSelfAttention(4, 1, causal=True, shared_qk=True, scale=1.0).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    q, v = layer.in_proj(x)[0].chunk(2, dim=-1)
    k = q / q.norm(dim=-1, keepdim=True)
    weights = torch.softmax(torch.stack([q[2] @ k[0], q[2] @ k[1]]), dim=0)
    rows = [v[0], v[0], weights[0] * v[0] + weights[1] * v[1]]  # itself, the first, both before
    torch.testing.assert_close(layer(x)[0], layer.out_proj(torch.stack(rows)))


def test_self_only_rows_are_not_dropped() -> None:
    layer = FullSelfAttention(8, 2, causal=True, shared_qk=True, dropout=0.9)
    x = torch.randn(1, 5, 8)
    expected = layer.out_proj(layer.in_proj(x)[:, 0].chunk(2, dim=-1)[1])
    for _ in range(5):
        torch.testing.assert_close(layer(x)[:, 0], expected)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("length", [1, 8, 37])
def test_local_attention_is_banded_full_attention(length: int, causal: bool) -> None:
    local = LocalSelfAttention(24, 3, chunk_size=8, causal=causal).double()
    x = torch.randn(2, length, 24, dtype=torch.float64)
    mask = random_mask(2, length)
    chunk = torch.arange(length) // 8
    behind = chunk[:, None] - chunk[None, :]
    band = (behind <= 1) & (behind >= (0 if causal else -1))
    if causal:
        band = band.tril()
    allowed = band & ~mask[:, None, None, :]
    q, k, v = (t.transpose(1, 2) for t in local.in_proj(x).unflatten(-1, (3, 3, 8)).unbind(2))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).nan_to_num()
    expected = local.out_proj(out.transpose(1, 2).flatten(2))
    keep = ~mask[..., None]
    torch.testing.assert_close(local(x, key_padding_mask=mask) * keep, expected * keep)


def test_lsh_hash_is_stateless_and_leaves_generators_alone() -> None:
    """RP draws new rotations in eval too; HF reseeds the global generator at every hash."""
    layer = LSHSelfAttention(32, 2, n_buckets=16, chunk_size=4)
    other = LSHSelfAttention(32, 2, n_buckets=16, chunk_size=4, hash_seed=1)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 50, 32)
    state = torch.get_rng_state()
    out, buckets = layer(x, return_buckets=True)
    assert torch.equal(layer(x), out)
    assert torch.equal(layer(x, hash_step=torch.tensor([0])), out)
    assert not torch.equal(layer(x, hash_step=1, return_buckets=True)[1], buckets)
    assert not torch.equal(other(x, return_buckets=True)[1], buckets)
    assert torch.equal(layer(x, hash_step=1, buckets=buckets), out)
    assert torch.equal(torch.get_rng_state(), state)
    assert buckets.dtype == torch.int16
    assert buckets.shape == (1, 2, 8, 50)
    assert layer(x, n_hashes=3, return_buckets=True)[1].shape == (1, 2, 3, 50)


def test_lsh_wide_bucket_numbers_are_int32() -> None:
    layer = LSHSelfAttention(8, 1, n_buckets=(128, 256), n_hashes=1)
    mask = torch.tensor([[False, True]])
    _, buckets = layer(torch.randn(1, 2, 8), key_padding_mask=mask, return_buckets=True)
    assert buckets.dtype == torch.int32
    assert buckets[0, 0, 0, 1] == 128 * 256


def test_rotary_positions_turn_the_hash_only_if_asked() -> None:
    x = torch.randn(1, 1, 32).expand(1, 200, 32)  # the same content everywhere
    rotary = RotaryPositions(16)(200)
    for before in (True, False):
        layer = LSHSelfAttention(32, 2, n_buckets=16, rotary_before_hash=before)
        _, buckets = layer(x, rotary=rotary, return_buckets=True)
        assert (buckets != buckets[..., :1]).any() == before


def test_hash_rotations_are_normal_and_uncorrelated() -> None:
    shape = {"n_heads": 8, "head_dim": 64, "n_hashes": 8, "n_buckets": [64, 64]}
    draw = lambda seed, step: hash_rotations(  # noqa: E731
        seed, step, **shape, device=CPU, dtype=torch.float64
    )
    a = draw(0, 0)
    assert a.shape == (8, 64, 8, 64)
    assert torch.equal(a, draw(0, torch.zeros(1, dtype=torch.int64)))
    assert torch.equal(a, a.to(torch.bfloat16).double())
    n = a.numel()
    assert abs(a.mean()) < 5 / math.sqrt(n)
    assert abs(a.var() - 4 / 3) < 0.02
    projections = a.sum(dim=1).flatten()  # of a vector: as good as normal
    assert abs(projections.pow(4).mean() / projections.var() ** 2 - 3) < 0.2
    for b in (draw(0, 1), draw(1, 0), draw(1, 1), draw(0, 2**31 + 5)):
        assert abs((a * b).mean()) < 5 / math.sqrt(n)
        assert not torch.isin(a.flatten()[:16].prod(), b.flatten().unfold(0, 16, 16).prod(-1))
    rows = a.permute(0, 2, 3, 1).reshape(-1, 64)
    correlation = rows.T @ rows / len(rows) / a.var() - torch.eye(64)
    assert correlation.abs().max() < 6 / math.sqrt(len(rows))


@pytest.mark.parametrize("kind", [LSHSelfAttention, LocalSelfAttention, FullSelfAttention])
def test_attention_errors(kind: type[nn.Module]) -> None:
    name = kind.__name__
    with pytest.raises(ValueError, match=f"{name}: expected dim divisible by heads, got 10 and 3"):
        kind(10, 3)
    with pytest.raises(ValueError, match=rf"{name}: expected dropout in \[0, 1\), got 1.0"):
        kind(12, 3, dropout=1.0)
    with pytest.raises(ValueError, match=rf"{name}: expected x \[B, L, 12\], got \[5, 12\]"):
        kind(12, 3)(torch.ones(5, 12))
    mask = torch.zeros(1, 5, dtype=torch.bool)
    for bad in (mask, mask.expand(2, -1)[:, 1:], mask.expand(2, -1).int()):
        with pytest.raises((ValueError, RuntimeError), match=r"key_padding_mask of|\[2, 5\]"):
            kind(12, 3)(torch.ones(2, 5, 12), key_padding_mask=bad)


@pytest.mark.parametrize("kind", [LSHSelfAttention, LocalSelfAttention, FullSelfAttention])
def test_attention_is_the_sum_over_its_heads(kind: type[nn.Module]) -> None:
    layer = kind(12, 3, causal=True, bias=True).double()
    x = torch.randn(2, 150, 12, dtype=torch.float64)
    options = {"rotary": RotaryPositions(4)(150)}
    options |= {"return_buckets": True} if kind is LSHSelfAttention else {}
    whole, *parts = (layer(x, heads=heads, **options) for heads in (None, (0, 1), (1, 3)))
    if kind is LSHSelfAttention:
        (whole, buckets), parts, in_parts = whole, *zip(*parts, strict=True)
        assert torch.equal(torch.cat(in_parts, dim=1), buckets)
    torch.testing.assert_close(sum(parts), whole)
    for heads in ((1, 1), (2, 4), (-1, 2)):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: expected heads \(first, end\)"):
            layer(x, heads=heads)


# Positions


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    cos, sin = RotaryPositions(16)(1_000_001)
    q, k = torch.randn(2, 16)

    def score(i: int, j: int) -> Tensor:
        at = lambda x, p: apply_rotary(x.view(1, 1, 1, -1), (cos[p : p + 1], sin[p : p + 1]))  # noqa: E731
        return (at(q, i) * at(k, j)).sum()

    torch.testing.assert_close(score(1_000_000, 999_990), score(10, 0), atol=1e-5, rtol=1e-5)
    assert abs(score(10, 0) - score(0, 10)) > 1e-3
    torch.testing.assert_close(score(5, 5), q @ k)


def test_axial_positions_are_the_grid_in_row_major_order() -> None:
    positions = AxialPositions((3, 4, 5), 7)
    assert [tuple(w.shape) for w in positions.weights] == [(3, 3), (4, 2), (5, 2)]
    everything = positions(60)
    for p in (0, 1, 19, 20, 37, 59):
        a, b, c = p // 20, p // 5 % 4, p % 5
        expected = torch.cat([positions.weights[i][j] for i, j in enumerate((a, b, c))])
        assert torch.equal(everything[p], expected)
    for length in (1, 19, 20, 21, 59):
        assert torch.equal(positions(length), everything[:length])
    positions(21).sum().backward()
    assert [int(w.grad.sum()) for w in positions.weights] == [63, 42, 42]


def test_position_errors() -> None:
    with pytest.raises(ValueError, match="AxialPositions: expected at most 12 positions, got 13"):
        AxialPositions((3, 4), 8)(13)
    with pytest.raises(ValueError, match="AxialPositions: expected 2 positive dims that sum to 8"):
        AxialPositions((3, 4), 8, (4, 5))
    with pytest.raises(ValueError, match="AbsolutePositions: expected at most 4 positions, got 5"):
        AbsolutePositions(4, 8)(5)
    for width in (7, 0, 8.0, "8"):
        with pytest.raises(ValueError, match="RotaryPositions: expected an even head_dim"):
            RotaryPositions(width)
    for base in (0, -1.0, math.nan, math.inf, "10"):
        with pytest.raises(ValueError, match="RotaryPositions: expected base to be a number > 0"):
            RotaryPositions(8, base)
    for positions in (AbsolutePositions(64, 32), AxialPositions((8, 8), 32), RotaryPositions(8)):
        assert len(positions(0)) == (2 if isinstance(positions, RotaryPositions) else 0)
        for length in (-1, 2.0, "2"):
            message = f"{type(positions).__name__}: expected length to be an integer >= 0, got "
            with pytest.raises(ValueError, match=f"^{message}{length!r}$"):
                positions(length)
    for sizes in ((0, 8), (8.0, 8), (4, 0), (4, "8")):
        with pytest.raises(ValueError, match=r"AbsolutePositions: expected (max_length|dim) to be"):
            AbsolutePositions(*sizes)
    with pytest.raises(ValueError, match=r"AxialPositions: expected shape of positive sizes, got"):
        AxialPositions((2.0, 4), 8)
    with pytest.raises(ValueError, match="AxialPositions: expected 2 positive dims that sum to 8"):
        AxialPositions((3, 4), 8, (4.0, 4))


# Chunks of positions


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 17, 100])
def test_chunked_feed_forward_is_the_unchunked(chunk_size: int, glu: bool) -> None:
    whole = ChunkedFeedForward(6, 10, glu=glu, activation="silu").double()
    chunked = ChunkedFeedForward(6, 10, glu=glu, activation="silu", chunk_size=chunk_size).double()
    chunked.load_state_dict(whole.state_dict())
    x = torch.randn(2, 17, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in (whole, chunked):
        out = layer(x)
        results.append((out, torch.autograd.grad(out.pow(3).sum(), [x, *layer.parameters()])))
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(chunked(x), results[0][0])


def test_chunked_feed_forward_by_hand() -> None:
    layer = ChunkedFeedForward(3, 5, activation="relu", glu=True)
    x = torch.randn(1, 2, 3)
    up, gate = layer.in_proj(x).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x), layer.out_proj(up * gate.relu()))


def test_chunked_feed_forward_never_holds_all_hidden_activations() -> None:
    layer = ChunkedFeedForward(8, 64, chunk_size=10, dropout=0.1)
    x = torch.randn(1, 100, 8, requires_grad=True)
    with LargestTensor() as largest:
        layer(x).sum().backward()
    assert largest.numel <= 800  # x itself; the hidden activations would be 6400


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", [0, 1, 7, 1000])
@pytest.mark.parametrize("biased", [True, False])
def test_chunked_loss_is_cross_entropy(biased: bool, chunk_size: int, reduction: str) -> None:
    hidden = torch.randn(2, 11, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True) if biased else None
    targets = torch.randint(9, (2, 11))
    targets[0, 3:7] = -100
    loss = chunked_lm_loss(
        hidden, weight, bias, targets, chunk_size=chunk_size, reduction=reduction
    )
    logits = F.linear(hidden, weight, bias).transpose(1, 2)
    expected = F.cross_entropy(logits, targets, reduction=reduction)
    inputs = [hidden, weight] + ([bias] if bias is not None else [])
    torch.testing.assert_close(loss, expected)
    weights = torch.rand_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((loss * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
    )


def test_chunked_loss_never_holds_all_logits() -> None:
    hidden = torch.randn(1, 100, 4, requires_grad=True)
    weight = torch.randn(50, 4, requires_grad=True)
    with LargestTensor() as largest:
        loss = chunked_lm_loss(hidden, weight, None, torch.randint(50, (1, 100)), chunk_size=10)
        loss.backward()
    assert largest.numel == 500  # a chunk's logits, and not 5000


def test_chunked_loss_under_autocast_is_float32() -> None:
    hidden, weight = torch.randn(1, 6, 4), torch.randn(9, 4)
    targets = torch.randint(9, (1, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_lm_loss(hidden, weight, None, targets, chunk_size=4)
    assert loss.dtype == torch.float32
    exact = chunked_lm_loss(hidden, weight, None, targets)
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "expected dim to be an integer >= 1, got 0"),
        ({"dim": 4.0}, "expected dim to be an integer >= 1, got 4.0"),
        ({"hidden": 0}, "expected hidden to be an integer >= 1, got 0"),
        ({"hidden": "8"}, "expected hidden to be an integer >= 1, got '8'"),
        ({"chunk_size": 2.5}, "expected chunk_size >= 0, got 2.5"),
        ({"chunk_size": True}, "expected chunk_size >= 0, got True"),
        ({"dropout": 1.0}, r"expected dropout in [0, 1), got 1.0"),
        ({"dropout": math.nan}, r"expected dropout in [0, 1), got nan"),
        ({"dropout": "0"}, r"expected dropout in [0, 1), got '0'"),
    ],
)
def test_feed_forward_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ChunkedFeedForward: {re.escape(message)}$"):
        ChunkedFeedForward(**{"dim": 4, **change})


def test_chunked_errors() -> None:
    with pytest.raises(ValueError, match=r"chunked_lm_loss: expected targets \[1, 6\], got \[1, 5"):
        chunked_lm_loss(torch.ones(1, 6, 4), torch.ones(9, 4), None, torch.zeros(1, 5).long())
    with pytest.raises(ValueError, match="expected reduction mean, sum or none, got 'max'"):
        chunked_lm_loss(
            torch.ones(1, 4), torch.ones(9, 4), None, torch.zeros(1).long(), reduction="max"
        )
    with pytest.raises(ValueError, match="ChunkedFeedForward: expected chunk_size >= 0, got -1"):
        ChunkedFeedForward(4, chunk_size=-1)
    with pytest.raises(ValueError, match=r"expected activation in .*, got 'tanh'"):
        ChunkedFeedForward(4, activation="tanh")


# Models


@pytest.mark.parametrize("positions", ["rotary", "axial", "absolute", "none"])
@pytest.mark.parametrize("length", [1, 2, 17, 64, 101])
def test_any_length(length: int, positions: str) -> None:
    model = ReformerLM(small_config(positions=positions, layers=("local", "lsh", "full")))
    tokens = torch.randint(256, (2, length))
    logits = model(tokens)
    assert logits.shape == (2, length, 256)
    loss = model.loss(tokens, torch.randint(256, (2, length)))
    assert 5.2 < loss.item() < 5.9  # near log 256 = 5.55 before any training
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_lm_loss_is_the_cross_entropy_of_its_logits() -> None:
    for tied in (True, False):
        model = ReformerLM(small_config(tie_embeddings=tied, loss_chunk_size=7)).double().eval()
        tokens = torch.randint(256, (2, 20))
        targets = torch.randint(256, (2, 20))
        targets[:, :3] = -100
        expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        torch.testing.assert_close(model.loss(tokens, targets), expected)


def test_embeddings_instead_of_tokens() -> None:
    model = Reformer(small_config()).eval()
    tokens = torch.randint(256, (1, 9))
    assert torch.equal(model(model.embedding(tokens)), model(tokens))


@pytest.mark.parametrize("kind", ["local", "lsh", "full"])
def test_causal_models_do_not_look_ahead(kind: str) -> None:
    config = small_config(layers=(kind,) * 2, chunk_size=64, full_shared_qk=True)
    model = ReformerLM(config).double().eval()
    tokens = torch.randint(256, (1, 40))
    changed = tokens.clone()
    changed[0, 25:] = (changed[0, 25:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=1e-10, atol=1e-12)
    assert (before[:, 25:] - after[:, 25:]).abs().max() > 1e-3


def test_padding_is_not_read() -> None:
    model = ReformerLM(small_config(causal=False, layers=("local", "lsh", "full"))).double().eval()
    tokens = torch.randint(256, (2, 30))
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[1, 19:] = True
    changed = torch.where(mask, 7, tokens)
    got = [model(t, key_padding_mask=mask)[~mask] for t in (tokens, changed)]
    torch.testing.assert_close(*got, rtol=1e-10, atol=1e-12)


def test_evaluation_is_deterministic_and_training_hashes_anew() -> None:
    """RP: two eval calls differ by 0.73."""
    model = Reformer(small_config(layers=("lsh",), n_buckets=16))
    tokens = torch.randint(256, (1, 100))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert model.hash_step.item() == 0
    model.train()
    first, second = model(tokens), model(tokens)
    assert not torch.equal(first, second)
    assert model.hash_step.item() == 2
    model.hash_step.zero_()
    assert torch.equal(model(tokens), first)


def test_manual_seed_reproduces_training_and_the_state_dict_resumes_it() -> None:
    """HF reseeds from entropy in train(): the same seed gives other losses."""
    config = small_config(dropout=0.1, attention_dropout=0.1, layers=("local", "lsh", "full"))
    tokens = torch.randint(256, (2, 41))

    def train(model: ReformerLM, steps: int) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(steps):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = ReformerLM(config)
        runs.append(train(model, 2))
        state, generator = model.state_dict(), torch.get_rng_state()
        state = {name: tensor.clone() for name, tensor in state.items()}
        runs[-1] += train(model, 2)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4
    resumed = ReformerLM(config)
    resumed.load_state_dict(state)
    torch.set_rng_state(generator)
    assert train(resumed, 2) == runs[0][2:]


def test_hashes_per_call_in_training() -> None:
    """HF's backward fails with a num_hashes of the call."""
    model = ReformerLM(small_config(layers=("lsh",)))
    tokens = torch.randint(256, (1, 40))
    model.loss(tokens, tokens, n_hashes=5).backward()
    assert model.reformer.layers.blocks[0].f.attention.in_proj.weight.grad.abs().max() > 0


def test_learns() -> None:
    """A pattern with a period of 13."""
    model = ReformerLM(small_config(vocab_size=16, positions="axial", ff_hidden=32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = torch.arange(64).remainder(13).view(1, 64)
    losses = []
    for _ in range(15):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_initialisation() -> None:
    model = Reformer(small_config(dim=256, layers=("local", "lsh") * 4))
    for name, parameter in model.named_parameters():
        if name.endswith("out_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / 4, rel=0.05), name
        elif name.endswith(("in_proj.weight", "embedding.weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("bias"):
            assert parameter.abs().max() == 0, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "ReformerConfig.dim: expected an integer >= 1, got 0"),
        ({"dim": 33}, "ReformerConfig.heads: expected a divisor of dim = 33, got 2"),
        ({"layers": ()}, r"ReformerConfig.layers: expected one or more of .*, got \(\)"),
        ({"layers": ("lsh", "fast")}, "ReformerConfig.layers: .*'fast'"),
        ({"layers": "lsh"}, "ReformerConfig.layers: .*'lsh'"),
        ({"n_buckets": 7}, "ReformerConfig.n_buckets: expected None, an even number .*, got 7"),
        ({"n_buckets": (4, 5)}, r"ReformerConfig.n_buckets: .*got \(4, 5\)"),
        ({"dropout": 1.0}, r"ReformerConfig.dropout: expected a number in \[0, 1\), got 1.0"),
        ({"positions": "polar"}, "ReformerConfig.positions: expected one of .*, got 'polar'"),
        ({"head_dim": 257}, "ReformerConfig.head_dim: expected at most 256"),
        ({"head_dim": 9}, "ReformerConfig.head_dim: expected an even number"),
        ({"axial_shape": (8, 8)}, "ReformerConfig.axial_shape: .* at least max_length = 128"),
        ({"ff_activation": "tanh"}, "ReformerConfig.ff_activation: expected one of .*, got 'tanh'"),
        ({"norm_eps": 0.0}, "ReformerConfig.norm_eps: expected a number > 0, got 0.0"),
        ({"dropout": "0.1"}, "ReformerConfig.dropout: expected a number .*, got '0.1'"),
        ({"causal": 1}, "ReformerConfig.causal: expected True or False, got 1"),
        ({"n_buckets": 8.0}, "ReformerConfig.n_buckets: .*got 8.0"),
        ({"heads_at_once": -1}, "ReformerConfig.heads_at_once: expected an integer >= 0, got -1"),
        ({"heads_at_once": 4}, "heads_at_once: expected 0 or a divisor of heads = 2, got 4"),
        ({"dim": "32"}, "ReformerConfig.dim: expected an integer >= 1, got '32'"),
    ],
)
def test_config_errors(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


def test_model_errors() -> None:
    model = ReformerLM(small_config(positions="absolute"))
    with pytest.raises(ValueError, match=r"Reformer: expected tokens \[B, L\], got \[5\]"):
        model(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Reformer: expected embeddings \[B, L, 32\]"):
        model(torch.zeros(1, 5, 31))
    tokens = torch.zeros(1, 129, dtype=torch.int64)
    for dtype in (torch.bool, torch.uint8):
        with pytest.raises(ValueError, match=f"expected tokens of int64 or int32, got {dtype}"):
            model(tokens[:, :5].to(dtype))
    for n_hashes in (0, -1, 2.5, True):
        message = f"expected n_hashes to be None or an integer >= 1, got {n_hashes}"
        with pytest.raises(ValueError, match=message):
            model(tokens[:, :5], n_hashes=n_hashes)
    axial = ReformerLM(small_config(positions="axial"))  # on a grid of 144
    for limited in (model, axial):
        with pytest.raises(ValueError, match="expected at most max_length = 128 positions, got 12"):
            limited(tokens)
        with pytest.raises(ValueError, match="expected at most max_length = 128 positions, got 12"):
            limited(tokens.repeat(1, 2), cu_seqlens=[0, 129, 258])
        limited(tokens[:, :128].repeat(1, 2), cu_seqlens=[0, 128, 256])
    with torch.no_grad(), pytest.raises(TypeError, match="expected a DecodingCache from new_cache"):
        model.eval()(tokens[:, :5], cache=model.new_cache(1, 8).layers[0])


@pytest.mark.parametrize("module", ["nn.models", "nn.encoder_decoder", "integrations.transformers"])
def test_docstring_examples(module: str) -> None:
    if module == "integrations.transformers":
        pytest.importorskip("transformers", reason="needs transformers")
    results = doctest.testmod(importlib.import_module(f"reformer_ext.{module}"))
    assert results.attempted > 0
    assert results.failed == 0


# Saving and loading


def test_save_and_load(tmp_path: Path) -> None:
    config = small_config(positions="axial", n_buckets=(4, 2), tie_embeddings=False)
    model = ReformerLM(config)
    tokens = torch.randint(256, (1, 20))
    model.loss(tokens, tokens)  # moves hash_step
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = ReformerLM.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == config
    assert not loaded.training
    for (name, a), (other, b) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b), name
    assert torch.equal(loaded(tokens), model.eval()(tokens))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_load_errors(tmp_path: Path) -> None:
    model = ReformerLM(small_config())
    model.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()

    def load_fails(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            ReformerLM.from_pretrained(tmp_path)
        config.write_text(good_config)
        weights.write_bytes(good_weights)

    weights.write_bytes(good_weights[:-100])
    load_fails(ValueError, "model.safetensors: expected safetensors, got")
    weights.write_bytes(b"PK\x03\x04 a zip archive of another program")
    load_fails(ValueError, "model.safetensors: expected safetensors, got")
    weights.unlink()
    load_fails(FileNotFoundError, "no such file: .*model.safetensors")
    config.write_text(good_config[:50])
    load_fails(ValueError, "config.json: expected JSON, got")
    config.write_text(json.dumps({"model_type": "bert"}))
    load_fails(ValueError, "config.json: expected architecture ReformerLM, got None")
    config.write_text("[1, 2]")
    load_fails(ValueError, "config.json: expected architecture ReformerLM, got None")
    config.write_text(json.dumps({**json.loads(good_config), "n_heads": 3}))
    load_fails(ValueError, r"config.json: unknown fields \['n_heads'\]")
    config.write_text(json.dumps({**json.loads(good_config), "dim": 64}))
    load_fails(ValueError, "(?s)model.safetensors: not the weights of .*size mismatch")
    assert torch.equal(
        ReformerLM.from_pretrained(tmp_path).output_weight, model.output_weight.detach()
    )


# Compilation


def test_inference_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = ReformerLM(small_config(layers=("local", "lsh", "full"), n_buckets=8)).double().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (24, 37):
        tokens = torch.randint(256, (2, length))
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens), model(tokens))


def test_compiled_hash_rotations_are_the_same_bits() -> None:
    """Inductor fuses the integer arithmetic into one kernel."""
    torch._dynamo.reset()

    def draw(step: Tensor) -> Tensor:
        return hash_rotations(5, step, 2, 16, 3, [8, 4], device=CPU, dtype=torch.float32)

    compiled = torch.compile(draw, fullgraph=True)
    for step in (0, 2**33 + 7):
        assert torch.equal(compiled(torch.tensor([step])), draw(torch.tensor([step])))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"positions": "axial", "length_multiple": 12},
        {"positions": "absolute", "ff_chunk_size": 7, "same_bucket": True},
        {"layers": ("full", "lsh"), "full_shared_qk": True, "correct_duplicates": True},
        {"local_wrap": True, "causal": False, "length_multiple": 16, "streams": "concat"},
    ],
    ids=["rotary", "axial-multiple", "absolute-chunks", "full", "wrap-multiple"],
)
def test_export(fields: dict[str, object], masked: bool) -> None:
    """With a dynamic length; the example length must not show in the graph."""
    model = ReformerLM(small_config(n_buckets=8, **fields)).double().eval()
    length = torch.export.Dim("length", min=2, max=128)

    def inputs(n: int) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        mask = {"key_padding_mask": random_mask(2, n)} if masked else {}
        return (torch.randint(256, (2, n)),), mask

    example, mask = inputs(24)
    shapes = {"tokens": {1: length}, **{name: {1: length} for name in mask}}
    program = torch.export.export(model, example, mask, dynamic_shapes=shapes).module()
    for n in (24, 101, 128, 2):
        args, kwargs = inputs(n)
        torch.testing.assert_close(program(*args, **kwargs), model(*args, **kwargs))


def test_export_needs_a_number_of_buckets() -> None:
    """Unless all lengths of the range have the same."""
    model = ReformerLM(small_config()).double().eval()
    tokens = torch.randint(256, (2, 24))

    def export(least: int, most: int) -> Callable[[Tensor], Tensor]:
        shapes = ({1: torch.export.Dim("length", min=least, max=most)},)
        return torch.export.export(model, (tokens,), dynamic_shapes=shapes).module()

    for least, most in ((2, 128), (16, 32), (15, 31)):
        with pytest.raises(ValueError, match=r"default_n_buckets: expected n_buckets to be given"):
            export(least, most)
    torch.testing.assert_close(export(16, 31)(tokens), model(tokens))
    fixed = torch.export.export(model, (tokens,)).module()
    torch.testing.assert_close(fixed(tokens), model(tokens))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    """The hashes are the same bits on both, so the models are the same function."""
    config = small_config(
        dim=64, chunk_size=64, local_chunk_size=64, layers=("local", "lsh", "full")
    )
    model = ReformerLM(config).eval()
    tokens = torch.randint(256, (2, 300))
    expected = model(tokens)
    got = model.cuda()(tokens.cuda()).cpu()
    # A query near the border of two buckets may fall on the other side.
    error = (got - expected).abs().amax(dim=-1)
    assert (error < 1e-4).double().mean() > 0.9
    assert error.max() < 0.1
    shape = {"n_heads": 2, "head_dim": 32, "n_hashes": 3, "n_buckets": [16], "dtype": torch.float32}
    rotations = [hash_rotations(3, 9, **shape, device=torch.device(d)) for d in ("cpu", "cuda")]
    assert torch.equal(rotations[0], rotations[1].cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains_a_long_sequence_in_bfloat16() -> None:
    config = small_config(
        dim=128, chunk_size=64, local_chunk_size=64, ff_chunk_size=4096, layers=("local", "lsh") * 2
    )
    model = ReformerLM(dataclasses.replace(config, max_length=65536)).cuda()
    tokens = torch.arange(65537, device="cuda").remainder(251).view(1, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
