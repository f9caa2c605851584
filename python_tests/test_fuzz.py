"""Random shapes, flags and values against the float64 reference, gradients included.

200 cases of each device and dtype, the same every time; ``REFORMER_FUZZ=2000 pytest
python_tests/test_fuzz.py`` draws that many new ones. A failure is shrunk, and printed with a line
that repeats it.
"""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch
from conftest import device_dtypes
from test_ops import (
    assert_accurate,
    attend,
    attention_cotangents,
    differentiate,
    differentiate_twin,
    upcast,
)
from torch import Tensor

import reformer_ext
from python_tests.cases import AttentionCase
from reformer_ext import reference

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

from strategies import attention_cases  # noqa: E402 needs hypothesis

WANTED = os.environ.get("REFORMER_FUZZ")
FUZZ = settings(
    max_examples=int(WANTED or 200) // 2,  # of each of two tests
    derandomize=WANTED is None,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2.0**-7}
VALUES = ["normal", "normal", "large", "norms", "equal", "zeros", "denormal"]

wide = {
    "length": st.integers(1, 150),
    "chunk_size": st.integers(1, 70),
    "layout": st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    "values": st.sampled_from(VALUES),
    "scale": st.sampled_from([None, None, 0.0, 1.0, 1e-3]),
}
head_dims = {
    "cpu": st.one_of(st.integers(1, 32), st.sampled_from([64, 80])),
    "cuda": st.sampled_from([8, 16, 24, 32, 64, 80, 128]),
}


def repeats(call: str, case: AttentionCase, device: str, dtype: torch.dtype, *more: object) -> str:
    """The line that repeats a case."""
    default = AttentionCase("drawn")
    changed = ", ".join(
        f"{field.name}={getattr(case, field.name)!r}"
        for field in dataclasses.fields(case)
        if getattr(case, field.name) != getattr(default, field.name)
    )
    rest = "".join(f", {value!r}" for value in (device, *more))
    code = f"from test_fuzz import *; {call}(AttentionCase('drawn', {changed}), {dtype}{rest})"
    return f'PYTHONPATH=python_tests python -c "{code}"'


def usual_keys(
    case: AttentionCase, inputs: dict[str, Tensor], indices: dict[str, Tensor | None]
) -> int:
    """How many a query attends to: the median, without those that have none or only themselves."""
    uniform = dataclasses.replace(case, scale=0.0, dropout_p=0.0)
    _, lse = attend(reference, uniform, indices)(**upcast(inputs))
    lse = lse[lse > reference.SELF_ONLY_LSE]
    return round(lse.median().exp().item()) if lse.numel() else 0


def cancelling(
    name: str, case: AttentionCase, inputs: dict[str, Tensor], cotangents: tuple[Tensor, Tensor]
) -> float:
    """How large the terms are that cancel in the gradient of queries or keys: dP and delta, times
    the vectors on the other side (and, of normalised keys, by their own length)."""
    dout, _ = (x.double() for x in cotangents)
    dp = (dout @ inputs["v"].detach().double().transpose(-1, -2)).abs().max().item()
    lengths = inputs["q" if case.shared or name == "grad_k" else "k"].detach().double().norm(dim=-1)
    other = lengths.max().item()
    if case.shared:
        other = 1.0 + other / lengths.min().clamp(min=1e-3).item()
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return scale * dp / (1.0 - case.dropout_p) * other


def agree(
    case: AttentionCase,
    inputs: dict[str, Tensor],
    indices: dict[str, Tensor | None],
    cotangents: tuple[Tensor, Tensor],
    got: dict[str, Tensor],
) -> None:
    """``got`` is as near to float64 as the reference in its dtype, and rounding, allow.

    Weights know the logits to their rounding, and gradients recompute them from the rounded lse.
    With large vectors, and under dropout with equal ones or at most three keys a query, the
    gradients of queries and keys are small differences of large terms (dP and delta, which knows
    the rounded output): those alone may be off by the rounding of the terms.
    """
    twin = differentiate_twin(case, inputs, indices, cotangents)
    oracle = differentiate(attend(reference, case, indices), upcast(inputs), cotangents)
    rounding = ROUNDING[inputs["q"].dtype]
    lse = oracle["lse"].masked_fill(oracle["lse"] <= reference.SELF_ONLY_LSE, 0.0)
    of_weights = 4.0 * torch.finfo(got["lse"].dtype).eps * lse.abs().max().item()
    cancels = case.values in ("large", "norms") or (
        case.dropout_p > 0 and (case.values == "equal" or usual_keys(case, inputs, indices) <= 3)
    )
    for name, expected in oracle.items():
        terms = 0.0
        if cancels and name in ("grad_q", "grad_k"):
            terms = cancelling(name, case, inputs, cotangents)
            terms *= torch.finfo(inputs["q"].dtype).eps + of_weights
        relative = rounding + (0.0 if name == "lse" else of_weights)
        assert_accurate(name, got[name], twin[name], expected, relative, terms)


