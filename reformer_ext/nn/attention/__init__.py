"""Self-attention over ``(B, L, dim)``: a file for each kind, with its options and its cache."""

from __future__ import annotations

from ..config import ATTENTIONS
from .base import AttentionCall, AttentionOptions, SelfAttention, check_padding
from .full import FullSelfAttention
from .local import LocalSelfAttention
from .lsh import LSHOptions, LSHSelfAttention, hash_rotations, narrow_buckets

__all__ = [
    "ATTENTIONS",
    "AttentionCall",
    "AttentionOptions",
    "FullSelfAttention",
    "LSHOptions",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "SelfAttention",
    "check_padding",
    "hash_rotations",
    "narrow_buckets",
]

ATTENTIONS.update(local=LocalSelfAttention, lsh=LSHSelfAttention, full=FullSelfAttention)
