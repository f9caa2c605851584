"""Cross-attention and the encoder-decoder: against formulas, plain autograd and one another."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import gpu
from test_reversible import saved_bytes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import reformer_ext
from python_tests.cases import tiny_config
from reformer_ext import ops, reference
from reformer_ext.generate import Sampling, generate_from_source
from reformer_ext.nn import (
    EncoderDecoderCache,
    FullCrossAttention,
    LSHCrossAttention,
    ReformerConfig,
    ReformerEncoderDecoder,
    ReversibleStack,
)

DIM = 16


def reference_lsh_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotations: Tensor,
    n_buckets: list[int],
    *,
    chunk_size: int,
    look_back: int = 1,
    look_ahead: int = 1,
    same_bucket: bool = False,
    correct_duplicates: bool = False,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Written to be read: one (batch, head, round, query) after the other."""
    batch, heads, n_queries, head_dim = q.shape
    n_keys, rounds = k.shape[2], rotations.shape[2]
    per_round = math.ceil((n_queries + n_keys) / chunk_size)
    query_buckets = reference.lsh_hash(q, rotations, n_buckets, query_padding_mask)
    key_buckets = reference.lsh_hash(k, rotations, n_buckets, key_padding_mask)
    counts = torch.zeros(batch, heads, n_queries, n_keys, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            query_chunk, key_chunk = {}, {}
            for r in range(rounds):
                rows = [(int(query_buckets[b, h, r, i]), 0, i) for i in range(n_queries)]
                rows += [(int(key_buckets[b, h, r, j]), 1, j) for j in range(n_keys)]
                for place, (_, side, position) in enumerate(sorted(rows)):
                    chunk = r * per_round + place // chunk_size
                    (key_chunk if side else query_chunk)[r, position] = chunk
            for (r, i), chunk in query_chunk.items():
                window = {
                    (chunk + offset) % (rounds * per_round)
                    for offset in range(-look_back, look_ahead + 1)
                }
                for (other, j), place in key_chunk.items():
                    padded = key_padding_mask is not None and bool(key_padding_mask[b, j])
                    together = other == r and query_buckets[b, h, r, i] == key_buckets[b, h, r, j]
                    if place in window and not padded and (together or not same_bucket):
                        counts[b, h, i, j] += 1
    valid = counts > 0
    logits = head_dim**-0.5 * q @ k.transpose(-1, -2)
    if not correct_duplicates:
        logits = logits + counts.clamp(min=1).log()
    # A row without a key: any finite row, then 0.
    logits = logits.masked_fill(~valid & valid.any(dim=-1, keepdim=True), -math.inf)
    nothing = ~valid.any(dim=-1)
    out = (torch.softmax(logits, dim=-1) @ v).masked_fill(nothing[..., None], 0.0)
    return out, logits.logsumexp(dim=-1).masked_fill(nothing, -math.inf)


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "options"),
    [
        (13, 29, {}),
        (40, 7, {}),
        (1, 17, {"correct_duplicates": True}),
        (17, 1, {}),
        (21, 22, {"correct_duplicates": True, "look_back": 0}),
        (15, 15, {"same_bucket": True}),
        (23, 18, {"padded": True}),
        (9, 30, {"padded": True, "same_bucket": True}),
    ],
)
def test_lsh_cross_attention_is_the_reference(
    n_queries: int, n_keys: int, options: dict[str, object]
) -> None:
    options = dict(options)
    masks = {}
    if options.pop("padded", False):
        masks["query_padding_mask"] = torch.arange(n_queries) >= torch.tensor([[n_queries], [5]])
        masks["key_padding_mask"] = torch.arange(n_keys) >= torch.tensor([[n_keys - 6], [0]])
    q = torch.randn(2, 2, n_queries, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, n_keys, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    rotations = reformer_ext.sample_rotations(2, 8, 3, [4, 2], dtype=torch.float64)
    out, lse, buckets = reformer_ext.lsh_cross_attention(
        q,
        k,
        v,
        rotations=rotations,
        n_buckets=[4, 2],
        chunk_size=4,
        return_lse=True,
        return_buckets=True,
        **options,
        **masks,
    )
    expected, expected_lse = reference_lsh_cross_attention(
        q, k, v, rotations, [4, 2], chunk_size=4, **options, **masks
    )
    if "key_padding_mask" in masks:
        assert (out[1] == 0).all()  # no key at all
        assert (lse[1] == -math.inf).all()
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-11, atol=1e-12)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, [q, k, v], dout)
    wanted = torch.autograd.grad(expected, [q, k, v], dout)
    for name, grad, target in zip("qkv", got, wanted, strict=True):
        torch.testing.assert_close(
            grad, target, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"d{name}: {m}"
        )
    assert buckets.shape == (2, 2, 3, n_queries + n_keys)
    again = reformer_ext.lsh_cross_attention(
        q, k, v, buckets=buckets, n_buckets=[4, 2], chunk_size=4, **options, **masks
    )
    assert torch.equal(again, out)


