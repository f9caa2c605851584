"""Every operator against the float64 reference: values, gradients, registration, determinism, CUDA.

The error rule is flash-attention's: an operator may be at most twice as far from the float64 result
as the readable reference is when it runs in the tested dtype, plus the dtype's own rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from conftest import CUDA_DTYPES, device_dtypes, everywhere, gpu
from torch import Tensor

import reformer_ext
from benchmarks import measure
from python_tests.cases import (
    ATTENTION_CASES,
    HASH_CASES,
    MERGE_CASES,
    NEXT_VALUES_CASES,
    SORT_CASES,
    AttentionCase,
    HashCase,
    MergeCase,
    SortCase,
)
from reformer_ext import reference
from reformer_ext.nn import RotaryPositions

ops = torch.ops.reformer
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}


def attention_case(name: str) -> AttentionCase:
    return next(case for case in ATTENTION_CASES if case.id == name)


def assert_accurate(
    name: str, got: Tensor, twin: Tensor, oracle: Tensor, rounding: float, more: float = 0.0
) -> None:
    """``got`` is as near to ``oracle`` as allowed; ``twin`` is the reference in the dtype.
    ``rounding`` is relative to the largest value, ``more`` absolute."""
    assert got.shape == oracle.shape, f"{name}: {tuple(got.shape)} != {tuple(oracle.shape)}"
    got, twin, oracle = got.detach().double(), twin.detach().double(), oracle.detach()
    exact = oracle.isinf() | (oracle == reference.SELF_ONLY_LSE)
    assert torch.equal(got[exact], oracle[exact]), f"{name}: wrong where there is no other key"
    got, twin, oracle = got[~exact], twin[~exact], oracle[~exact]
    if oracle.numel() == 0:
        return
    error, allowed = (got - oracle).abs().max().item(), (twin - oracle).abs().max().item()
    allowed = 2.0 * allowed + rounding * max(1.0, oracle.abs().max().item()) + more
    rms = ((got - oracle).square().mean() / oracle.square().mean().clamp(min=1e-30)).sqrt().item()
    assert error <= allowed, (
        f"{name}: max abs error {error:.3e}, allowed {allowed:.3e}; relative RMS {rms:.3e}"
    )


def differentiate(
    function: Callable[..., Sequence[Tensor]],
    inputs: dict[str, Tensor],
    cotangents: Sequence[Tensor],
) -> dict[str, Tensor]:
    """``out``, ``lse`` or whatever comes second, a third output if there is one, and the gradient
    of every input by name, through all outputs."""
    outputs = function(**inputs)
    grads = torch.autograd.grad(
        [output for output in outputs if output.requires_grad],
        list(inputs.values()),
        [c.to(o.dtype) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad],
    )
    named = {f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {**dict(zip(("out", "lse", "third"), outputs, strict=False)), **named}


def upcast(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


def attention_cotangents(
    case: AttentionCase, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (case.batch, case.heads, case.length)
    generator = torch.Generator().manual_seed(11)
    out = torch.randn(*shape, case.head_dim, generator=generator)
    lse = torch.randn(*shape, generator=generator)
    return out.to(device, dtype), lse.to(device)


def attend(
    implementation: object, case: AttentionCase, indices: dict[str, Tensor | None]
) -> Callable:
    def function(
        q: Tensor, v: Tensor, k: Tensor | None = None, **more: Tensor
    ) -> tuple[Tensor, Tensor]:
        return implementation.chunked_attention(  # type: ignore[attr-defined]
            q, k, v, **indices, **case.options, **more
        )

    return function


def differentiate_twin(
    case: AttentionCase,
    inputs: dict[str, Tensor],
    indices: dict[str, Tensor | None],
    cotangents: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """The reference in the inputs' dtype; logits and weights, so ``out`` and ``lse``, in float32 at
    least, as the operator has them."""
    twin = differentiate(attend(reference, case, indices), inputs, cotangents)
    if any(value.isnan().any() for value in twin.values()):  # float16 overflows there
        wider = {name: x.detach().bfloat16().requires_grad_() for name, x in inputs.items()}
        twin = differentiate(attend(reference, case, indices), wider, cotangents)
    if inputs["q"].dtype in (torch.float16, torch.bfloat16):
        wider = {name: x.detach().float() for name, x in inputs.items()}
        twin["out"], twin["lse"] = attend(reference, case, indices)(**wider)
    return twin


# chunked_attention: values and gradients ----------------------------------------------------------


@pytest.mark.parametrize(("device", "dtype", "case"), everywhere(ATTENTION_CASES))
def test_chunked_attention(case: AttentionCase, device: str, dtype: torch.dtype) -> None:
    inputs, indices = case.vectors(device, dtype), case.indices(device)
    cotangents = attention_cotangents(case, device, dtype)
    got = differentiate(attend(reformer_ext, case, indices), inputs, cotangents)
    twin = differentiate_twin(case, inputs, indices, cotangents)
    oracle = differentiate(attend(reference, case, indices), upcast(inputs), cotangents)
    assert got["out"].dtype == dtype
    assert got["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    failures = []
    for name, expected in oracle.items():
        try:
            assert_accurate(name, got[name], twin[name], expected, ROUNDING[dtype])
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("name", ["default", "transposed", "transposed-separate", "fast-129x4"])
def test_outputs_and_gradients_keep_the_layout_of_q(name: str, device: str) -> None:
    case = attention_case(name)
    inputs = case.vectors(device, torch.float32)
    out, lse = attend(reformer_ext, case, case.indices(device))(**inputs)
    assert out.stride() == inputs["q"].stride()
    assert lse.is_contiguous()
    for grad in torch.autograd.grad(out.sum(), list(inputs.values())):
        assert grad.stride() == inputs["q"].stride()


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("name", ["padding-head", "padding-head-separate", "dropout", "fast-129x4"])
@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradients_through_one_output_to_one_input(name: str, through: str, device: str) -> None:
    case = attention_case(name)
    inputs, indices = case.vectors(device, torch.float32), case.indices(device)
    cotangents = dict(
        zip(("out", "lse"), attention_cotangents(case, device, torch.float32), strict=True)
    )
    for other in set(cotangents) - {through}:
        cotangents[other] = torch.zeros_like(cotangents[other])
    expected = differentiate(
        attend(reference, case, indices), upcast(inputs), [*cotangents.values()]
    )
    for name, x in inputs.items():
        if through == "lse" and name == "v":
            continue
        frozen = {other: y.detach() for other, y in inputs.items() if other != name}
        outputs = attend(reformer_ext, case, indices)(**frozen, **{name: x})
        output = outputs[0] if through == "out" else outputs[1]
        (grad,) = torch.autograd.grad(output, x, cotangents[through])
        want = expected[f"grad_{name}"]
        assert_accurate(f"grad_{name}", grad, want, want, 2e-5)


@pytest.mark.parametrize(
    "name",
    [
        "local",
        "default",
        "padding-head-separate",
        "alone-in-bucket",
        "duplicates-dropout",
        "dropout-local",
    ],
)
def test_gradcheck(name: str) -> None:
    case = attention_case(name)
    small = AttentionCase(
        **{**vars(case), "batch": 1, "heads": 1, "length": 13, "head_dim": 3, "chunk_size": 4}
    )
    inputs, indices = small.vectors("cpu", torch.float64), small.indices("cpu")
    function = attend(reformer_ext, small, indices)

    def finite(*vectors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = function(**dict(zip(inputs, vectors, strict=True)))
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(finite, tuple(inputs.values()))


def test_second_derivatives_raise() -> None:
    case = attention_case("local")
    inputs = case.vectors("cpu", torch.float64)
    out, _ = attend(reformer_ext, case, case.indices("cpu"))(**inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        torch.autograd.grad(grad.sum(), inputs["q"])


@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
@pytest.mark.parametrize("name", ["default", "duplicates-dropout", "padding-local", "fast-128x8"])
def test_same_bits_twice(name: str, device: str, dtype: torch.dtype) -> None:
    """Also by another number of threads."""
    case = attention_case(name)
    inputs, indices = case.vectors(device, dtype), case.indices(device)
    cotangents = attention_cotangents(case, device, dtype)
    first = differentiate(attend(reformer_ext, case, indices), inputs, cotangents)
    torch.set_num_threads(3)
    try:
        second = differentiate(attend(reformer_ext, case, indices), inputs, cotangents)
    finally:
        torch.set_num_threads(1)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    with torch.inference_mode():
        out, lse = attend(reformer_ext, case, indices)(**{n: x.detach() for n, x in inputs.items()})
    assert torch.equal(out, first["out"]) and torch.equal(lse, first["lse"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_bits_by_any_number_of_threads(dtype: torch.dtype) -> None:
    """Blocks of one head that write the same rows, as neighbours or from another round, do so in
    turn."""
    case = AttentionCase("blocks", heads=1, length=2600, rounds=3, chunk_size=64, n_buckets=40)
    inputs, indices = case.vectors("cpu", dtype), case.indices("cpu")
    cotangents = attention_cotangents(case, "cpu", dtype)
    expected = differentiate(attend(reformer_ext, case, indices), inputs, cotangents)
    for threads in (2, 3, 5, 2, 3, 5):
        torch.set_num_threads(threads)
        try:
            got = differentiate(attend(reformer_ext, case, indices), inputs, cotangents)
        finally:
            torch.set_num_threads(1)
        for name, value in expected.items():
            assert torch.equal(value, got[name]), f"{name}, {threads} threads"


# chunked_attention: particular rules --------------------------------------------------------------


@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_alone_is_exactly_its_value(device: str, dtype: torch.dtype) -> None:
    """Whatever the dropout and however often it meets itself, where the peers' constants round."""
    case = attention_case("alone-dropout")
    inputs, indices = case.vectors(device, dtype), case.indices(device)
    buckets = torch.arange(case.length, dtype=torch.int32, device=device).expand_as(
        indices["order"]
    )
    indices["buckets"], indices["order"] = buckets.contiguous(), buckets.contiguous()
    out, lse = attend(reformer_ext, case, indices)(**inputs)
    assert torch.equal(out, inputs["v"])
    assert (lse == reference.SELF_ONLY_LSE).all()
    cotangent = torch.randn_like(out)
    grad_q, grad_v = torch.autograd.grad((out, lse), (inputs["q"], inputs["v"]), (cotangent, lse))
    assert torch.equal(grad_v, cotangent)
    assert not grad_q.any()


