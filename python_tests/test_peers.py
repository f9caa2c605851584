"""The function of the published Reformers, given the same rotations: values and gradients.

transformers' and reformer-pytorch's layers in float64. Both sort by (round, bucket, position), as
we do, both look around circularly over all rounds, and both let a query attend to itself by a
finite logit when nothing else is valid, which float64 represents exactly enough. transformers adds
1e-6 to the mean square of a key, which bounds the agreement: the mean square of ours is at least 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

import reformer_ext
from reformer_ext import reference

modeling_reformer = pytest.importorskip(
    "transformers.models.reformer.modeling_reformer", reason="needs transformers"
)

TOLERANCE = 1e-5
IMPLEMENTATIONS = [
    pytest.param(reformer_ext, id="operator"),
    pytest.param(reference, id="reference"),
]


@contextmanager
def drawing(rotations: Tensor) -> Iterator[None]:
    """``torch.randn`` gives the rotations, once, to whoever asks for their shape."""
    draws = []

    def randn(*size: object, **_: object) -> Tensor:
        shape = size[0] if len(size) == 1 else size
        assert tuple(shape) == tuple(rotations.shape)  # type: ignore[arg-type]
        draws.append(rotations)
        return rotations

    with mock.patch.object(torch, "randn", randn):
        yield
    assert len(draws) == 1


def leaf(*shape: int) -> Tensor:
    """Random vectors with a mean square between 1 and 4."""
    vectors = torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)
    lengths = math.sqrt(shape[-1]) * (1.0 + torch.rand(*shape[:-1], 1, dtype=torch.float64))
    return (vectors * lengths).requires_grad_()


def compare(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    rows: Tensor,
) -> None:
    """Outputs at ``rows (B, L)`` and the gradients, by name, of a loss that reads those rows."""
    expected, actual = theirs(**inputs), ours(**inputs)
    cotangent = torch.randn_like(expected) * rows[:, None, :, None]
    results = {"out": (actual * cotangent.ne(0), expected * cotangent.ne(0))}
    for name, *grads in zip(
        inputs,
        torch.autograd.grad(actual, list(inputs.values()), cotangent),
        torch.autograd.grad(expected, list(inputs.values()), cotangent),
        strict=True,
    ):
        results[f"grad_{name}"] = (grads[0], grads[1])
    for name, (got, want) in results.items():
        assert want.abs().max() > 1e-3, f"{name}: nothing to compare"
        torch.testing.assert_close(
            got, want, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


def attend_by_hash(
    ops: object,
    rotations: Tensor,
    n_buckets: int | list[int],
    *,
    hash_padding: Tensor | None = None,
    same_bucket: bool = False,
    **options: object,
) -> Callable[[Tensor, Tensor], Tensor]:
    """LSH attention in its three steps, by the operators or by the reference."""

    def attend(qk: Tensor, v: Tensor) -> Tensor:
        buckets = ops.lsh_hash(qk, rotations, n_buckets, hash_padding)  # type: ignore[attr-defined]
        total = math.prod([n_buckets] if isinstance(n_buckets, int) else n_buckets)
        order = ops.bucket_sort(buckets, total + 1)  # type: ignore[attr-defined]
        out, _ = ops.chunked_attention(  # type: ignore[attr-defined]
            qk, None, v, order, buckets=buckets if same_bucket else None, **options
        )
        return out

    return attend


def padding_mask(kind: str | None, batch: int, length: int) -> Tensor:
    mask = torch.zeros(batch, length, dtype=torch.bool)
    if kind == "tail":
        mask[0, length - length // 3 :] = True
    elif kind == "head":  # trax never masks positions 0 and 1 (PEERS.md C.2, 14)
        mask[0, :2] = True
    elif kind == "scattered":
        mask = torch.rand(batch, length) < 0.3
        mask[:, 5] = False
    return mask


# transformers ------------------------------------------------------------------------------------


def hf_config(heads: int, head_dim: int, causal: bool, **options: object) -> object:
    from transformers import ReformerConfig

    return ReformerConfig(
        attention_head_size=head_dim,
        num_attention_heads=heads,
        hidden_size=3 * heads * head_dim,  # the layer's projections then pick q, k and v apart
        is_decoder=causal,
        lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        **options,
    )


def selecting(layer: torch.nn.Module, *projections: str) -> torch.nn.Module:
    """Sets the i-th projection to the i-th third of the hidden state."""
    for third, name in enumerate(projections):
        weight = getattr(layer, name).weight
        with torch.no_grad():
            weight.zero_()
            size = weight.shape[0]
            weight[:, third * size : (third + 1) * size] = torch.eye(size)
    return layer.double()


def hidden_states(*parts: Tensor) -> Tensor:
    merged = [part.transpose(1, 2).flatten(2) for part in parts]
    return torch.cat(merged + [torch.zeros_like(merged[0])] * (3 - len(merged)), dim=-1)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("length", "chunk", "rounds", "n_buckets", "before", "after", "padding"),
    [
        (64, 8, 1, 8, 1, 0, None),
        (64, 8, 4, [2, 4], 1, 0, None),
        (48, 4, 2, 6, 2, 1, None),
        (48, 16, 3, 4, 0, 0, None),
        (48, 16, 3, 4, 0, 1, "tail"),
        (64, 8, 2, 8, 1, 0, "head"),
        (64, 8, 3, [4, 2], 1, 1, "scattered"),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_lsh_attention_is_transformers(
    ops: object,
    causal: bool,
    length: int,
    chunk: int,
    rounds: int,
    n_buckets: int | list[int],
    before: int,
    after: int,
    padding: str | None,
) -> None:
    batch, heads, head_dim = 2, 3, 8
    config = hf_config(
        heads,
        head_dim,
        causal,
        lsh_attn_chunk_length=chunk,
        lsh_num_chunks_before=before,
        lsh_num_chunks_after=after,
        num_hashes=rounds,
        num_buckets=n_buckets,
    )
    layer = selecting(modeling_reformer.LSHSelfAttention(config, layer_idx=0), "query_key", "value")
    columns = (n_buckets if isinstance(n_buckets, int) else sum(n_buckets)) // 2
    rotations = torch.randn(heads, head_dim, rounds, columns, dtype=torch.float64)
    mask = padding_mask(padding, batch, length)

    def theirs(qk: Tensor, v: Tensor) -> Tensor:
        with drawing(rotations):
            result = layer(
                hidden_states(qk, v), attention_mask=None if padding is None else (~mask).long()
            )
        return result.hidden_states.view(batch, length, heads, head_dim).transpose(1, 2)

    ours = attend_by_hash(
        ops,
        rotations,
        n_buckets,
        hash_padding=mask,
        key_padding_mask=mask,
        chunk_size=chunk,
        look_back=before,
        look_ahead=after,
        causal=causal,
        scale=1.0,
    )
    inputs = {"qk": leaf(batch, heads, length, head_dim), "v": leaf(batch, heads, length, head_dim)}
    compare(ours, theirs, inputs, ~mask)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("padding", [None, "tail", "head", "scattered"])
@pytest.mark.parametrize(("before", "after"), [(1, 0), (1, 1), (2, 0), (0, 0)])
def test_local_attention_is_transformers(
    ops: object, causal: bool, padding: str | None, before: int, after: int
) -> None:
    batch, heads, length, head_dim, chunk = 2, 2, 48, 8, 8
    config = hf_config(
        heads,
        head_dim,
        causal,
        local_attn_chunk_length=chunk,
        local_num_chunks_before=before,
        local_num_chunks_after=after,
    )
    layer = selecting(
        modeling_reformer.LocalSelfAttention(config, layer_idx=0), "query", "key", "value"
    )
    mask = padding_mask(padding, batch, length)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = layer(
            hidden_states(q, k, v), attention_mask=None if padding is None else (~mask).long()
        )
        return result.hidden_states.view(batch, length, heads, head_dim).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.chunked_attention(  # type: ignore[attr-defined]
            q,
            k,
            v,
            chunk_size=chunk,
            look_back=before,
            look_ahead=after,
            causal=causal,
            wrap=True,  # transformers looks around the ends of the line in local layers too
            key_padding_mask=mask,
        )[0]

    inputs = {name: leaf(batch, heads, length, head_dim) for name in "qkv"}
    # transformers gives a query without any valid key the mean of its window; we give it zero.
    counts = reference.slot_counts(
        length,
        None,
        chunk_size=chunk,
        look_back=before,
        look_ahead=after,
        causal=causal,
        mask_self=False,
        wrap=True,
        key_padding_mask=mask,
        buckets=None,
        batch=batch,
        heads=1,
        device=mask.device,
    )
    compare(ours, theirs, inputs, ~mask & counts.sum(dim=(1, 2, 4)).gt(0))


# reformer-pytorch ---------------------------------------------------------------------------------


@pytest.fixture
def lsh_attention_class() -> type:
    module = pytest.importorskip(
        "reformer_pytorch.reformer_pytorch", reason="needs reformer_pytorch"
    )
    return module.LSHAttention


def lucidrains(
    lsh_attention_class: type, rotations: Tensor, mask: Tensor, **options: object
) -> Callable[[Tensor, Tensor], Tensor]:
    """Its layer on ``(B, H, L, D)``, the rotations shared by batch and heads."""
    layer = lsh_attention_class(n_hashes=rotations.shape[2], **options)

    def attend(qk: Tensor, v: Tensor) -> Tensor:
        heads = qk.shape[1]
        with drawing(rotations):
            out, _, _ = layer(
                qk.flatten(0, 1),
                v.flatten(0, 1),
                input_mask=(~mask).repeat_interleave(heads, 0) if mask.any() else None,
            )
        return out.view_as(qk)

    return attend


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("length", "chunk", "rounds", "same_bucket", "correct_duplicates", "padding"),
    [
        (64, 8, 4, False, False, None),
        (32, 16, 1, False, False, None),
        (64, 8, 3, False, False, "scattered"),
        (64, 8, 2, False, False, "head"),
        (64, 8, 4, True, False, None),
        (64, 8, 4, True, True, None),
        (64, 16, 3, True, True, "tail"),
    ],
)
def test_lsh_attention_is_reformer_pytorch(
    lsh_attention_class: type,
    ops: object,
    causal: bool,
    length: int,
    chunk: int,
    rounds: int,
    same_bucket: bool,
    correct_duplicates: bool,
    padding: str | None,
) -> None:
    batch, heads, head_dim, n_buckets = 2, 2, 8, length // chunk
    rotations = torch.randn(1, head_dim, rounds, n_buckets // 2, dtype=torch.float64)
    mask = padding_mask(padding, batch, length)
    theirs = lucidrains(
        lsh_attention_class,
        rotations,
        mask,
        bucket_size=chunk,
        causal=causal,
        attend_across_buckets=not same_bucket,
        allow_duplicate_attention=not correct_duplicates,
    )
    ours = attend_by_hash(
        ops,
        rotations,
        n_buckets,
        same_bucket=same_bucket,
        key_padding_mask=mask,
        chunk_size=chunk,
        causal=causal,
        correct_duplicates=correct_duplicates,
    )
    inputs = {"qk": leaf(batch, heads, length, head_dim), "v": leaf(batch, heads, length, head_dim)}
    compare(ours, theirs, inputs, ~mask)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_duplicates_are_counted_across_round_boundaries(
    lsh_attention_class: type, ops: object
) -> None:
    """A pair that meets only across a round's boundary counts once; reformer-pytorch multiplies its
    weight by 1e9 (PEERS.md B.11), and is right for the queries that no boundary touches."""
    length, head_dim, chunk, rounds = 64, 8, 8, 4
    n_buckets = length // chunk
    rotations = torch.randn(1, head_dim, rounds, n_buckets // 2, dtype=torch.float64)
    qk, v = leaf(1, 1, length, head_dim), leaf(1, 1, length, head_dim)
    nothing = torch.zeros(1, length, dtype=torch.bool)
    theirs = lucidrains(
        lsh_attention_class,
        rotations,
        nothing,
        bucket_size=chunk,
        allow_duplicate_attention=False,
    )(qk, v)[0, 0]
    ours = attend_by_hash(ops, rotations, n_buckets, chunk_size=chunk, correct_duplicates=True)(
        qk, v
    )

    # The union of the windows, written out: the sorted lists end to end, chunk by chunk.
    order = reference.bucket_sort(reference.lsh_hash(qk, rotations, n_buckets), n_buckets)[0, 0]
    chunks = order.long().view(-1, chunk)
    met = torch.zeros(length, length, dtype=torch.bool)
    for index in range(len(chunks)):
        for near in (chunks[index], chunks[index - 1]):
            met[chunks[index][:, None], near] = True
    met.fill_diagonal_(False)
    logits = qk[0, 0] @ torch.nn.functional.normalize(qk[0, 0], dim=-1).T / math.sqrt(head_dim)
    expected = logits.masked_fill(~met, -math.inf).softmax(-1) @ v[0, 0]
    torch.testing.assert_close(ours[0, 0], expected, rtol=1e-10, atol=1e-10)

    touched = torch.zeros(length, dtype=torch.bool)
    touched[chunks[:: length // chunk].flatten()] = True
    torch.testing.assert_close(theirs[~touched], expected[~touched], rtol=1e-6, atol=1e-6)
    assert (theirs - expected)[touched].abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_self_rule_is_exact_where_the_peers_round(
    lsh_attention_class: type, dtype: torch.dtype
) -> None:
    """A first token meets itself several times: its output is its value to the last bit.
    A finite self logit (-1e5, -5e4) rounds: the weights no longer sum to one."""
    length, head_dim, chunk, rounds = 32, 8, 16, 4
    torch.manual_seed(3)
    qk = torch.randn(1, 1, length, head_dim).to(dtype)
    v = torch.full((1, 1, length, head_dim), 1.0, dtype=dtype)
    rotations = torch.randn(1, head_dim, rounds, 1)
    out, lse = reformer_ext.lsh_attention(
        qk,
        v,
        rotations=rotations.to(dtype),
        n_buckets=2,
        chunk_size=chunk,
        causal=True,
        return_lse=True,
    )
    assert torch.equal(out[0, 0, 0], v[0, 0, 0])
    assert lse[0, 0, 0] == reference.SELF_ONLY_LSE
    if dtype == torch.float32:
        peer = lucidrains(
            lsh_attention_class,
            rotations,
            torch.zeros(1, length, dtype=torch.bool),
            bucket_size=chunk,
            causal=True,
        )(qk, v)
        assert (peer[0, 0, 0] - 1.0).abs().max() > 1e-4
