"""Next values in the modules: LSH and exact attention with shared queries and keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from python_tests.cases import tiny_config
from reformer_ext.nn import (
    FullSelfAttention,
    Layer,
    LSHSelfAttention,
    Reformer,
    ReformerConfig,
    ReformerLM,
)
from reformer_ext.optim import split_parameters


def lsh(causal: bool = True, **options: Any) -> LSHSelfAttention:
    torch.manual_seed(0)
    layer = LSHSelfAttention(16, 2, causal=causal, next_values=True, **options).double()
    nn.init.uniform_(layer.value_mix, 0.2, 0.8)
    return layer


def full(causal: bool = True) -> FullSelfAttention:
    """With the weights of :func:`lsh`, whose exact limit it is."""
    layer = FullSelfAttention(16, 2, causal=causal, shared_qk=True, next_values=True).double()
    layer.load_state_dict(lsh(causal).state_dict())
    return layer


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_next_values_in_one_chunk_are_the_exact_limit(causal: bool, padded: bool) -> None:
    x = torch.randn(2, 24, 16, dtype=torch.float64)
    padding = None
    if padded:
        padding = torch.zeros(2, 24, dtype=torch.bool)
        padding[0, 20:] = padding[1, 7] = True
    options = {"n_hashes": 1, "chunk_size": 32, "look_back": 0}
    if not causal:
        options["look_ahead"] = 0
    approximate = lsh(causal, **options)(x, key_padding_mask=padding)
    exact = full(causal)(x, key_padding_mask=padding)
    if padding is not None:
        approximate, exact = approximate[~padding], exact[~padding]
    torch.testing.assert_close(approximate, exact, rtol=1e-10, atol=1e-12)


def test_next_values_by_their_formula() -> None:
    layer, x = full(), torch.randn(1, 9, 16, dtype=torch.float64)
    qk, v = layer.in_proj(x).view(9, 2, 2, 8).permute(1, 2, 0, 3)  # (H, L, D) each
    a, b = layer.value_mix[:, :, None, None]
    outs = v.clone()
    for i in range(1, 9):
        keys = qk[:, :i] / qk[:, :i].norm(dim=-1, keepdim=True)
        weights = (qk[:, i : i + 1] @ keys.transpose(1, 2) * 8**-0.5).softmax(-1)
        outs[:, i : i + 1] = weights @ (a * v[:, :i] + b * v[:, 1 : i + 1])
    expected = layer.out_proj(outs.transpose(0, 1).flatten(1))[None]
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_hashes": 1, "chunk_size": 4},
        {"same_bucket": True},
        {"correct_duplicates": True},
        {"look_back": 2},
    ],
)
def test_next_values_show_nothing_of_the_future(options: dict[str, Any]) -> None:
    layer = lsh(**{"n_hashes": 3, "chunk_size": 8, **options})
    x = torch.randn(1, 40, 16, dtype=torch.float64, requires_grad=True)
    for attention in (layer, full()):
        y = attention(x)
        for i in (0, 1, 7, 8, 25, 38):
            (gradient,) = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)
            assert gradient[0, i].abs().max() > 0
            assert not gradient[0, i + 1 :].any()


def test_next_values_packed_are_those_of_each_alone() -> None:
    lengths = [7, 20, 1, 20]
    x = torch.randn(1, sum(lengths), 16, dtype=torch.float64)
    borders = [0, 7, 27, 28, 48]
    for layer in (lsh(n_buckets=2, chunk_size=8), full()):
        packed = layer(x, cu_seqlens=borders)
        alone = [layer(part) for part in x.split(lengths, 1)]
        torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["lsh", "full"])
def test_next_values_in_a_model(kind: str) -> None:
    config = tiny_config(
        layers=("local", kind),
        heads_at_once=1,
        full_shared_qk=True,
        same_bucket=True,
        n_buckets=2,
        chunk_size=64,
    )
    assert config.mixes_next_values and not config.turns_shared_qk  # the default where causal
    model = ReformerLM(config).double()
    nn.init.uniform_(model.reformer.layers.blocks[1].f.attention.value_mix, 0.2, 0.8)
    matrices, others = split_parameters(model, model.head)
    mix = model.reformer.layers.blocks[1].f.attention.value_mix
    assert any(mix is p for p in others) and not any(mix is p for p in matrices)
    tokens = torch.randint(256, (2, 40))

    def gradients(**changes: Any) -> dict[str, Tensor]:
        other = ReformerLM(dataclasses.replace(config, **changes)).double()
        other.load_state_dict(model.state_dict())
        other.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        return {name: p.grad for name, p in other.named_parameters()}

    expected = gradients(heads_at_once=0, reversible=False)
    for name, gradient in gradients().items():
        scale = expected[name].abs().max().item()
        assert scale > 0
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-10 * scale)

    # Decoding, several at once and one by one, of sequences of different lengths, reordered.
    model.eval()
    padding = torch.zeros(2, 25, dtype=torch.bool)
    padding[1, 20:] = True
    cache = model.new_cache(2, 45, window=45)
    more = torch.randint(256, (2, 10))
    with torch.no_grad():
        model(tokens[:, :25], key_padding_mask=padding, cache=cache)
        parts = [model(more[:, :4], cache=cache)]
        cache.reorder([1, 0])
        swapped = more.flip(0)
        parts += [model(swapped[:, t : t + 1], cache=cache).flip(0) for t in range(4, 10)]
        decoded = torch.cat(parts, 1)
        for row, length in enumerate((25, 20)):
            whole = model(torch.cat([tokens[row, :length], more[row]])[None])[0, -10:]
            torch.testing.assert_close(decoded[row], whole, rtol=1e-9, atol=1e-11)


def test_defaults_of_next_values() -> None:
    def layers(config: ReformerConfig) -> list[Any]:
        return [attention for attention, _ in Reformer(config).attention_calls()]

    (attention,) = layers(tiny_config(layers=("lsh",), causal=False))
    assert attention.value_mix is None and attention.rotary
    (attention,) = layers(tiny_config(layers=("lsh",), causal=False, next_values=True))
    assert attention.value_mix.shape == (3, 2) and not attention.rotary
    (attention,) = layers(tiny_config(layers=("lsh",), next_values=False))
    assert attention.value_mix is None and attention.rotary
    (attention,) = layers(tiny_config(layers=("full",)))  # separate queries and keys
    assert attention.value_mix is None and attention.rotary


def test_errors_of_next_values() -> None:
    message = "expected next_values with shared_qk alone, got separate queries and keys"
    with pytest.raises(ValueError, match=f"FullSelfAttention: {message}"):
        FullSelfAttention(16, 2, next_values=True)
    with pytest.raises(ValueError, match=message):
        tiny_config(layers=("local", Layer("full", {"next_values": True})))
    with pytest.raises(ValueError, match=r"ReformerConfig.next_values: expected None, True or Fal"):
        tiny_config(next_values=1)
    with pytest.raises(ValueError, match="expected next_values to be True or False, got 'yes'"):
        LSHSelfAttention(16, 2, next_values="yes")  # type: ignore[arg-type]
