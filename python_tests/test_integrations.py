"""Other Reformers' models as ours and the other way round, compared with the packages themselves.

Both sides hash with the same rotations: each LSH layer of a forward pass draws once, and the draws
are answered alike (:func:`hashing_alike`). transformers adds 1e-6 to the mean square of a key; in
most tests the constant is taken out, so that all else is compared to float64's accuracy.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_ext import ops
from reformer_ext.integrations import reformer_pytorch as lucidrains
from reformer_ext.integrations.transformers import accelerate, from_transformers, to_transformers
from reformer_ext.nn import (
    AxialPositions,
    Reformer,
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerLM,
    ReversibleStack,
)

transformers = pytest.importorskip("transformers", reason="needs transformers")
modeling = pytest.importorskip("transformers.models.reformer.modeling_reformer")
reformer_pytorch = pytest.importorskip("reformer_pytorch", reason="needs reformer_pytorch")

randn = torch.randn


@contextmanager
def hashing_alike(
    convert: Callable[[Tensor], Tensor] = lambda rotations: rotations, shared: bool = False
) -> Iterator[None]:
    """The n-th draw of rotations within gives the n-th of a fixed list to whoever draws. Ours
    converts what it gets, and gives all heads the same if shared."""
    calls = itertools.count(1)

    def draw(*shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(next(calls))
        return randn(*shape, generator=generator).double()

    def theirs(*size: Any, dtype: torch.dtype = torch.float64, **_: object) -> Tensor:
        return draw(*(size[0] if len(size) == 1 else size)).to(dtype)

    def ours(
        seed: int,
        step: object,
        n_heads: int,
        head_dim: int,
        n_hashes: int,
        n_buckets: list[int],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        rotations = draw(1 if shared else n_heads, head_dim, n_hashes, sum(n_buckets) // 2)
        return convert(rotations).to(dtype).expand(n_heads, -1, -1, -1)

    with (
        mock.patch.object(torch, "randn", theirs),
        mock.patch("reformer_ext.nn.attention.lsh.hash_rotations", ours),
        mock.patch.object(lucidrains, "hash_rotations", ours),
    ):
        yield


def randomized(module: nn.Module) -> nn.Module:
    """Weights large enough that every part matters, in float64."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(randn(parameter.shape) * 0.3)
    return module


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# transformers: conversion -------------------------------------------------------------------------

LSH = ["lsh"] * 2
LOCAL = ["local"] * 2
MIXED = ["local", "lsh", "lsh", "local"]


def hf_config(**fields: object) -> Any:
    defaults = {
        "vocab_size": 50,
        "attention_head_size": 8,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_buckets": [2, 4],
        "num_hashes": 2,
        "lsh_attn_chunk_length": 6,
        "local_attn_chunk_length": 4,
        "feed_forward_size": 40,
        "hidden_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 48,
        "axial_pos_shape": [6, 8],
        "axial_pos_embds_dim": [8, 16],
        "attn_layers": MIXED,
        "is_decoder": True,
    }
    return transformers.ReformerConfig(**{**defaults, **fields})


def hf_model(**fields: object) -> Any:
    config = hf_config(**fields)
    kind = transformers.ReformerModelWithLMHead
    model = randomized((kind if config.is_decoder else transformers.ReformerForMaskedLM)(config))
    return model.eval()