def check_chunked_attention(case: AttentionCase, dtype: torch.dtype, device: str) -> None:
    inputs, indices = case.vectors(device, dtype), case.indices(device)
    cotangents = attention_cotangents(case, device, dtype)
    got = differentiate(attend(reformer_ext, case, indices), inputs, cotangents)
    agree(case, inputs, indices, cotangents, got)


def check_lsh_attention(
    case: AttentionCase, dtype: torch.dtype, device: str, factors: list[int]
) -> None:
    """The buckets are the reference's, and the attention what the reference makes of them."""
    inputs, mask = case.vectors(device, dtype), case.indices(device)["key_padding_mask"]
    cotangents = attention_cotangents(case, device, dtype)
    generator = torch.Generator().manual_seed(3)
    rotations = reformer_ext.sample_rotations(
        case.heads, case.head_dim, case.rounds, factors, generator=generator
    ).to(device, dtype)
    buckets = None

    def hashed(q: Tensor, v: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        nonlocal buckets
        out, lse, buckets = reformer_ext.lsh_attention(
            q,
            v,
            k=k,
            rotations=rotations,
            n_buckets=factors,
            key_padding_mask=mask,
            same_bucket=case.same_bucket,
            return_lse=True,
            return_buckets=True,
            **case.options,
        )
        return out, lse

    got = differentiate(hashed, inputs, cotangents)
    expected = reference.lsh_hash(inputs["q"].double(), rotations.double(), factors, mask)
    if dtype == torch.float64 and case.values in ("normal", "large", "norms"):  # no ties
        assert torch.equal(buckets, expected)
    assert ((buckets >= 0) & (buckets <= math.prod(factors))).all()
    indices = {
        "order": reference.bucket_sort(buckets, 0),
        "buckets": buckets if case.same_bucket else None,
        "key_padding_mask": mask,
    }
    agree(case, inputs, indices, cotangents, got)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", ["normal", "large", "norms", "equal"])
@pytest.mark.parametrize("name", ["out", "lse", "grad_v"])
def test_what_is_a_little_wrong_does_not_agree(name: str, values: str, dtype: torch.dtype) -> None:
    case = AttentionCase("wrong", values=values, dropout_p=0.3)
    inputs, indices = case.vectors("cpu", dtype), case.indices("cpu")
    cotangents = attention_cotangents(case, "cpu", dtype)
    got = differentiate(attend(reformer_ext, case, indices), inputs, cotangents)
    agree(case, inputs, indices, cotangents, got)
    got[name] = 0.9 * got[name]
    with pytest.raises(AssertionError, match=f"^{name}: max abs error"):
        agree(case, inputs, indices, cotangents, got)


DEVICES = device_dtypes(
    cpu=(torch.float64, torch.float32, torch.bfloat16), cuda=(torch.float32, torch.bfloat16)
)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@FUZZ
@given(data=st.data())
def test_chunked_attention(device: str, dtype: torch.dtype, data: object) -> None:
    case = data.draw(attention_cases(**wide, head_dim=head_dims[device]))
    hypothesis.note(repeats("check_chunked_attention", case, device, dtype))
    check_chunked_attention(case, dtype, device)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@FUZZ
@given(data=st.data())
def test_lsh_attention(device: str, dtype: torch.dtype, data: object) -> None:
    case = data.draw(attention_cases(**wide, head_dim=head_dims[device], rounds=st.integers(1, 4)))
    factors = data.draw(st.lists(st.sampled_from([2, 4, 6, 16]), min_size=1, max_size=3))
    hypothesis.note(repeats("check_lsh_attention", case, device, dtype, factors))
    check_lsh_attention(case, dtype, device, factors)
