"""Diagnostics against brute force over dense attention, and ``reformer inspect`` end to end."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ATTENTION_CASES, AttentionCase
from torch import Tensor

from reformer_ext import bucket_sort, lsh_hash, reference, sample_rotations
from reformer_ext import train as train_module
from reformer_ext.checkpoint import load_checkpoint, save_checkpoint
from reformer_ext.cli import main
from reformer_ext.data import load_corpus
from reformer_ext.diagnostics import (
    BucketOccupancy,
    CapturedMass,
    bucket_occupancy,
    captured_mass,
    inspect_model,
    round_collisions,
    spaced_queries,
)
from reformer_ext.generate import load_model
from reformer_ext.nn import Reformer, ReformerConfig, ReformerLM

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
                for r in range(shape[2]):
                    held = met[b, h, r, i, valid]
                    at = (b, h, r, i)
                    result["mass"][at] = weights[held].sum()
                    result["best"][at] = likeliest.values[: int(held.sum())].sum()
                    result["uniform"][at] = held.double().mean()
                    result["recall"][at] = held[likeliest.indices[:top_k]].double().mean()
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
