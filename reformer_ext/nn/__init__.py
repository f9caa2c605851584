"""Modules and models built from the operators; see the submodules."""

from __future__ import annotations

from .attention import FullSelfAttention, LocalSelfAttention, LSHSelfAttention, hash_rotations
from .cache import DecodingCache
from .feed_forward import ChunkedFeedForward, chunked_lm_loss
from .models import Reformer, ReformerConfig, ReformerLM
from .positions import AbsolutePositions, AxialPositions, RotaryPositions, apply_rotary
from .reversible import ReversibleStack

__all__ = [
    "AbsolutePositions",
    "AxialPositions",
    "ChunkedFeedForward",
    "DecodingCache",
    "FullSelfAttention",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "Reformer",
    "ReformerConfig",
    "ReformerLM",
    "ReversibleStack",
    "RotaryPositions",
    "apply_rotary",
    "chunked_lm_loss",
    "hash_rotations",
]