@pytest.fixture
def without_key_epsilon() -> Iterator[None]:
    def normalize(self: object, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5

    with mock.patch.object(modeling.LSHSelfAttention, "_len_norm", normalize):
        yield


def padding_mask(batch: int, length: int) -> Tensor:
    """True = padding: a tail in the first sequence, holes in the others."""
    mask = torch.rand(batch, length) < 0.3
    mask[0] = torch.arange(length) >= max(1, length - length // 3)
    mask[:, 0] = False
    return mask


@pytest.mark.usefixtures("without_key_epsilon")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("length", [1, 3, 5, 12, 29, 48])
@pytest.mark.parametrize(
    "fields",
    [
        {"attn_layers": LSH},
        {"attn_layers": LSH, "num_hashes": 3, "num_buckets": 8, "lsh_num_chunks_before": 2},
        {"attn_layers": LOCAL, "hidden_act": "gelu"},
        {"attn_layers": MIXED},
        {"attn_layers": MIXED, "axial_pos_embds": False, "local_num_chunks_before": 0},
    ],
    ids=["lsh", "lsh3", "local", "mixed", "absolute"],
)
def test_logits_are_those_of_transformers(
    fields: dict[str, Any], length: int, causal: bool, masked: bool
) -> None:
    """Also where transformers pads (to a multiple of 12 in the mixed models, whose chunks are 6 and
    4 long) and where it takes its branch for short sequences."""
    theirs = hf_model(is_decoder=causal, **fields)
    ours = from_transformers(theirs)
    tokens = torch.randint(50, (2, length))
    mask = padding_mask(2, length) if masked else None
    attention_mask = None if mask is None else (~mask).long()
    with torch.no_grad(), hashing_alike():
        expected = theirs(tokens, attention_mask=attention_mask).logits
    with torch.no_grad(), hashing_alike():
        actual = ours(tokens, key_padding_mask=mask)
    rows = torch.ones(2, length, dtype=torch.bool) if mask is None else ~mask
    torch.testing.assert_close(actual[rows], expected[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("without_key_epsilon")
def test_default_number_of_buckets_is_that_of_transformers() -> None:
    """At a whole number of chunks (else transformers counts its padding), up to 64 buckets."""
    theirs = hf_model(num_buckets=None, attn_layers=LSH)
    ours = from_transformers(theirs)
    tokens = torch.randint(50, (2, 24))
    with torch.no_grad(), hashing_alike():
        expected = theirs(tokens).logits
    with torch.no_grad(), hashing_alike():
        actual = ours(tokens)
    assert ours.config.n_buckets is None
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("length", [29, 48])
def test_logits_are_those_of_transformers_as_shipped(length: int, causal: bool) -> None:
    """With its constant in the norm of keys: to 1e-6 of the largest logit."""
    theirs = hf_model(is_decoder=causal)
    tokens = torch.randint(50, (2, length))
    with torch.no_grad(), hashing_alike():
        expected = theirs(tokens).logits
    with torch.no_grad(), hashing_alike():
        actual = from_transformers(theirs)(tokens)
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.usefixtures("without_key_epsilon")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_gradients_are_those_of_transformers(causal: bool) -> None:
    """Every parameter's, by name, in training mode without dropout."""
    theirs = hf_model(is_decoder=causal).train()
    ours = from_transformers(theirs)
    assert ours.training
    tokens = torch.randint(50, (2, 48))
    cotangent = randn(2, 48, 50).double()
    with hashing_alike():
        theirs(tokens).logits.backward(cotangent)
    with hashing_alike():
        ours(tokens).backward(cotangent)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    _, actual = to_transformers(ours)  # gradients under their names
    for name, parameter in theirs.named_parameters():
        assert relative_error(actual[name], parameter.grad) < 1e-8, name


def test_a_bare_model_becomes_a_reformer() -> None:
    theirs = randomized(transformers.ReformerModel(hf_config())).eval()
    ours = from_transformers(theirs)
    assert type(ours) is Reformer
    tokens = torch.randint(50, (2, 29))
    with torch.no_grad(), hashing_alike():
        expected = theirs(tokens).last_hidden_state
    with torch.no_grad(), hashing_alike():
        actual = ours(tokens)
    assert actual.shape == (2, 29, 48)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def head_model(kind: str, **fields: object) -> Any:
    """A classifier of 3 labels or a model for question answering."""
    options = {"is_decoder": False, "num_labels": 3 if "Classification" in kind else 2}
    config = hf_config(**{**options, **fields})
    return randomized(getattr(transformers, kind)(config)).eval()


HEAD_KINDS = ["ReformerForSequenceClassification", "ReformerForQuestionAnswering"]


@pytest.mark.usefixtures("without_key_epsilon")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_models_with_heads(kind: str, masked: bool, tmp_path: Path) -> None:
    theirs = head_model(kind)
    ours = from_transformers(theirs)
    assert type(ours).__name__ == kind
    tokens = torch.randint(50, (2, 29))
    mask = torch.arange(29) >= torch.tensor([[29], [17]]) if masked else None
    attention_mask = None if mask is None else (~mask).long()
    with torch.no_grad(), hashing_alike():
        expected = theirs(tokens, attention_mask=attention_mask)
    with torch.no_grad(), hashing_alike():
        actual = ours(tokens, key_padding_mask=mask)
    if kind == "ReformerForSequenceClassification":
        torch.testing.assert_close(actual, expected.logits, rtol=1e-8, atol=1e-9)
    else:
        for one, other in zip(actual, (expected.start_logits, expected.end_logits), strict=True):
            real = torch.ones(2, 29).bool() if mask is None else ~mask
            torch.testing.assert_close(one[real], other[real], rtol=1e-8, atol=1e-9)
    ours.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path).double()
    torch.testing.assert_close(loaded(tokens), ours(tokens))

    config, weights = to_transformers(ours)
    assert config.architectures == [kind] and config.num_labels == theirs.config.num_labels
    back = getattr(transformers, kind)(config).double()
    back.load_state_dict(weights)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    again = from_transformers(back.config, weights)
    assert type(again) is type(ours) and again.config == ours.config


def test_heads_without_counterpart_are_named() -> None:
    theirs = head_model("ReformerForSequenceClassification", classifier_dropout=0.3)
    with pytest.raises(ValueError, match=r"expected classifier_dropout to be None or 0.0, got 0.3"):
        from_transformers(theirs)
    config = from_transformers(hf_model(is_decoder=False)).config
    for options in ({}, {"pooling": "first"}, {"pooling": "first", "hidden": 7}, {"hidden": 24}):
        model = ReformerForSequenceClassification(config, 3, **options)
        with pytest.raises(ValueError, match=r"expected pooling 'first' and hidden to be dim = 24"):
            to_transformers(model)
    with pytest.raises(TypeError, match=r"to_transformers: .*got ReformerForTokenClassification"):
        to_transformers(ReformerForTokenClassification(config, 3))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize(
    "fields",
    [
        {"hash_seed": 7, "chunk_size_lm_head": 3, "hidden_dropout_prob": 0.1},
        {"axial_pos_embds": False, "num_buckets": 8, "hidden_act": "silu", "attn_layers": LSH},
    ],
    ids=["axial", "absolute"],
)
def test_round_trip_is_exact(fields: dict[str, Any], causal: bool) -> None:
    theirs = hf_model(is_decoder=causal, local_attention_probs_dropout_prob=0.2, **fields)
    ours = from_transformers(theirs.config, theirs.state_dict())
    assert type(ours) is (ReformerLM if causal else ReformerForMaskedLM) and not ours.training
    config, weights = to_transformers(ours)
    back = getattr(transformers, config.architectures[0])(config).double()
    assert type(back) is type(theirs)
    back.load_state_dict(weights)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    ignored = {"architectures", "chunk_size_lm_head"}
    if not theirs.config.axial_pos_embds:
        ignored |= {"axial_pos_shape", "axial_pos_embds_dim"}
    expected = theirs.config.to_dict()
    assert {
        name: value for name, value in config.to_dict().items() if expected[name] != value
    }.keys() <= ignored
    again = from_transformers(back)
    assert again.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_converted_models_are_saved(tmp_path: Path) -> None:
    ours = from_transformers(hf_model())
    ours.save_pretrained(tmp_path)
    loaded = ReformerLM.from_pretrained(tmp_path).double()
    assert loaded.config == ours.config
    tokens = torch.randint(50, (2, 29))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), ours(tokens))


def test_our_own_model_goes_to_transformers() -> None:
    """Defaults that depend on others (axial grid, widths, neighbours) are written out."""
    config = ReformerConfig(
        vocab_size=50, dim=16, heads=2, layers=("local", "lsh"), n_hashes=2, chunk_size=8,
        n_buckets=8, local_chunk_size=8, local_wrap=True, causal=False, positions="axial",
        max_length=64, streams="concat", head_bias=True,
    )  # fmt: skip
    ours = randomized(ReformerLM(config)).eval()
    hf_fields, weights = to_transformers(ours)
    theirs = transformers.ReformerForMaskedLM(hf_fields).double().eval()
    theirs.load_state_dict(weights)
    tokens = torch.randint(50, (2, 61))
    with torch.no_grad(), hashing_alike():
        expected = theirs(tokens).logits
    with torch.no_grad(), hashing_alike():
        actual = ours(tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_converted_model_trains_at_any_length() -> None:
    """Where transformers asks for whole chunks and the whole axial grid."""
    theirs = hf_model().train()
    tokens = torch.randint(50, (2, 29))
    with pytest.raises(ValueError, match="multiple"):
        theirs(tokens)
    ours = from_transformers(theirs)
    ours.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_files_of_old_versions_load() -> None:
    """They hold the head's bias under the other name, and constants."""
    theirs = hf_model()
    state = theirs.state_dict()
    expected = from_transformers(theirs).state_dict()
    del state["lm_head.decoder.bias"]
    state["reformer.encoder.layers.1.attention.self_attention.mask_value_float32"] = torch.ones(())
    loaded = from_transformers(theirs.config, state).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert "lm_head.bias" in state  # the caller's dict stays as it was
    state["lm_head.decoder.bias"] = state["lm_head.bias"] + 1
    with pytest.raises(ValueError, match=r"lm_head.bias equal to lm_head.decoder.bias"):
        from_transformers(theirs.config, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.decoder.weight"), r"lacks \['lm_head.decoder.weight'\]"),
        (lambda s: s.update(stranger=torch.ones(1)), r"unknown \['stranger'\]"),
        (
            lambda s: s.update({"lm_head.decoder.weight": torch.ones(3, 4)}),
            r"expected lm_head.decoder.weight of shape \[50, 48\], got \[3, 4\]",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_wrong_state_dicts_are_named(change: Callable[[dict], object], message: str) -> None:
    theirs = hf_model()
    state = theirs.state_dict()
    change(state)
    with pytest.raises(ValueError, match=f"from_transformers: .*{message}"):
        from_transformers(theirs.config, state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "tanh"}, "expected hidden_act to be one of .*, got 'tanh'"),
        ({"tie_word_embeddings": True}, "expected tie_word_embeddings to be False, got True"),
        ({"attn_layers": ["lsh", "full"]}, "expected attn_layers to be 'local' and 'lsh' only"),
        ({"num_buckets": 3}, "ReformerConfig.n_buckets: .* got 3"),
    ],
)
def test_unsupported_transformers_configs_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_transformers(hf_config(**fields), {"reformer.": torch.ones(1)})


@pytest.mark.parametrize(
    "fields",
    [
        {"streams": "mean"}, {"head_bias": False}, {"positions": "rotary"}, {"ff_glu": True},
        {"layers": ("lsh", "full")}, {"same_bucket": True}, {"correct_duplicates": True},
        {"shared_qk_scale": None}, {"local_wrap": False}, {"output_dropout": 0.5},
        {"attention_out_bias": True}, {"length_multiple": 1}, {"ff_dropout": 0.5},
        {"axial_sum": True, "axial_dims": None},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_models_that_transformers_lacks_are_named(fields: dict[str, Any]) -> None:
    config = dataclasses.replace(from_transformers(hf_model()).config, **fields)
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"to_transformers: expected config.{name} to be .*, got"):
        to_transformers(ReformerLM(config))


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"from_transformers: .*got Linear"):
        from_transformers(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"from_transformers: .*got dict"):
        from_transformers({}, {})
    with pytest.raises(TypeError, match=r"to_transformers: .*got Linear"):
        to_transformers(nn.Linear(1, 1))


def test_without_the_package_the_error_says_so() -> None:
    with mock.patch.dict("sys.modules", {"transformers": None}):
        for call in (from_transformers, accelerate):
            with pytest.raises(ImportError, match="needs the package transformers"):
                call(nn.Linear(1, 1))


# transformers: acceleration -----------------------------------------------------------------------

# Inputs and results of transformers' integration tests, which were checked against trax
# (tests/models/reformer/test_modeling_reformer.py, class ReformerIntegrationTests).
FIXTURE_CONFIG = {
    "vocab_size": 320,
    "attention_head_size": 8,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_buckets": 2,
    "num_hashes": 4,
    "lsh_attn_chunk_length": 4,
    "local_attn_chunk_length": 4,
    "feed_forward_size": 32,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 32,
    "axial_pos_shape": [4, 8],
    "axial_pos_embds_dim": [8, 8],
    "hash_seed": 0,
    "is_decoder": True,
}
# fmt: off
FIXTURE_HIDDEN = [[
    [1.90826353, -1.45999730, -0.62040546, 1.52503433, -0.36446423, -0.82735923, 0.83967080,
     0.24449217, 0.49833275, 2.69175139, -0.00708081, 1.04915401, -1.83476661, 0.76722047,
     0.29858054, 0.02848039],
    [-0.02663742, 0.43349757, 0.31038630, 0.54603994, -0.00024729, -0.75230501, 0.23916210,
     0.72521618, -0.75835737, 0.42063599, -0.04047399, 0.15992414, 2.05135748, -1.15997978,
     0.53716639, 0.26287360],
    [0.18524748, 0.70704603, -0.67708971, -2.24209655, -0.03753079, -0.85938087, -2.81027884,
     1.01276376, -1.69438001, 0.41757466, -1.49196962, -1.76483717, -0.19456631, -1.71183858,
     0.77290356, -1.11557056],
    [0.94606919, 0.15341762, -0.95868699, 0.11812666, 1.75967724, 1.62194590, -0.57410815,
     0.67992044, 0.54402816, 0.20546611, -0.36304586, 0.24186506, 0.32034838, -0.90561117,
     -0.19269072, -1.19917547],
]]
FIXTURE_TOKENS = [
    [89, 279, 286, 84, 194, 316, 182, 28, 283, 37, 169, 7, 253, 267, 107, 250,
     44, 7, 102, 62, 3, 243, 171, 265, 302, 48, 164, 264, 148, 229, 280, 150],
    [9, 192, 66, 112, 163, 83, 135, 70, 224, 96, 31, 80, 196, 80, 63, 22,
     85, 100, 47, 283, 0, 163, 126, 143, 195, 82, 53, 82, 18, 27, 182, 52],
]
FIXTURE_MASK = [
    [1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1,
     0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1],
    [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 1,
     1, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0],
]
# fmt: on


@pytest.fixture(params=[False, True], ids=["transformers", "ours"])
def maybe_accelerate(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return accelerate if request.param else lambda model: model


def close_to(actual: Tensor, expected: list[float] | float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "mask", "expected"),
    [
        (
            {"attn_layers": ["lsh"], "is_decoder": False},
            None,
            [1.6879, -1.3083, -0.4708, 1.3555, -0.6292],
        ),
        (
            {"attn_layers": ["lsh"], "num_buckets": [2, 4]},
            [[0, 1, 0, 0]],
            [1.6439, -1.2306, -0.5108, 1.3006, -0.6537],
        ),
        (
            {"attn_layers": ["local"], "is_decoder": False},
            None,
            [1.4212, -2.0576, -0.9688, 1.4599, -0.1344],
        ),
        (
            {"attn_layers": ["local"]},
            [[0, 1, 0, 0]],
            [1.4750, -2.0235, -0.9743, 1.4463, -0.1269],
        ),
    ],
    ids=["lsh", "lsh-complex", "local", "local-complex"],
)
def test_layer_fixtures(
    maybe_accelerate: Callable[[Any], Any],
    fields: dict[str, Any],
    mask: list[list[int]] | None,
    expected: list[float],
) -> None:
    """The rows compared in the complex ones are padding."""
    chunks = {"lsh_num_chunks_before": 0, "local_num_chunks_before": 0}
    config = transformers.ReformerConfig(**{**FIXTURE_CONFIG, **chunks, **fields})
    torch.manual_seed(0)
    layer = maybe_accelerate(modeling.ReformerLayer(config).eval())
    hidden = torch.tensor(FIXTURE_HIDDEN)
    result = layer(
        prev_attn_output=hidden.clone(),
        hidden_states=hidden,
        attention_mask=None if mask is None else torch.tensor(mask),
    )
    close_to(result.hidden_states[0, 0, :5], expected)


@pytest.mark.parametrize(
    ("kind", "fields", "row", "expected"),
    [
        (
            "ReformerModel",
            {"attn_layers": ["lsh"] * 4, "num_buckets": [2, 4]},
            (0, 0),
            [-0.9896, -0.9396, -1.0831, -0.0597, 0.2456],
        ),
        (
            "ReformerModel",
            {"attn_layers": ["local"] * 4},
            (0, 0),
            [-1.6791, 0.7171, 0.1594, 0.4063, 1.2584],
        ),
        (
            "ReformerForMaskedLM",
            {"attn_layers": ["local", "lsh"] * 3, "num_buckets": [2, 4], "is_decoder": False},
            (1, -1),
            [0.1018, -0.2026, 0.2116, 0.0270, -0.1233],
        ),
    ],
    ids=["lsh", "local", "lm"],
)
def test_model_fixtures(
    maybe_accelerate: Callable[[Any], Any],
    kind: str,
    fields: dict[str, Any],
    row: tuple[int, int],
    expected: list[float],
) -> None:
    torch.manual_seed(0)
    config = transformers.ReformerConfig(**{**FIXTURE_CONFIG, **fields})
    model = maybe_accelerate(getattr(transformers, kind)(config).eval())
    output = model(torch.tensor(FIXTURE_TOKENS), attention_mask=torch.tensor(FIXTURE_MASK))[0]
    close_to(output[row][:5], expected)


@pytest.mark.parametrize(
    ("fields", "loss", "word", "first", "second"),
    [
        (
            {"attn_layers": ["local"] * 4},
            5.8019,
            [-0.0005, -0.0001, -0.0002, -0.0006, -0.0006],
            [-0.5235, 0.5704, 0.0922, -0.3140, 0.9928],
            [1.7960, 1.7668, 0.5593, 0.0907, 1.8342],
        ),
        (
            {"attn_layers": ["lsh"] * 4, "num_buckets": [2, 4], "num_hashes": 6},
            5.7854,
            [0.0004, 0.0003, 0.0006, -0.0004, 0.0002],
            [-0.3792, 0.5593, -1.6993, 0.2033, 0.4131],
            [-1.4212, -0.3201, -1.1944, 0.1258, 0.2856],
        ),
    ],
    ids=["local", "lsh"],
)
def test_gradient_fixtures(
    maybe_accelerate: Callable[[Any], Any],
    fields: dict[str, Any],
    loss: float,
    word: list[float],
    first: list[float],
    second: list[float],
) -> None:
    torch.manual_seed(0)
    config = transformers.ReformerConfig(**{**FIXTURE_CONFIG, **fields})
    model = maybe_accelerate(transformers.ReformerModelWithLMHead(config).train())
    tokens = torch.tensor(FIXTURE_TOKENS)
    actual = model(input_ids=tokens, labels=tokens)[0]
    actual.backward()
    embeddings = model.reformer.embeddings
    close_to(actual.detach(), loss)
    close_to(embeddings.word_embeddings.weight.grad[0, :5], word)
    # Of these the originals record the weights themselves.
    close_to(embeddings.position_embeddings.weights[0].detach()[1, 0, -5:], first)
    close_to(embeddings.position_embeddings.weights[1].detach()[0, 1, :5], second)


def pair(**fields: object) -> tuple[Any, Any]:
    """transformers' model and its accelerated copy."""
    theirs = hf_model(**fields)
    return theirs, accelerate(copy.deepcopy(theirs))


def compare_outputs(actual: Any, expected: Any, atol: float) -> None:
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=atol)
    for one, other in zip(
        actual.get("hidden_states") or (), expected.get("hidden_states") or (), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)
    caches = actual.get("past_buckets_states") or (), expected.get("past_buckets_states") or ()
    assert len(caches[0]) == len(caches[1])
    for (buckets, states), (expected_buckets, expected_states) in zip(*caches, strict=True):
        assert torch.equal(buckets, expected_buckets)
        torch.testing.assert_close(states, expected_states, rtol=0, atol=atol)


