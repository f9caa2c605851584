"""The peers of LSH attention, each as a function of queries and values ``(B, H, L, D)``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[Tensor, Tensor], Tensor]


def peers(
    args: argparse.Namespace, dtype: torch.dtype, length: int, n_buckets: list[int]
) -> Iterator[tuple[str, Call | str]]:
    """Name and forward of each, or the reason why it cannot run. ``args``: ops.py's."""
    backends = {"sdpa": None}
    if args.device == "cuda":
        backends = {
            "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
            "sdpa flash": SDPBackend.FLASH_ATTENTION,
        }
    for name, backend in backends.items():
        yield name, exact(backend, args.causal)
    yield "transformers (with projections)", transformers(args, dtype, n_buckets)
    yield "reformer_pytorch", reformer_pytorch(args, length)


def exact(backend: SDPBackend | None, causal: bool) -> Call:
    def forward(qk: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return F.scaled_dot_product_attention(qk, qk, v, is_causal=causal)

    return forward


def transformers(args: argparse.Namespace, dtype: torch.dtype, n_buckets: list[int]) -> Call | str:
    """Its layer takes hidden states and projects queries and values itself."""
    try:
        from transformers import ReformerConfig
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention
    except ImportError as error:
        return f"not installed: {error}"
    config = ReformerConfig(
        attention_head_size=args.head_dim,
        num_attention_heads=args.heads,
        hidden_size=args.heads * args.head_dim,
        is_decoder=args.causal,
        lsh_attn_chunk_length=args.chunk_size,
        num_hashes=args.n_hashes,
        num_buckets=n_buckets if len(n_buckets) > 1 else n_buckets[0],
    )
    layer = LSHSelfAttention(config, layer_idx=0).to(args.device, dtype).eval()

    def forward(qk: Tensor, v: Tensor) -> Tensor:
        hidden = (qk + v).transpose(1, 2).flatten(2)
        out = layer(hidden).hidden_states
        return out.view(*hidden.shape[:2], args.heads, args.head_dim).transpose(1, 2)

    return forward


def reformer_pytorch(args: argparse.Namespace, length: int) -> Call | str:
    try:
        from reformer_pytorch.reformer_pytorch import LSHAttention
    except ImportError as error:
        return f"not installed: {error}"
    if length % (2 * args.chunk_size):
        return f"needs a length divisible by {2 * args.chunk_size}"
    layer = LSHAttention(bucket_size=args.chunk_size, n_hashes=args.n_hashes, causal=args.causal)
    layer = layer.eval()

    def forward(qk: Tensor, v: Tensor) -> Tensor:
        return layer(qk.flatten(0, 1), v.flatten(0, 1))[0].view_as(qk)

    return forward
