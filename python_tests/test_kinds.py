"""Kinds of attention: options of layers, a kind of one's own, repeated layers, what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from python_tests.cases import tiny_config
from reformer_ext.diagnostics import inspect_model
from reformer_ext.generate import generate
from reformer_ext.nn import (
    ATTENTIONS,
    FullCrossAttention,
    FullSelfAttention,
    Layer,
    LocalSelfAttention,
    LSHCrossAttention,
    LSHSelfAttention,
    Reformer,
    ReformerConfig,
    ReformerEncoderDecoder,
    ReformerForTokenClassification,
    ReformerLM,
    RotaryPositions,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_attention.py"
# In one chunk, with whole buckets: a forward pass sees what decoding does.
EXACT = {"chunk_size": 64, "n_buckets": 4, "same_bucket": True, "initializer_range": 0.3}
TOKENS = 40


def language_model(**fields: Any) -> ReformerLM:
    torch.manual_seed(0)
    return ReformerLM(tiny_config(vocab_size=TOKENS, **fields)).double()


def continued(model: nn.Module, cache: Any, tokens: Tensor, pieces: list[int]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part, cache=cache) for part in tokens.split(pieces, 1)], 1)


# Options of layers


def test_options_of_a_layer_come_before_the_fields_of_all() -> None:
    layers = ("lsh", Layer("lsh", {"n_hashes": 5, "n_buckets": [2, 4]}), Layer("local"))
    model = language_model(layers=layers, n_hashes=3, local_chunk_size=16)
    first, second, third = (block.f.attention for block in model.reformer.layers.blocks)
    assert (first.n_hashes, second.n_hashes) == (3, 5)
    assert (first.n_buckets, list(second.n_buckets)) == (None, [2, 4])
    assert first.chunk_size == second.chunk_size == model.config.chunk_size
    assert third.chunk_size == 16
    assert (first.hash_seed, second.hash_seed) == (0, 1)


def test_a_layer_of_a_name_alone_is_the_name() -> None:
    named, plain = (language_model(layers=(kind, "lsh")) for kind in (Layer("local"), "local"))
    tokens = torch.randint(TOKENS, (1, 30))
    assert torch.equal(named(tokens), plain(tokens))
    assert named.state_dict().keys() == plain.state_dict().keys()


def test_configurations_survive_json() -> None:
    layers = ("local", Layer("lsh", {"n_buckets": (2, 4), "scale": None}, feed_forward=False))
    config = tiny_config(layers=layers, repeat=2, repeat_order="layer")
    again = ReformerConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config)
    for written in (
        {"attention": "lsh", "n_hashes": 4},
        {"attention": "lsh", "options": {"n_hashes": 4}},
        {"attention": "lsh", "options": [["n_hashes", 4]], "feed_forward": True},
    ):
        assert tiny_config(layers=[written]).layers == (Layer("lsh", {"n_hashes": 4}),)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("lhs", r"ReformerConfig\.layers: expected one or more of .*'lsh'.*, got \('lhs',\)"),
        (Layer("lhs"), r"ReformerConfig\.layers: expected one or more of"),
        (3, r"ReformerConfig\.layers: expected one or more of"),
        (
            Layer("local", {"n_hashes": 4}),
            r"ReformerConfig\.layers\[0\]: expected options among \['chunk_size', .*\], "
            r"got \['n_hashes'\]",
        ),
        (
            Layer("lsh", {"n_hashes": 0}),
            r"ReformerConfig\.layers\[0\]: expected n_hashes and chunk_size >= 1, got 0 and 4",
        ),
        (
            {"attention": "lsh", "rotary": "no"},
            r"ReformerConfig\.layers\[0\]: expected rotary to be True or False, got 'no'",
        ),
        (
            {"attention": "lsh", "n_buckets": 5},
            r"layers\[0\]: expected n_buckets to be None, an even number >= 2 or .*, got 5",
        ),
        (Layer("full", {"scale": math.nan}), r"layers\[0\]: expected scale to be None or a number"),
        (Layer("local", {"look_back": -1}), r"layers\[0\]: expected look_back to be an integer"),
        (Layer("local", {"dropout": 1}), r"layers\[0\]: expected dropout in \[0, 1\), got 1"),
        ({"kind": "lsh"}, r"Layer: expected attention, got \['kind'\] alone"),
        (
            {"attention": "lsh", "options": {}, "n_hashes": 4},
            r"Layer: expected options in one place, got options and \['n_hashes'\]",
        ),
        (
            {"attention": "lsh", "feed_forward": 1},
            r"Layer\.feed_forward: expected True or False, got 1",
        ),
    ],
)
def test_layer_errors(layer: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(layers=(layer,))


@pytest.mark.parametrize("field", ["repeat", "repeat_order"])
def test_repeat_errors(field: str) -> None:
    with pytest.raises(ValueError, match=rf"ReformerConfig\.{field}: expected .*, got 0"):
        tiny_config(**{field: 0})


@pytest.mark.parametrize("kind", ["lsh", "local", "full"])
def test_a_layer_without_rotary_positions(kind: str) -> None:
    """Is that of a model without any; in reports too."""
    layer = Layer(kind, {"rotary": False})
    without = language_model(layers=(layer,), initializer_range=0.3).eval()
    plain = language_model(layers=(kind,), positions="none", initializer_range=0.3).eval()
    turned = Layer(kind, {"rotary": True})
    with_them = language_model(layers=(turned,), initializer_range=0.3).eval()
    tokens = torch.randint(TOKENS, (2, 30))
    with torch.no_grad():
        assert torch.equal(without(tokens), plain(tokens))
        assert not torch.allclose(with_them(tokens), plain(tokens))
    (report,), (expected,) = (inspect_model(model, tokens) for model in (without, plain))
    if report.mass is not None:
        assert torch.equal(report.mass.mass.nan_to_num(), expected.mass.mass.nan_to_num())


def test_a_layer_without_feed_forward() -> None:
    model = language_model(layers=(Layer("local", feed_forward=False), "full")).eval()
    first, second = model.reformer.layers.blocks
    assert first.g is None and second.g is not None
    tokens = torch.randint(TOKENS, (1, 20))
    with torch.no_grad():
        expected = model(tokens)
    got = continued(model, model.new_cache(1, 20), tokens, [15, 1, 4])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# A kind of one's own


@pytest.fixture
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("custom_attention", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    del ATTENTIONS["linear"]


def test_a_kind_of_ones_own_learns_and_generates(example: ModuleType) -> None:
    torch.manual_seed(0)
    model, losses = example.train(example.small_config(), 120)
    assert losses[0] > 3.3 and losses[-1] < 0.3  # of log 32 = 3.47
    prompt = torch.tensor([[20, 21, 22], [0, 1, 2]])
    expected = torch.arange(3, 19) + torch.tensor([[20], [0]])
    assert torch.equal(example.generate(model, prompt, 16), expected % 32)


@pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "plain"])
def test_a_kind_of_ones_own_decodes_what_it_computes(
    example: ModuleType, reversible: bool, tmp_path: Path
) -> None:
    layers = ("lsh", Layer("linear", {"floor": 1e-3}))
    model = language_model(layers=layers, reversible=reversible, **EXACT).eval()
    assert model.reformer.layers.blocks[1].f.attention.floor == 1e-3
    tokens = torch.randint(TOKENS, (2, 30))
    with torch.no_grad():
        expected = model(tokens)
    cache = model.new_cache(2, 30, window=64)
    for pieces in ([30], [20, 1, 1, 8]):
        cache.reset()
        got = continued(model, cache, tokens, pieces)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    model.save_pretrained(tmp_path)
    saved = ReformerLM.from_pretrained(tmp_path).double()
    assert saved.config == model.config
    with torch.no_grad():
        torch.testing.assert_close(saved(tokens), expected, rtol=1e-3, atol=1e-3)  # float32


def test_reports_go_by_calls_and_know_other_kinds(example: ModuleType) -> None:
    model = language_model(layers=("linear", "lsh"), repeat=2).eval()
    reports = inspect_model(model, torch.randint(TOKENS, (1, 30)))
    assert [report.kind for report in reports] == ["linear", "lsh"] * 2
    assert [report.index for report in reports] == [0, 1, 2, 3]
    first, second = reports[1].mass, reports[3].mass
    assert reports[0].mass is None and not torch.equal(first.mass, second.mass)


def test_options_of_a_kind_of_ones_own_are_checked(example: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"layers\[0\]: expected floor > 0, got 0"):
        tiny_config(layers=[{"attention": "linear", "floor": 0}])
    with pytest.raises(ValueError, match=r"expected options among \['floor'\], got \['roof'\]"):
        tiny_config(layers=[{"attention": "linear", "roof": 1}])


def test_penalties_of_layers_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated layer counts once; the library's kinds ask for nothing."""
    model = language_model(layers=("local", "lsh"), repeat=2)
    assert model.penalty().item() == 0.0
    monkeypatch.setattr(
        LocalSelfAttention, "penalty", lambda self: self.in_proj.weight.pow(2).sum()
    )
    weight = model.reformer.layers.blocks[0].f.attention.in_proj.weight
    assert torch.equal(model.penalty(), weight.pow(2).sum())
    model.penalty().backward()
    assert torch.equal(weight.grad, 2 * weight)
    labels = ReformerForTokenClassification(model.config, 2).double()
    assert torch.equal(labels.penalty(), labels.reformer.penalty()) and labels.penalty() > 0
    config = dataclasses.replace(model.config, causal=False)
    both = ReformerEncoderDecoder(config, model.config).double()
    torch.testing.assert_close(both.penalty(), both.encoder.penalty() + both.decoder.penalty())


