"""Diagnostics against brute force over dense attention, and ``reformer inspect`` end to end."""

from __future__ import annotations

import base64
import dataclasses
import math
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reformer_ext
from python_tests.cases import ATTENTION_CASES, AttentionCase, tiny_config
from reformer_ext import bucket_sort, lsh_hash, reference, sample_rotations
from reformer_ext import train as train_module
from reformer_ext.ablation import ablated_losses
from reformer_ext.checkpoint import load_checkpoint, save_checkpoint
from reformer_ext.cli import main
from reformer_ext.data import load_corpus
from reformer_ext.diagnostics import (
    CapturedMass,
    LSHLayerReport,
    bucket_occupancy,
    captured_mass,
    inspect_model,
    round_collisions,
    spaced_queries,
)
from reformer_ext.generate import load_model
from reformer_ext.nn import Reformer, ReformerEncoderDecoder, ReformerLM
from reformer_ext.report import distance_table, loss_table

# Without head dimensions, layouts and dropout, of which the candidates know nothing.
CASES = [
    case
    for case in ATTENTION_CASES
    if not case.id.startswith(("head_dim", "fast", "dropout", "length-997"))
]


def slot_counts(case: AttentionCase, tensors: dict[str, Tensor | None]) -> Tensor:
    """How often query and key meet in each round, ``(B, H, R, L, L)``."""
    return reference.slot_counts(
        case.length,
        tensors["order"],
        chunk_size=case.chunk_size,
        look_back=case.look_back,
        look_ahead=case.look_ahead,
        causal=case.causal,
        mask_self=case.shared if case.mask_self is None else case.mask_self,
        wrap=case.rounds > 0 if case.wrap is None else case.wrap,
        key_padding_mask=tensors["key_padding_mask"],
        buckets=tensors["buckets"],
        batch=case.batch,
        heads=case.heads,
        device=torch.device("cpu"),
    )


def brute_force_mass(
    case: AttentionCase, vectors: dict[str, Tensor], tensors: dict[str, Tensor | None], top_k: int
) -> dict[str, Tensor]:
    """Query by query, with loops, from a dense softmax."""
    q = vectors["q"]
    keys = torch.nn.functional.normalize(q, dim=-1) if case.shared else vectors["k"]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    logits = scale * (q @ keys.mT)
    met = slot_counts(case, tensors).cumsum(dim=2) > 0
    mask = tensors["key_padding_mask"]
    mask_self = case.shared if case.mask_self is None else case.mask_self
    shape = (case.batch, case.heads, met.shape[2], case.length)
    result = {
        name: torch.full(shape, math.nan, dtype=torch.float64)
        for name in ("mass", "best", "uniform", "recall")
    }
    bins = (case.length - 1).bit_length() + 1
    distances = torch.zeros(2, case.batch, case.heads, bins, dtype=torch.float64)
    counted = torch.zeros(case.batch, case.heads, 1)
    for b in range(case.batch):
        for h in range(case.heads):
            for i in range(case.length):
                valid = [
                    j
                    for j in range(case.length)
                    if not (case.causal and j > i)
                    and not (mask_self and j == i)
                    and not (mask is not None and mask[b, j])
                ]
                if not valid or (mask is not None and mask[b, i]):
                    continue
                weights = logits[b, h, i, valid].softmax(dim=0)
                likeliest = weights.sort(descending=True, stable=True)
                counted[b, h] += 1
                far = torch.tensor([abs(i - j).bit_length() for j in valid])
                distances[0, b, h].index_add_(0, far, weights)
                distances[1, b, h].index_add_(0, far, weights * met[b, h, -1, i, valid])
                for r in range(shape[2]):
                    held = met[b, h, r, i, valid]
                    at = (b, h, r, i)
                    result["mass"][at] = weights[held].sum()
                    result["best"][at] = likeliest.values[: int(held.sum())].sum()
                    result["uniform"][at] = held.double().mean()
                    result["recall"][at] = held[likeliest.indices[:top_k]].double().mean()
    result["at_distance"], result["met_at_distance"] = distances / counted
    return result