@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_nothing_to_attend_to_is_zero(shared: bool, device: str, dtype: torch.dtype) -> None:
    case = AttentionCase("nothing", length=40, shared=shared, padding="all")
    inputs = case.vectors(device, dtype)
    out, lse = attend(reformer_ext, case, case.indices(device))(**inputs)
    assert not out.any()
    assert (lse == -math.inf).all()
    cotangents = (torch.ones_like(out), torch.ones_like(lse))
    for grad in torch.autograd.grad((out, lse), list(inputs.values()), cotangents):
        assert not grad.any()


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 - 1, 2**40 + 7, 2**63 - 1])
def test_dropout_mask_is_the_references(seed: int, device: str) -> None:
    """With the identity as values, the output is the weights."""
    batch, heads, length, p = 2, 3, 64, 0.25
    q = torch.randn(batch, heads, length, length, device=device)
    v = torch.eye(length, device=device).expand_as(q).contiguous()
    out, _ = reformer_ext.chunked_attention(
        q, q, v, chunk_size=length, look_back=0, dropout_p=p, dropout_seed=seed
    )
    dense, _ = reformer_ext.chunked_attention(q, q, v, chunk_size=length, look_back=0)
    keep = reference.dropout_keep(
        seed, p, batch=batch, heads=heads, rounds=1, length=length, device=q.device
    )[:, :, 0]
    assert 0.7 < keep.double().mean() < 0.8
    torch.testing.assert_close(out, dense * keep / (1.0 - p), rtol=1e-4, atol=1e-6)
    assert torch.equal(out != 0, keep & (dense != 0))


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
def test_dropout_seed_default_follows_torch(device: str) -> None:
    q, v = torch.randn(2, 1, 1, 64, 16, device=device)
    outs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outs.append(reformer_ext.chunked_attention(q, None, v, chunk_size=16, dropout_p=0.5)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    seed_tensor = torch.tensor([9], device=device)
    by_tensor = reformer_ext.chunked_attention(
        q, None, v, chunk_size=16, dropout_p=0.5, dropout_seed=seed_tensor
    )
    by_int = reformer_ext.chunked_attention(
        q, None, v, chunk_size=16, dropout_p=0.5, dropout_seed=9
    )
    assert torch.equal(by_tensor[0], by_int[0])


@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
@pytest.mark.parametrize("name", ["default", "local", "fast-200x3", "duplicates-causal"])
@pytest.mark.parametrize("where", ["q", "v"])
def test_nan_stays_with_its_readers(name: str, where: str, device: str, dtype: torch.dtype) -> None:
    """Queries whose windows lack the row keep their bits; those that attend to it get NaN."""
    case = attention_case(name)
    inputs, indices = case.vectors(device, dtype, requires_grad=False), case.indices(device)
    row = 5
    windows = {
        "chunk_size": case.chunk_size,
        "look_back": case.look_back,
        "look_ahead": case.look_ahead,
        "wrap": case.rounds > 0,
        "batch": case.batch,
        "heads": case.heads,
        "device": torch.device(device),
    }
    valid = {"causal": case.causal, "mask_self": case.shared}
    near = reference.slot_counts(
        case.length,
        indices["order"],
        causal=False,
        mask_self=False,
        key_padding_mask=None,
        buckets=None,
        **windows,
    )
    read = reference.slot_counts(
        case.length,
        indices["order"],
        key_padding_mask=indices["key_padding_mask"],
        buckets=indices["buckets"],
        **valid,
        **windows,
    )
    clean, _ = attend(reformer_ext, case, indices)(**inputs)
    inputs[where][:, :, row] = math.nan
    out, _ = attend(reformer_ext, case, indices)(**inputs)
    far = near.sum(dim=2)[..., row] == 0
    readers = (
        read.sum(dim=2)[..., row] > 0 if where == "v" or case.shared else torch.zeros_like(far)
    )
    if where == "q":
        readers[:, :, row] = case.length > 1
        far[:, :, row] = False
        if not case.shared:
            far = torch.ones_like(far)
            far[:, :, row] = False
    assert far.any() and readers.any()
    assert out.isnan().any(dim=-1)[readers].all()
    assert torch.equal(out[far], clean[far])


INERT_CASES = [
    AttentionCase("inert", length=100, rounds=3, padding="scattered", causal=True),
    AttentionCase("inert-full", batch=2, length=65, padding="row"),
    AttentionCase("inert-bucket", length=65, padding="tail", same_bucket=True, dropout_p=0.2),
    AttentionCase("inert-separate", length=100, shared=False, padding="scattered", look_ahead=1),
    AttentionCase("inert-local", rounds=0, shared=False, padding="head", causal=True),
    *[
        AttentionCase(
            f"fast-inert-{size}{'-causal' if causal else ''}",
            length=330,
            head_dim=size,
            rounds=4,
            chunk_size=64,
            causal=causal,
            padding="scattered",
        )
        for size in (32, 64, 128)
        for causal in (True, False)
    ],
    *[
        AttentionCase(
            f"fast-inert-{name}",
            length=330,
            head_dim=64,
            rounds=4,
            chunk_size=64,
            n_buckets=10,
            padding="scattered",
            same_bucket=name == "bucket",
            dropout_p=0.1 if name == "dropout" else 0.0,
        )
        for name in ("bucket", "dropout")
    ],
    *[
        AttentionCase(
            f"fast-inert-local-{size}",
            rounds=0,
            shared=False,
            length=301,
            head_dim=size,
            chunk_size=128,
            causal=True,
            padding="scattered",
        )
        for size in (32, 64, 128)
    ],
]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("device", "dtype", "case"), everywhere(INERT_CASES))
def test_padding_is_inert(
    case: AttentionCase,
    bad: float,
    device: str,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
) -> None:
    """What is at padding, in vectors or in cotangents, changes nothing elsewhere: not a bit."""
    if device == "cuda" and dtype != torch.float32 and case.shared and case.id.startswith("fast"):
        reason = "the gradient of q multiplies 0 by what is at padding on tensor cores"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    inputs, indices = case.vectors(device, dtype), case.indices(device)
    mask = indices["key_padding_mask"]
    assert mask is not None and mask.any() and not mask.all()
    # Separate keys: masked positions are no keys, but still queries, whose outputs nobody reads.
    out, lse = attention_cotangents(case, device, dtype)
    rest = [out.masked_fill(mask[:, None, :, None], 0.0), lse.masked_fill(mask[:, None], 0.0)]
    at = mask[:, None, :, None]
    function = attend(reformer_ext, case, indices)
    zeros = {n: x.detach().masked_fill(at, 0.0).requires_grad_() for n, x in inputs.items()}
    dirty = {n: x.detach().masked_fill(at, bad).requires_grad_() for n, x in inputs.items()}
    expected = differentiate(function, zeros, rest)
    got = differentiate(function, dirty, rest)
    real = ~mask[:, None].expand(lse.shape)
    for name, value in got.items():
        assert torch.equal(value[real], expected[name][real]), name
        if name.startswith("grad"):
            assert not value.isnan().any(), name
    if case.shared:  # not even a cotangent
        spoilt = [rest[0].masked_fill(at, bad), rest[1]]
        for name, value in differentiate(function, dirty, spoilt).items():
            assert torch.equal(value[real], expected[name][real]), name


