"""Sequence to sequence: a Reformer reads, another writes and attends to it, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .cross_attention import FullCrossAttention, LSHCrossAttention
from .feed_forward import chunked_lm_loss
from .models import Reformer, ReformerConfig, _AttentionBlock, lm_head
from .pretrained import PretrainedModel, config_from_fields
from .reversible import ReversibleBlock

__all__ = ["ReformerEncoderDecoder"]

CROSS_KINDS = ("full", "lsh")


class ReformerEncoderDecoder(PretrainedModel):
    """Encoder and decoder, for translation, summarisation or speech (Reformer, section 5).

    A decoder layer is ``a = attention(norm(x2))``, ``y1 = x1 + a + cross(norm(x2 + a))``,
    ``y2 = x2 + feed_forward(norm(y1))``. Both stacks are reversible. The decoder keeps the
    encoder's output once for all layers and sums up its gradient, so that the backward pass goes
    through the encoder once. Cross-attention compares contents alone, without rotary positions.

    >>> config = ReformerConfig(dim=64, heads=2, layers=("local", "lsh"))
    >>> model = ReformerEncoderDecoder(dataclasses.replace(config, causal=False), config, "lsh")
    >>> source, tokens = torch.randint(256, (1, 1000)), torch.randint(256, (1, 300))
    >>> model.loss(source, tokens[:, :-1], tokens[:, 1:]).backward()

    Args:
        encoder_config: not causal.
        decoder_config: causal; may differ in all else. ``n_hashes``, ``chunk_size``, ``n_buckets``,
            ``same_bucket``, ``correct_duplicates`` and ``attention_dropout`` are also those of the
            cross-attention.
        cross: the cross-attention of all decoder layers or of each: "full", exact, or "lsh", with
            memory linear in both lengths.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        encoder_config: ReformerConfig,
        decoder_config: ReformerConfig,
        cross: str | Sequence[str] = "full",
    ) -> None:
        super().__init__()
        if encoder_config.causal or not decoder_config.causal:
            raise ValueError(
                "ReformerEncoderDecoder: expected encoder_config.causal False and "
                f"decoder_config.causal True, got {encoder_config.causal} and "
                f"{decoder_config.causal}"
            )
        depth = len(decoder_config.layers)
        kinds = (cross,) * depth if isinstance(cross, str) else tuple(cross)
        if len(kinds) != depth or any(kind not in CROSS_KINDS for kind in kinds):
            raise ValueError(
                f"ReformerEncoderDecoder: expected cross to be one of {CROSS_KINDS}, or one for "
                f"each of {depth} decoder layers, got {cross!r}"
            )
        self.encoder_config = encoder_config
        self.decoder_config = decoder_config
        self.cross = kinds
        self.encoder = Reformer(encoder_config)
        self.decoder = _Decoder(decoder_config, encoder_config.output_width, kinds)
        self.head = lm_head(decoder_config)

    def _fields(self) -> dict[str, Any]:
        return {
            "encoder": dataclasses.asdict(self.encoder_config),
            "decoder": dataclasses.asdict(self.decoder_config),
            "cross": self.cross,
        }

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Self:
        if fields.keys() != {"encoder", "decoder", "cross"}:
            raise ValueError(f"expected fields encoder, decoder and cross, got {sorted(fields)}")
        return cls(
            config_from_fields(ReformerConfig, fields["encoder"]),
            config_from_fields(ReformerConfig, fields["decoder"]),
            fields["cross"],
        )

    @property
    def output_weight(self) -> Tensor:
        """``(vocab_size, dim)``: the head's, or the decoder's token embedding's if tied."""
        return self.decoder.embedding.weight if self.head is None else self.head.weight

    @property
    def output_bias(self) -> Tensor | None:
        """``(vocab_size,)``, or None without a bias."""
        return None if self.head is None else self.head.bias

    def encode(
        self,
        source: Tensor,
        *,
        source_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
    ) -> Tensor:
        """The encoder's hidden states ``(B, M, encoder dim)``, the ``context`` of
        :meth:`decode`; arguments as in :meth:`forward`."""
        return self.encoder(source, key_padding_mask=source_padding_mask, n_hashes=n_hashes)

    def decode(
        self,
        tokens: Tensor,
        context: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        source_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
    ) -> Tensor:
        """The decoder's hidden states ``(B, L, decoder dim)``; arguments as in :meth:`forward`,
        with what :meth:`encode` returned as context."""
        return self.decoder(
            tokens,
            context,
            key_padding_mask=key_padding_mask,
            context_padding_mask=source_padding_mask,
            n_hashes=n_hashes,
        )

    def forward(
        self,
        source: Tensor,
        tokens: Tensor,
        *,
        source_padding_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            source: int64 ``(B, M)``, or embeddings, floating ``(B, M, encoder dim)``.
            tokens: int64 ``(B, L)``, or embeddings, floating ``(B, L, decoder dim)``.
            source_padding_mask: bool ``(B, M)``, True = padding.
            key_padding_mask: bool ``(B, L)``, True = padding.
            n_hashes: hash rounds of this call, in all layers; default: the configurations'.

        Returns:
            ``(B, L, vocab_size)``.
        """
        context = self.encode(source, source_padding_mask=source_padding_mask, n_hashes=n_hashes)
        hidden = self.decode(
            tokens,
            context,
            key_padding_mask=key_padding_mask,
            source_padding_mask=source_padding_mask,
            n_hashes=n_hashes,
        )
        return F.linear(hidden, self.output_weight, self.output_bias)

    def loss(
        self,
        source: Tensor,
        tokens: Tensor,
        targets: Tensor,
        reduction: str = "mean",
        *,
        source_padding_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
    ) -> Tensor:
        """Cross-entropy in nats of the targets, teacher-forced: each is predicted from the true
        tokens before it. The logits of all positions are never held.

        Args:
            source, tokens, source_padding_mask, key_padding_mask, n_hashes: as in :meth:`forward`.
            targets: int64 ``(B, L)``, the tokens to predict; -100 does not count.
            reduction: "mean", "sum" or "none", as in :func:`chunked_lm_loss`.
        """
        context = self.encode(source, source_padding_mask=source_padding_mask, n_hashes=n_hashes)
        hidden = self.decode(
            tokens,
            context,
            key_padding_mask=key_padding_mask,
            source_padding_mask=source_padding_mask,
            n_hashes=n_hashes,
        )
        return chunked_lm_loss(
            hidden,
            self.output_weight,
            self.output_bias,
            targets,
            chunk_size=self.decoder_config.loss_chunk_size,
            reduction=reduction,
        )


class _DecoderAttentionBlock(nn.Module):
    """F of a decoder layer: ``a + cross(x + a, context)`` with ``a = attention(x)``."""

    def __init__(self, attention: nn.Module, cross: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.cross = cross

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor,
        self_kwargs: Mapping[str, Any],
        cross_kwargs: Mapping[str, Any],
        buckets: Tensor | None = None,
        cross_buckets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        replay = {}
        if buckets is not None:
            self_kwargs = {**self_kwargs, "buckets": buckets}
        if cross_buckets is not None:
            cross_kwargs = {**cross_kwargs, "buckets": cross_buckets}
        y = self.attention(x, **self_kwargs)
        if not isinstance(y, Tensor):
            y, replay["buckets"] = y[0], y[1]["buckets"]
        y = y.to(x.dtype)  # both terms join the stream in its precision, under autocast too
        z = self.cross(x + y, context=context, **cross_kwargs)
        if not isinstance(z, Tensor):
            z, replay["cross_buckets"] = z[0], z[1]["buckets"]
        return y + z, replay


class _Decoder(Reformer):
    """A :class:`Reformer` with cross-attention in every layer."""

    def __init__(self, config: ReformerConfig, context_dim: int, cross: Sequence[str]) -> None:
        super().__init__(config)
        self.cross = tuple(cross)
        for index, (block, kind) in enumerate(zip(self.layers.blocks, cross, strict=True)):
            assert isinstance(block, ReversibleBlock)
            attention = _cross_attention(config, context_dim, kind, index)
            block.f = _DecoderAttentionBlock(block.f, _AttentionBlock(config, attention))
        if config.attention_dropout > 0.0 and "full" in cross:
            self.layers.preserve_rng_state = True
        self._initialize()

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        context: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        context_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
    ) -> Tensor:
        self._check(tokens, key_padding_mask)
        x = self._embed(tokens)
        length = x.shape[1]
        x, key_padding_mask = self._pad(x, key_padding_mask)
        self_kwargs = self._layer_kwargs(x, key_padding_mask, n_hashes)
        cross_kwargs = self._cross_kwargs(x, key_padding_mask, context_padding_mask, n_hashes)
        f_kwargs = [
            {"self_kwargs": for_self, "cross_kwargs": for_cross}
            for for_self, for_cross in zip(self_kwargs, cross_kwargs, strict=True)
        ]
        return self._run(x, f_kwargs, {"context": context})[:, :length]

    def _cross_kwargs(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        context_padding_mask: Tensor | None,
        n_hashes: int | None,
    ) -> list[dict[str, Any]]:
        """What each cross-attention gets beside x and context; after ``_layer_kwargs``, which
        counts ``hash_step``."""
        step = self.hash_step.clone() if self.training else 0
        seed: Tensor | None = None
        if self.training and self.config.attention_dropout > 0.0 and "lsh" in self.cross:
            seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
        result = []
        for index, kind in enumerate(self.cross):
            kwargs: dict[str, Any] = {"context_padding_mask": context_padding_mask}
            if kind == "lsh":
                kwargs.update(
                    query_padding_mask=key_padding_mask,
                    n_hashes=n_hashes,
                    hash_step=step,
                    dropout_seed=None if seed is None else seed + index,
                    return_buckets=True,
                )
            result.append(kwargs)
        return result


def _cross_attention(
    config: ReformerConfig, context_dim: int, kind: str, index: int
) -> FullCrossAttention | LSHCrossAttention:
    if kind == "full":
        return FullCrossAttention(
            config.dim,
            config.heads,
            context_dim=context_dim,
            head_dim=config.head_dim,
            dropout=config.attention_dropout,
        )
    return LSHCrossAttention(
        config.dim,
        config.heads,
        context_dim=context_dim,
        head_dim=config.head_dim,
        n_hashes=config.n_hashes,
        chunk_size=config.chunk_size,
        n_buckets=config.n_buckets,
        same_bucket=config.same_bucket,
        correct_duplicates=config.correct_duplicates,
        dropout=config.attention_dropout,
        hash_seed=config.hash_seed + len(config.layers) + index,
    )