# Repeated layers


def written_out(model: nn.Module) -> nn.Module:
    """The same without repetition: a layer for each call, with the parameters of the layer that is
    called, under plain autograd."""

    def once(config: ReformerConfig) -> ReformerConfig:
        layers = tuple(config.layers[layer] for layer in config.schedule)
        return dataclasses.replace(config, layers=layers, repeat=1, reversible=False)

    if isinstance(model, ReformerLM):
        result: nn.Module = ReformerLM(once(model.config))
    else:
        assert isinstance(model, ReformerEncoderDecoder)
        cross = tuple(model.cross[layer] for layer in model.decoder_config.schedule)
        result = ReformerEncoderDecoder(
            once(model.encoder_config), once(model.decoder_config), cross
        )
    parameters = dict(model.named_parameters())
    stacks = {
        name: module.config.schedule
        for name, module in model.named_modules()
        if isinstance(module, Reformer)
    }
    for name, _ in list(result.named_parameters()):
        theirs = name
        for stack, schedule in stacks.items():
            found = re.fullmatch(rf"({stack}\.layers\.blocks\.)(\d+)(\..*)", name)
            if found is not None:
                theirs = f"{found[1]}{schedule[int(found[2])]}{found[3]}"
        owner, _, attribute = name.rpartition(".")
        setattr(result.get_submodule(owner), attribute, parameters[theirs])
    return result.train(model.training)