@pytest.mark.parametrize(
    ("shared", "size"), [(True, 1e4), (True, 1e8), (True, 1e19), (True, 1e37), (False, 1e4)]
)
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.bfloat16), gpu("cuda", torch.float32)],
)
def test_large_logits(shared: bool, size: float, device: str, dtype: torch.dtype) -> None:
    """No weight is beyond 1 and nothing overflows on the way: gradients stay what they may be."""
    if device == "cuda" and size > 1e8:
        pytest.skip("squares of norms overflow there")
    case = AttentionCase("large", length=100, shared=shared, rounds=2, causal=True)
    inputs, indices = case.vectors(device, dtype), case.indices(device)
    inputs = {
        name: (x if name == "v" else size * x).detach().requires_grad_()
        for name, x in inputs.items()
    }
    cotangents = attention_cotangents(case, device, dtype)
    got = differentiate(attend(reformer_ext, case, indices), inputs, cotangents)
    oracle = differentiate(attend(reference, case, indices), upcast(inputs), cotangents)
    for name, value in got.items():
        assert value.isfinite().all(), name
    queries = 2 * 2 * case.chunk_size * case.rounds  # that meet a key, at most
    assert got["grad_v"].abs().max() <= queries * cotangents[0].abs().max()
    if shared and size <= 1e4 and dtype == torch.float32:
        torch.testing.assert_close(got["out"].double(), oracle["out"], rtol=0.02, atol=0.02)
        torch.testing.assert_close(got["grad_v"].double(), oracle["grad_v"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_a_zero_query_keeps_gradients_finite(device: str, dtype: torch.dtype) -> None:
    q, v = torch.randn(2, 1, 2, 40, 16, device=device, dtype=dtype)
    q[:, :, 3] = 0.0
    q, v = q.requires_grad_(), v.requires_grad_()
    out, lse = reformer_ext.chunked_attention(q, None, v, chunk_size=16)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, v))
    others = torch.arange(40, device=device) != 3
    assert out.isfinite().all() and lse.isfinite().all()
    assert grads[0][:, :, others].isfinite().all() and grads[1].isfinite().all()
    assert not grads[0].isnan().any()


# Own values, next values --------------------------------------------------------------------------

OWN_VALUES_CASES = [
    case
    for case in ATTENTION_CASES
    if case.id
    in {
        "default",
        "local-shared",
        "shared-mask_self",
        "shared-causal-mask_self-wrap",
        "separate-causal-mask_self",
        "length-1",
        "length-65",
        "alone-in-bucket",
        "alone-dropout",
        "alone-separate",
        "padding-row",
        "padding-head",
        "duplicates-causal",
        "head_dim-20",
        "head_dim-256",
        "transposed",
        "expanded",
        "batch-0",
        "fast-200x3",
        "fast-head_dim-128-padding",
        "fast-bucket-32",
        "fast-bucket-dropout-64",
        "fast-local-wrap-mask_self",
    }
]


@pytest.mark.parametrize("given", ["own_values", "value_mix"])
@pytest.mark.parametrize(("device", "dtype", "case"), everywhere(OWN_VALUES_CASES))
def test_own_and_next_values(
    case: AttentionCase, given: str, device: str, dtype: torch.dtype
) -> None:
    inputs, indices = case.vectors(device, dtype), case.indices(device)
    if given == "own_values":
        inputs["own_values"] = case.vectors(device, dtype, seed=1)["v"]
    else:
        mixed, _ = next_values_inputs(case, device, dtype)
        inputs["value_mix"] = mixed["value_mix"]
    cotangents = attention_cotangents(case, device, dtype)
    got = differentiate(attend(reformer_ext, case, indices), inputs, cotangents)
    twin = differentiate(attend(reference, case, indices), inputs, cotangents)
    oracle = differentiate(attend(reference, case, indices), upcast(inputs), cotangents)
    for name, expected in oracle.items():
        assert_accurate(name, got[name], twin[name], expected, ROUNDING[dtype])


