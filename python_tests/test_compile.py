"""torch.compile, torch.export, AOTInductor and autocast over the public functions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import gpu
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import reformer_ext

DEVICES = ["cpu", gpu("cuda")]
HEADS, HEAD_DIM, ROUNDS, CHUNK, N_BUCKETS = 3, 16, 2, 16, [2, 4]
LENGTHS = (70, 101)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def randn(length: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A (B, L, H, D) projection, heads brought forward."""
    generator = torch.Generator().manual_seed(seed + length)
    x = torch.randn(2, length, HEADS, HEAD_DIM, generator=generator)
    return x.to(device, dtype).transpose(1, 2).requires_grad_()


def rotations(device: str) -> Tensor:
    return reformer_ext.sample_rotations(
        HEADS, HEAD_DIM, ROUNDS, N_BUCKETS, generator=torch.Generator().manual_seed(1)
    ).to(device)


def padding(length: int, device: str) -> Tensor:
    mask = torch.zeros(2, length, dtype=torch.bool, device=device)
    mask[1, length - 9 :] = True
    return mask


def lsh(length: int, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    rotation = rotations(device)

    def function(qk: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out, lse, _ = reformer_ext.lsh_attention(
            qk * 2.0,
            v.sin(),
            rotations=rotation,
            n_buckets=N_BUCKETS,
            chunk_size=CHUNK,
            causal=True,
            key_padding_mask=mask,
            return_lse=True,
            return_buckets=True,
        )
        return out.cos() + lse[..., None].clamp(min=-50.0)

    return function, [randn(length, device), randn(length, device, 1), padding(length, device)]


def chunked(length: int, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def function(q: Tensor, k: Tensor, v: Tensor, seed: Tensor) -> Tensor:
        out, lse = reformer_ext.chunked_attention(
            q * 2.0, k.cos(), v, chunk_size=CHUNK, look_ahead=1, dropout_p=0.2, dropout_seed=seed
        )
        return out.tanh() + lse[..., None]

    seed = torch.tensor([4], device=device)
    return function, [*(randn(length, device, i) for i in range(3)), seed]


def hashed(length: int, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    rotation = rotations(device)

    def function(x: Tensor) -> Tensor:
        buckets = reformer_ext.lsh_hash(x.sin(), rotation, N_BUCKETS)
        return x * reformer_ext.bucket_sort(buckets, 8).sum(dim=2)[..., None]

    return function, [randn(length, device)]


def merged(length: int, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def function(a: Tensor, b: Tensor) -> Tensor:
        out, lse = reformer_ext.merge_attention([a.sin(), b], [a.sum(-1), b.sum(-1)])
        return out * lse[..., None]

    return function, [randn(length, device), randn(length, device, 1)]


FUNCTIONS = {
    "lsh_attention": lsh,
    "chunked_attention": chunked,
    "hash_and_sort": hashed,
    "merge": merged,
}


def value_and_grads(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    value = function(*inputs)
    return [
        value,
        *torch.autograd.grad(value.square().sum(), [x for x in inputs if x.requires_grad]),
    ]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_once_for_every_length(name: str, device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled, compilations = None, []
    for length in LENGTHS:
        function, inputs = FUNCTIONS[name](length, device)
        if compiled is None:
            compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
        assert_same(value_and_grads(compiled, inputs), value_and_grads(function, inputs))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_inductor(device: str) -> None:
    """Generated code trusts the strides that the operators' Meta functions promise."""
    function, inputs = chunked(LENGTHS[0], device)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    assert_same(value_and_grads(compiled, inputs), value_and_grads(function, inputs))


@pytest.mark.gpu
def test_inductor_with_cuda_graphs() -> None:
    function, inputs = chunked(LENGTHS[0], "cuda")
    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = [value.clone() for value in value_and_grads(compiled, inputs)]
    assert_same(got, value_and_grads(function, inputs))


@pytest.mark.parametrize("dynamic", [None, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("device", DEVICES)
def test_defaults_compile(device: str, dynamic: bool | None) -> None:
    """Rotations, n_buckets and the dropout seed drawn inside the graph: as eager draws them."""

    def function(qk: Tensor, v: Tensor) -> Tensor:
        return reformer_ext.lsh_attention(qk, v, n_hashes=2, chunk_size=CHUNK, dropout_p=0.1)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    outs = []
    for seed in (1, 2):
        inputs = [randn(70, device), randn(70, device, 1)]
        torch.manual_seed(seed)
        got = value_and_grads(compiled, inputs)
        torch.manual_seed(seed)
        assert_same(got, value_and_grads(function, inputs))
        outs.append(got[0])
    assert not torch.allclose(*outs, atol=1e-2)


class Attention(torch.nn.Module):
    """What a user would export."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.register_buffer("rotations", rotations(device))

    def forward(self, qk: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return reformer_ext.lsh_attention(
            qk,
            v,
            rotations=self.rotations,
            n_buckets=N_BUCKETS,
            chunk_size=CHUNK,
            causal=True,
            key_padding_mask=mask,
        )


def exported(device: str) -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=2, max=1 << 20)
    inputs = (randn(70, device).detach(), randn(70, device, 1).detach(), padding(70, device))
    shapes = {"qk": {2: length}, "v": {2: length}, "mask": {1: length}}
    return torch.export.export(Attention(device), inputs, dynamic_shapes=shapes)


@pytest.mark.parametrize("device", DEVICES)
def test_export_with_a_dynamic_length(device: str) -> None:
    program = exported(device)
    assert any("reformer." in str(node.target) for node in program.graph.nodes)
    for length in LENGTHS:
        inputs = (randn(length, device), randn(length, device, 1), padding(length, device))
        assert torch.equal(program.module()(*inputs), Attention(device)(*inputs))


def test_aot_inductor(tmp_path: Path) -> None:
    assert shutil.which("g++") or shutil.which("c++"), "needs a C++ compiler, as the build does"
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # three times as fast to compile
    with torch.no_grad(), torch._inductor.config.patch(quick):
        package = torch._inductor.aoti_compile_and_package(
            exported("cpu"), package_path=str(tmp_path / "attention.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        inputs = (randn(101, "cpu"), randn(101, "cpu", 1), padding(101, "cpu"))
        torch.testing.assert_close(loaded(*inputs), Attention("cpu")(*inputs))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), gpu("cuda", torch.float16)])
def test_autocast(device: str, dtype: torch.dtype, compiled: bool) -> None:
    """Attention runs in the lower precision, the hash on what it was given; gradients come back in
    the inputs' dtype."""
    rotation = rotations(device)
    qk, v = randn(70, device), randn(70, device, 1)

    def attend(qk: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return reformer_ext.lsh_attention(
            qk,
            v,
            rotations=rotation,
            n_buckets=N_BUCKETS,
            chunk_size=CHUNK,
            return_lse=True,
            return_buckets=True,
        )

    function = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    with torch.autocast(device, dtype):
        out, lse, buckets = function(qk, v)
    assert (out.dtype, lse.dtype, buckets.dtype) == (dtype, torch.float32, torch.int32)
    low = [x.detach().to(dtype).requires_grad_() for x in (qk, v)]
    expected, expected_lse, _ = reformer_ext.lsh_attention(
        *low,
        buckets=buckets,
        n_buckets=N_BUCKETS,
        chunk_size=CHUNK,
        return_lse=True,
        return_buckets=True,
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, (qk, v), cotangent)
    for grad, want in zip(grads, torch.autograd.grad(expected, low, cotangent), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, want.float())


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), gpu("cuda", torch.bfloat16)]
)
def test_autocast_of_mixed_inputs(device: str, dtype: torch.dtype) -> None:
    """A float32 parameter beside bfloat16 activations, as autocast users have them."""
    q, k, v = randn(70, device), randn(70, device, 1, dtype), randn(70, device, 2, dtype)
    with torch.autocast(device, dtype):
        out, lse = reformer_ext.chunked_attention(q, k, v, chunk_size=CHUNK)
        merged_out, merged_lse = reformer_ext.merge_attention([out, out], [lse, lse])
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert merged_out.dtype == dtype and merged_lse.dtype == torch.float32
    with torch.autocast(device, enabled=False), pytest.raises(RuntimeError, match="expected k"):
        reformer_ext.chunked_attention(q, k, v, chunk_size=CHUNK)