@pytest.mark.usefixtures("without_key_epsilon")
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("length", [3, 5, 29, 48])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hash_seed": 3, "num_buckets": None},
        {"attn_layers": LSH, "num_buckets": 4, "lsh_num_chunks_before": 0},
        {"attn_layers": LOCAL},
    ],
    ids=["mixed", "auto", "lsh", "local"],
)
def test_acceleration_changes_no_output(
    fields: dict[str, Any], length: int, causal: bool, masked: bool, grad: bool
) -> None:
    """Logits, hidden states of all layers and the cache with its buckets; padding rows included."""
    theirs, ours = pair(is_decoder=causal, **fields)
    tokens = torch.randint(50, (2, length))
    options = {"use_cache": True, "output_hidden_states": True} if causal else {}
    if masked:
        options["attention_mask"] = (~padding_mask(2, length)).long()
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        context = hashing_alike() if theirs.config.hash_seed is None else mock.MagicMock()
        with torch.set_grad_enabled(grad), context:
            outputs.append(model(tokens, num_hashes=3, **options))
    # The weights of padding that sees nothing are accurate to 1e9 * 2**-52 in transformers.
    compare_outputs(*outputs, atol=1e-6 if masked else 1e-9)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_acceleration_of_a_model_as_shipped(causal: bool) -> None:
    """With transformers' constant in the norm of keys."""
    theirs, ours = pair(is_decoder=causal, hash_seed=1)
    tokens = torch.randint(50, (2, 48))
    with torch.no_grad():
        expected, actual = theirs(tokens).logits, ours(tokens).logits
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.usefixtures("without_key_epsilon")
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"output_attentions": True}),
        ({}, {"head_mask": torch.tensor([0.0, 1.0])}),
        ({"lsh_num_chunks_after": 1, "attn_layers": LSH, "num_hashes": 1}, {}),
        ({"local_num_chunks_after": 4, "attn_layers": LOCAL}, {}),
    ],
    ids=["attentions", "head-mask", "short-lsh", "short-local"],
)
def test_what_we_lack_is_left_to_transformers(
    fields: dict[str, Any], options: dict[str, Any]
) -> None:
    """Attention weights, head masks, lines shorter than the window (12 positions)."""
    theirs, ours = pair(is_decoder=False, **fields)
    tokens = torch.randint(50, (2, 12))
    outputs = []
    for model in (ours, theirs):
        with torch.no_grad(), hashing_alike():
            outputs.append(model(tokens, **options))
    compare_outputs(*outputs, atol=1e-9)
    for one, other in zip(*(output.get("attentions") or () for output in outputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("without_key_epsilon")
@pytest.mark.parametrize("embedded", [False, True], ids=["tokens", "embeddings"])
@pytest.mark.parametrize("axial", [True, False], ids=["axial", "absolute"])
def test_position_ids_at_any_length(axial: bool, embedded: bool) -> None:
    """transformers fails where the length is not a multiple of the chunks'; what it computes there
    is had from it by padding the tokens first."""
    theirs, ours = pair(axial_pos_embds=axial, is_decoder=False)
    tokens = torch.randint(50, (2, 29))
    positions = torch.stack([torch.arange(29), torch.arange(29).flip(0)])
    mask = padding_mask(2, 29)
    padded = F.pad(tokens, (0, 7))
    options = {
        "position_ids": torch.cat([positions, torch.arange(29, 36).expand(2, -1)], dim=1),
        "attention_mask": F.pad((~mask).long(), (0, 7)),
    }
    inputs = {"input_ids": tokens}
    if embedded:
        inputs = {"inputs_embeds": ours.get_input_embeddings()(tokens)}
    with torch.no_grad(), hashing_alike():
        expected = theirs(padded, **options).logits[:, :29]
    with torch.no_grad(), hashing_alike():
        options = {"position_ids": positions, "attention_mask": (~mask).long()}
        actual = ours(**inputs, **options).logits
    torch.testing.assert_close(actual[~mask], expected[~mask], rtol=0, atol=1e-9)
    with pytest.raises((RuntimeError, IndexError)):
        theirs(**inputs, **options)
    # The positions that are there without any.
    with torch.no_grad(), hashing_alike():
        plain = ours(tokens).logits
    with torch.no_grad(), hashing_alike():
        counted = ours(tokens, position_ids=torch.arange(29).expand(2, -1)).logits
    torch.testing.assert_close(counted, plain)


def test_an_accelerated_model_is_saved_under_its_own_name(tmp_path: Path) -> None:
    model = accelerate(transformers.ReformerModel(hf_config()))
    model.save_pretrained(tmp_path)
    config = transformers.ReformerConfig.from_pretrained(tmp_path)
    assert config.architectures == ["ReformerModel"]
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is transformers.ReformerModel


def test_cached_decoding_is_that_of_transformers() -> None:
    theirs, ours = pair(hash_seed=5, axial_pos_embds=False)
    tokens = torch.randint(1, 50, (1, 20))
    expected = theirs.generate(tokens, max_new_tokens=10, do_sample=False, use_cache=True)
    actual = ours.generate(tokens, max_new_tokens=10, do_sample=False, use_cache=True)
    assert torch.equal(actual, expected)


def gradients(model: nn.Module, step: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    step(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare_with_plain_autograd(model: Any, step: Callable[[Any], Tensor]) -> None:
    """The same network with the same random numbers, without reversing anything."""
    actual = gradients(model, step)
    plain = partial(ReversibleStack, reversible=False)
    with mock.patch("reformer_ext.integrations._transformers_layers.ReversibleStack", plain):
        expected = gradients(model, step)
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert relative_error(actual[name], gradient) < 1e-8, name


def lm_step(tokens: Tensor, **options: object) -> Callable[[Any], Tensor]:
    return lambda model: model(tokens, labels=tokens, **options).loss


@pytest.mark.parametrize("layers", [LSH * 2, LOCAL, MIXED], ids=["lsh", "local", "mixed"])
@pytest.mark.parametrize("options", [{}, {"num_hashes": 4}, {"use_cache": False}], ids=str)
def test_gradients_with_dropout(layers: list[str], options: dict[str, Any]) -> None:
    """PEERS C.2, defects 1 and 3: transformers repeats other dropout masks than those of its
    forward in LSH layers, and cannot differentiate a call with num_hashes."""
    theirs, ours = pair(
        attn_layers=layers,
        hidden_dropout_prob=0.2,
        lsh_attention_probs_dropout_prob=0.1,
        local_attention_probs_dropout_prob=0.1,
    )
    tokens = torch.randint(50, (2, 48))
    compare_with_plain_autograd(ours.train(), lm_step(tokens, **options))
    if "num_hashes" in options and "lsh" in layers:
        with pytest.raises(RuntimeError):
            lm_step(tokens, **options)(theirs.train()).backward()


def test_gradients_of_transformers_are_wrong_with_dropout() -> None:
    """Defect 1 itself: the gradient of a parameter against a difference of two losses. Without a
    seed of its own each forward would draw other masks, so its seeds are given."""
    theirs, ours = pair(attn_layers=LSH, hidden_dropout_prob=0.3, hash_seed=2)
    tokens = torch.randint(50, (2, 48))
    cotangent = randn(2, 48, 50).double()
    weight = "reformer.encoder.layers.0.attention.output.dense.weight"
    errors = []
    for model in (theirs.train(), ours.train()):

        def loss(model: Any = model) -> Tensor:
            torch.manual_seed(3)
            with mock.patch.object(torch, "seed", return_value=5):
                return (model(tokens).logits * cotangent).sum()

        parameter = model.get_parameter(weight)
        direction = randn(parameter.shape).double()
        loss().backward()
        slope = (parameter.grad * direction).sum()
        with torch.no_grad():
            parameter.add_(1e-7 * direction)
            above = loss()
            parameter.sub_(2e-7 * direction)
            below = loss()
        errors.append(abs((above - below) / 2e-7 / slope - 1).item())
    assert errors[1] < 1e-4 < 1e-2 < errors[0]


def test_backward_in_evaluation_mode() -> None:
    """Defect 13, where transformers raises; at a length that it pads, with its default cache."""
    theirs, ours = pair()
    tokens = torch.randint(50, (2, 29))
    with pytest.raises(AssertionError):
        lm_step(tokens)(theirs).backward()
    compare_with_plain_autograd(ours, lm_step(tokens, use_cache=True))


def test_two_forwards_before_a_backward_and_frozen_embeddings() -> None:
    """Defects 5 and 6."""
    _, ours = pair(hidden_dropout_prob=0.2)
    ours.reformer.embeddings.requires_grad_(False)
    first, second = torch.randint(50, (2, 2, 48))
    ours.train()

    def both(model: Any) -> Tensor:
        return lm_step(first)(model) + lm_step(second)(model)

    actual = gradients(ours, both)
    plain = partial(ReversibleStack, reversible=False)
    with mock.patch("reformer_ext.integrations._transformers_layers.ReversibleStack", plain):
        expected = gradients(ours, both)
    for name, gradient in expected.items():
        if gradient is not None:
            assert relative_error(actual[name], gradient) < 1e-8, name
    assert sum(gradient is not None for gradient in actual.values()) > 20


def test_a_training_step_hashes_once() -> None:
    """The recomputed input differs by rounding: it could fall into other buckets."""
    _, ours = pair(attn_layers=MIXED)
    with mock.patch.object(ops, "lsh_hash", wraps=ops.lsh_hash) as lsh_hash:
        lm_step(torch.randint(50, (2, 48)))(ours.train()).backward()
    assert lsh_hash.call_count == MIXED.count("lsh")


def test_a_seed_makes_training_reproducible() -> None:
    """Defect 4: transformers seeds the global generator anew in every layer of every step."""
    theirs, ours = pair(hidden_dropout_prob=0.2)
    step = lm_step(torch.randint(50, (2, 48)))
    losses = []
    for model in (ours, ours, theirs, theirs):
        torch.manual_seed(1)
        losses.append(step(model.train()).item())
    assert losses[0] == losses[1]
    assert losses[2] != losses[3]


def test_a_hash_seed_leaves_the_global_generator_alone() -> None:
    _, ours = pair(hash_seed=4)
    before = torch.get_rng_state()
    with torch.no_grad():
        first, second = (ours(torch.arange(48)[None]).logits for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)


def test_accelerated_models_are_copied_saved_and_accelerated_again() -> None:
    theirs, ours = pair(hash_seed=4)
    assert accelerate(ours) is ours
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.config.to_dict() == theirs.config.to_dict()
    tokens = torch.randint(50, (1, 48))
    with torch.no_grad():
        expected = ours(tokens).logits
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            ours.reformer.encoder.layers[0].attention.self_attention.dropout = 0.5  # not shared
            assert torch.equal(twin(tokens).logits, expected)


def test_acceleration_keeps_the_mode_of_each_module() -> None:
    _, ours = pair(hidden_dropout_prob=0.2)
    ours.train().reformer.encoder.layers[1].eval()
    lm_step(torch.randint(50, (2, 48)))(ours).backward()
    assert ours.training and not ours.reformer.encoder.layers[1].attention.training


def test_acceleration_refuses_before_it_changes_anything() -> None:
    with pytest.raises(ValueError, match=r"accelerate: expected .* got Linear"):
        accelerate(nn.Linear(1, 1))
    wide = hf_model(attention_head_size=264)
    with pytest.raises(ValueError, match=r"accelerate: .*at most 256, got 264"):
        accelerate(wide)
    assert type(wide.reformer.encoder) is modeling.ReformerEncoder


@pytest.mark.gpu
def test_acceleration_changes_no_output_on_cuda() -> None:
    theirs, ours = (model.float().cuda() for model in pair(hash_seed=3))
    tokens = torch.randint(50, (2, 48), device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-3, atol=1e-3)
    step = lm_step(tokens)
    step(ours.train()).backward()
    step(theirs.train()).backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(one.grad, other.grad) < 1e-2, name


# reformer-pytorch ---------------------------------------------------------------------------------


def lucidrains_model(**options: object) -> tuple[Any, dict[str, Any]]:
    options = {
        "num_tokens": 50,
        "dim": 24,
        "depth": 2,
        "max_seq_len": 64,
        "heads": 2,
        "dim_head": 8,
        "bucket_size": 8,
        "n_hashes": 3,
        "ff_chunks": 3,
        **options,
    }
    return randomized(reformer_pytorch.ReformerLM(**options)).eval(), options


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ff_glu": True, "ff_activation": nn.ReLU, "ff_mult": 2},
        {"absolute_position_emb": True},
        {"axial_position_emb": True},
        {"axial_position_emb": True, "axial_position_shape": (5, 4, 4)},
        {"use_full_attn": True},
        {"use_full_attn": True, "absolute_position_emb": True},
        {"return_embeddings": True, "dim_head": 4, "num_mem_kv": 0},
    ],
    ids=[
        "rotary", "glu", "absolute", "axial", "axial3", "full", "full-absolute", "embeddings",
    ],
)  # fmt: skip
def test_logits_and_gradients_are_those_of_reformer_pytorch(
    options: dict[str, Any], causal: bool
) -> None:
    theirs, options = lucidrains_model(causal=causal, **options)
    ours = lucidrains.from_reformer_pytorch(theirs.state_dict(), **options)
    assert type(ours) is (Reformer if options.get("return_embeddings") else ReformerLM)
    tokens = torch.randint(50, (2, 64))
    rotary = ours.config.positions == "rotary"

    def convert(rotations: Tensor) -> Tensor:
        if rotary:  # as the rows of qk
            rotations = torch.cat([rotations[:, 0::2], rotations[:, 1::2]], dim=1)
        return rotations

    cotangent = randn(2, 64, 24 if options.get("return_embeddings") else 50).double()
    with hashing_alike():
        expected = theirs.train()(tokens)
        expected.backward(cotangent)
    with hashing_alike(convert, shared=True):
        actual = ours.train()(tokens)
        actual.backward(cotangent)
    # Our cosines and its frequencies are float32 numbers.
    tolerance = 2e-5 if rotary else 1e-8
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    embedding = (ours if isinstance(ours, Reformer) else ours.reformer).embedding
    assert relative_error(embedding.weight.grad, theirs.token_emb.weight.grad) < tolerance


def test_reformer_pytorch_options_without_counterpart_are_named() -> None:
    theirs, options = lucidrains_model()
    state = theirs.state_dict()
    load = partial(lucidrains.from_reformer_pytorch, state)
    for name, value in {
        "num_mem_kv": 4,
        "pkm_layers": (1,),
        "n_local_attn_heads": 1,
        "weight_tie": True,
        "use_rezero": True,
        "use_scale_norm": True,
        "emb_dim": 12,
        "full_attn_thres": 100,
        "one_value_head": True,
        "weight_tie_embedding": True,
        "fixed_position_emb": True,
        "layer_dropout": 0.1,
    }.items():
        with pytest.raises(ValueError, match=f"from_reformer_pytorch: expected {name} to be .*got"):
            load(**{**options, name: value})
    with pytest.raises(TypeError, match=r"from_reformer_pytorch: .*got 'stranger'"):
        load(**options, stranger=1)
    with pytest.raises(ValueError, match="from_reformer_pytorch: expected ff_activation"):
        load(**options, ff_activation=nn.Tanh)
    with pytest.raises(ValueError, match=r"lacks \[.*fn.to_out.bias.* unknown \[\]"):
        load(**{**options, "depth": 3})
    with pytest.raises(ValueError, match=r"expected token_emb.weight of shape \[60, 24\], got"):
        load(**{**options, "num_tokens": 60})


LAYER_CASES = [
    {"dim_head": 4},
    {"random_rotations_per_head": True},  # the original's differ between batch items, too
    {"attend_across_buckets": False},
    {"attend_across_buckets": False, "allow_duplicate_attention": False},
    {"use_full_attn": True},
    {"full_attn_thres": 64},
]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("options", LAYER_CASES, ids=lambda options: "-".join(options) or "plain")
def test_layer_is_that_of_reformer_pytorch(options: dict[str, Any], causal: bool) -> None:
    """Output, and gradients of input and parameters by name."""
    options = {"dim": 24, "heads": 3, "bucket_size": 8, "n_hashes": 4, "causal": causal, **options}
    theirs = randomized(reformer_pytorch.LSHSelfAttention(**options))
    ours = lucidrains.LSHSelfAttention(**options).double()
    ours.load_state_dict(theirs.state_dict())
    batch = 1 if options.get("random_rotations_per_head") else 2
    x, cotangent = randn(2, batch, 64, 24).double()
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with hashing_alike():
            out = layer(leaf)
        out.backward(cotangent)
        grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append({"out": out, "x": leaf.grad, **grads})
    assert results[0].keys() == results[1].keys()
    for name, actual in results[0].items():
        assert relative_error(actual, results[1][name]) < 1e-8, name


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("length", [1, 7, 9, 37])
def test_layer_takes_any_length_and_keeps_padding_out(length: int, mode: str) -> None:
    """What padding holds, and how much of it there is, changes nothing elsewhere."""
    layer = lucidrains.LSHSelfAttention(16, heads=2, bucket_size=8, n_hashes=2).double()
    layer.train(mode == "train")
    x = randn(2, length + 5, 16).double()
    mask = torch.arange(length + 5) < length
    outputs = []
    for filling in (0.0, 100.0):
        padded = torch.where(mask[:, None], x, x + filling)
        torch.manual_seed(2)
        outputs.append(layer(padded, input_mask=mask.expand(2, -1))[:, :length])
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()


def test_layer_hashes_anew_in_training_only() -> None:
    """C.2, defect 12: the original is random in evaluation too."""
    layer = lucidrains.LSHSelfAttention(16, heads=2, bucket_size=8, n_hashes=1)
    x = randn(1, 128, 16)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    third = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), third)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "expected heads to be an integer >= 1, got 0"),
        ({"heads": 2.0}, "expected heads to be an integer >= 1, got 2.0"),
        ({"bucket_size": 0}, "expected bucket_size to be an integer >= 1, got 0"),
        ({"n_hashes": 0}, "expected n_hashes to be an integer >= 1, got 0"),
        ({"dim_head": -8}, "expected dim_head to be an integer >= 1, got -8"),
        ({"full_attn_thres": -1}, "expected full_attn_thres to be an integer >= 0, got -1"),
        ({"dropout": 1.5}, r"expected dropout in [0, 1), got 1.5"),
    ],
)
def test_layer_sizes_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^LSHSelfAttention: {re.escape(message)}$"):
        lucidrains.LSHSelfAttention(16, **{"heads": 2, **change})


