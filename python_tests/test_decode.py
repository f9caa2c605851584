"""Decoding: the operators against loops over lists, the cache against the full forward pass."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA_DTYPES, device_dtypes, gpu
from torch import Tensor

import reformer_ext
from python_tests.cases import tiny_config
from reformer_ext.nn import DecodingCache, ReformerLM
from reformer_ext.nn.attention.full import FullCache

ops = torch.ops.reformer
DEVICES = ["cpu", gpu("cuda")]
COMPOSITE = (
    torch._C.DispatchKey.CompositeExplicitAutograd
)  # the kernel of devices without their own


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    heads: int = 3
    head_dim: int = 16
    rounds: int = 2
    n_buckets: int = 5
    window: int = 4
    capacity: int = 60


class Cache:
    """The tensors of a cache, filled with garbage where nothing has been written."""

    def __init__(self, sizes: Sizes, device: str, dtype: torch.dtype) -> None:
        rows = (sizes.batch, sizes.heads, sizes.capacity, sizes.head_dim)
        buckets = (sizes.batch, sizes.heads, sizes.rounds, sizes.n_buckets)
        self.keys, self.values = (
            torch.full(rows, math.nan, device=device, dtype=dtype) for _ in range(2)
        )
        self.table = torch.full((*buckets, sizes.window), -7, device=device, dtype=torch.int32)
        self.counts = torch.zeros(buckets, device=device, dtype=torch.int32)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.table, self.counts


def rows(sizes: Sizes, n: int, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Unit-length k and any v ``(B, H, n, D)``, and buckets with some padding ``(B, H, R, n)``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.batch, n, sizes.heads, sizes.head_dim)
    k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    buckets = torch.randint(
        sizes.n_buckets + 1, (sizes.batch, sizes.heads, sizes.rounds, n), generator=generator
    )
    k, v = F.normalize(k, dim=-1).transpose(1, 2), v.transpose(1, 2)
    return k.to(device, dtype), v.to(device, dtype), buckets.to(device, torch.int32)


def append_everywhere(
    cache: Cache,
    composite: bool,
    *args: Tensor,
    normalize: bool = False,
    value_mix: Tensor | None = None,
    last_values: Tensor | None = None,
) -> None:
    """Through the device's own kernel, or the one composed of ATen operators."""
    options = {"normalize": normalize, "value_mix": value_mix, "last_values": last_values}
    if composite:
        append = ops.lsh_cache_append.default
        append._op_dk(COMPOSITE, *cache.tensors(), *args, **options)
    else:
        reformer_ext.lsh_cache_append(*cache.tensors(), *args, **options)


def decode(cache: Cache, composite: bool, q: Tensor, buckets: Tensor, **options: object):
    if not composite:
        return reformer_ext.lsh_decode(q, *cache.tensors(), buckets, **options)
    options = {
        "own_values": None,
        "scale": None,
        "correct_duplicates": False,
        "before": None,
    } | options
    return ops.lsh_decode.default._op_dk(COMPOSITE, q, *cache.tensors(), buckets, **options)


def expected_decode(
    history: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    sizes: Sizes,
    q: Tensor,
    buckets: Tensor,
    own_values: Tensor | None,
    scale: float | None,
    correct_duplicates: bool,
) -> tuple[Tensor, Tensor]:
    """By lists of positions, in float64."""
    keys = torch.cat([k for k, _, _, _ in history], dim=2).double()
    values = torch.cat([v for _, v, _, _ in history], dim=2).double()
    all_buckets = torch.cat([b for _, _, b, _ in history], dim=3).tolist()
    out, lse = torch.zeros_like(q, dtype=torch.float64), torch.zeros(q.shape[:3]).double()
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        found: list[int] = []
        for r in range(sizes.rounds):
            bucket = int(buckets[b, h, r, t])
            members = [i for i, other in enumerate(all_buckets[b][h][r]) if other == bucket]
            found += members[-sizes.window :] if bucket < sizes.n_buckets else []
        if correct_duplicates:
            found = sorted(set(found))
        if not found:
            out[b, h, t] = 0 if own_values is None else own_values[b, h, t].double()
            lse[b, h, t] = -math.inf if own_values is None else -1e5
            continue
        factor = sizes.head_dim**-0.5 if scale is None else scale
        logits = keys[b, h, found] @ q[b, h, t].double() * factor
        out[b, h, t] = logits.softmax(0) @ values[b, h, found]
        lse[b, h, t] = logits.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("composite", [False, True], ids=["kernel", "composite"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "zero"])
@pytest.mark.parametrize("correct", [True, False], ids=["once", "every"])
@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_decode_is_attention_to_the_last_of_each_bucket(
    device: str, dtype: torch.dtype, correct: bool, own: bool, composite: bool
) -> None:
    sizes = Sizes()
    cache = Cache(sizes, device, dtype)
    history = []
    lengths = torch.zeros(sizes.batch, dtype=torch.int64, device=device)
    for step, n in enumerate([1, 17, 1, 2, 9, 1, 1]):
        k, v, buckets = rows(sizes, n, device, dtype, step)
        if history:
            q, own_values, _ = rows(sizes, 3, device, dtype, 100 + step)
            _, _, wanted = rows(sizes, 3, device, dtype, 200 + step)
            options = {
                "own_values": own_values if own else None,
                "scale": 2.0 if step % 2 else None,
                "correct_duplicates": correct,
            }
            out, lse = decode(cache, composite, q, wanted, **options)
            expected = expected_decode(
                [tuple(x.cpu() for x in part) for part in history],
                sizes,
                q.cpu(),
                wanted.cpu(),
                own_values.cpu() if own else None,
                options["scale"],
                correct,
            )
            assert out.dtype == dtype and out.stride() == q.stride()
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
            torch.testing.assert_close(
                out.cpu().double(), expected[0], rtol=tolerance, atol=tolerance
            )
            torch.testing.assert_close(
                lse.cpu().double(), expected[1], rtol=min(tolerance, 1e-5), atol=1e-5
            )
        append_everywhere(cache, composite, k, v, buckets, lengths)
        history.append((k, v, buckets, lengths))
        lengths = lengths + n


