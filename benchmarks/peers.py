"""The peers, each a function of a case's inputs: ``(qk, v)``, or ``(q, k, v)`` of local attention.

Exact attention reads the shared queries and keys as they are; the published Reformers normalise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .case import Case, Forward

Sees = Callable[[Tensor, Tensor], Tensor]  # (query, key) -> whether it attends to it


@dataclass(frozen=True)
class Peer:
    """``forward``, or the reason why there is none. ``sees``: the pairs that attend, by which its
    results can be checked; None for a peer that draws its own rotations."""

    name: str
    forward: Forward | str
    sees: Sees | None = None


def peers(case: Case) -> Iterator[Peer]:
    """Those that do a plain or a local case's work."""
    if case.variant not in ("plain", "local"):
        return
    backends = {"sdpa": None}
    if case.device == "cuda":
        backends = {
            "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
            "sdpa flash": SDPBackend.FLASH_ATTENTION,
        }
    everything = seen_before if case.causal else seen_always
    for name, backend in backends.items():
        yield Peer(name, exact(backend, case.causal), everything)
    yield Peer("flex_attention", flex(everything, case), everything)
    if case.local:
        near = within_chunks(case.chunk_size, case.causal)
        yield Peer("flex_attention, same window", flex(near, case), near)
        return
    if case.causal:  # as many keys a query as LSH attention reads
        width = 2 * case.chunk_size * case.n_hashes
        near = within(width)
        yield Peer(f"flex_attention, window of {width}", flex(near, case), near)
    yield Peer("transformers (with projections)", transformers(case))
    yield Peer("reformer_pytorch", reformer_pytorch(case))


def seen_always(query: Tensor, key: Tensor) -> Tensor:
    return key == key


def seen_before(query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def within(width: int) -> Sees:
    return lambda query, key: (key <= query) & (query - key < width)


def within_chunks(chunk: int, causal: bool) -> Sees:
    """Local attention: a query's own chunk and the one before."""

    def sees(query: Tensor, key: Tensor) -> Tensor:
        back = query // chunk - key // chunk
        near = (back == 0) | (back == 1)
        return near & (key <= query) if causal else near

    return sees


def exact(backend: SDPBackend | None, causal: bool) -> Forward:
    def forward(*inputs: Tensor) -> Tensor:
        *query_key, v = inputs
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return F.scaled_dot_product_attention(query_key[0], query_key[-1], v, is_causal=causal)

    return forward


def flex(sees: Sees, case: Case) -> Forward:
    """Compiled at the first call, mask included."""
    torch.compiler.reset()  # dynamo gives up compiling a function after 8 shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    make_mask = torch.compile(create_block_mask, dynamic=False)
    mask = None

    def forward(*inputs: Tensor) -> Tensor:
        nonlocal mask
        if mask is None:
            mask = make_mask(
                lambda batch, head, query, key: sees(query, key),
                None, None, case.length, case.length, device=case.device,
            )  # fmt: skip
        *query_key, v = inputs
        return compiled(query_key[0], query_key[-1], v, block_mask=mask)

    return forward


def transformers(case: Case) -> Forward | str:
    """Its layer takes hidden states and projects queries and values itself."""
    try:
        from transformers import ReformerConfig
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention
    except ImportError as error:
        return f"not installed: {error}"
    if case.length % case.chunk_size:
        return f"needs a length divisible by {case.chunk_size}"
    factors = case.n_buckets
    config = ReformerConfig(
        attention_head_size=case.head_dim,
        num_attention_heads=case.heads,
        hidden_size=case.heads * case.head_dim,
        is_decoder=case.causal,
        lsh_attn_chunk_length=case.chunk_size,
        num_hashes=case.n_hashes,
        num_buckets=factors if len(factors) > 1 else factors[0],
    )
    layer = LSHSelfAttention(config, layer_idx=0).to(case.device, case.torch_dtype).eval()

    def forward(qk: Tensor, v: Tensor) -> Tensor:
        hidden = (qk + v).transpose(1, 2).flatten(2)
        out = layer(hidden).hidden_states
        return out.view(*hidden.shape[:2], case.heads, case.head_dim).transpose(1, 2)

    return forward


def reformer_pytorch(case: Case) -> Forward | str:
    try:
        from reformer_pytorch.reformer_pytorch import LSHAttention
    except ImportError as error:
        return f"not installed: {error}"
    if case.length % (2 * case.chunk_size):
        return f"needs a length divisible by {2 * case.chunk_size}"
    layer = LSHAttention(bucket_size=case.chunk_size, n_hashes=case.n_hashes, causal=case.causal)
    layer = layer.eval()

    def forward(qk: Tensor, v: Tensor) -> Tensor:
        return layer(qk.flatten(0, 1), v.flatten(0, 1))[0].view_as(qk)

    return forward
