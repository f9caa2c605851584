"""Losses by position, and with the LSH layers replaced: against models written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.cases import tiny_config
from reformer_ext import chunked_attention
from reformer_ext.ablation import ablated_losses, lsh_replaced, position_bits
from reformer_ext.nn import LSHSelfAttention, ReformerLM


def small_model(**fields: Any) -> ReformerLM:
    sizes = {"chunk_size": 8, "local_chunk_size": 8, "n_hashes": 3, "initializer_range": 0.3}
    config = tiny_config(**{**sizes, "layers": ("local", "lsh", "lsh"), **fields})
    return ReformerLM(config).double().eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(256, (3, 78))


def test_position_bits_are_the_logits(tokens: Tensor) -> None:
    model = small_model().train()
    step = model.reformer.hash_step.clone()
    bits = position_bits(model, tokens, batch=2)
    assert model.training and torch.equal(model.reformer.hash_step, step)
    assert bits.shape == (3, 77) and bits.dtype == torch.float64
    with torch.no_grad():
        logits = model.eval()(tokens[:, :-1])
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0] / math.log(2)
    torch.testing.assert_close(bits, expected)
    other = position_bits(model, tokens, n_hashes=1)
    assert not torch.allclose(other, bits)


def test_zeroed_layers_add_nothing(tokens: Tensor) -> None:
    model = small_model()
    before = position_bits(model, tokens)
    with lsh_replaced(model, "zero"):
        zeroed = position_bits(model, tokens)
    torch.testing.assert_close(position_bits(model, tokens), before, rtol=0, atol=0)
    assert (zeroed - before).abs().mean() > 0.01
    for module in model.modules():
        if isinstance(module, LSHSelfAttention):
            module.out_proj.weight.data.zero_()
    torch.testing.assert_close(zeroed, position_bits(model, tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"same_bucket": True, "positions": "none"},
        {"look_back": 2, "shared_qk_scale": None},
        {"n_buckets": (4, 2), "rotary_before_hash": True},
        {"correct_duplicates": True},
    ],
)
def test_local_layers_take_natural_order(
    fields: dict[str, Any], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(**fields)
    with lsh_replaced(model, "local"):
        bits = position_bits(model, tokens)
    assert (bits - position_bits(model, tokens)).abs().mean() > 0.01

    def local(qk: Tensor, v: Tensor, **options: Any) -> Any:
        names = ("chunk_size", "look_back", "look_ahead", "causal", "scale", "value_mix")
        out, _ = chunked_attention(qk, None, v, **{name: options[name] for name in names})
        return (out, options["buckets"]) if options.get("return_buckets") else out

    monkeypatch.setattr("reformer_ext.ops.lsh_attention", local)
    torch.testing.assert_close(bits, position_bits(model, tokens), rtol=0, atol=1e-11)


def test_all_of_them(tokens: Tensor) -> None:
    model = small_model()
    losses = ablated_losses(model, tokens, batch=3)
    assert list(losses) == ["trained", "local", "zero"]
    torch.testing.assert_close(losses["trained"], position_bits(model, tokens))
    for by in ("local", "zero"):
        with lsh_replaced(model, by):
            torch.testing.assert_close(losses[by], position_bits(model, tokens))


def test_hooks_go_when_something_fails() -> None:
    model = small_model()
    with pytest.raises(ZeroDivisionError), lsh_replaced(model, "zero"):
        _ = 1 // 0
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_bad_arguments(tokens: Tensor) -> None:
    model = small_model()
    for call, message in (
        (lambda: lsh_replaced(model, "one").__enter__(), r"expected by to be one of .*'one'"),
        (
            lambda: lsh_replaced(small_model(layers=("full",)), "zero").__enter__(),
            "lsh_replaced: expected a model with LSH layers, got one without",
        ),
        (lambda: position_bits(model, tokens[:, :1]), r"expected tokens \[N, L \+ 1\].*got \[3, 1"),
        (
            lambda: position_bits(model, tokens, batch=0),
            "position_bits: expected batch >= 1, got 0",
        ),
        (lambda: position_bits(small_model(causal=False), tokens), "expected a causal model"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