def test_lsh_cross_attention_in_one_chunk_is_full() -> None:
    lsh = LSHCrossAttention(24, 3, context_dim=10, n_hashes=3, chunk_size=64).double()
    full = FullCrossAttention(24, 3, context_dim=10).double()
    full.load_state_dict(lsh.state_dict())
    x = torch.randn(2, 13, 24, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 31, 10, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(31) >= torch.tensor([[31], [9]])
    results = []
    for layer in (lsh, full):
        out = layer(x, context, context_padding_mask=mask)
        grads = torch.autograd.grad(out.pow(2).sum(), [x, context, *layer.parameters()])
        results.append((out, grads))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_lsh_cross_attention_finds_the_near_keys() -> None:
    """Keys that are noisy copies of the queries, shuffled: what is attended to is found."""
    length = 512
    q = 8 * F.normalize(torch.randn(1, 1, length, 32), dim=-1)
    copies = torch.randperm(length)
    k = q[:, :, copies] + 0.05 * torch.randn_like(q)
    v = torch.randn_like(q)
    out = reformer_ext.lsh_cross_attention(
        q, k, v, chunk_size=16, n_hashes=8, scale=1.0, correct_duplicates=True
    )
    exact = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    error = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 1e-3
    assert (error < 0.1).float().mean() > 0.9


def test_lsh_cross_hash_is_stateless_and_can_be_replayed() -> None:
    layer = LSHCrossAttention(DIM, 2, n_hashes=2, chunk_size=4)
    x, context = torch.randn(1, 20, DIM), torch.randn(1, 33, DIM)
    state = torch.get_rng_state()
    out, buckets = layer(x, context, return_buckets=True)
    assert torch.equal(layer(x, context), out)
    assert not torch.equal(layer(x, context, hash_step=1), out)
    assert torch.equal(layer(x, context, hash_step=1, buckets=buckets), out)
    assert torch.equal(torch.get_rng_state(), state)
    assert buckets.dtype == torch.int16
    assert buckets.shape == (1, 2, 2, 53)
    assert layer(x, context, n_hashes=5, return_buckets=True)[1].shape == (1, 2, 5, 53)


def test_full_cross_attention_over_padding_alone_is_zero() -> None:
    layer = FullCrossAttention(DIM, 2)
    x, context = torch.randn(2, 5, DIM), torch.randn(2, 7, DIM, requires_grad=True)
    mask = torch.tensor([[False] * 7, [True] * 7])
    out = layer(x, context, context_padding_mask=mask)
    assert (out[1] == 0).all()
    out.sum().backward()
    assert (context.grad[1] == 0).all()
    assert context.grad.isfinite().all()
    torch.testing.assert_close(out[0], layer(x[:1], context[:1])[0])


# The gradient of a stack's context


class Reader(nn.Module):
    """An F that reads a context, with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.cross = FullCrossAttention(DIM, 2, bias=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, context: Tensor, scale: Tensor) -> Tensor:
        return scale * self.dropout(self.cross(torch.tanh(x), context))


class Mlp(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.linear(x)))


def reader_stacks(depth: int, dropout: float = 0.0) -> list[ReversibleStack]:
    """The same network, reversible and plain."""
    blocks = [(Reader(dropout), Mlp(dropout)) for _ in range(depth)]
    return [
        ReversibleStack(blocks),
        ReversibleStack(copy.deepcopy(blocks), reversible=False),
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("x_needs_grad", [True, False], ids=["x-grad", "x-frozen"])
def test_context_gradient_is_that_of_plain_autograd(x_needs_grad: bool, dropout: float) -> None:
    """Two forwards before the backward, and a context of two tensors of which one needs grad."""
    found = []
    for stack in reader_stacks(4, dropout):
        stack = stack.double()
        torch.manual_seed(2)
        x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=x_needs_grad)
        source = torch.randn(2, 13, DIM, dtype=torch.float64, requires_grad=True)
        scale = torch.randn(DIM, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for factor in (1.0, -0.5):
            context = {"context": factor * source.sin(), "scale": scale}
            y1, y2 = stack(x, context=context)
            total = total + (y1 * y2).sum()
        total.backward()
        grads = {name: p.grad for name, p in stack.named_parameters()}
        found.append({"source": source.grad, "x": x.grad, "total": total, **grads})
    assert (found[0]["x"] is not None) == x_needs_grad
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-11)


def test_context_gradient_alone() -> None:
    """Nothing else needs a gradient."""
    found = []
    for stack in reader_stacks(3):
        stack.double().requires_grad_(False)
        torch.manual_seed(2)
        x = torch.randn(1, 5, DIM, dtype=torch.float64)
        source = torch.randn(1, 6, DIM, dtype=torch.float64, requires_grad=True)
        one = torch.ones(1, dtype=torch.float64)
        sum(stack(x, context={"context": source, "scale": one})).square().sum().backward()
        found.append(source.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_context_gradient_under_autocast(inside: bool) -> None:
    found = []
    for stack in reader_stacks(5):
        torch.manual_seed(2)
        x, source = torch.randn(2, 9, DIM), torch.randn(2, 13, DIM, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y1, y2 = stack(x, context={"context": source, "scale": torch.ones(1)})
            loss = (y1 * y2).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert source.grad.dtype == torch.float32
        found.append(source.grad)
    error = (found[0] - found[1]).abs().max() / found[1].abs().max()
    assert error < 2e-2


def test_context_is_kept_once_whatever_the_depth() -> None:
    x, source = torch.randn(1, 64, DIM), torch.randn(1, 100, DIM, requires_grad=True)
    context = {"context": source, "scale": torch.ones(1)}
    totals = []
    for depth in (1, 6):
        for stack in reader_stacks(depth):
            with saved_bytes(stack) as sizes:
                stack(x, context=context)
            totals.append(sum(sizes))
    shallow, shallow_plain, deep, deep_plain = totals
    assert shallow == deep == 2 * x.nbytes + source.nbytes + 4
    assert deep_plain > 5 * shallow_plain


def test_a_context_changed_before_backward_is_refused() -> None:
    stack = reader_stacks(1)[0]
    source = torch.randn(1, 6, DIM)
    y1, _ = stack(torch.randn(1, 5, DIM), context={"context": source, "scale": torch.ones(1)})
    source.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y1.sum().backward()


def test_f_kwargs_that_need_a_gradient_are_refused() -> None:
    stack = reader_stacks(1)[0]
    source = torch.randn(1, 6, DIM, requires_grad=True)
    for kwargs in ({"context": source}, {"nested": {"context": source}}):
        with pytest.raises(ValueError, match=r"requires grad \(pass it as context, or make it"):
            stack(torch.randn(1, 5, DIM), f_kwargs=[kwargs])


# Encoder-decoder


def models(
    cross: str | tuple[str, ...] = ("full", "lsh", "lsh"), **fields: object
) -> list[ReformerEncoderDecoder]:
    """The same model, reversible and plain."""
    defaults = {
        "vocab_size": 40,
        "dim": DIM,
        "max_length": 64,
        "loss_chunk_size": 7,
    }
    found = []
    for reversible in (True, False):
        torch.manual_seed(7)
        decoder = tiny_config(
            **{**defaults, "layers": ("local", "lsh", "full"), "reversible": reversible, **fields}
        )
        encoder = dataclasses.replace(
            decoder, dim=24, vocab_size=30, layers=("lsh", "local"), causal=False
        )
        found.append(ReformerEncoderDecoder(encoder, decoder, cross).double())
    return found


def batch() -> dict[str, Tensor]:
    """Two pairs of lengths (21, 13) and (9, 6)."""
    return {
        "source": torch.randint(30, (2, 21)),
        "tokens": torch.randint(40, (2, 13)),
        "source_padding_mask": torch.arange(21) >= torch.tensor([[21], [9]]),
        "key_padding_mask": torch.arange(13) >= torch.tensor([[13], [6]]),
    }


@pytest.mark.parametrize(("cross", "heads_at_once"), [("full", 0), ("lsh", 1)])
@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.0, 0.0), (0.2, 0.2), (0.0, 0.2)])
def test_gradients_are_those_of_plain_autograd(
    dropout: float, attention_dropout: float, cross: str, heads_at_once: int
) -> None:
    data = batch()
    targets = torch.randint(40, (2, 13)).masked_fill(data["key_padding_mask"], -100)
    found = []
    fields = {"dropout": dropout, "attention_dropout": attention_dropout, "positions": "axial"}
    fields["heads_at_once"] = heads_at_once
    for model in models(cross, layers=("local", "lsh"), **fields):
        torch.manual_seed(5)
        losses = [model.loss(**data, targets=targets) for _ in range(2)]
        assert not torch.equal(*losses)  # each pass hashes anew
        torch.stack(losses).sum().backward()  # several forwards before one backward
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
        grads = {name: p.grad for name, p in model.named_parameters()}
        found.append({"losses": torch.stack(losses), **grads})
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_a_decoder_layer_by_hand() -> None:
    model = models("full", layers=("full",), reversible=False, positions="none")[1].eval()
    data = batch()
    context = model.encode(data["source"])
    x = model.decoder.embedding(data["tokens"])
    block = model.decoder.layers.blocks[0]
    attention, cross = block.f.attention, block.f.cross
    a = attention.attention(attention.norm(x))
    y1 = x + a + cross.attention(cross.norm(x + a), context)
    y2 = x + block.g.feed_forward(block.g.norm(y1))
    expected = F.linear(model.decoder.norm((y1 + y2) / 2), model.head.weight)
    torch.testing.assert_close(model(data["source"], data["tokens"]), expected)


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    for tied in (True, False):
        model = models(tie_embeddings=tied)[0].eval()
        data = batch()
        targets = torch.randint(40, (2, 13)).masked_fill(data["key_padding_mask"], -100)
        logits = model(**data)
        assert logits.shape == (2, 13, 40)
        expected = F.cross_entropy(logits.transpose(1, 2), targets)
        torch.testing.assert_close(model.loss(**data, targets=targets), expected)
        assert (model.output_weight is model.decoder.embedding.weight) == tied


def test_padding_is_not_read_and_the_source_is() -> None:
    model = models()[0].eval()
    data = batch()
    changed = dict(data)
    changed["source"] = data["source"].masked_fill(data["source_padding_mask"], 7)
    changed["tokens"] = data["tokens"].masked_fill(data["key_padding_mask"], 7)
    real = ~data["key_padding_mask"]
    torch.testing.assert_close(model(**data)[real], model(**changed)[real], rtol=1e-9, atol=1e-11)
    changed["source"] = (data["source"] + 1) % 30
    assert not torch.allclose(model(**data)[real], model(**changed)[real])


def test_the_decoder_does_not_look_ahead() -> None:
    model = models(("full",) * 3, chunk_size=64)[0].eval()
    data = batch()
    changed = data["tokens"].clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 40
    before, after = (model(data["source"], tokens) for tokens in (data["tokens"], changed))
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=1e-10, atol=1e-12)
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-3


def test_the_encoder_is_back_propagated_once() -> None:
    """RP: each decoder layer's recomputation goes back through the whole encoder, 12 block passes
    for 3 x 4 layers."""
    model = models("full", layers=("local",) * 4)[0]
    runs: list[int] = []
    for index, block in enumerate(model.encoder.layers.blocks):
        block.f.register_forward_hook(lambda *_, index=index: runs.append(index))
    data = batch()
    model.loss(**data, targets=data["tokens"]).backward()
    assert runs == [0, 1, 1, 0]  # forward, and one recomputation


def test_memory_does_not_grow_with_the_decoder() -> None:
    data = batch()
    totals = []
    for depth in (1, 5):
        model = models("full", layers=("local",) * depth)[0]
        context = model.encode(data["source"]).detach()
        with saved_bytes(model) as sizes:
            model.decode(data["tokens"], context)
        totals.append(sum(sizes))
    assert totals[0] == totals[1]


@pytest.mark.parametrize("cross", ["full", "lsh"])
def test_autocast(cross: str) -> None:
    data = batch()
    found = []
    for model in models(cross, layers=("lsh", "local")):
        model.float().eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(**data, targets=data["tokens"])
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, expected in found[1][1].items():
        error = (found[0][1][name] - expected).abs().max() / expected.abs().max()
        assert error < 3e-2, f"{name}: relative error {error:.1e}"


def test_training_in_autocast_learns_to_copy() -> None:
    model = models(("full",) * 3, ff_hidden=32, positions="absolute")[0].float()
    source = torch.randint(1, 20, (8, 6))
    tokens = F.pad(source, (1, 0))[:, :-1]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(source, tokens, source)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_evaluation_is_deterministic_and_training_hashes_anew() -> None:
    data = batch()
    model = models("lsh", layers=("full",), n_buckets=8)[0]
    context = model.encode(data["source"]).detach()
    assert not torch.equal(*(model.decode(data["tokens"], context) for _ in range(2)))
    model.eval()
    assert torch.equal(model(**data), model(**data))


def test_each_training_step_hashes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys that are recomputed differ by rounding; the forward's buckets stay."""
    calls = 0

    def counted(*args: object) -> Tensor:
        nonlocal calls
        calls += 1
        return lsh_hash(*args)

    def counted_cross(*args: Any, buckets: Tensor | None = None, **options: Any) -> Any:
        nonlocal calls
        calls += buckets is None  # hashes queries and keys together, in C++
        return lsh_cross_attention(*args, buckets=buckets, **options)

    lsh_hash, lsh_cross_attention = ops.lsh_hash, ops.lsh_cross_attention
    monkeypatch.setattr(ops, "lsh_hash", counted)
    monkeypatch.setattr(ops, "lsh_cross_attention", counted_cross)
    data = batch()
    models("lsh", layers=("lsh", "local"))[0].loss(**data, targets=data["tokens"]).backward()
    assert calls == 1 + 1 + 2  # encoder, decoder, cross-attention


def test_save_and_load(tmp_path: Path) -> None:
    model = models(n_buckets=(4, 2))[0].float().eval()
    model.save_pretrained(tmp_path)
    loaded = ReformerEncoderDecoder.from_pretrained(tmp_path)
    assert loaded.encoder_config == model.encoder_config
    assert loaded.decoder_config == model.decoder_config
    assert loaded.cross == ("full", "lsh", "lsh")
    data = batch()
    assert torch.equal(loaded(**data), model(**data))
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for changes, message in (
        ({"depth": 3}, r"config.json: expected fields encoder, decoder and cross, got .*'depth'"),
        ({"cross": "local"}, "config.json: ReformerEncoderDecoder: expected cross to be one of"),
        ({"decoder": {"n_heads": 2}}, r"config.json: unknown fields \['n_heads'\]"),
        ({"encoder": 3}, "config.json: "),
    ):
        path.write_text(json.dumps({**fields, **changes}))
        with pytest.raises(ValueError, match=message):
            ReformerEncoderDecoder.from_pretrained(tmp_path)


def test_inference_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = models("lsh", layers=("full",), n_buckets=8)[0].eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (24, 37):
        source, tokens = torch.randint(30, (2, length)), torch.randint(40, (2, length - 5))
        with torch.no_grad():
            torch.testing.assert_close(compiled(source, tokens), model(source, tokens))


# Decoding


def decoding_model(**fields: object) -> ReformerEncoderDecoder:
    """With weights large enough that attention matters, and LSH buckets in one chunk: a forward
    pass sees what decoding does."""
    options = {"chunk_size": 64, "n_buckets": 6, "same_bucket": True, "initializer_range": 0.3}
    return models("full", **{**options, **fields})[0].eval()


def continued(
    model: ReformerEncoderDecoder,
    cache: EncoderDecoderCache,
    source: Tensor,
    tokens: Tensor,
    pieces: list[int],
    **masks: Tensor,
) -> Tensor:
    """Logits of the tokens given to the cache piece by piece."""
    first, *rest = tokens.split(pieces, dim=1)
    with torch.no_grad():
        parts = [model(source, first, cache=cache, **masks)]
        parts += [model(None, part, cache=cache) for part in rest]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("positions", ["rotary", "axial", "absolute"])
def test_cached_logits_are_the_teacher_forced(positions: str, device: str) -> None:
    # On CUDA attention knows no float64, and head dimensions are multiples of 8.
    dtype, tolerance = (torch.float64, 1e-9) if device == "cpu" else (torch.float32, 1e-4)
    model = decoding_model(positions=positions, dim=48, heads=3).to(
        device, dtype
    )  # heads of 8 and 16
    source, tokens = batch()["source"].to(device), torch.randint(40, (2, 30), device=device)
    padding = batch()["source_padding_mask"].to(device)
    with torch.no_grad():
        expected = model(source, tokens, source_padding_mask=padding)
    cache = model.new_cache(2, 40, 25, window=64)
    for pieces in ([30], [1] * 30, [5, 17, 1, 7]):
        got = continued(model, cache, source, tokens, pieces, source_padding_mask=padding)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        assert cache.lengths.tolist() == [30, 30]
        cache.reset()
    # Another source in the same buffers, of which nothing of the last is seen.
    buffers = [buffer.data_ptr() for buffer in cache.buffers()]
    with torch.no_grad():
        expected = model(source[:, :4], tokens)
    got = continued(model, cache, source[:, :4], tokens, [20, 10])
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert buffers == [buffer.data_ptr() for buffer in cache.buffers()]


def test_a_step_does_not_run_the_encoder_nor_project_the_source() -> None:
    model = decoding_model()
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    for layer in model.modules():
        if isinstance(layer, FullCrossAttention):
            layer.context_proj.register_forward_hook(lambda *_: calls.append("projection"))
    data = batch()
    cache = model.new_cache(2, 40, 21)
    continued(model, cache, data["source"], data["tokens"], [3, *[1] * 10])
    assert calls == ["encoder", *["projection"] * 3]


def test_padded_prompts_and_a_source_of_padding_alone() -> None:
    model = decoding_model()
    data = batch()
    data["source_padding_mask"][1] = True
    more = torch.randint(40, (2, 7))
    cache = model.new_cache(2, 40, 21, window=64)
    with torch.no_grad():
        model(**data, cache=cache)
        later = model(None, more, cache=cache)
        for row, length in enumerate((13, 6)):
            alone = torch.cat([data["tokens"][row, :length], more[row]])[None]
            masks = {"source_padding_mask": data["source_padding_mask"][row : row + 1]}
            want = model(data["source"][row : row + 1], alone, **masks)[0, length:]
            torch.testing.assert_close(later[row], want, rtol=1e-9, atol=1e-9)


def test_reordered_pairs_go_on_as_their_originals() -> None:
    model = decoding_model()
    source, tokens = torch.randint(30, (3, 21)), torch.randint(40, (3, 30))
    with torch.no_grad():
        cache = model.new_cache(3, 40, 21, window=64)
        model(source, tokens[:, :20], cache=cache)
        cache.reorder([2, 0])
        got = model(None, tokens[[2, 0], 20:], cache=cache)
        expected = model(source, tokens)[[2, 0], 20:]
    assert cache.batch == 2
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_greedy_decoding_is_that_of_the_whole_targets() -> None:
    model = decoding_model()
    source = torch.randint(30, (3, 21))
    padding = torch.arange(21) >= torch.tensor([[21], [9], [1]])
    start = torch.tensor([[1], [2], [3]])
    masks = {"source_padding_mask": padding}
    found = generate_from_source(model, source, start, 20, **masks)
    tokens = start
    with torch.no_grad():
        for _ in range(20):
            logits = model(source, tokens, **masks)[:, -1:]
            tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
    assert torch.equal(found, tokens[:, 1:])

    # Those that end are filled up, and leave the batch; the others go on as before.
    end = int(found[0, 3])
    stopped = generate_from_source(model, source, start, 20, end=end, **masks)
    for row, wanted in zip(stopped, found, strict=True):
        places = (wanted == end).nonzero()
        length = int(places[0]) if len(places) else 20
        assert torch.equal(row[:length], wanted[: len(row)][:length])
        assert (row[length:] == end).all()
    assert (stopped[0] == end).sum() >= stopped.shape[1] - 3

    hot = Sampling(temperature=1.0, top_k=10)
    options = {"sampling": hot, **masks}
    sampled = [generate_from_source(model, source, start, 9, seed=s, **options) for s in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


def test_decoding_step_compiles_once() -> None:
    model = decoding_model()
    source, tokens = torch.randint(30, (2, 21)), torch.randint(40, (2, 30))
    cache = model.new_cache(2, 40, 21, window=64)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        expected = model(source, tokens)
        model(source, tokens[:, :20], cache=cache)
        got = [step(None, tokens[:, t : t + 1], cache=cache) for t in range(20, 30)]
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat(got, 1), expected[:, 20:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prompted", [torch.inference_mode, torch.no_grad])
def test_cache_in_inference_mode_or_not(prompted: Callable[[], AbstractContextManager]) -> None:
    model = decoding_model()
    source, tokens = torch.randint(30, (2, 21)), torch.randint(40, (2, 30))
    with torch.inference_mode():
        cache = model.new_cache(2, 40, 21, window=64)
    with prompted():
        model(source, tokens[:, :9], cache=cache)
        cache.reorder(torch.tensor([1]))
    with torch.no_grad():
        got = model(None, tokens[1:, 9:], cache=cache)
        cache.reset()
        expected = model(source[1:], tokens[1:])
        torch.testing.assert_close(got, expected[:, 9:], rtol=1e-9, atol=1e-9)
        again = model(source[1:], tokens[1:], cache=cache)
    torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-9)


def test_cache_errors() -> None:
    lsh = models(("full", "lsh", "full"))[0].eval()
    for new_cache in (lsh.new_cache, lsh.decoder.new_cache):
        with pytest.raises(ValueError, match=r"expected cross-attention 'full' in all .*'lsh'"):
            new_cache(2, 40, 21)
    model = decoding_model()
    source, tokens = torch.randint(30, (2, 21)), torch.randint(40, (2, 13))
    with pytest.raises(ValueError, match="expected source_capacity to be an integer >= 1, got 0"):
        model.new_cache(2, 40, 0)
    with pytest.raises(ValueError, match="new_cache: expected capacity to be an integer >= 1"):
        model.new_cache(2, 0, 21)
    with pytest.raises(ValueError, match="expected a source or its context, got none"):
        model(None, tokens)
    cache = model.new_cache(2, 40, 21)
    with pytest.raises(RuntimeError, match=r"expected evaluation mode and torch\.no_grad"):
        model(source, tokens, cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match="expected a source, got none"):
            model(None, tokens, cache=cache)
        with pytest.raises(ValueError, match="n_hashes is the cache's"):
            model(source, tokens, n_hashes=3, cache=cache)
        with pytest.raises(ValueError, match="expected a context of at most 21 positions, as the"):
            model(source.repeat(1, 2), tokens, cache=cache)
        with pytest.raises(ValueError, match="expected 2 sequences, got 1"):
            model(source[:1], tokens[:1], cache=cache)
        with pytest.raises(ValueError, match=r"expected context \[2, M, 24\], got \[1, 21, 24\]"):
            model(source[:1], tokens, cache=cache)
        with pytest.raises(ValueError, match="expected at most 40 positions, got 52 more after 0"):
            model(source, tokens.repeat(1, 4), cache=cache)
        with pytest.raises(TypeError, match="expected a cache from new_cache, got DecodingCache"):
            model(source, tokens, cache=cache.decoder)
        assert not cache.filled
        model(source, tokens, cache=cache)
        with pytest.raises(ValueError, match="expected no source after the prompt, got one"):
            model(source, tokens, cache=cache)
        with pytest.raises(ValueError, match="expected no source_padding_mask after the source"):
            model(None, tokens, source_padding_mask=torch.zeros(2, 21).bool(), cache=cache)
        with pytest.raises(ValueError, match="expected no key_padding_mask after the prompt"):
            model(None, tokens, key_padding_mask=torch.zeros(2, 13).bool(), cache=cache)
        assert cache.lengths.tolist() == [13, 13]
        with pytest.raises(ValueError, match="expected a context or a cache, got both or none"):
            FullCrossAttention(DIM, 2)(torch.ones(1, 3, DIM))
    with pytest.raises(ValueError, match=r"expected prompt \[2, P\] of torch\.int64, got \[1, 1\]"):
        generate_from_source(model, source, torch.tensor([[1]]), 5)
    with pytest.raises(ValueError, match="expected length >= 1, got 0"):
        generate_from_source(model, source, tokens, 0)


# Errors


def test_errors() -> None:
    config = models()[0].decoder_config
    encoder = dataclasses.replace(config, causal=False)
    with pytest.raises(
        ValueError, match=r"expected encoder_config.causal False and .*got True and"
    ):
        ReformerEncoderDecoder(config, config)
    with pytest.raises(ValueError, match=r"expected cross to be one of .*3 decoder .*\('full',\)"):
        ReformerEncoderDecoder(encoder, config, ("full",))
    for kind in (FullCrossAttention, LSHCrossAttention):
        name = kind.__name__
        with pytest.raises(ValueError, match=f"{name}: expected dim divisible by heads, got 10"):
            kind(10, 3)
        with pytest.raises(ValueError, match=rf"{name}: expected context \[1, M, 12\], got \[2, 5"):
            kind(12, 3)(torch.ones(1, 4, 12), torch.ones(2, 5, 12))
    x, context = torch.ones(2, 4, 12), torch.ones(2, 5, 12)
    for mask in (torch.zeros(1, 5).bool(), torch.zeros(2, 4).bool(), torch.zeros(2, 5)):
        with pytest.raises(
            ValueError, match=r"expected context_padding_mask \[2, 5\] of torch.bool"
        ):
            FullCrossAttention(12, 3)(x, context, context_padding_mask=mask)
    data = {**batch(), "source_padding_mask": torch.zeros(2, 13).bool()}
    with pytest.raises(ValueError, match=r"expected source_padding_mask \[2, 21\] .*\[2, 13\]"):
        models()[0](**data)
    with pytest.raises(ValueError, match=r"Reformer: expected tokens \[B, L\], got \[5\]"):
        models()[0].decode(torch.zeros(5, dtype=torch.int64), context)
    with pytest.raises(ValueError, match="LSHCrossAttention: expected n_hashes and chunk_size"):
        LSHCrossAttention(12, 3, n_hashes=0)


def test_operator_errors() -> None:
    q, k = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8)
    attend = reformer_ext.lsh_cross_attention
    with pytest.raises(RuntimeError, match=r"lsh_cross_attention: expected q \[B, H, Lq, D\], got"):
        attend(q[0], k, k)
    with pytest.raises(RuntimeError, match=r"expected k \[2, 2, Lk, 8\], got \[2, 1, 7, 8\]"):
        attend(q, k[:, :1], k)
    with pytest.raises(RuntimeError, match=r"expected v \[2, 2, 7, 8\], as k, got \[2, 2, 5, 8\]"):
        attend(q, k, q)
    with pytest.raises(
        RuntimeError, match=r"expected k of dtype torch\.float32, as q, got torch\.float64"
    ):
        attend(q, k.double(), k.double())
    with pytest.raises(
        RuntimeError, match=r"expected v of dtype torch\.bfloat16, as q, got torch\.float32"
    ):
        attend(q.bfloat16(), k.bfloat16(), k)
    with pytest.raises(RuntimeError, match="lsh_cross_attention: expected v on cpu, as q, got met"):
        attend(q, k, k.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(q, k.bfloat16(), k).dtype == torch.bfloat16
    mask = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"expected key_padding_mask \[2, 7\] .*\[2, 5\]"):
        attend(q, k, k, key_padding_mask=mask)
    with pytest.raises(RuntimeError, match=r"query_padding_mask \[2, 5\] of torch.bool, .*int32"):
        attend(q, k, k, query_padding_mask=mask.int())
    with pytest.raises(RuntimeError, match="lsh_cross_attention: expected n_buckets to be even"):
        attend(q, k, k, n_buckets=3)


# CUDA


@pytest.mark.parametrize("device", [gpu("cuda")])
def test_cuda_trains_without_synchronising(device: str) -> None:
    config = ReformerConfig(dim=64, heads=2, layers=("local", "lsh"), attention_dropout=0.1)
    encoder = dataclasses.replace(config, causal=False)
    model = ReformerEncoderDecoder(encoder, config, "lsh").to(device)
    source = torch.randn(2, 700, 64, device=device)
    tokens = torch.randn(2, 300, 64, device=device)
    for mode in ("default", "error"):  # the first step allocates and loads kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model.decode(tokens, model.encode(source)).square().mean()
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for stack in (model.encoder.layers, model.decoder.layers):
        assert all(p.grad.isfinite().all() for p in stack.parameters())