def gradients(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    loss = model.loss(*inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradients(model: nn.Module, *inputs: Tensor) -> None:
    loss, found = gradients(model, *inputs)
    tied = written_out(model)
    expected_loss, by_name = gradients(tied, *inputs)
    expected = {id(p): by_name[name] for name, p in tied.named_parameters()}
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        error = (found[name] - expected[id(parameter)]).norm() / expected[id(parameter)].norm()
        assert error < 1e-10, name


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout"])
@pytest.mark.parametrize("order", ["cycle", "layer"])
@pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "plain"])
def test_repeated_layers_are_the_stack_written_out(
    reversible: bool, order: str, dropout: float
) -> None:
    """Same hashes and masks call by call; gradients of all calls of a layer add up."""
    model = language_model(
        layers=("local", "lsh", "lsh"),
        repeat=3,
        repeat_order=order,
        reversible=reversible,
        attention_dropout=dropout,
        initializer_range=0.2,
    )
    tokens = torch.randint(TOKENS, (2, 41))
    assert_same_gradients(model, tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("cross", ["full", "lsh"])
def test_repeated_layers_of_an_encoder_decoder(cross: str) -> None:
    config = tiny_config(
        vocab_size=TOKENS, layers=("local", "lsh"), repeat=2, initializer_range=0.2
    )
    torch.manual_seed(0)
    encoder = dataclasses.replace(config, causal=False)
    model = ReformerEncoderDecoder(encoder, config, cross).double()
    source, tokens = torch.randint(TOKENS, (2, 30)), torch.randint(TOKENS, (2, 21))
    assert_same_gradients(model, source, tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("order", ["cycle", "layer"])
def test_repeated_layers_are_saved_once_and_decode_call_by_call(order: str, tmp_path: Path) -> None:
    fields = {"layers": ("local", "lsh", "full"), **EXACT}
    model = language_model(**fields, repeat=3, repeat_order=order).eval()
    once = language_model(**fields)
    assert model.state_dict().keys() == once.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in once.parameters())
    tokens = torch.randint(TOKENS, (2, 30))
    with torch.no_grad():
        expected = model(tokens)
        cache = model.new_cache(2, 30, window=64)
        assert len(cache.layers) == 9
        got = continued(model, cache, tokens, [20, 1, 9])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        cache.reset()
        model(tokens[:, :25], cache=cache)
        cache.reorder([1, 0])
        got = model(tokens[[1, 0], 25:], cache=cache)
        torch.testing.assert_close(got, expected[[1, 0], 25:], rtol=1e-9, atol=1e-9)
        model.save_pretrained(tmp_path)
        saved = ReformerLM.from_pretrained(tmp_path).double()
        assert saved.config == model.config
        torch.testing.assert_close(saved(tokens), expected, rtol=1e-3, atol=1e-3)  # float32


def test_a_repeated_decoder_decodes() -> None:
    config = tiny_config(vocab_size=TOKENS, layers=("local", "lsh"), repeat=2, **EXACT)
    torch.manual_seed(0)
    model = ReformerEncoderDecoder(dataclasses.replace(config, causal=False), config).double()
    source, tokens = torch.randint(TOKENS, (2, 30)), torch.randint(TOKENS, (2, 20))
    with torch.no_grad():
        expected = model.eval()(source, tokens)
        cache = model.new_cache(2, 20, 30, window=64)
        got = [model(source, tokens[:, :15], cache=cache), model(None, tokens[:, 15:], cache=cache)]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-9, atol=1e-9)