@pytest.mark.parametrize(("device", "dtype", "case"), everywhere(OWN_VALUES_CASES))
def test_value_mix_is_next_values_with_own_values(
    case: AttentionCase, device: str, dtype: torch.dtype
) -> None:
    """One operator or two: the same bits forward, gradients of v but for the last rounding."""
    inputs, indices = case.vectors(device, dtype), case.indices(device)
    mixed, mask = next_values_inputs(case, device, dtype)
    inputs["value_mix"] = mixed["value_mix"]
    cotangents = attention_cotangents(case, device, dtype)
    function = attend(reformer_ext, case, indices)

    def two(v: Tensor, value_mix: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
        w = reformer_ext.next_values(v, value_mix, mask, causal=case.causal)
        return function(v=w, own_values=v, **others)

    got = differentiate(function, inputs, cotangents)
    expected = differentiate(two, inputs, cotangents)
    for name, value in got.items():
        if name == "grad_v":
            torch.testing.assert_close(value, expected[name])
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "case", [case for case in ATTENTION_CASES if case.causal and case.masks_self], ids=str
)
def test_next_values_show_nothing_of_the_future(case: AttentionCase) -> None:
    """The gradient of output i by the values after i is exactly zero, and so is their influence."""
    inputs, indices = case.vectors("cpu", torch.float64), case.indices("cpu")
    (mix, v), mask = (
        (torch.rand(2, case.heads).double(), inputs.pop("v")),
        indices["key_padding_mask"],
    )
    attention = attend(reformer_ext, case, indices)

    def output(v: Tensor, fused: bool) -> Tensor:
        if fused:
            return attention(**inputs, v=v, value_mix=mix)[0]
        w = reformer_ext.next_values(v, mix, mask)
        return attention(**inputs, v=w, own_values=v)[0]

    borders = [at for chunk in range(0, case.length, 64) for at in (chunk - 1, chunk)]
    some = {0, 1, 2, case.length // 3, case.length // 2, case.length - 2, *borders}
    for fused in (True, False):
        out = output(v, fused)
        for i in sorted(i for i in some if 0 <= i < case.length):
            (grad,) = torch.autograd.grad(out[:, :, i].sum(), v, retain_graph=True)
            assert not grad[:, :, i + 1 :].any(), i
            noise = torch.cat([v[:, :, : i + 1], torch.randn_like(v[:, :, i + 1 :])], dim=2)
            assert torch.equal(output(noise, fused)[:, :, : i + 1], out[:, :, : i + 1]), i


def test_next_values_through_lsh_attention() -> None:
    case = AttentionCase("lsh", length=150, head_dim=16, heads=2)
    q, v = case.vectors("cpu", torch.float64).values()
    mix = torch.rand(2, 2).double().requires_grad_()
    options = {"n_hashes": 3, "chunk_size": 16, "n_buckets": 8, "causal": True}
    _, buckets = reformer_ext.lsh_attention(q, v, **options, return_buckets=True)
    fused = reformer_ext.lsh_attention(q, v, buckets=buckets, value_mix=mix, **options)
    w = reformer_ext.next_values(v, mix)
    out = reformer_ext.lsh_attention(q, w, buckets=buckets, own_values=v, **options)
    assert torch.equal(out, fused) and torch.equal(out[:, :, 0], v[:, :, 0])
    cotangent = torch.randn_like(out)
    for one, two in zip(
        torch.autograd.grad(fused, (q, v, mix), cotangent),
        torch.autograd.grad(out, (q, v, mix), cotangent, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    for i in (0, 1, 15, 16, 77, 148):
        (grad,) = torch.autograd.grad(out[:, :, i].sum(), v, retain_graph=True)
        assert grad.any() and not grad[:, :, i + 1 :].any()


@pytest.mark.parametrize("given", ["own_values", "value_mix"])
@pytest.mark.parametrize("name", ["default", "padding-head", "alone-in-bucket"])
def test_gradcheck_own_and_next_values(name: str, given: str) -> None:
    case = attention_case(name)
    small = AttentionCase(
        **{**vars(case), "batch": 1, "heads": 2, "length": 13, "head_dim": 3, "chunk_size": 4}
    )
    inputs, indices = small.vectors("cpu", torch.float64), small.indices("cpu")
    if given == "own_values":
        inputs["own_values"] = small.vectors("cpu", torch.float64, seed=1)["v"]
    else:
        inputs["value_mix"] = next_values_inputs(small, "cpu", torch.float64)[0]["value_mix"]
    function = attend(reformer_ext, small, indices)

    def finite(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = function(**dict(zip(inputs, tensors, strict=True)))
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(finite, tuple(inputs.values()))


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("given", ["own_values", "value_mix"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["default", "transposed", "padding-row", "batch-0"])
def test_opcheck_own_and_next_values(
    name: str, requires_grad: bool, given: str, device: str
) -> None:
    case = attention_case(name)
    vectors = case.vectors(device, torch.float32, requires_grad=requires_grad)
    options = {**case.options, **case.indices(device)}
    order = options.pop("order")
    if given == "own_values":
        options[given] = torch.randn_like(vectors["v"]).requires_grad_(requires_grad)
    else:
        mix, _ = next_values_inputs(case, device, torch.float32)
        options[given] = mix["value_mix"].detach().requires_grad_(requires_grad)
    args = (vectors["q"], None, vectors["v"], order)
    torch.library.opcheck(ops.chunked_attention.default, args, options)


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
def test_own_and_next_values_under_autocast(device: str) -> None:
    qk, v, own = torch.randn(3, 1, 2, 40, 16, device=device)
    mix = torch.rand(2, 2, device=device)
    options = {"chunk_size": 16, "causal": True}
    half = {"own_values": own.bfloat16()}
    for more, expected in [({"own_values": own}, half), ({"value_mix": mix}, {"value_mix": mix})]:
        with torch.autocast(device, torch.bfloat16):
            out, _ = reformer_ext.chunked_attention(qk, None, v, **options, **more)
        assert out.dtype == torch.bfloat16
        args = (qk.bfloat16(), None, v.bfloat16())
        assert torch.equal(out, reformer_ext.chunked_attention(*args, **options, **expected)[0])


def test_own_and_next_values_errors() -> None:
    qk, k, v = torch.randn(3, 1, 2, 40, 16)
    mix = torch.rand(2, 2)
    for arguments, options, message in [
        (
            (qk, k, v),
            {"own_values": v},
            "expected own_values only with mask_self, under which a query may meet only itself, "
            "got mask_self false",
        ),
        (
            (qk, None, v),
            {"own_values": v, "mask_self": False},
            "expected own_values only with mask_self, under which a query may meet only itself, "
            "got mask_self false",
        ),
        (
            (qk, k, v),
            {"value_mix": mix, "causal": True},
            "expected value_mix only with mask_self, under which no query attends to itself, "
            "got mask_self false",
        ),
        (
            (qk, None, v),
            {"value_mix": mix, "own_values": v, "causal": True},
            "expected value_mix without own_values, which are then v, got both",
        ),
        (
            (qk, None, v),
            {"own_values": v[:, :1]},
            "expected own_values of shape [1, 2, 40, 16] like q, got [1, 1, 40, 16]",
        ),
        (
            (qk, None, v),
            {"own_values": v.double()},
            "expected own_values of dtype Float, got Double",
        ),
    ]:
        with pytest.raises(RuntimeError) as raised:
            reformer_ext.chunked_attention(*arguments, **options)
        assert str(raised.value).splitlines()[0] == f"chunked_attention: {message}"
    with pytest.raises(RuntimeError, match=r"next_values: expected value_mix of shape \[3, 2\]"):
        reformer_ext.chunked_attention(qk, None, v, value_mix=mix)


@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_an_lse_that_is_the_mark_by_chance(device: str, dtype: torch.dtype) -> None:
    """One key, at a logit of exactly -1e5: an attention like any other, with its gradients."""
    q, k = torch.full((1, 1, 2, 8), -100.0), torch.full((1, 1, 2, 8), 125.0)
    v = torch.randn(1, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.to(device, dtype).requires_grad_() for x in (q, k, v))
    options = {"chunk_size": 2, "causal": True, "mask_self": True, "scale": 1.0}
    out, lse = reformer_ext.chunked_attention(q, k, v, **options)
    assert lse[0, 0, 0] == -1e5 and lse[0, 0, 1] != -1e5
    assert abs(lse[0, 0, 1].item() + 1e5) < 0.01
    torch.testing.assert_close(out[:, :, 1], v[:, :, 0])  # in float32 CUDA's may round
    (grad_v,) = torch.autograd.grad(out, v, torch.ones_like(out))
    torch.testing.assert_close(grad_v[:, :, 0], torch.full_like(v[:, :, 0], 2.0), rtol=0.02, atol=0)
    assert not grad_v[:, :, 1].any()


# lsh_hash, bucket_sort, merge_attention, lsh_attention --------------------------------------------


@pytest.mark.parametrize(("device", "dtype", "case"), everywhere(HASH_CASES))
def test_lsh_hash(case: HashCase, device: str, dtype: torch.dtype) -> None:
    """The reference's buckets, but where the two best projections of a factor nearly tie."""
    x, rotations, factors, mask = case.inputs(device, dtype)
    got = reformer_ext.lsh_hash(x, rotations, case.n_buckets, mask)
    assert got.dtype == torch.int32
    assert got.shape == (case.batch, case.heads, case.rounds, case.length)
    expected = reference.lsh_hash(x.double(), rotations.double(), factors, mask)
    projections = torch.einsum(
        "bhld,hdrc->bhrlc",
        x.double(),
        rotations.double().expand(case.heads, -1, -1, -1),
    )
    near_tie = torch.zeros_like(got, dtype=torch.bool)
    for columns in projections.split([factor // 2 for factor in factors], dim=-1):
        best = torch.cat([columns, -columns], dim=-1).topk(2, dim=-1).values
        near_tie |= best[..., 0] - best[..., 1] <= 1e-5 * best[..., 0]
    assert ((got >= 0) & (got <= case.total)).all()
    if mask is not None:
        padding = mask[:, None, None, :].expand_as(got)
        assert torch.equal(got == case.total, padding)
    assert torch.equal(got[~near_tie], expected[~near_tie])
    if case.values == "zeros":  # a tie of opposite signs may go either way
        assert ((got == 0) | (got == case.total // 2)).all() and len(factors) == 1
    else:
        assert near_tie.sum() <= 0.01 * near_tie.numel() + case.length * (case.values == "equal")


@pytest.mark.gpu
def test_lsh_hash_of_few_positions_is_one_launch() -> None:
    x = torch.randn(1, 16, 1, 64, device="cuda", dtype=torch.bfloat16)
    rotations = torch.randn(16, 64, 8, 48, device="cuda", dtype=torch.bfloat16)

    def call() -> Tensor:
        return reformer_ext.lsh_hash(x, rotations, [32, 32, 32])

    call()
    launched = measure.kernels(call, "cuda")
    ours = [kernel["calls"] for name, kernel in launched.items() if "reformer::" in name]
    assert ours == [1], launched


@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_lsh_hash_breaks_ties_to_the_lowest_bucket(device: str, dtype: torch.dtype) -> None:
    x = torch.ones(1, 1, 70, 16, device=device, dtype=dtype)
    rotations = torch.ones(1, 16, 2, 8, device=device, dtype=dtype)
    assert not reformer_ext.lsh_hash(x, rotations, 16).any()
    assert (reformer_ext.lsh_hash(-x, rotations, 16) == 8).all()


@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_lsh_hash_of_nan_is_a_bucket(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 70, 16, device=device, dtype=dtype)
    rotations = torch.randn(1, 16, 3, 8, device=device, dtype=dtype)
    clean = reformer_ext.lsh_hash(x, rotations, [8, 8])
    x[:, :, 7] = math.nan
    x[:, :, 9] = math.inf
    got = reformer_ext.lsh_hash(x, rotations, [8, 8])
    assert ((got >= 0) & (got < 64)).all()
    others = torch.ones(70, dtype=torch.bool, device=device)
    others[[7, 9]] = False
    assert torch.equal(got[..., others], clean[..., others])


@pytest.mark.parametrize("case", SORT_CASES, ids=str)
@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
def test_bucket_sort(case: SortCase, device: str) -> None:
    buckets, n_buckets = case.inputs(device)
    order = reformer_ext.bucket_sort(buckets, n_buckets)
    assert order.dtype == torch.int32
    assert torch.equal(order, buckets.argsort(dim=-1, stable=True).to(torch.int32))


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
def test_bucket_sort_of_a_view(device: str) -> None:
    buckets = torch.randint(9, (2, 65, 4, 3), dtype=torch.int32, device=device).transpose(1, 3)
    order = reformer_ext.bucket_sort(buckets, 9)
    assert torch.equal(order, buckets.argsort(dim=-1, stable=True).to(torch.int32))


@pytest.mark.gpu
def test_bucket_sort_clamps_on_cuda() -> None:
    buckets = torch.randint(-50, 50, (1, 2, 2, 3000), dtype=torch.int32, device="cuda")
    order = reformer_ext.bucket_sort(buckets, 16)
    expected = buckets.clamp(0, 15).argsort(dim=-1, stable=True)
    assert torch.equal(order, expected.to(torch.int32))


@pytest.mark.parametrize("case", MERGE_CASES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_merge_attention(case: MergeCase, device: str, dtype: torch.dtype) -> None:
    outs, lses = case.inputs(device, dtype)
    inputs = {f"out{i}": out for i, out in enumerate(outs)}
    inputs |= {f"lse{i}": lse for i, lse in enumerate(lses)}
    shape = (case.batch, case.heads, case.length)
    cotangents = (
        torch.randn(*shape, case.head_dim, device=device, dtype=dtype),
        torch.randn(*shape, device=device),
    )

    def merge(implementation: object) -> Callable:
        def function(**parts: Tensor) -> tuple[Tensor, Tensor]:
            values = list(parts.values())
            return implementation.merge_attention(  # type: ignore[attr-defined]
                values[: case.parts], values[case.parts :]
            )

        return function

    got = differentiate(merge(reformer_ext), inputs, cotangents)
    twin = differentiate(merge(reference), inputs, cotangents)
    oracle = differentiate(merge(reference), upcast(inputs), cotangents)
    for name, expected in oracle.items():
        assert expected.isnan().sum() == 0
        assert_accurate(name, got[name], twin[name], expected, ROUNDING[dtype])


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("head_dim", [2, 24, 64])
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "batched"])
@pytest.mark.parametrize("layout", ["contiguous", "projected", "odd"])
@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_apply_rotary(
    layout: str, batched: bool, head_dim: int, length: int, device: str, dtype: torch.dtype
) -> None:
    x, cos, sin = rotary_inputs(layout, batched, head_dim, length, device, dtype)
    inputs = {"x": x.requires_grad_()}
    cotangents = (torch.randn_like(x), torch.randn(x.shape[:-1], device=device))

    def turn(implementation: object) -> Callable:
        def function(x: Tensor) -> tuple[Tensor, Tensor]:
            y = implementation.apply_rotary(x, cos, sin)  # type: ignore[attr-defined]
            return y, y.double().sum(-1)

        return function

    got = differentiate(turn(reformer_ext), inputs, cotangents)
    twin = differentiate(turn(reference), inputs, cotangents)
    oracle = differentiate(turn(reference), upcast(inputs), cotangents)
    for name, expected in oracle.items():
        assert_accurate(name, got[name], twin[name], expected, ROUNDING[dtype])


def rotary_inputs(
    layout: str, batched: bool, head_dim: int, length: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As the modules have them: x is a view of one projection into queries, keys and values."""
    positions = torch.randint(10**6, (2, 1, length) if batched else (length,), device=device)
    factors = RotaryPositions(head_dim).at(positions)
    excess = layout == "odd"
    x = torch.randn(2, length, 3, 4, head_dim + excess, device=device).to(dtype)[..., excess:]
    x = x.permute(2, 0, 3, 1, 4)
    return x[:2] if layout != "contiguous" else x[0].contiguous(), *factors


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "batched"])
@pytest.mark.parametrize("layout", ["contiguous", "projected"])
def test_opcheck_apply_rotary(layout: str, batched: bool, device: str) -> None:
    x, *factors = rotary_inputs(layout, batched, 16, 5, device, torch.float32)
    torch.library.opcheck(ops.apply_rotary.default, (x, *factors))
    torch.library.opcheck(ops.apply_rotary.default, (x.requires_grad_(), *factors))


def test_apply_rotary_twice_differentiable() -> None:
    x, *factors = rotary_inputs("projected", True, 4, 3, "cpu", torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reformer_ext.apply_rotary(x, *factors), x)
    assert torch.autograd.gradgradcheck(lambda x: reformer_ext.apply_rotary(x, *factors), x)


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("head_dim", [2, 24, 64])
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "batched"])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_split_and_merge_heads(
    parts: int, batched: bool, head_dim: int, length: int, device: str, dtype: torch.dtype
) -> None:
    heads, cos, sin = rotary_inputs("projected", batched, head_dim, length, device, dtype)
    rows = torch.randn(2, length, parts * 4 * head_dim, device=device).to(dtype)
    q, k, v = heads[0], heads[1] if parts == 3 else None, heads[1].flip(2)

    def split(implementation: object) -> Callable:
        return lambda x: tuple(implementation.split_heads(x, parts, cos, sin))  # type: ignore[attr-defined]

    def merge(implementation: object) -> Callable:
        return lambda q, v, k=None: (implementation.merge_heads(q, k, v, cos, sin),)  # type: ignore[attr-defined]

    tensors = {"q": q, "v": v} if k is None else {"q": q, "v": v, "k": k}
    for function, inputs in [(split, {"x": rows}), (merge, tensors)]:
        inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        cotangents = [torch.randn_like(y) for y in function(reformer_ext)(**inputs)]
        got = differentiate(function(reformer_ext), inputs, cotangents)
        twin = differentiate(function(reference), inputs, cotangents)
        oracle = differentiate(function(reference), upcast(inputs), cotangents)
        for name, expected in oracle.items():
            assert_accurate(name, got[name], twin[name], expected, ROUNDING[dtype])

    q, *k, v = reformer_ext.split_heads(rows, parts, cos, sin)
    assert all(x.transpose(1, 2).is_contiguous() for x in (q, *k, v))
    back = reformer_ext.merge_heads(q, k[0] if k else None, v, cos, -sin)
    torch.testing.assert_close(back, rows, rtol=2**-6, atol=2**-6)
    values = slice(-4 * head_dim, None)
    torch.testing.assert_close(back[..., values], rows[..., values], rtol=0, atol=0)


def test_split_heads_takes_any_strides() -> None:
    _, cos, sin = rotary_inputs("projected", False, 16, 7, "cpu", torch.float32)
    rows = torch.randn(2, 2 * 3 * 16, 7).transpose(1, 2)
    for got, expected in zip(
        reformer_ext.split_heads(rows, 2, cos, sin),
        reference.split_heads(rows, 2, cos, sin),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "batched"])
@pytest.mark.parametrize("parts", [2, 3])
def test_opcheck_split_and_merge_heads(parts: int, batched: bool, device: str) -> None:
    heads, *factors = rotary_inputs("projected", batched, 16, 5, device, torch.float32)
    x = torch.randn(2, 5, parts * 64, device=device, requires_grad=True)
    torch.library.opcheck(ops.split_heads.default, (x, parts, *factors))
    q, v = (part.detach().requires_grad_() for part in heads)
    k = None if parts == 2 else torch.randn_like(q, requires_grad=True)
    torch.library.opcheck(ops.merge_heads.default, (q, k, v, *factors))


@pytest.mark.parametrize("parts", [2, 3])
def test_split_heads_twice_differentiable(parts: int) -> None:
    _, *factors = rotary_inputs("projected", True, 4, 3, "cpu", torch.float64)
    x = torch.randn(2, 3, parts * 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reformer_ext.split_heads(x, parts, *factors), x)
    assert torch.autograd.gradgradcheck(lambda x: reformer_ext.split_heads(x, parts, *factors), x)


def test_split_and_merge_heads_errors() -> None:
    heads, cos, sin = rotary_inputs("projected", True, 4, 3, "cpu", torch.float32)
    x, (q, v) = torch.randn(2, 3, 32), heads
    for arguments, message in [
        ((x[0], 2, cos, sin), r"expected x of shape \[B, L, parts \* H \* D\].*\[3, 32\]"),
        ((x.int(), 2, cos, sin), "expected x of dtype.*Int"),
        ((x, 4, cos, sin), "expected parts of 2 or 3, got 4"),
        ((x, 3, cos, sin), r"multiple of parts \* D = 12, got \[2, 3, 32\]"),
        ((x, 2, cos[..., :3], sin), "expected cos with an even head dimension"),
        ((x, 2, cos[0], sin), r"expected cos of shape \[L, D\]"),
        ((x, 2, cos, sin[:1]), "expected sin of shape"),
        ((x, 2, cos, sin.double()), "expected sin of dtype"),
    ]:
        with pytest.raises(RuntimeError, match=f"split_heads: .*{message}"):
            reformer_ext.split_heads(*arguments)
    for arguments, message in [
        ((q[0], None, v, cos, sin), r"expected q of shape \[B, H, L, D\]"),
        ((q, None, v[:1], cos, sin), "expected v of shape"),
        ((q, v.double(), v, cos, sin), "expected k of dtype"),
        ((q, None, v, cos[:, :, :2], sin), "expected cos of shape"),
        ((q[..., :2], None, v[..., :2], cos, sin), "expected q with the head dimension 4 of cos"),
    ]:
        with pytest.raises(RuntimeError, match=f"merge_heads: .*{message}"):
            reformer_ext.merge_heads(*arguments)


def test_apply_rotary_errors() -> None:
    x, cos, sin = rotary_inputs("projected", True, 4, 3, "cpu", torch.float32)
    for arguments, message in [
        ((x[0, 0], cos, sin), r"expected x of shape \[B, H, L, D\]"),
        ((x[..., :3], cos, sin), "even head dimension"),
        ((x.int(), cos, sin), "expected x of dtype"),
        ((x, cos[:1], sin), "expected cos of shape"),
        ((x, cos, sin[0, 0, :2]), "expected sin of shape"),
        ((x, cos, sin.double()), "expected sin of dtype"),
    ]:
        with pytest.raises(RuntimeError, match=f"apply_rotary: .*{message}"):
            reformer_ext.apply_rotary(*arguments)


# next_values --------------------------------------------------------------------------------------


def next_values_inputs(
    case: AttentionCase, device: str, dtype: torch.dtype, mix_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """``v`` and ``value_mix``, leaves, and the mask. The mix of half-precision values is float32,
    as a module's parameter under autocast, unless its type is given."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(2 if case.causal else 3, case.heads, generator=generator)
    mix_dtype = mix_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    v = case.vectors(device, dtype)["v"]
    mask = case.indices(device)["key_padding_mask"]
    return {"v": v, "value_mix": mix.to(device, mix_dtype).requires_grad_()}, mask


@pytest.mark.parametrize(("device", "dtype", "case"), everywhere(NEXT_VALUES_CASES))
def test_next_values(case: AttentionCase, device: str, dtype: torch.dtype) -> None:
    inputs, mask = next_values_inputs(case, device, dtype)
    cotangents = attention_cotangents(case, device, dtype)[:1]

    def mix(implementation: object) -> Callable:
        def function(v: Tensor, value_mix: Tensor) -> tuple[Tensor]:
            return (implementation.next_values(v, value_mix, mask, causal=case.causal),)  # type: ignore[attr-defined]

        return function

    got = differentiate(mix(reformer_ext), inputs, cotangents)
    twin = differentiate(mix(reference), inputs, cotangents)
    oracle = differentiate(mix(reference), upcast(inputs), cotangents)
    assert got["out"].dtype == dtype and got["grad_value_mix"].dtype == inputs["value_mix"].dtype
    for name, expected in oracle.items():
        assert_accurate(name, got[name], twin[name], expected, ROUNDING[dtype])
    if case.batch > 0:  # once more, with as many threads as may be
        torch.set_num_threads(3)
        try:
            again = differentiate(mix(reformer_ext), inputs, cotangents)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
def test_next_values_are_what_they_say(device: str) -> None:
    """Sums of small integers, written out."""
    v = torch.arange(1.0, 6.0, device=device).view(1, 1, 5, 1).expand(1, 1, 5, 8).contiguous()
    mask = torch.tensor([[False, False, True, False, False]], device=device)
    mix = torch.tensor([[10.0], [100.0]], device=device)
    for given, expected in [
        (None, [210, 320, 430, 540, 550]),
        (mask, [210, 220, 0, 540, 550]),  # before padding, and at the end: itself
    ]:
        w = reformer_ext.next_values(v, mix, given)
        assert w[0, 0, :, 0].tolist() == expected and w.std(dim=-1).max() == 0.0
    mix = torch.tensor([[1.0], [10.0], [100.0]], device=device)
    w = reformer_ext.next_values(v, mix, mask, causal=False)
    assert w[0, 0, :, 0].tolist() == [211, 221, 0, 544, 554]


@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_padding_is_inert_in_next_values(
    bad: float, causal: bool, device: str, dtype: torch.dtype
) -> None:
    case = AttentionCase("inert", length=70, padding="scattered", causal=causal)
    inputs, mask = next_values_inputs(case, device, dtype)
    assert mask is not None
    (cotangent,) = attention_cotangents(case, device, dtype)[:1]

    def gradients(v: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        v = v.detach().requires_grad_()
        w = reformer_ext.next_values(v, inputs["value_mix"], mask, causal=causal)
        return w, *torch.autograd.grad(w, (v, inputs["value_mix"]), cotangent)

    at = mask[:, None, :, None]
    clean = gradients(inputs["v"], cotangent)
    dirty = gradients(inputs["v"].masked_fill(at, bad), cotangent.masked_fill(at, bad))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not clean[0].masked_select(at).any() and not clean[1].masked_select(at).any()


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
def test_next_values_keep_the_layout_of_v(device: str) -> None:
    """As a (B, L, H, D) projection, or a part of one: rows of a position side by side, dense."""
    projection = torch.randn(2, 9, 2, 3, 16, device=device)
    v = projection.permute(2, 0, 3, 1, 4)[1].requires_grad_()
    w = reformer_ext.next_values(v, torch.rand(2, 3, device=device))
    (grad,) = torch.autograd.grad(w.sum(), v)
    assert w.transpose(1, 2).is_contiguous() and grad.transpose(1, 2).is_contiguous()
    dense = reformer_ext.next_values(v.detach().contiguous(), torch.ones(2, 3, device=device))
    assert dense.is_contiguous()
    assert torch.equal(dense, reformer_ext.next_values(v, torch.ones(2, 3, device=device)))
    strided = projection.movedim(-1, 0).contiguous().movedim(0, -1).permute(2, 0, 3, 1, 4)[1]
    assert strided.stride(-1) != 1
    assert torch.equal(reformer_ext.next_values(strided, torch.ones(2, 3, device=device)), dense)


@pytest.mark.parametrize("name", ["length-3", "length-3-full", "padding-scattered", "sliced"])
def test_gradcheck_next_values(name: str) -> None:
    case = next(case for case in NEXT_VALUES_CASES if case.id == name)
    small = AttentionCase(**{**vars(case), "length": min(case.length, 9), "head_dim": 3})
    inputs, mask = next_values_inputs(small, "cpu", torch.float64)

    def function(v: Tensor, value_mix: Tensor) -> Tensor:
        return reformer_ext.next_values(v, value_mix, mask, causal=small.causal)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    (grad,) = torch.autograd.grad(function(**inputs).square().sum(), inputs["v"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .*next_values_backward.* is not impl"):
        torch.autograd.grad(grad.sum(), inputs["v"])


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("mix_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["default", "transposed", "sliced", "expanded", "padding-tail-full", "batch-0"]
)
def test_opcheck_next_values(name: str, mix_dtype: torch.dtype, device: str) -> None:
    case = next(case for case in NEXT_VALUES_CASES if case.id == name)
    inputs, mask = next_values_inputs(case, device, torch.bfloat16, mix_dtype)
    options = {"causal": case.causal}
    torch.library.opcheck(ops.next_values.default, (*inputs.values(), mask), options)
    detached = tuple(x.detach() for x in inputs.values())
    torch.library.opcheck(ops.next_values.default, (*detached, mask), options)
    args = (torch.ones_like(detached[0]), *detached, mask)
    torch.library.opcheck(ops.next_values_backward.default, args, options)


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
def test_next_values_under_autocast(device: str) -> None:
    v = torch.randn(1, 2, 9, 16, device=device, requires_grad=True)
    mix = torch.rand(2, 2, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        w = reformer_ext.next_values(v, mix)
    assert torch.equal(w, reformer_ext.next_values(v.bfloat16(), mix))
    w.float().sum().backward()
    assert v.grad is not None and v.grad.dtype == torch.float32
    assert mix.grad is not None and mix.grad.dtype == torch.float32


def test_next_values_errors() -> None:
    v, mix = torch.randn(2, 3, 5, 4), torch.randn(2, 3)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    for arguments, options, message in [
        ((v[0], mix), {}, r"expected v of shape [B, H, L, D], got [3, 5, 4]"),
        ((v.int(), mix), {}, "expected v of dtype float32, float16, bfloat16 or float64, got Int"),
        ((v, mix[0]), {}, "expected value_mix of shape [2 or 3, H], got [3]"),
        (
            (v, mix),
            {"causal": False},
            "expected value_mix of shape [3, 3] (previous, own and next, heads), as causal is "
            "false, got [2, 3]",
        ),
        (
            (v, torch.randn(3, 3)),
            {},
            "expected value_mix of shape [2, 3] (own and next, heads), as causal is true, "
            "got [3, 3]",
        ),
        (
            (v, mix.int()),
            {},
            "expected value_mix of dtype float32, float16, bfloat16 or float64, got Int",
        ),
        (
            (v, mix, mask[:, 1:]),
            {},
            "expected key_padding_mask of shape [2, 5] (batch, length), got [2, 4]",
        ),
        ((v, mix, mask.int()), {}, "expected key_padding_mask of dtype Bool, got Int"),
    ]:
        with pytest.raises(RuntimeError) as raised:
            reformer_ext.next_values(*arguments, **options)
        assert str(raised.value).splitlines()[0] == f"next_values: {message}"


@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
@pytest.mark.parametrize(
    "options",
    [
        {"n_hashes": 4, "causal": True},
        {"n_hashes": 2, "chunk_size": 16, "same_bucket": True, "correct_duplicates": True},
        {"n_hashes": 3, "chunk_size": 32, "n_buckets": [4, 6], "padded": True, "look_ahead": 1},
        {"n_hashes": 1, "chunk_size": 7, "separate": True, "dropout_p": 0.2, "dropout_seed": 3},
    ],
    ids=["causal", "same_bucket", "padded", "separate"],
)
def test_lsh_attention(options: dict[str, object], device: str, dtype: torch.dtype) -> None:
    """The public call is its three steps; given back its buckets it repeats itself to the bit."""
    options = dict(options)
    padded, separate = options.pop("padded", False), options.pop("separate", False)
    case = AttentionCase(
        "lsh", length=150, head_dim=32, shared=not separate, padding=padded and "tail"
    )
    inputs = {("qk" if n == "q" else n): x for n, x in case.vectors(device, dtype).items()}
    mask = case.indices(device)["key_padding_mask"] if padded else None
    generator = torch.Generator(device).manual_seed(1)
    out, lse, buckets = reformer_ext.lsh_attention(
        **inputs,
        **options,
        generator=generator,
        key_padding_mask=mask,
        return_lse=True,
        return_buckets=True,
    )
    chunk_size, rounds = options.pop("chunk_size", 64), options.pop("n_hashes")
    n_buckets = options.pop("n_buckets", reformer_ext.default_n_buckets(150, chunk_size))
    rotations = reformer_ext.sample_rotations(
        2, 32, rounds, n_buckets, generator=generator.manual_seed(1), device=device, dtype=dtype
    )
    assert torch.equal(buckets, reformer_ext.lsh_hash(inputs["qk"], rotations, n_buckets, mask))

    same_bucket = options.pop("same_bucket", False)

    def three_steps(qk: Tensor, v: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return reference.chunked_attention(
            qk,
            k,
            v,
            reference.bucket_sort(buckets, math.prod(n_buckets) + 1),
            buckets=buckets if same_bucket else None,
            key_padding_mask=mask,
            chunk_size=chunk_size,
            **options,
        )

    cotangents = (torch.randn_like(out), torch.randn_like(lse))
    repeat = differentiate(
        lambda **vectors: reformer_ext.lsh_attention(
            **vectors,
            buckets=buckets,
            n_buckets=n_buckets,
            chunk_size=chunk_size,
            same_bucket=same_bucket,
            key_padding_mask=mask,
            return_lse=True,
            **options,
        ),
        inputs,
        cotangents,
    )
    assert torch.equal(repeat["out"], out) and torch.equal(repeat["lse"], lse)
    grads = torch.autograd.grad((out, lse), list(inputs.values()), cotangents)
    oracle = differentiate(three_steps, upcast(inputs), cotangents)
    twin = differentiate(three_steps, inputs, cotangents)
    for name, grad in zip(inputs, grads, strict=True):
        assert torch.equal(grad, repeat[f"grad_{name}"])
    for name, expected in oracle.items():
        assert_accurate(name, repeat[name], twin[name], expected, ROUNDING[dtype])


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
def test_lsh_attention_takes_any_length(device: str) -> None:
    for length in [1, 2, 3, 5, 63, 64, 65, 129]:
        qk = torch.randn(1, 2, length, 16, device=device, requires_grad=True)
        v = torch.randn(1, 2, length, 16, device=device)
        out = reformer_ext.lsh_attention(qk, v, n_hashes=3, causal=True)
        assert torch.equal(out[:, :, 0], v[:, :, 0])  # the first token has only itself
        out.sum().backward()
        assert qk.grad is not None and qk.grad.isfinite().all()


def test_numbers_that_are_none() -> None:
    q, v = torch.randn(2, 1, 1, 40, 16)
    for options, message in [
        ({"scale": math.nan}, "expected a finite scale, got nan"),
        ({"scale": math.inf}, "expected a finite scale, got inf"),
        ({"scale": 1e300}, "expected a scale that is finite in float32, got 1e+300"),
        ({"scale": -1e39}, "expected a scale that is finite in float32, got -1e+39"),
        (
            {"dropout_p": 0.5, "dropout_seed": 1.5},
            "expected dropout_seed to be an int or an int64 tensor, got 1.5",
        ),
    ]:
        with pytest.raises(RuntimeError) as raised:
            reformer_ext.chunked_attention(q, None, v, **options)
        assert str(raised.value).splitlines()[0] == f"chunked_attention: {message}"
    out, _ = reformer_ext.chunked_attention(q.double(), None, v.double(), scale=1e39)
    assert out.isfinite().all()
    for sizes in [(math.nan, 64), (100.0, 64), (100, 0.5), (True, 64)]:
        with pytest.raises(ValueError, match="default_n_buckets: expected integers length and"):
            reformer_ext.default_n_buckets(*sizes)


def test_default_n_buckets() -> None:
    sizes = {1: [2], 127: [2], 128: [4], 4096: [8, 16], 65536: [32, 64], 262144: [16, 16, 32]}
    for length, expected in sizes.items():
        factors = reformer_ext.default_n_buckets(length)
        buckets = math.prod(factors)
        assert factors == expected
        assert buckets == 2 or buckets <= 2 * length / 64 < 2 * buckets
    assert reformer_ext.default_n_buckets(4096, 16) == reformer_ext.default_n_buckets(16384)


def test_sample_rotations() -> None:
    def draw(**options: object) -> Tensor:
        return reformer_ext.sample_rotations(
            2, 16, 3, [4, 6], generator=torch.Generator().manual_seed(4), **options
        )

    rotations = draw()
    assert rotations.shape == (2, 16, 3, 5) and rotations.dtype == torch.float32
    assert torch.equal(rotations, draw(dtype=torch.bfloat16).float())
    assert torch.equal(rotations, draw(dtype=torch.float64).float())
    many = reformer_ext.sample_rotations(8, 64, 8, 64)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1.0) < 0.01


# Registration -------------------------------------------------------------------------------------

OPCHECK_CASES = [
    "default",
    "local",
    "transposed",
    "transposed-separate",
    "sliced",
    "expanded",
    "padding-row",
    "dropout-local",
    "alone-in-bucket",
    "batch-0",
]


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck_chunked_attention(name: str, requires_grad: bool, device: str) -> None:
    case = attention_case(name)
    vectors = case.vectors(device, torch.float32, requires_grad=requires_grad)
    options = {**case.options, **case.indices(device)}
    order = options.pop("order")
    if case.dropout_p > 0.0:
        options["dropout_seed"] = torch.tensor([5], device=device)
    args = (vectors["q"], vectors.get("k"), vectors["v"], order)
    torch.library.opcheck(ops.chunked_attention.default, args, options)


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck_chunked_attention_backward(name: str, device: str) -> None:
    case = attention_case(name)
    vectors = case.vectors(device, torch.float32, requires_grad=False)
    options = {**case.options, **case.indices(device)}
    order = options.pop("order")
    if case.dropout_p > 0.0:
        options["dropout_seed"] = torch.tensor([5], device=device)
    inputs = (vectors["q"], vectors.get("k"), vectors["v"], order)
    out, lse = ops.chunked_attention(*inputs, **options)
    grad_out, grad_lse = attention_cotangents(case, device, torch.float32)
    for given in (grad_lse, None):
        args = (grad_out, given, *inputs, out, lse)
        torch.library.opcheck(ops.chunked_attention_backward.default, args, options)


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("given", ["rotations", "buckets"])
def test_opcheck_lsh_attention(given: str, requires_grad: bool, device: str) -> None:
    case = AttentionCase("lsh", length=100, padding="tail", layout="transposed", heads=3)
    vectors = case.vectors(device, torch.float32, requires_grad=requires_grad)
    rotations = reformer_ext.sample_rotations(3, 16, 2, [2, 4], device=device)
    buckets = torch.randint(8, (1, 3, 2, 100), dtype=torch.int32, device=device)
    torch.library.opcheck(
        ops.lsh_attention.default,
        (vectors["q"], vectors["v"], rotations if given == "rotations" else None, [2, 4]),
        {
            "buckets": buckets if given == "buckets" else None,
            "causal": True,
            "chunk_size": 32,
            "key_padding_mask": case.indices(device)["key_padding_mask"],
        },
    )


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("name", ["default", "factors", "padding", "transposed", "batch-0"])
def test_opcheck_lsh_hash(name: str, device: str) -> None:
    case = next(case for case in HASH_CASES if case.id == name)
    torch.library.opcheck(ops.lsh_hash.default, case.inputs(device, torch.float32))
    x, *rest = case.inputs(device, torch.float32)
    torch.library.opcheck(ops.lsh_hash.default, (x.requires_grad_(), *rest))


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("name", ["default", "batch-0", "many-buckets"])
def test_opcheck_bucket_sort(name: str, device: str) -> None:
    case = next(case for case in SORT_CASES if case.id == name)
    torch.library.opcheck(ops.bucket_sort.default, case.inputs(device))


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["default", "transposed", "empty-rows", "batch-0"])
def test_opcheck_merge_attention(name: str, requires_grad: bool, device: str) -> None:
    case = next(case for case in MERGE_CASES if case.id == name)
    inputs = case.inputs(device, torch.float32, requires_grad=requires_grad)
    torch.library.opcheck(ops.merge_attention.default, inputs)


# CUDA ---------------------------------------------------------------------------------------------


def cuda_step(
    qk: Tensor, v: Tensor, rotations: Tensor, cotangent: Tensor, **options: object
) -> tuple[Tensor, ...]:
    """One forward and backward of the public call."""
    out, lse = reformer_ext.lsh_attention(
        qk, v, rotations=rotations, n_buckets=[8, 8], causal=True, return_lse=True, **options
    )
    return (out, lse, *torch.autograd.grad(out, (qk, v), cotangent))


def cuda_inputs(device: str, dtype: torch.dtype, length: int = 1000) -> tuple[Tensor, ...]:
    case = AttentionCase("cuda", batch=2, heads=4, length=length, head_dim=64)
    vectors = case.vectors(device, dtype, seed=int(torch.initial_seed()))
    rotations = reformer_ext.sample_rotations(4, 64, 4, [8, 8], device=device, dtype=dtype)
    return vectors["q"], vectors["v"], rotations, torch.randn_like(vectors["q"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_cuda_graph(dtype: torch.dtype, dropout_p: float) -> None:
    """Captured once, replayed on new values (and a new dropout seed): what eager computes."""
    static = cuda_inputs("cuda", dtype)
    seed = torch.tensor([1], device="cuda")
    options = {"dropout_p": dropout_p, "dropout_seed": seed}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cuda_step(*static, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda_step(*static, **options)
    for number in (2, 3):
        torch.manual_seed(number)
        fresh = cuda_inputs("cuda", dtype)
        with torch.no_grad():
            for target, source in zip(
                (*static, seed), (*fresh, torch.tensor([number])), strict=True
            ):
                target.copy_(source)
        graph.replay()
        expected = cuda_step(*fresh, dropout_p=dropout_p, dropout_seed=number)
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream() -> None:
    """A long copy before and a wipe after, on a side stream, would show work enqueued elsewhere."""
    qk, v, rotations, cotangent = cuda_inputs("cuda", torch.bfloat16)
    expected = cuda_step(qk, v, rotations, cotangent)
    staged = [torch.zeros_like(x).requires_grad_(x.requires_grad) for x in (qk, v, rotations)]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(20_000_000)
        for target, source in zip(staged, (qk, v, rotations), strict=True):
            target.copy_(source)
    with torch.cuda.stream(stream):
        got = cuda_step(*staged, cotangent)
        with torch.no_grad():
            for target in staged:
                target.zero_()
    torch.cuda.synchronize()
    for value, want in zip(got, expected, strict=True):
        assert torch.equal(value, want)


@pytest.mark.gpu
def test_cuda_does_not_synchronise() -> None:
    inputs = cuda_inputs("cuda", torch.bfloat16)
    mask = torch.zeros(2, 1000, dtype=torch.bool, device="cuda")
    mask[:, 900:] = True
    seed = torch.tensor([3], device="cuda")
    options = [
        {},
        {"key_padding_mask": mask, "dropout_p": 0.1, "dropout_seed": seed},
        {"correct_duplicates": True, "same_bucket": True, "look_ahead": 1, "chunk_size": 16},
    ]
    for option in options:
        cuda_step(*inputs, **option)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for option in options:
            cuda_step(*inputs, **option)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["default", "local", "look-far", "fast-320x8", "duplicates"])
def test_cuda_survives_an_order_out_of_range(name: str) -> None:
    case = attention_case(name)
    inputs, indices = case.vectors("cuda", torch.bfloat16), case.indices("cuda")
    garbage = torch.tensor([-(2**31), -1, case.length, 2**31 - 1], dtype=torch.int32, device="cuda")
    for key in ("order", "buckets"):
        if indices[key] is not None:
            indices[key][..., 3:7] = garbage
    out, lse = attend(reformer_ext, case, indices)(**inputs)
    torch.autograd.grad((out, lse), list(inputs.values()), (out.detach(), lse.detach()))
    torch.cuda.synchronize()


@pytest.fixture
def workspace_limit() -> Iterator[Callable[[int], None]]:
    before = reformer_ext.workspace_limit()
    yield reformer_ext.set_workspace_limit
    reformer_ext.set_workspace_limit(before)


@pytest.mark.gpu
@pytest.mark.parametrize("mib", [None, 256])
def test_cuda_memory_is_bounded(mib: int | None, workspace_limit: Callable[[int], None]) -> None:
    """Beyond inputs, results and indices: the workspace, capped (at 1.25 GiB unless set) however
    many heads. Partial results of all would be 2 GiB forward and 4 GiB backward."""
    if mib is not None:
        workspace_limit(mib * 2**20)
    batch, heads, length, head_dim, rounds = 8, 16, 16384, 64, 8
    qk, v, cotangent = (
        torch.randn(batch, heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    rotations = reformer_ext.sample_rotations(
        heads, head_dim, rounds, [16, 32], device="cuda", dtype=torch.bfloat16
    )
    qk.requires_grad_()
    v.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = reformer_ext.lsh_attention(qk, v, rotations=rotations, n_buckets=[16, 32], causal=True)
    forward = torch.cuda.max_memory_allocated() - before
    torch.autograd.grad(out, (qk, v), cotangent)
    both = torch.cuda.max_memory_allocated() - before
    positions = batch * heads * length
    result, indices = 2 * positions * head_dim, 2 * 4 * rounds * positions
    cap = reformer_ext.workspace_limit()
    assert cap == (mib or 1280) * 2**20
    assert 2 * rounds * positions * head_dim > cap
    assert forward - indices - result < 1.05 * cap
    assert both - indices - 3 * result < 1.05 * cap


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # generic and wgmma kernels
def test_cuda_workspace_limit_changes_no_bit(
    dtype: torch.dtype, workspace_limit: Callable[[int], None]
) -> None:
    inputs = cuda_inputs("cuda", dtype)
    expected = cuda_step(*inputs)
    workspace_limit(0)  # one head after the other
    for got, want in zip(cuda_step(*inputs), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_cuda_device_guard() -> None:
    """Tensors on another device than the current one: the same bits."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a CUDA device beside the first")
    here = cuda_inputs("cuda:0", torch.bfloat16)
    # Through host memory: a copy between the devices would let a kernel on the wrong one read them.
    there = [x.detach().cpu().to("cuda:1").requires_grad_(x.requires_grad) for x in here]
    with torch.cuda.device(0):
        got, expected = cuda_step(*there), cuda_step(*here)
    for value, want in zip(got, expected, strict=True):
        assert value.device == torch.device("cuda:1")
        assert torch.equal(value.cpu(), want.cpu())