@pytest.mark.parametrize("device", DEVICES)
def test_kernel_and_composite_leave_the_same_cache(device: str) -> None:
    """Sequences of different lengths, positions in one piece or one by one, over the capacity."""
    sizes = Sizes(capacity=30)
    k, v, buckets = rows(sizes, 40, device, torch.float32, 3)
    lengths = torch.tensor([0, 11], device=device)
    caches = []
    for composite in (False, True):
        for pieces in ([40], [1] * 40, [7, 1, 32]):
            cache, begin = Cache(sizes, device, torch.float32), 0
            for n in pieces:
                part = slice(begin, begin + n)
                append_everywhere(
                    cache,
                    composite,
                    k[:, :, part],
                    v[:, :, part],
                    buckets[..., part],
                    lengths + begin,
                )
                begin += n
            caches.append(cache)
    for cache in caches[1:]:
        for got, want in zip(cache.tensors(), caches[0].tensors(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(caches[0].keys[0], k[0, :, :30])
    assert torch.equal(caches[0].keys[1, :, 11:], k[1, :, :19])
    assert caches[0].keys[1, :, :11].isnan().all()


@pytest.mark.parametrize("composite", [False, True], ids=["kernel", "composite"])
@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_keys_are_normalized_if_asked(device: str, dtype: torch.dtype, composite: bool) -> None:
    sizes = Sizes()
    k, v, buckets = rows(sizes, 9, device, dtype, 0)
    k = k * torch.linspace(0, 50, 9, device=device, dtype=dtype)[:, None]  # the first is zero
    lengths = torch.zeros(sizes.batch, dtype=torch.int64, device=device)
    cache = Cache(sizes, device, dtype)
    append_everywhere(cache, composite, k, v, buckets, lengths, normalize=True)
    expected = F.normalize(k.double(), dim=-1).to(dtype)
    torch.testing.assert_close(cache.keys[:, :, :9], expected)
    assert torch.equal(cache.values[:, :, :9], v)


def completed(v: Tensor, padding: Tensor, mix: Tensor) -> Tensor:
    """Each row of ``v (B, H, n, D)`` with the next, in float64; but not those of padding."""
    wide, mix = v.double().clone(), mix.double()
    for b, t in torch.cartesian_prod(*(torch.arange(n) for n in padding.shape)).tolist():
        if padding[b, t] or t + 1 == v.shape[2]:
            continue
        following = v[b, :, t if padding[b, t + 1] else t + 1].double()
        wide[b, :, t] = mix[0, :, None] * v[b, :, t].double() + mix[1, :, None] * following
    return wide


@pytest.mark.parametrize("composite", [False, True], ids=["kernel", "composite"])
@pytest.mark.parametrize("mix_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_values_are_completed_by_the_next(
    device: str, dtype: torch.dtype, mix_dtype: torch.dtype, composite: bool
) -> None:
    """In one piece, in pieces or one by one, beyond the capacity, with padding between."""
    sizes = Sizes(capacity=30)
    k, v, buckets = rows(sizes, 40, device, dtype, 3)
    buckets.clamp_(max=sizes.n_buckets - 1)
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[0, [5, 12, 13]] = True
    buckets.masked_fill_(padding.to(device)[:, None, None], sizes.n_buckets)
    mix = torch.rand(2, sizes.heads).to(device, mix_dtype)
    expected = completed(v.cpu(), padding, mix.cpu())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2e-2)
    for pieces in ([40], [1] * 40, [7, 6, 1, 26]):
        cache, begin = Cache(sizes, device, dtype), 0
        last = torch.full((2, sizes.heads, sizes.head_dim), math.nan, device=device, dtype=dtype)
        lengths = torch.tensor([0, 11], device=device)
        for n in pieces:
            part = slice(begin, begin + n)
            args = (k[:, :, part], v[:, :, part], buckets[..., part], lengths + begin)
            append_everywhere(cache, composite, *args, value_mix=mix, last_values=last)
            begin += n
        kept, real = cache.values.cpu().double(), ~padding[0, :30]  # nobody reads padding's
        ours, theirs = kept[0][:, real], expected[0, :, :30][:, real]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert torch.equal(last, v[:, :, -1])
        ours, theirs = kept[1, :, 11:], expected[1, :, :19]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert kept[1, :, :10].isnan().all()  # nothing was there


@pytest.mark.parametrize("composite", [False, True], ids=["kernel", "composite"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_prompts_padding_is_replaced(device: str, composite: bool) -> None:
    """Prompts of 9 and 4 positions, padded to 9; then 3 each: as without padding."""
    sizes = Sizes(capacity=20)
    k, v, buckets = rows(sizes, 12, device, torch.float32, 5)
    buckets.clamp_(max=sizes.n_buckets - 1)
    mix = torch.rand(2, sizes.heads, device=device)
    last = torch.zeros(2, sizes.heads, sizes.head_dim, device=device)
    cache, lengths = Cache(sizes, device, torch.float32), torch.tensor([9, 4], device=device)
    prompt = buckets[..., :9].clone()
    prompt[1, :, :, 4:] = sizes.n_buckets
    mixing = {"value_mix": mix, "last_values": last}
    append_everywhere(cache, composite, k[:, :, :9], v[:, :, :9], prompt, 0 * lengths, **mixing)
    assert torch.equal(last[0], v[0, :, 8]) and torch.equal(last[1], v[1, :, 3])
    new = slice(9, 12)
    args = (k[:, :, new], v[:, :, new], buckets[..., new], lengths)
    append_everywhere(cache, composite, *args, **mixing)
    for b, line in enumerate([v[0], torch.cat([v[1, :, :4], v[1, :, new]], dim=1)]):
        n = line.shape[1]
        expected = completed(line[None].cpu(), torch.zeros(1, n, dtype=torch.bool), mix.cpu())[0]
        torch.testing.assert_close(cache.values[b, :, :n].cpu().double(), expected)


@pytest.mark.parametrize("composite", [False, True], ids=["kernel", "composite"])
@pytest.mark.parametrize(("device", "dtype"), device_dtypes())
def test_decode_of_next_values_is_exact_attention(
    device: str, dtype: torch.dtype, composite: bool
) -> None:
    """Where a bucket holds everything: one by one and several at once, a query finds what is before
    it, the value before it completed by its own."""
    sizes = Sizes(rounds=1, n_buckets=1, window=40, capacity=40)
    k, v, _ = rows(sizes, 24, device, dtype, 7)
    q = k * 3.0
    buckets = torch.zeros(2, sizes.heads, 1, 24, dtype=torch.int32, device=device)
    mix = torch.rand(2, sizes.heads, device=device)
    mixing = {"value_mix": mix, "last_values": torch.zeros_like(v[:, :, 0]).contiguous()}
    w = completed(v.cpu(), torch.zeros(2, 24, dtype=torch.bool), mix.cpu())
    logits = (q.double() @ k.double().mT * sizes.head_dim**-0.5).cpu()
    logits.masked_fill_(torch.ones(24, 24, dtype=torch.bool).triu(), -math.inf)
    expected = logits.softmax(-1).nan_to_num() @ w
    expected[:, :, 0] = v[:, :, 0].double().cpu()
    cache, begin, outs = Cache(sizes, device, dtype), 0, []
    for n in [1, 1, 5, 1, 16]:
        part = slice(begin, begin + n)
        lengths = torch.full((2,), begin, device=device)
        args = (k[:, :, part], v[:, :, part], buckets[..., part], lengths)
        append_everywhere(cache, composite, *args, **mixing)
        out, lse = decode(
            cache,
            composite,
            q[:, :, part],
            buckets[..., part],
            own_values=v[:, :, part],
            before=lengths,
            correct_duplicates=n > 1,
        )
        assert torch.equal(lse[:, :, 0] == -1e5, torch.full_like(lse[:, :, 0], begin == 0).bool())
        outs.append(out)
        begin += n
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    got = torch.cat(outs, dim=2).cpu().double()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_next_values_in_the_cache_are_registered_soundly() -> None:
    sizes = Sizes()
    cache = Cache(sizes, "cpu", torch.float32)
    cache.keys.zero_(), cache.values.zero_(), cache.table.zero_()
    k, v, buckets = rows(sizes, 9, "cpu", torch.float32, 0)
    lengths = torch.full((sizes.batch,), 2)
    last = torch.zeros(sizes.batch, sizes.heads, sizes.head_dim)
    options = {"value_mix": torch.rand(2, sizes.heads), "last_values": last}
    args = (*cache.tensors(), k, v, buckets, lengths)
    torch.library.opcheck(ops.lsh_cache_append.default, args, options)
    options = {"own_values": v, "before": lengths}
    torch.library.opcheck(ops.lsh_decode.default, (k, *cache.tensors(), buckets), options)


def test_next_values_in_the_cache_errors() -> None:
    sizes = Sizes()
    cache = Cache(sizes, "cpu", torch.float32)
    k, v, buckets = rows(sizes, 2, "cpu", torch.float32, 0)
    lengths = torch.zeros(sizes.batch, dtype=torch.int64)
    mix, last = torch.rand(2, 3), torch.zeros(2, 3, 16)
    for options, message in [
        ({"value_mix": mix}, "expected value_mix and last_values together, got value_mix alone"),
        (
            {"last_values": last},
            "expected value_mix and last_values together, got last_values alone",
        ),
        (
            {"value_mix": mix[:1], "last_values": last},
            "expected value_mix of shape [2, 3] (own and next, heads), got [1, 3]",
        ),
        (
            {"value_mix": mix, "last_values": last[:1]},
            "expected last_values of shape [2, 3, 16] (batch, heads, head dimension), "
            "got [1, 3, 16]",
        ),
        (
            {"value_mix": mix, "last_values": last.double()},
            "expected last_values of dtype Float, got Double",
        ),
        (
            {"value_mix": mix, "last_values": last.mT.contiguous().mT},
            "expected a contiguous last_values, got strides [48, 1, 3]",
        ),
    ]:
        with pytest.raises(RuntimeError) as raised:
            reformer_ext.lsh_cache_append(*cache.tensors(), k, v, buckets, lengths, **options)
        assert str(raised.value).splitlines()[0] == f"lsh_cache_append: {message}"
    with pytest.raises(RuntimeError, match=r"lsh_decode: expected before of dtype Long, got Int"):
        reformer_ext.lsh_decode(k, *cache.tensors(), buckets, before=lengths.int())


def test_operators_are_registered_soundly() -> None:
    sizes = Sizes()
    cache = Cache(sizes, "cpu", torch.float32)
    cache.keys.zero_(), cache.values.zero_(), cache.table.zero_()
    k, v, buckets = rows(sizes, 9, "cpu", torch.float32, 0)
    lengths = torch.zeros(sizes.batch, dtype=torch.int64)
    torch.library.opcheck(ops.lsh_cache_append.default, (*cache.tensors(), k, v, buckets, lengths))
    options = {"own_values": v, "correct_duplicates": True}
    torch.library.opcheck(ops.lsh_decode.default, (k, *cache.tensors(), buckets), options)


def test_decoding_is_not_differentiable() -> None:
    sizes = Sizes()
    cache = Cache(sizes, "cpu", torch.float32)
    k, v, buckets = rows(sizes, 2, "cpu", torch.float32, 0)
    out, _ = reformer_ext.lsh_decode(k.requires_grad_(), *cache.tensors(), buckets, own_values=v)
    with pytest.raises(RuntimeError, match="derivative for reformer::lsh_decode"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 3, 5)}, r"lsh_decode: expected q of shape \[B, H, L, D\]"),
        ({"keys": (2, 3, 60, 8)}, r"lsh_decode: expected keys of shape \[2, 3, 60, 16\]"),
        (
            {"keys": (2, 3, 0, 16), "values": (2, 3, 0, 16)},
            r"lsh_decode: expected keys with at least one place, got \[2, 3, 0, 16\]",
        ),
        ({"values": (2, 3, 61, 16)}, r"lsh_decode: expected values of shape .* like keys"),
        ({"table": (2, 3, 4, 5, 4)}, r"lsh_decode: expected table of shape \[2, 3, 2, 5, 4\]"),
        ({"counts": (2, 3, 2, 4)}, r"lsh_decode: expected counts of shape \[2, 3, 2, 5\]"),
        ({"buckets": (2, 3, 2, 3)}, r"lsh_decode: expected buckets of shape \[2, 3, 2, 4\]"),
        ({"own_values": (2, 3, 4, 8)}, r"lsh_decode: expected own_values of shape"),
    ],
)
def test_decode_errors(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {
        "q": (2, 3, 4, 16),
        "keys": (2, 3, 60, 16),
        "values": (2, 3, 60, 16),
        "table": (2, 3, 2, 5, 4),
        "counts": (2, 3, 2, 5),
        "buckets": (2, 3, 2, 4),
    }
    integers = {"table", "counts", "buckets"}
    args = {
        name: torch.zeros(shape, dtype=torch.int32 if name in integers else torch.float32)
        for name, shape in {**shapes, **change}.items()
    }
    with pytest.raises(RuntimeError, match=message):
        reformer_ext.lsh_decode(**args)


def test_more_decode_errors() -> None:
    sizes = Sizes()
    cache = Cache(sizes, "cpu", torch.float32)
    k, v, buckets = rows(sizes, 2, "cpu", torch.float32, 0)
    lengths = torch.zeros(sizes.batch, dtype=torch.int64)
    keys, values, table, counts = cache.tensors()
    with pytest.raises(RuntimeError, match="expected keys of dtype Double, got Float"):
        reformer_ext.lsh_decode(k.double(), *cache.tensors(), buckets)
    with pytest.raises(RuntimeError, match="lsh_decode: expected buckets of dtype Int, got Long"):
        reformer_ext.lsh_decode(k, *cache.tensors(), buckets.long())
    with pytest.raises(RuntimeError, match="expected a contiguous table, got strides"):
        reformer_ext.lsh_decode(
            k, keys, values, table.transpose(3, 4).contiguous().mT, counts, buckets
        )
    with pytest.raises(RuntimeError, match="lsh_decode: expected a finite scale, got inf"):
        reformer_ext.lsh_decode(k, *cache.tensors(), buckets, scale=math.inf)
    with pytest.raises(RuntimeError, match=r"expected lengths of shape \[2\] \(batch\)"):
        reformer_ext.lsh_cache_append(*cache.tensors(), k, v, buckets, lengths[:1])
    with pytest.raises(RuntimeError, match="lsh_cache_append: expected lengths >= 0, got -1"):
        reformer_ext.lsh_cache_append(*cache.tensors(), k, v, buckets, lengths - 1)
    before = [tensor.clone() for tensor in cache.tensors()]
    with pytest.raises(RuntimeError, match="lsh_cache_append: expected lengths >= 0, got -2"):
        reformer_ext.lsh_cache_append(*cache.tensors(), k, v, buckets, torch.tensor([0, -2]))
    for tensor, old in zip(cache.tensors(), before, strict=True):
        torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)
    counts.fill_(-3)
    with pytest.raises(RuntimeError, match="lsh_cache_append: expected counts >= 0, got -3"):
        reformer_ext.lsh_cache_append(*cache.tensors(), k, v, buckets.clamp(max=4), lengths)
    counts.fill_(2)
    with pytest.raises(RuntimeError, match=r"expected table with positions in \[0, 60\), got -7"):
        reformer_ext.lsh_decode(k, *cache.tensors(), buckets.clamp(max=4))