def measured_mass(
    case: AttentionCase,
    vectors: dict[str, Tensor],
    tensors: dict[str, Tensor | None],
    **options: Any,
) -> CapturedMass:
    return captured_mass(
        vectors["q"],
        tensors["order"],
        k=vectors.get("k"),
        chunk_size=case.chunk_size,
        look_back=case.look_back,
        look_ahead=case.look_ahead,
        causal=case.causal,
        mask_self=case.mask_self,
        wrap=case.wrap,
        scale=case.scale,
        key_padding_mask=tensors["key_padding_mask"],
        buckets=tensors["buckets"],
        **options,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_captured_mass_is_that_of_dense_attention(
    case: AttentionCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = case.vectors("cpu", torch.float64, requires_grad=False)
    tensors = case.indices("cpu")
    top_k = 5
    expected = brute_force_mass(case, vectors, tensors, top_k)
    queries = torch.arange(case.length)
    measured = measured_mass(case, vectors, tensors, queries=queries, top_k=top_k)
    # Equal logits: any of the likeliest may be the first five.
    names = set(expected) - ({"recall"} if case.values != "normal" or case.scale == 0.0 else set())
    for name in names:
        torch.testing.assert_close(
            getattr(measured, name),
            expected[name],
            atol=1e-12,
            rtol=0,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    # In blocks of a few queries, for some of them, in any order.
    monkeypatch.setattr("reformer_ext.diagnostics._BLOCK", 3000)
    queries = torch.randperm(case.length)[: max(1, case.length // 2)]
    some = measured_mass(case, vectors, tensors, queries=queries, top_k=top_k)
    torch.testing.assert_close(some.mass, measured.mass[..., queries], equal_nan=True)
    torch.testing.assert_close(some.best, measured.best[..., queries], equal_nan=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.rounds > 0], ids=str)
def test_round_collisions_are_those_of_the_slots(
    case: AttentionCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = case.indices("cpu")
    order = tensors["order"]
    assert order is not None
    counts = slot_counts(case, tensors)
    monkeypatch.setattr("reformer_ext.diagnostics._BLOCK", 5000)
    queries = torch.randperm(case.length)[: max(1, 2 * case.length // 3)]
    measured = round_collisions(
        order,
        chunk_size=case.chunk_size,
        look_back=case.look_back,
        look_ahead=case.look_ahead,
        causal=case.causal,
        mask_self=case.shared if case.mask_self is None else case.mask_self,
        wrap=case.wrap is not False,
        key_padding_mask=tensors["key_padding_mask"],
        buckets=tensors["buckets"],
        queries=queries,
    )
    counts = counts[..., queries, :]
    slots = counts.sum(dim=-1).cumsum(dim=2)
    distinct = (counts.cumsum(dim=2) > 0).sum(dim=-1)
    assert torch.equal(measured.slots, slots)
    assert torch.equal(measured.distinct, distinct)
    total = counts.sum(dim=2).flatten(2)
    rounds = order.shape[2]
    for n in range(1, rounds + 1):
        pairs = (total == n) if n < rounds else (total >= n)
        assert torch.equal(measured.multiplicity[..., n - 1], pairs.sum(dim=-1))
    assert torch.equal(measured.multiplicity.sum(dim=-1), distinct[:, :, -1].sum(dim=-1))
    torch.testing.assert_close(measured.new.sum(dim=-1), distinct[:, :, -1].double().mean(dim=-1))
    torch.testing.assert_close(
        (measured.new + measured.again).cumsum(dim=-1), slots.double().mean(dim=-1)
    )
    again = (slots - distinct)[:, :, -1].double().sum(dim=-1)
    repeated = again / slots[:, :, -1].sum(dim=-1)
    torch.testing.assert_close(measured.repeated, repeated, equal_nan=True)


def lsh_order(
    qk: Tensor, n_hashes: int, n_buckets: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rotations = sample_rotations(qk.shape[1], qk.shape[3], n_hashes, n_buckets)
    buckets = lsh_hash(qk, rotations.to(qk.dtype), n_buckets, mask)
    return buckets, bucket_sort(buckets, n_buckets + 1)


def test_mass_grows_with_the_rounds_and_beats_chance() -> None:
    qk = torch.randn(2, 3, 300, 16)
    _, order = lsh_order(qk, 6, 16)
    for causal in (False, True):
        measured = captured_mass(qk, order, chunk_size=16, causal=causal, scale=4.0, top_k=8)
        assert measured.mass.shape == (2, 3, 6, 256)
        for name in ("mass", "best", "uniform", "recall"):
            values = getattr(measured, name).nan_to_num(0.0)
            assert (values.diff(dim=2) >= -1e-12).all(), name
            assert values.min() >= 0.0
            assert values.max() <= 1.0 + 1e-12
        assert (measured.mass <= measured.best + 1e-12).logical_or(measured.mass.isnan()).all()
        # Peaked attention between like directions is what the hash finds.
        assert measured.mass[:, :, -1].nanmean() > 1.2 * measured.uniform[:, :, -1].nanmean()


@pytest.mark.parametrize("causal", [False, True])
def test_one_chunk_holds_everything(causal: bool) -> None:
    qk = torch.randn(2, 2, 50, 8)
    mask = torch.zeros(2, 50, dtype=torch.bool)
    mask[1, 30:] = True
    _, order = lsh_order(qk, 2, 4, mask)
    measured = captured_mass(qk, order, chunk_size=64, causal=causal, key_padding_mask=mask)
    nothing = mask[:, None, None].expand(2, 2, 2, 50).clone()
    nothing[..., 0] |= causal  # the first position sees nobody else
    for name in ("mass", "best", "uniform", "recall"):
        values = getattr(measured, name)
        assert torch.equal(values.isnan(), nothing), name
        torch.testing.assert_close(values[~nothing], torch.ones_like(values[~nothing]))
    repeats = round_collisions(order, chunk_size=64, causal=causal, key_padding_mask=mask)
    assert repeats.new[..., 1].max() == 0.0  # with nothing left for the second round


def test_alone_in_its_bucket_captures_nothing() -> None:
    qk = torch.randn(1, 1, 20, 8)
    buckets = torch.arange(20, dtype=torch.int32).view(1, 1, 1, 20)
    measured = captured_mass(qk, bucket_sort(buckets, 20), buckets=buckets)
    assert measured.mass.max() == measured.best.max() == measured.recall.max() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_float64_whatever_the_input(dtype: torch.dtype) -> None:
    qk = torch.randn(1, 2, 90, 8, dtype=dtype)
    _, order = lsh_order(qk, 2, 8)
    measured = captured_mass(qk, order, chunk_size=8)
    assert measured.mass.dtype == torch.float64
    assert torch.equal(measured.mass, captured_mass(qk.double(), order, chunk_size=8).mass)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    qk = torch.randn(2, 2, 333, 16)
    mask = torch.rand(2, 333) < 0.2
    buckets, order = lsh_order(qk, 3, 8, mask)
    window = {"chunk_size": 32, "causal": True, "key_padding_mask": mask, "buckets": buckets}
    on_cuda = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in window.items()}
    expected = captured_mass(qk, order, **window)
    measured = captured_mass(qk.cuda(), order.cuda(), **on_cuda)
    for name in ("mass", "best", "uniform", "recall"):
        torch.testing.assert_close(
            getattr(measured, name).cpu(), getattr(expected, name), equal_nan=True
        )
    collisions = round_collisions(order.cuda(), **on_cuda)
    assert torch.equal(collisions.distinct.cpu(), round_collisions(order, **window).distinct)
    counts = bucket_occupancy(buckets.cuda(), 8).counts
    assert torch.equal(counts.cpu(), bucket_occupancy(buckets, 8).counts)


def test_bucket_occupancy_counts() -> None:
    mask = torch.zeros(2, 97, dtype=torch.bool)
    mask[1, 90:] = True
    buckets, _ = lsh_order(torch.randn(2, 3, 97, 8), 4, 12, mask)
    occupancy = bucket_occupancy(buckets, (2, 6), chunk_size=8)
    expected = torch.stack([row.bincount(minlength=13)[:12] for row in buckets.reshape(-1, 97)])
    assert torch.equal(occupancy.counts, expected.view(2, 3, 4, 12))
    assert torch.equal(bucket_occupancy(buckets.short(), 12).counts, occupancy.counts)
    assert (occupancy.counts.sum(dim=-1) == torch.tensor([97, 90]).view(2, 1, 1)).all()

    rows = expected.double()
    shares = rows / rows.sum(dim=-1, keepdim=True)
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum(dim=-1) / math.log(12)
    for measured, value in (
        (occupancy.mean, rows.mean(dim=-1)),
        (occupancy.largest, expected.max(dim=-1).values),
        (occupancy.load, rows.max(dim=-1).values / 8),
        (occupancy.empty, (rows == 0).double().mean(dim=-1)),
        (occupancy.entropy, entropy),
        (occupancy.quantiles([0.5])[..., 0], rows.quantile(0.5, dim=-1)),
    ):
        torch.testing.assert_close(measured.flatten(), value)


def test_bucket_occupancy_extremes() -> None:
    even = bucket_occupancy(torch.arange(32).view(1, 1, 1, 32) % 8, 8, chunk_size=4)
    assert even.entropy.item() == pytest.approx(1.0)
    assert (even.empty.item(), even.load.item()) == (0.0, 1.0)
    one = bucket_occupancy(torch.zeros(1, 1, 1, 32, dtype=torch.int32), 8, chunk_size=4)
    assert (one.entropy.item(), one.empty.item(), one.load.item()) == (0.0, 7 / 8, 8.0)
    padding = bucket_occupancy(torch.full((1, 1, 1, 32), 8), 8)
    assert padding.entropy.isnan().all()
    assert padding.mean.item() == 0.0


def test_spaced_queries() -> None:
    assert spaced_queries(5).tolist() == [0, 1, 2, 3, 4]
    assert spaced_queries(100, 4).tolist() == [24, 49, 74, 99]
    assert spaced_queries(7, 3).tolist() == [1, 3, 6]


QK = torch.zeros(1, 2, 6, 4)
ORDER = torch.arange(6).expand(1, 2, 3, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: captured_mass(QK[0]), r"captured_mass: expected qk to be \[B, H, L, D\]"),
        (lambda: captured_mass(QK, k=QK[:, :1]), r"expected k to be \[1, 2, 6, 4\] as qk, got"),
        (lambda: captured_mass(QK, ORDER.float()), r"expected order to be integers \[B, H, R, L\]"),
        (lambda: captured_mass(QK, ORDER[..., 1:]), r"order to be \[1, 2, 3, 6\], got .* 5\]"),
        (lambda: captured_mass(QK, ORDER[:, :, :0]), r"order to be \[1, 2, 1, 6\], got .* 0, 6\]"),
        (lambda: captured_mass(QK, 0 * ORDER), r"order to be permutations of 0 \.\. 5"),
        (lambda: captured_mass(QK, ORDER, chunk_size=0), r"chunk_size to be at least 1, got 0"),
        (lambda: captured_mass(QK, ORDER, look_back=-1), r"look_back to be at least 0, got -1"),
        (lambda: captured_mass(QK, ORDER, top_k=0), r"top_k to be at least 1, got 0"),
        (
            lambda: captured_mass(QK, ORDER, key_padding_mask=torch.zeros(1, 6)),
            r"key_padding_mask to be bool \[1, 6\], got torch.float32 \[1, 6\]",
        ),
        (
            lambda: captured_mass(QK, ORDER, buckets=ORDER[:, :, :1]),
            r"buckets to be \[1, 2, 3, 6\], got \[1, 2, 1, 6\]",
        ),
        (
            lambda: captured_mass(QK, ORDER, queries=torch.tensor([6])),
            r"queries to be 0 \.\. 5, got 6 \.\. 6",
        ),
        (lambda: round_collisions(ORDER[0]), r"round_collisions: expected order to be \[B, H, R,"),
        (
            lambda: round_collisions(ORDER, queries=torch.zeros(0, dtype=torch.int64)),
            r"queries to be int64 \[S\], got torch.int64 \[0\]",
        ),
        (lambda: bucket_occupancy(ORDER, 4), r"bucket_occupancy: .* buckets to be 0 \.\. 4, got"),
        (lambda: bucket_occupancy(ORDER, 1), r"n_buckets to be at least 2 buckets, got 1"),
        (lambda: spaced_queries(0), r"spaced_queries: expected length and count >= 1, got 0"),
        (lambda: inspect_model(torch.nn.Linear(2, 2), QK), r"inspect_model: .* got Linear"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def small_model(**fields: Any) -> ReformerLM:
    config = {
        "layers": ("local", "lsh", "full", "lsh"),
        "max_length": 80,
        "chunk_size": 8,
        "local_chunk_size": 8,
        "n_hashes": 3,
        "initializer_range": 0.3,  # far from uniform attention
    }
    return ReformerLM(tiny_config(**{**config, **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": False, "positions": "axial", "n_buckets": (2, 6), "local_wrap": True},
        {"same_bucket": True, "shared_qk_scale": None, "rotary_before_hash": True},
    ],
    ids=["causal", "bidirectional-axial", "same-bucket"],
)
@pytest.mark.parametrize("padding", [False, True])
def test_inspect_model_looks_at_what_the_layers_attend_with(
    fields: dict[str, Any], padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(**fields).double()
    tokens = torch.randint(256, (2, 77))
    mask = None
    if padding:
        mask = torch.zeros(2, 77, dtype=torch.bool)
        mask[1, 60:] = True
    calls: list[tuple[AttentionCase, dict[str, Tensor], dict[str, Tensor | None], Any]] = []

    def record(real: Any) -> Any:
        def call(q: Tensor, *args: Any, **options: Any) -> Any:
            buckets = options.get("buckets")
            vectors = {"q": q} if buckets is not None else {"q": q, "k": args[0]}
            calls.append((case_of(q, **options), vectors, tensors_of(**options), buckets))
            return real(q, *args, **options)

        return call

    def case_of(q: Tensor, **options: Any) -> AttentionCase:
        names = ("chunk_size", "look_back", "look_ahead", "causal", "scale")
        return AttentionCase(
            "",
            *q.shape,
            rounds=options["buckets"].shape[2] if "buckets" in options else 0,
            shared="buckets" in options,
            wrap=options.get("wrap"),
            **{name: options[name] for name in names},
        )

    def tensors_of(**options: Any) -> dict[str, Tensor | None]:
        buckets = options.get("buckets")
        return {
            "order": None if buckets is None else buckets.argsort(dim=-1, stable=True),
            "buckets": buckets if options.get("same_bucket") else None,
            "key_padding_mask": options["key_padding_mask"],
        }

    with monkeypatch.context() as patch:
        for name in ("lsh_attention", "chunked_attention"):
            function = getattr(reformer_ext.ops, name)
            patch.setattr(reformer_ext.ops, name, record(function))
        reports = inspect_model(model, tokens, key_padding_mask=mask, n_queries=77, top_k=4)
    assert [(report.index, report.kind) for report in reports] == [
        *((0, "local"), (1, "lsh"), (2, "full"), (3, "lsh"))
    ]
    assert reports[2].mass is None
    attended = [report for report in reports if report.mass is not None]
    assert len(calls) == len(attended) == 3
    for report, (case, vectors, tensors, buckets) in zip(attended, calls, strict=True):
        expected = brute_force_mass(case, vectors, tensors, 4)
        for name, value in expected.items():
            torch.testing.assert_close(
                getattr(report.mass, name), value, atol=1e-10, rtol=0, equal_nan=True
            )
        if not isinstance(report, LSHLayerReport):
            continue
        assert report.mass.mass.shape == (2, 2, 3, 77)
        n_buckets = 12 if "n_buckets" in fields else 16
        assert torch.equal(report.occupancy.counts, bucket_occupancy(buckets, n_buckets).counts)
        assert report.occupancy.chunk_size == 8
        distinct = (slot_counts(case, tensors).cumsum(dim=2) > 0).sum(dim=-1)
        assert torch.equal(report.collisions.distinct, distinct)


def test_inspect_model_of_a_decoder() -> None:
    config = small_model(layers=("lsh", "local", "full")).config
    encoder = dataclasses.replace(config, layers=("lsh",), causal=False)
    model = ReformerEncoderDecoder(encoder, config, ("full", "lsh", "full")).double()
    source, tokens = torch.randint(256, (2, 50)), torch.randint(256, (2, 77))
    padding = torch.arange(50) >= torch.tensor([[50], [20]])
    context = model.eval().encode(source, source_padding_mask=padding)
    reports = inspect_model(
        model.decoder, tokens, context=context, context_padding_mask=padding, n_queries=20
    )
    assert [report.kind for report in reports] == ["lsh", "local", "full"]
    # The first layer sees the embeddings alone, as that of a model without cross-attention.
    alone = Reformer(config).double()
    weights = {
        name.replace(".f.attention.", ".f.", 1): weight
        for name, weight in model.decoder.state_dict().items()
        if ".f.cross." not in name
    }
    alone.load_state_dict(weights)
    expected = inspect_model(alone, tokens, n_queries=20)
    torch.testing.assert_close(reports[0].mass.mass, expected[0].mass.mass, equal_nan=True)
    assert not torch.allclose(reports[1].mass.mass, expected[1].mass.mass, equal_nan=True)
    assert len(inspect_model(model.encoder, source)) == 1
    for other, options in (
        (model.decoder, {}),
        (model.decoder, {"context_padding_mask": padding}),
        (model.encoder, {"context": context}),
        (model.encoder, {"context_padding_mask": padding}),
    ):
        with pytest.raises(ValueError, match="inspect_model: expected context to be given for the"):
            inspect_model(other, tokens, **options)


def test_inspect_model_leaves_no_trace() -> None:
    model = small_model(dropout=0.1, attention_dropout=0.1).train()
    model.reformer.norm.eval()
    modes = [module.training for module in model.modules()]
    tokens = torch.randint(256, (1, 64))
    state, step = torch.get_rng_state(), model.reformer.hash_step.clone()
    reports = inspect_model(model, tokens, n_hashes=5, n_queries=10)
    assert isinstance(reports[1], LSHLayerReport)
    assert reports[1].mass.mass.shape == (1, 2, 5, 10)
    with pytest.raises(ValueError, match="expected tokens"):
        inspect_model(model.reformer, tokens[0])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.reformer.hash_step, step)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    # The same numbers in either mode, for the model within and for its embeddings.
    for other in (
        inspect_model(model.eval(), tokens, n_hashes=5, n_queries=10),
        inspect_model(
            model.reformer, model.reformer.embedding(tokens).detach(), n_hashes=5, n_queries=10
        ),
    ):
        assert isinstance(other[3], LSHLayerReport)
        assert torch.equal(other[3].mass.mass, reports[3].mass.mass)


# The command line.

TINY = [
    *("--device=cpu", "--batch=2", "--context=64", "--dim=32", "--heads=2", "--layers=local,lsh"),
    *("--chunk-size=8", "--local-chunk-size=16", "--n-hashes=3", "--warmup=2", "--steps=4"),
]


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "numbers <1>.txt"
    file.write_text("".join(f"{n} squared is {n * n}\n" for n in range(700)))
    return file


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, alone in its folder."""
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "_SAMPLE_BYTES", 1)
        assert run("train", corpus, "--out", out, *TINY) == 0
    return (out / "checkpoint.pt").rename(out.parent / "checkpoint.pt")


class Page(HTMLParser):
    """Tables, pictures and text of a page whose tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "script", "iframe")
        values = dict(attrs)
        assert "href" not in values
        if tag == "img":
            self.pictures.append(values["src"] or "")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def check_png(picture: bytes, least_height: int) -> None:
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 1000
    assert height > least_height
    assert picture.endswith(b"IEND\xaeB`\x82")


def test_inspect_writes_a_page(
    corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device=cpu", "--sequences=2", "--queries=20", "--top-k=4"]
    assert run("inspect", "--checkpoint", trained, *options) == 0
    printed = capsys.readouterr().out
    out = trained.parent / "inspect.html"
    assert f"report: {out}\n" in printed
    page = Page(out.read_text(encoding="utf-8"))
    assert f"held-out bytes of {corpus}: 2 x 64 of" in page.text

    # The numbers, from the same windows of the held-out bytes.
    held_out = load_corpus([corpus]).held_out
    starts = [0, (len(held_out) - 64) // 2]
    tokens = torch.stack([held_out[start : start + 64] for start in starts]).long()
    model = load_model(trained, torch.device("cpu"))
    local, lsh = inspect_model(model, tokens, n_queries=20, top_k=4)
    assert isinstance(lsh, LSHLayerReport)
    assert local.mass is not None
    layers, losses, distances, heads = page.tables
    assert layers[0][:5] == ["layer", "kind", "mass", "best", "random"]
    assert layers[1][:3] == ["0", "local", f"{local.mass.mass.nanmean():.3f}"]
    assert layers[1][-1] == "-"
    repeated = lsh.collisions.repeated.mean()
    occupancy = lsh.occupancy
    assert layers[2] == [
        *("1", "lsh"),
        *(
            f"{getattr(lsh.mass, name)[:, :, 2].nanmean():.3f}"
            for name in ("mass", "best", "uniform", "recall")
        ),
        f"{repeated:.3f}",
        f"{occupancy.load.max():.2f}",
        *(f"{occupancy.empty.mean():.3f}", f"{occupancy.entropy.mean():.3f}"),
    ]
    assert [row[:4] for row in heads] == [
        ["head", "mass, R=1", "mass, R=2", "mass, R=3"],
        *(
            [str(h), *(f"{lsh.mass.mass[:, h, r].nanmean():.3f}" for r in range(3))]
            for h in range(2)
        ),
    ]
    text = held_out[: len(held_out) // 64 * 64]
    starts = [n * (len(held_out) - 65) // (len(text) // 64) for n in range(len(text) // 64)]
    windows = torch.stack([held_out[start : start + 65] for start in starts]).long()
    bits = ablated_losses(model, windows, batch=99)
    assert losses[0] == ["bits per byte", "all", "1-64"]
    assert [row[0] for row in losses[1:]] == ["as trained", "lsh as local", "lsh zeroed"]
    assert [row[1:] for row in losses[1:]] == [[f"{x.mean():.3f}"] * 2 for x in bits.values()]
    assert distances[0] == ["layer", "mass by distance", "0", "1-3", "4-15", "16-63"]
    for row, name in zip(distances[1:], ("at_distance", "met_at_distance"), strict=True):
        shares = getattr(lsh.mass, name).mean(dim=(0, 1))
        pairs = [shares[0], *(shares[n : n + 2].sum() for n in (1, 3, 5))]
        assert row[2:] == [f"{share:.3f}" for share in pairs]
    for row in (*layers, *losses, *distances):  # and in the terminal
        assert any(" ".join(row) == " ".join(line.split()) for line in printed.splitlines())
    (picture,) = page.pictures
    head, _, data = picture.partition("base64,")
    assert head == "data:image/png;"
    check_png(base64.b64decode(data, validate=True), 300)


def test_tables_of_long_sequences() -> None:
    bits = torch.arange(5000.0, dtype=torch.float64).expand(3, -1)
    heading, row = loss_table({"zero": bits})
    assert heading == [
        *("bits per byte", "all", "1-64", "65-256", "257-1,024", "1,025-4,096", "4,097-5,000"),
        "last 2,000",
    ]
    means = (2499.5, 31.5, 159.5, 639.5, 2559.5, 4547.5, 3999.5)
    assert row == ["lsh zeroed", *(f"{mean:.3f}" for mean in means)]
    assert len(loss_table({"zero": bits[:, :2000]})[0]) == 6
    assert len(loss_table({"zero": bits[:, :1]})[0]) == 3
    assert distance_table([]) == []


@pytest.mark.parametrize("options", [["--length=1"], ["--loss-bytes=0"], ["--loss-bytes=1"]])
def test_inspect_at_its_smallest(
    options: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    options = ["--device=cpu", "--sequences=1", "--queries=3", "--out", str(out), *options]
    assert run("inspect", "--checkpoint", trained, *options) == 0
    assert ("lsh zeroed" in capsys.readouterr().out) is ("--loss-bytes=0" not in options)


def test_inspect_draws_other_data(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "report.png"
    options = ["--device=cpu", "--length=100", "--n-hashes=5", "--queries=9", "--out", picture]
    assert run("inspect", "--checkpoint", trained, "--data", corpus, corpus, *options) == 0
    printed = capsys.readouterr().out
    assert "5 hash rounds, chunks of 8" in printed
    assert f"81 x 100 of {corpus.stat().st_size + 1:,} bytes" in printed  # the file once
    assert "  4: " in printed
    assert "  5: " in printed
    check_png(picture.read_bytes(), 300)
    assert [path.name for path in picture.parent.iterdir()] == ["report.png"]


def test_inspect_without_matplotlib(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["inspect", "--checkpoint", trained, "--device=cpu", "--queries=9", "--out"]
    assert run(*command, tmp_path / "report.html") == 0
    assert "without pictures: matplotlib is absent" in capsys.readouterr().out
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.pictures == []
    assert "Without pictures: matplotlib is absent" in page.text
    assert len(page.tables) == 4
    assert run(*command, tmp_path / "report.png") == 1
    assert "needs matplotlib, which is absent" in capsys.readouterr().err
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out=report.pdf"], "expected --out to end in .html or .png, got report.pdf"),
        (["--length=0"], "expected --length to be at least 1, got 0"),
        (["--loss-bytes=-1"], "expected --loss-bytes to be at least 0, got -1"),
        (["--top-k=0"], "expected --top-k to be at least 1, got 0"),
        (["--length=5000"], "expected at least --length = 5,000 bytes, got "),
        (["--data", "none"], "corpus: none is neither a file nor a folder"),
        (["--data", __file__, "--length=9999999"], "name more files or lower --length"),
    ],
)
def test_inspect_refuses(
    options: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(trained.parent.iterdir())
    assert run("inspect", "--checkpoint", trained, "--device=cpu", *options) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("reformer: ")
    assert message in printed.err
    assert sorted(trained.parent.iterdir()) == before


def test_inspect_refuses_checkpoints(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pt"
    assert run("inspect", "--checkpoint", path, "--device=cpu") == 1
    assert "checkpoint.pt does not exist" in capsys.readouterr().err
    content = trained.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert run("inspect", "--checkpoint", path, "--device=cpu") == 1
    assert "is truncated or no checkpoint of reformer_ext" in capsys.readouterr().err

    model = small_model(layers=("local", "full"))
    config = dataclasses.asdict(model.config)
    save_checkpoint(path, {"config": config, "model": model.state_dict()})
    assert run("inspect", "--checkpoint", path, "--device=cpu") == 1
    assert "a model with lsh layers, got layers local,full" in capsys.readouterr().err

    state = {**load_checkpoint(trained), "paths": [str(tmp_path / "moved")]}
    save_checkpoint(path, state)
    assert run("inspect", "--checkpoint", path, "--device=cpu") == 1
    assert "(these are the files of the training; --data names" in capsys.readouterr().err


def test_inspect_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "usage: reformer inspect" in printed
    assert "(default: the bytes held out in training)" in printed