def test_layer_errors_are_named() -> None:
    for name, value in {
        "num_mem_kv": 1,
        "one_value_head": True,
        "return_attn": True,
        "n_local_attn_heads": 2,
        "rehash_each_round": False,
        "drop_for_hash_rate": 0.1,
    }.items():
        with pytest.raises(ValueError, match=f"LSHSelfAttention: expected {name} to be"):
            lucidrains.LSHSelfAttention(16, **{name: value})
    with pytest.raises(TypeError, match=r"LSHSelfAttention: .*got 'stranger'"):
        lucidrains.LSHSelfAttention(16, stranger=1)
    with pytest.raises(ValueError, match="expected dim divisible by heads, got 15 and 8"):
        lucidrains.LSHSelfAttention(15)
    layer, x = lucidrains.LSHSelfAttention(16), torch.zeros(2, 5, 16)
    for name in ("keys", "input_attn_mask", "context_mask", "pos_emb"):
        with pytest.raises(ValueError, match=f"LSHSelfAttention: expected {name} to be None"):
            layer(x, **{name: x})
    with pytest.raises(ValueError, match=r"expected x \[B, L, 16\], got \[2, 5, 15\]"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match=r"expected input_mask \[2, 5\], got \[2, 4\]"):
        layer(x, input_mask=torch.ones(2, 4, dtype=torch.bool))


