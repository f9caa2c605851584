"""Modules and models built from the operators; see the submodules."""

from __future__ import annotations

from .attention import (
    ATTENTIONS,
    AttentionCall,
    AttentionOptions,
    FullSelfAttention,
    LocalSelfAttention,
    LSHSelfAttention,
    SelfAttention,
    hash_rotations,
)
from .cache import CacheSizes, DecodingCache, LayerCache
from .config import Layer, ReformerConfig
from .cross_attention import FullCrossAttention, LSHCrossAttention
from .encoder_decoder import EncoderDecoderCache, ReformerEncoderDecoder
from .feed_forward import ChunkedFeedForward, chunked_lm_loss
from .heads import (
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)
from .models import Reformer, ReformerLM
from .positions import AbsolutePositions, AxialPositions, RotaryPositions, apply_rotary
from .reversible import ReversibleStack

__all__ = [
    "ATTENTIONS",
    "AbsolutePositions",
    "AttentionCall",
    "AttentionOptions",
    "AxialPositions",
    "CacheSizes",
    "ChunkedFeedForward",
    "DecodingCache",
    "EncoderDecoderCache",
    "FullCrossAttention",
    "FullSelfAttention",
    "LSHCrossAttention",
    "LSHSelfAttention",
    "Layer",
    "LayerCache",
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
    "SelfAttention",
    "apply_rotary",
    "chunked_lm_loss",
    "hash_rotations",
]
