"""Modules and models built from the operators; see the submodules."""

from __future__ import annotations

from .attention import FullSelfAttention, LocalSelfAttention, LSHSelfAttention, hash_rotations
from .cache import DecodingCache
from .cross_attention import FullCrossAttention, LSHCrossAttention
from .encoder_decoder import EncoderDecoderCache, ReformerEncoderDecoder
from .feed_forward import ChunkedFeedForward, chunked_lm_loss
from .heads import (
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)
from .models import Reformer, ReformerConfig, ReformerLM
from .positions import AbsolutePositions, AxialPositions, RotaryPositions, apply_rotary
from .reversible import ReversibleStack

__all__ = [
    "AbsolutePositions",
    "AxialPositions",
    "ChunkedFeedForward",
    "DecodingCache",
    "EncoderDecoderCache",
    "FullCrossAttention",
    "FullSelfAttention",
    "LSHCrossAttention",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "Reformer",
    "ReformerConfig",
    "ReformerEncoderDecoder",
    "ReformerForMaskedLM",
    "ReformerForQuestionAnswering",
    "ReformerForSequenceClassification",
    "ReformerForTokenClassification",
    "ReformerLM",
    "ReversibleStack",
    "RotaryPositions",
    "apply_rotary",
    "chunked_lm_loss",
    "hash_rotations",
]