# The kernels on CUDA, against those on the CPU ----------------------------------------------------


def check_on_cuda(sizes: Sizes, dtype: torch.dtype, pieces: list[int], n_queries: int) -> None:
    """Pieces of positions into two caches, all ways of decoding between them, twice on CUDA."""
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.batch, sizes.heads)

    def vectors(n: int) -> Tensor:  # rows at odd addresses
        x = torch.randn(*shape, n, sizes.head_dim + 1, generator=generator)
        return x.to(dtype)[..., 1:]

    def drawn(n: int) -> Tensor:  # some out of range on either side
        low, high = -1, sizes.n_buckets + 2
        x = torch.randint(low, high, (*shape, n, sizes.rounds), generator=generator)
        return x.mT.to(torch.int32)

    def on_cuda(x: Tensor) -> Tensor:  # with the strides kept
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)

    tolerance = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    cpu, cuda = Cache(sizes, "cpu", dtype), Cache(sizes, "cuda", dtype)
    lengths = torch.arange(sizes.batch) * 7
    for n in [*pieces, 0]:
        q, own_values, wanted = vectors(n_queries), vectors(n_queries), drawn(n_queries)
        for own, correct in itertools.product((False, True), repeat=2):
            options = {"scale": 0.3 if own else None, "correct_duplicates": correct}
            args = (q, wanted, own_values if own else None)
            out, lse = decode(cpu, False, *args[:2], own_values=args[2], **options)
            args = tuple(None if x is None else on_cuda(x) for x in args)
            got = [decode(cuda, False, *args[:2], own_values=args[2], **options) for _ in range(2)]
            assert all(torch.equal(*pair) for pair in zip(*got, strict=True))
            torch.testing.assert_close(got[0][0].cpu(), out, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(got[0][1].cpu(), lse, rtol=1e-5, atol=1e-5)
        if n == 0:
            return
        new = (vectors(n), vectors(2 * n)[:, :, ::2], drawn(n), lengths)
        append_everywhere(cpu, False, *new)
        append_everywhere(cuda, False, *map(on_cuda, new))
        for ours, theirs in zip(cuda.tensors(), cpu.tensors(), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)
        lengths = lengths + n


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 24, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_kernels_on_cuda(dtype: torch.dtype, head_dim: int) -> None:
    """Every instance: empty buckets, rings that wrap, the end of the capacity."""
    sizes = Sizes(head_dim=head_dim, rounds=3, window=7, capacity=150)
    check_on_cuda(sizes, dtype, [1, 3, 70, 1, 64, 3, 30], n_queries=5)


@pytest.mark.gpu
def test_kernels_on_cuda_with_a_full_block() -> None:
    sizes = Sizes(batch=1, head_dim=64, rounds=8, n_buckets=2, window=64, capacity=700)
    check_on_cuda(sizes, torch.bfloat16, [70, 1, 300, 1], n_queries=1)


@pytest.mark.gpu
def test_many_rows_on_cuda() -> None:
    """So many that they are sorted."""
    sizes = Sizes(n_buckets=20, window=9, capacity=2000)
    check_on_cuda(sizes, torch.float32, [3, 513, 600, 1, 1000], n_queries=2)


@pytest.mark.gpu
def test_many_slots_on_cuda() -> None:
    """More than shared memory has room for when duplicates are looked for."""
    sizes = Sizes(batch=1, rounds=4, n_buckets=2, window=6000, capacity=20000)
    check_on_cuda(sizes, torch.bfloat16, [9000, 9000], n_queries=2)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), [(6, torch.float32), (16, torch.float64)])