def test_calls_of_a_repeated_model_hash_with_seeds_of_their_own() -> None:
    for order in ("cycle", "layer"):
        model = language_model(layers=("lsh", "lsh"), repeat=3, repeat_order=order, hash_seed=7)
        caches = model.new_cache(1, 40).layers
        hashes = [cache.rotations for cache in caches]
        assert len(hashes) == 6
        for i, a in enumerate(hashes):
            assert all(not torch.equal(a, b) for b in hashes[:i])


# Sizes and devices


def test_caches_are_as_large_as_what_they_can_hold() -> None:
    """And not as a chunk that no context fills."""
    huge = {"chunk_size": 10**9, "local_chunk_size": 10**9, "n_buckets": 4}
    model = language_model(layers=("local", "lsh"), **huge).eval()
    sizes = model.new_cache(1, 20), language_model(layers=("full", "full")).new_cache(1, 20)
    held = [sum(b.numel() for b in cache.buffers() if b.dim() == 4) for cache in sizes]
    assert held[0] < 2 * held[1]
    tokens = torch.randint(TOKENS, (1, 20))
    with torch.no_grad():
        expected = model(tokens)
    got = continued(model, sizes[0], tokens, [7, 1, 12])
    assert got.isfinite().all()
    local = language_model(layers=("local",), **huge).eval()
    with torch.no_grad():
        expected = local(tokens)
    got = continued(local, local.new_cache(1, 20), tokens, [7, 1, 12])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_text_does_not_depend_on_the_capacity() -> None:
    """Also where layers have chunks of their own."""
    layers = (Layer("lsh", {"chunk_size": 8}), "lsh")
    config = tiny_config(vocab_size=256, layers=layers, max_length=64, initializer_range=0.3)
    torch.manual_seed(0)
    model = ReformerLM(config).eval()
    long, short = (b"".join(generate(model, b"some text", n)) for n in (40, 12))
    assert long[:12] == short
    cache = model.new_cache(1, 12, hash_length=64)
    assert [math.prod(layer.n_buckets) for layer in cache.layers] == [16, 32]