# What the models above needed of ours -------------------------------------------------------------


def test_summed_axial_positions() -> None:
    positions = AxialPositions((3, 4), 8, summed=True)
    rows, columns = positions.weights
    expected = (rows[:, None] + columns[None]).flatten(0, 1)[:10]
    assert torch.equal(positions(10), expected)
    with pytest.raises(ValueError, match="AxialPositions: expected no dims if summed"):
        AxialPositions((3, 4), 8, (4, 4), summed=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"streams": "sum"}, "streams: expected one of"),
        ({"streams": "concat", "tie_embeddings": True}, "tie_embeddings: expected False with"),
        ({"head_bias": True, "tie_embeddings": True}, "head_bias: expected False with tie"),
        ({"axial_dims": (8, 8)}, "axial_dims: expected widths that sum to dim = 512"),
        ({"axial_dims": (256, 256), "axial_sum": True}, "axial_sum: expected False with axial"),
        ({"look_back": -1}, "look_back: expected an integer >= 0"),
        ({"local_look_ahead": -1}, "local_look_ahead: expected None or an integer >= 0"),
        ({"local_attention_dropout": 1.0}, "local_attention_dropout: expected None or a number"),
        ({"length_multiple": 0}, "length_multiple: expected an integer >= 1"),
    ],
)
def test_config_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ReformerConfig.{message}"):
        ReformerConfig(**fields)


def test_every_dropout_drops() -> None:
    """Each field alone makes training random, and reversing repeats its masks."""
    for name in ("ff_dropout", "output_dropout", "local_attention_dropout", "attention_dropout"):
        config = ReformerConfig(
            dim=16, heads=2, layers=("local", "lsh"), chunk_size=8, local_chunk_size=8,
            max_length=64, ff_chunk_size=16, **{name: 0.5},
        )  # fmt: skip
        model = randomized(Reformer(config))
        tokens = torch.randint(256, (1, 32))
        hash_step = model.hash_step.clone()
        grads, outputs = [], []
        for reversible in (True, False, True):
            model.layers.reversible = reversible
            model.hash_step.copy_(hash_step)
            model.zero_grad()
            torch.manual_seed(len(grads) // 2)
            outputs.append(model(tokens))
            outputs[-1].square().sum().backward()
            grads.append(model.embedding.weight.grad.clone())
        assert relative_error(grads[0], grads[1]) < 1e-8, name
        assert not torch.equal(outputs[1], outputs[2]), name