def test_what_the_kernels_do_not_take_on_cuda(head_dim: int, dtype: torch.dtype) -> None:
    sizes = Sizes(head_dim=head_dim)
    cache, cpu = Cache(sizes, "cuda", dtype), Cache(sizes, "cpu", dtype)
    lengths = torch.zeros(sizes.batch, dtype=torch.int64)
    new = (*rows(sizes, 40, "cpu", dtype, 0), lengths)
    append_everywhere(cpu, False, *new)
    append_everywhere(cache, False, *(x.cuda() for x in new))
    want = decode(cpu, False, new[0], new[2], correct_duplicates=True)
    got = decode(cache, False, new[0].cuda(), new[2].cuda(), correct_duplicates=True)
    torch.testing.assert_close([x.cpu() for x in got], list(want), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_table_in_disorder_on_cuda() -> None:
    """Positions anywhere, several times in a bucket: each still counts once, bit for bit."""
    sizes = Sizes(rounds=8, window=64, capacity=300)
    cache = Cache(sizes, "cpu", torch.float32)
    cache.keys.normal_(), cache.values.normal_()
    cache.table.random_(0, sizes.capacity), cache.counts.random_(0, 100)
    q, _, wanted = rows(sizes, 4, "cpu", torch.float32, 0)
    expected = decode(cache, False, q, wanted, correct_duplicates=True)
    for name in ("keys", "values", "table", "counts"):
        setattr(cache, name, getattr(cache, name).cuda())
    got = [
        decode(cache, False, q.cuda(), wanted.cuda(), correct_duplicates=True) for _ in range(20)
    ]
    torch.testing.assert_close([x.cpu() for x in got[0]], list(expected), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for again in got[1:] for a, b in zip(again, got[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("correct", [True, False], ids=["once", "every"])
def test_operators_in_a_cuda_graph(correct: bool) -> None:
    sizes = Sizes(capacity=25)
    steps = [rows(sizes, 1, "cpu", torch.float16, seed) for seed in range(30)]
    cpu, cuda = (Cache(sizes, device, torch.float16) for device in ("cpu", "cuda"))
    k, v, buckets = static = [x.cuda() for x in steps[0]]
    lengths = torch.zeros(sizes.batch, dtype=torch.int64, device="cuda")
    other = Cache(sizes, "cuda", torch.float16)
    decode(other, False, k, buckets, own_values=v, correct_duplicates=correct)  # loads the kernels
    append_everywhere(other, False, k, v, buckets, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode(cuda, False, k, buckets, own_values=v, correct_duplicates=correct)
        append_everywhere(cuda, False, k, v, buckets, lengths)
        lengths.add_(1)
    for t, new in enumerate(steps):
        for old, x in zip(static, new, strict=True):
            old.copy_(x)
        graph.replay()
        want = decode(cpu, False, new[0], new[2], own_values=new[1], correct_duplicates=correct)
        append_everywhere(cpu, False, *new, torch.full((sizes.batch,), t))
        torch.testing.assert_close([x.cpu() for x in got], list(want), rtol=2e-3, atol=2e-3)
    for ours, theirs in zip(cuda.tensors(), cpu.tensors(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


# The models ---------------------------------------------------------------------------------------


def language_model(device: str = "cpu", **fields: object) -> ReformerLM:
    """In float64, on CUDA float32, with weights large enough that attention matters."""
    defaults = {
        "vocab_size": 50,
        "dim": 32,
        "layers": ("local", "lsh", "full"),
        "n_hashes": 3,
        "chunk_size": 64,
        "n_buckets": 6,
        "same_bucket": True,  # in one chunk: a forward pass sees what decoding does
        "local_chunk_size": 8,
        "initializer_range": 0.3,
    }
    torch.manual_seed(1)
    dtype = torch.float64 if device == "cpu" else torch.float32
    return ReformerLM(tiny_config(**{**defaults, **fields})).to(device, dtype).eval()


def continued(model: ReformerLM, cache: DecodingCache, tokens: Tensor, pieces: list[int]) -> Tensor:
    """Logits of the tokens given to the cache piece by piece."""
    assert sum(pieces) == tokens.shape[1]
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(pieces, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("positions", ["rotary", "axial", "absolute", "none"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"correct_duplicates": True, "full_shared_qk": True, "rotary_before_hash": True},
        {"shared_qk_scale": None, "n_buckets": (2, 4), "reversible": False},
        {"axial_sum": True, "streams": "concat", "head_bias": True, "local_look_back": 2},
    ],
    ids=["default", "variant", "factors", "sum"],
)
def test_cached_logits_are_the_forward_passes(
    fields: dict[str, object], positions: str, device: str
) -> None:
    model = language_model(device, positions=positions, max_length=60, **fields)
    tolerance = 1e-9 if device == "cpu" else 1e-3
    tokens = torch.randint(50, (2, 43), device=device)
    with torch.no_grad():
        expected = model(tokens)
    for pieces in ([43], [1] * 43, [30, *[1] * 13], [5, 17, 1, 20]):
        cache = model.new_cache(2, 60, window=64)
        got = continued(model, cache, tokens, pieces)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        assert cache.lengths.tolist() == [43, 43]


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_prompts_are_as_if_alone(side: str) -> None:
    """HF's cached LSH decoding reads batch row 0's hidden states for every row."""
    model = language_model()
    lengths = [13, 40, 1]
    tokens = torch.randint(50, (3, 40))
    real = torch.arange(40) < torch.tensor(lengths)[:, None]
    if side == "left":
        real = real.flip(1)
    elif side == "scattered":
        real = torch.stack([row[torch.randperm(40)] for row in real])
    more = torch.randint(50, (3, 9))
    cache = model.new_cache(3, 60, window=64)
    with torch.no_grad():
        prompt = model(tokens, key_padding_mask=~real, cache=cache)
        later = continued(model, cache, more, [1, 3, 5])
        for row in range(3):
            alone = torch.cat([tokens[row][real[row]], more[row]])[None]
            want = model(alone)[0]
            n = lengths[row]
            torch.testing.assert_close(prompt[row][real[row]], want[:n], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(later[row], want[n:], rtol=1e-9, atol=1e-9)
    assert cache.lengths.tolist() == [n + 9 for n in lengths]


def test_a_bucket_forgets_beyond_its_window() -> None:
    model = language_model(layers=("lsh",), positions="none")
    tokens = torch.randint(50, (1, 50))
    with torch.no_grad():
        expected = model(tokens)
    narrow = continued(model, model.new_cache(1, 50, window=1), tokens, [10, *[1] * 40])
    assert not torch.allclose(narrow[:, -1], expected[:, -1])
    assert narrow.isfinite().all()


def test_reset_starts_again() -> None:
    model = language_model()
    cache = model.new_cache(1, 50, window=64)
    first = continued(model, cache, torch.randint(50, (1, 40)), [20, *[1] * 20])
    cache.reset()
    tokens = torch.randint(50, (1, 30))
    again = continued(model, cache, tokens, [10, *[1] * 20])
    fresh = continued(model, model.new_cache(1, 50, window=64), tokens, [10, *[1] * 20])
    assert torch.equal(again, fresh)
    assert first.shape[1] == 40


def test_reordered_sequences_go_on_as_their_originals() -> None:
    """A beam that goes on twice and one that does not; then all but one dropped."""
    model = language_model()
    tokens, more = torch.randint(50, (3, 20)), torch.randint(50, (3, 12))
    cache = model.new_cache(3, 40, window=64)
    before = {name: buffer.data_ptr() for name, buffer in cache.named_buffers()}
    with torch.no_grad():
        model(tokens, cache=cache)
        cache.reorder(torch.tensor([2, 0, 2]))
        assert {name: buffer.data_ptr() for name, buffer in cache.named_buffers()} == before
        got = model(more[:, :5], cache=cache)
        expected = model(torch.cat([tokens[[2, 0, 2]], more], dim=1))[:, 20:]
        torch.testing.assert_close(got, expected[:, :5], rtol=1e-9, atol=1e-9)
        cache.reorder([1])
        got = model(more[1:2, 5:], cache=cache)
        torch.testing.assert_close(got, expected[1:2, 5:], rtol=1e-9, atol=1e-9)
    assert cache.batch == 1
    assert cache.lengths.tolist() == [32]


def test_reordered_sequences_keep_their_lengths() -> None:
    model = language_model()
    tokens = torch.randint(50, (2, 20))
    padding = torch.arange(20) >= torch.tensor([[20], [7]])
    cache = model.new_cache(2, 40, window=64)
    with torch.no_grad():
        model(tokens, key_padding_mask=padding, cache=cache)
        cache.reorder([1, 0])
        assert cache.lengths.tolist() == [7, 20]
        got = model(tokens[:, :1], cache=cache)[0]
        alone = torch.cat([tokens[1, :7], tokens[0, :1]])[None]
        torch.testing.assert_close(got, model(alone)[0, -1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 2], r"DecodingCache.reorder: expected indices in 0 .. 1, got \[0, 2\]"),
        ([-1], r"expected indices in 0 .. 1, got \[-1\]"),
        ([0, 1, 0], "expected 1 to 2 indices, got 3"),
        (torch.zeros(0, dtype=torch.int64), "expected 1 to 2 indices, got 0"),
        ([0.0], r"expected indices \[n\] of int32 or int64, got \[1\] of torch.float32"),
        ([[0, 1]], r"expected indices \[n\] of int32 or int64, got \[1, 2\] of torch.int64"),
    ],
)
def test_reorder_errors(indices: list, message: str) -> None:
    cache = language_model().new_cache(2, 8)
    with pytest.raises(ValueError, match=message):
        cache.reorder(indices)
    assert cache.batch == 2


@pytest.mark.parametrize("fields", [{}, {"local_wrap": True}, {"layers": ("full", "lsh", "full")}])
def test_prompts_are_padded_to_the_length_multiple(fields: dict[str, object]) -> None:
    """As in a forward pass: without a part of the buckets, what a chunk looks back to shows it."""
    options = {"same_bucket": False, "chunk_size": 8, "length_multiple": 32, "n_buckets": 4}
    model = language_model(**{**options, **fields})
    tokens = torch.randint(50, (2, 41))
    plain = language_model(**{**options, **fields, "length_multiple": 1})
    with torch.no_grad():
        expected = model(tokens)
        cache = model.new_cache(2, 45, window=64)  # the padding reaches beyond it
        got = model(tokens, cache=cache)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(plain(tokens), expected)
        assert cache.lengths.tolist() == [41, 41]
        # What the cache holds is what it holds without.
        other = plain.new_cache(2, 45, window=64)
        plain(tokens, cache=other)
        first, second = cache.layers[0], other.layers[0]
        torch.testing.assert_close(first.keys[:, :, :41], second.keys[:, :, :41])

    # Local and full layers are exact: steps after the prompt do not see its padding.
    model = language_model(layers=("full", "local"), length_multiple=32)
    cache = model.new_cache(2, 45)
    with torch.no_grad():
        got = continued(model, cache, tokens, [37, 1, 3])
        torch.testing.assert_close(got, model(tokens), rtol=1e-9, atol=1e-9)


def test_cost_of_a_step_does_not_grow_with_the_context() -> None:
    """What a step of local and LSH layers reads and writes, counted by its operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Elements(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    self.total += tensor.numel()
            return out

    model = language_model(layers=("local", "lsh"))
    totals = []
    for context in (50, 5000):
        cache = model.new_cache(1, context + 1)
        with torch.no_grad():
            model(torch.randint(50, (1, context)), cache=cache)
            with Elements() as counter:
                model(torch.randint(50, (1, 1)), cache=cache)
        totals.append(counter.total)
    assert totals[0] == totals[1] > 0


def test_buffers_are_changed_in_place() -> None:
    model = language_model()
    cache = model.new_cache(2, 40)
    before = {name: buffer.data_ptr() for name, buffer in cache.named_buffers()}
    continued(model, cache, torch.randint(50, (2, 12)), [8, 1, 3])
    assert {name: buffer.data_ptr() for name, buffer in cache.named_buffers()} == before
    assert not cache.state_dict()


def test_step_compiles_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = language_model()
    tokens = torch.randint(50, (2, 30))
    with torch.no_grad():
        expected = model(tokens)
    cache = model.new_cache(2, 40, window=64)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        model(tokens[:, :20], cache=cache)
        got = [step(tokens[:, t : t + 1], cache=cache) for t in range(20, 30)]
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat(got, 1), expected[:, 20:], rtol=1e-9, atol=1e-9)


def test_prompt_compiles() -> None:
    model = language_model()
    tokens = torch.randint(50, (2, 30))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        expected = model(tokens)
        for length in (20, 17):
            cache = model.new_cache(2, 40, window=64)
            parts = tokens[:, : length + 1].split([length, 1], dim=1)
            got = [compiled(part, cache=cache) for part in parts]
            assert cache.filled
            got.append(model(tokens[:, length + 1 :], cache=cache))
            torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-9, atol=1e-9)


def test_step_exports() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = language_model(layers=("local", "lsh"))
            self.cache = self.model.new_cache(2, 40, window=64)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(tokens, cache=self.cache)

    tokens = torch.randint(50, (2, 30))
    step = Step().eval()
    with torch.no_grad():
        expected = step.model(tokens)
        step(tokens[:, :20])
        program = torch.export.export(step, (tokens[:, 20:21],)).module()
        got = [program(tokens[:, t : t + 1]) for t in range(20, 30)]
    torch.testing.assert_close(torch.cat(got, 1), expected[:, 20:], rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_step_in_a_cuda_graph() -> None:
    model = language_model("cuda", layers=("local", "lsh"))
    tokens = torch.randint(50, (2, 30), device="cuda")
    with torch.no_grad():
        expected = model(tokens)
        cache = model.new_cache(2, 40, window=64)
        model(tokens[:, :20], cache=cache)
        static = tokens[:, 20:21].clone()
        saved = [buffer.clone() for buffer in cache.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(static, cache=cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(static, cache=cache)
        for buffer, value in zip(cache.buffers(), saved, strict=True):
            buffer.copy_(value)
        got = []
        for t in range(20, 30):
            static.copy_(tokens[:, t : t + 1])
            graph.replay()
            got.append(logits.clone())
    torch.testing.assert_close(torch.cat(got, 1), expected[:, 20:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modes", list(itertools.product((False, True), repeat=3)))
def test_inference_mode_or_not(modes: tuple[bool, bool, bool]) -> None:
    model = language_model()
    tokens = torch.randint(50, (1, 30))
    made, prompted, stepped = (torch.inference_mode if mode else torch.no_grad for mode in modes)
    with made():
        cache = model.new_cache(1, 40, window=64)
    with prompted():
        model(tokens[:, :20], cache=cache)
    with stepped():
        got = model(tokens[:, 20:], cache=cache)
    with torch.no_grad():
        torch.testing.assert_close(got, model(tokens)[:, 20:], rtol=1e-9, atol=1e-9)
    cache.reset()


def test_a_prompt_may_fail_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out: the next prompt begins as if there had been none."""
    model = language_model(layers=("lsh", "full"))
    cache = model.new_cache(1, 40, window=64)
    tokens = torch.randint(50, (1, 30))
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(FullCache, "append", None)
            with pytest.raises(TypeError, match="not callable"):
                model(tokens.flip(1), cache=cache)
        assert cache.layers[0].counts.any()
        assert not cache.filled
        got = continued(model, cache, tokens, [20, 10])
        torch.testing.assert_close(got, model(tokens), rtol=1e-9, atol=1e-9)


def test_autocast_keeps_its_dtype() -> None:
    model = language_model().float()
    tokens = torch.randint(50, (1, 30))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens)
        cache = model.new_cache(1, 40, window=64)
        got = torch.cat([model(part, cache=cache) for part in tokens.split([20, 1, 9], 1)], 1)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_cache_errors() -> None:
    model = language_model(layers=("local", "lsh"))
    tokens = torch.randint(50, (1, 8))
    sizes = {"batch": 1, "capacity": 8}
    for name, value in [("capacity", 0), ("batch", 0), ("window", -1), ("n_hashes", 2.5)]:
        message = f"new_cache: expected {name} to be an integer >= 1, got {value}"
        with pytest.raises(ValueError, match=message):
            model.new_cache(**{**sizes, name: value})
    for n_buckets in (5, 0, [], [2, 3]):
        with pytest.raises(ValueError, match="new_cache: expected n_buckets to be an even number"):
            model.new_cache(1, 8, n_buckets=n_buckets)
    assert model.new_cache(1, 8, n_buckets=4).layers[1].n_buckets == [4]
    with pytest.raises(ValueError, match=r"expected a floating dtype, got torch\.int32"):
        model.new_cache(1, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected a causal model, got causal=False"):
        language_model(causal=False).new_cache(1, 8)
    with pytest.raises(ValueError, match=r"capacity up to max_length = 16 with axial positions"):
        language_model(positions="axial", max_length=16).new_cache(1, 17)
    cache = model.new_cache(1, 10)
    with pytest.raises(RuntimeError, match=r"expected evaluation mode and torch\.no_grad"):
        model(tokens, cache=cache)
    with torch.no_grad():
        mask = torch.zeros(1, 8).bool()
        for bad in (mask[:, :7], mask.long(), mask.expand(2, -1)):
            with pytest.raises(ValueError, match=r"key_padding_mask \[1, 8\] of torch\.bool, got"):
                model(tokens, key_padding_mask=bad, cache=cache)
        for empty in (tokens[:, :0], tokens[:, :0, None].expand(-1, -1, 32).double()):
            with pytest.raises(ValueError, match="Reformer: expected at least one position"):
                model(empty, cache=cache)
        with pytest.raises(ValueError, match=r"Reformer: expected tokens \[B, L\], got \[8\]"):
            model(tokens[0], cache=cache)
        other = language_model(layers=("local", "lsh"), local_chunk_size=4)
        with pytest.raises(ValueError, match="expected the model that made it, got one of another"):
            other(tokens, cache=cache)
        assert not cache.filled
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match="expected at most 10 positions, got 3 more after 8"):
            model(tokens[:, :3], cache=cache)
        with pytest.raises(ValueError, match="expected 1 sequences, got 2"):
            model(tokens.expand(2, -1), cache=cache)
        with pytest.raises(ValueError, match="expected no key_padding_mask after the prompt"):
            model(tokens[:, :1], key_padding_mask=torch.zeros(1, 1).bool(), cache=cache)
        with pytest.raises(ValueError, match="n_hashes is the cache's"):
            model(tokens[:, :1], n_hashes=2, cache=cache)
        assert cache.lengths.tolist() == [8]  # nothing half done
        model(tokens[:, :2], cache=cache)