@pytest.mark.parametrize("fields", [{}, {"repeat": 2}, {"ff_chunk_size": 8}, {"dropout": 0.1}])
def test_models_on_the_meta_device(fields: dict[str, Any]) -> None:
    """To plan memory: training step, evaluation and decoding, shapes alone."""
    layers = ("local", "lsh", "full")
    with torch.device("meta"):
        model = ReformerLM(tiny_config(layers=layers, attention_dropout=0.1, **fields))
        tokens = torch.zeros(2, 30, dtype=torch.int64)
        model.loss(tokens, tokens).backward()
        assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
        model.eval()
        with torch.no_grad():
            assert model(tokens).shape == (2, 30, 256)
            cache = model.new_cache(2, 40)
            assert model(tokens, cache=cache).shape == (2, 30, 256)
            assert model(tokens[:, :1], cache=cache).shape == (2, 1, 256)


@pytest.mark.parametrize("kind", ["lsh", "local", "full", "shared"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_what_is_at_padding_does_not_matter(kind: str, causal: bool) -> None:
    """NaN in embeddings there: outputs and gradients of the rest stay, to the bit."""
    layer = Layer("full", {"shared_qk": True}) if kind == "shared" else kind
    model = language_model(layers=(layer, layer), causal=causal)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    padding = torch.arange(20) >= torch.tensor([[20], [13]])
    results = []
    for value in (0.0, math.nan, math.inf):
        model.reformer.hash_step.zero_()
        given = x.masked_fill(padding[..., None], value).requires_grad_()
        out = model(given, key_padding_mask=padding)[~padding]
        inputs = [given, *model.reformer.layers.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        assert not results[-1][1][padding].any()
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("shared_qk", [True, False])
def test_full_attention_does_not_see_padding(shared_qk: bool) -> None:
    layer = FullSelfAttention(16, 2, shared_qk=shared_qk).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    padding = torch.arange(20) >= torch.tensor([[20], [13]])
    results = []
    for value in (0.0, math.nan):
        given = x.masked_fill(padding[..., None], value).requires_grad_()
        out = layer(given, key_padding_mask=padding)[~padding]
        (gradient,) = torch.autograd.grad(out.square().sum(), given)
        results.append((out, gradient[~padding]))
    assert all(map(torch.equal, *results))


def test_tokens_beyond_the_vocabulary_are_named() -> None:
    model = language_model()
    for token in (TOKENS, -1):
        tokens = torch.tensor([[0, token, 3]])
        expected = rf"^Reformer: expected tokens in 0 \.\. 39 \(vocab_size = 40\), got {token}$"
        with pytest.raises(ValueError, match=expected):
            model(tokens)
    for wrong in ([[0, 1]], "text", None):
        with pytest.raises(ValueError, match=r"^Reformer: expected tokens to be a tensor, got "):
            model(wrong)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("kind", [LSHSelfAttention, LocalSelfAttention, FullSelfAttention])
def test_rotary_factors_of_another_width_are_refused(kind: type[nn.Module], grad: bool) -> None:
    """Two heads of 16 are not four of 8."""
    layer = kind(32, 2)
    with torch.set_grad_enabled(grad):
        message = rf"^{kind.__name__}: expected rotary of head_dim = 16, got factors \[40, 8\]$"
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(1, 40, 32), rotary=RotaryPositions(8)(40))


SELF = (LSHSelfAttention, LocalSelfAttention, FullSelfAttention)
CROSS = (LSHCrossAttention, FullCrossAttention)
WRONG: list[tuple[tuple[type[nn.Module], ...], dict[str, object], str]] = [
    (SELF + CROSS, {"dim": 0}, "expected dim to be an integer >= 1, got 0"),
    (SELF + CROSS, {"dim": 12.0}, "expected dim to be an integer >= 1, got 12.0"),
    (SELF + CROSS, {"heads": 0}, "expected heads to be an integer >= 1, got 0"),
    (SELF + CROSS, {"heads": "3"}, "expected heads to be an integer >= 1, got '3'"),
    (SELF + CROSS, {"head_dim": 257}, "expected head_dim in 1 .. 256, got 257"),
    (SELF + CROSS, {"head_dim": 4.0}, "expected head_dim in 1 .. 256, got 4.0"),
    (SELF + CROSS, {"dropout": "0.1"}, "expected dropout in [0, 1), got '0.1'"),
    (SELF + CROSS, {"dropout": math.nan}, "expected dropout in [0, 1), got nan"),
    (SELF + CROSS, {"scale": math.nan}, "expected scale to be None or a number, got nan"),
    (SELF + CROSS, {"scale": math.inf}, "expected scale to be None or a number, got inf"),
    (SELF + CROSS, {"scale": 1e300}, "expected scale to be None or a number, got 1e+300"),
    (SELF, {"rotary": 1}, "expected rotary to be True or False, got 1"),
    (SELF[:2], {"look_back": -1}, "expected look_back to be an integer >= 0, got -1"),
    (SELF[:2], {"look_ahead": 0.5}, "expected look_ahead to be an integer >= 0, got 0.5"),
    (SELF[1:2], {"chunk_size": 8.0}, "expected chunk_size >= 1, got 8.0"),
    (SELF[1:2], {"wrap": None}, "expected wrap to be True or False, got None"),
    (SELF[2:], {"shared_qk": "yes"}, "expected shared_qk to be True or False, got 'yes'"),
    (CROSS, {"context_dim": 0}, "expected context_dim to be an integer >= 1, got 0"),
    *(
        ((SELF[0], CROSS[0]), change, message)
        for change, message in (
            ({"n_hashes": 2.0}, "expected n_hashes and chunk_size >= 1, got 2.0 and 64"),
            ({"chunk_size": 0}, "expected n_hashes and chunk_size >= 1, got 8 and 0"),
            (
                {"n_buckets": 5},
                "expected n_buckets to be None, an even number >= 2 or a list of such, got 5",
            ),
            (
                {"n_buckets": []},
                "expected n_buckets to be None, an even number >= 2 or a list of such, got []",
            ),
            ({"same_bucket": 0}, "expected same_bucket to be True or False, got 0"),
        )
    ),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [(kind, change, message) for kinds, change, message in WRONG for kind in kinds],
)
def test_constructors_name_what_is_wrong(
    kind: type[nn.Module], change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {re.escape(message)}$"):
        kind(**{"dim": 12, "heads": 3, **change})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("initializer_range", math.inf),
        ("initializer_range", math.nan),
        ("norm_eps", math.inf),
        ("rotary_base", 0),
        ("rotary_base", math.inf),
        ("shared_qk_scale", math.nan),
        ("shared_qk_scale", 1e300),
    ],
)
def test_numbers_of_a_configuration_are_finite(field: str, value: float) -> None:
    got = re.escape(f"got {value!r}")
    with pytest.raises(ValueError, match=rf"^ReformerConfig\.{field}: expected .*, {got}$"):
        tiny_config(**{field: value})
