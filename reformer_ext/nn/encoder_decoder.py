"""Sequence to sequence: a Reformer reads, another writes and attends to it, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .attention import check_padding
from .blocks import AttentionBlock, lm_head, without_padding
from .cache import DecodingCache, reorder_rows
from .checks import is_int
from .config import ReformerConfig
from .cross_attention import CROSS_ATTENTIONS, CrossAttention, CrossCache
from .feed_forward import chunked_lm_loss
from .models import Reformer
from .pretrained import PretrainedModel, config_from_fields
from .reversible import ReversibleBlock

__all__ = ["EncoderDecoderCache", "ReformerEncoderDecoder"]


class EncoderDecoderCache(nn.Module):
    """What a decoder remembers: the caches of its self-attention, and each layer's keys and values
    of the source, which are computed once.

    Made by :meth:`ReformerEncoderDecoder.new_cache`. All buffers have a fixed size and are changed
    in place, whatever the source.

    Attributes:
        decoder: of the self-attention.
        cross: a :class:`CrossCache` per layer.
        source_capacity: most positions of a source.
    """

    def __init__(self, decoder: DecodingCache, source_capacity: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.source_capacity = source_capacity
        config = decoder.config
        self.cross = nn.ModuleList(
            CrossCache(
                decoder.batch,
                config.heads,
                config.head_width,
                source_capacity,
                dtype=decoder.dtype,
                device=decoder.lengths.device,
            )
            for _ in config.layers
        )

    @property
    def batch(self) -> int:
        """B."""
        return self.decoder.batch

    @property
    def capacity(self) -> int:
        """Target positions there is room for."""
        return self.decoder.capacity

    @property
    def filled(self) -> bool:
        """Whether there have been a source and a prompt."""
        return self.decoder.filled

    @property
    def lengths(self) -> Tensor:
        """int64 ``(B,)``, target positions of each sequence."""
        return self.decoder.lengths

    def reset(self) -> None:
        """Forgets everything: the next call brings a new source and prompt."""
        self.decoder.reset()

    def reorder(self, indices: Tensor | Sequence[int]) -> None:
        """As :meth:`DecodingCache.reorder`, sources included."""
        reorder_rows(self, indices, self.batch)


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
        if len(kinds) != depth or any(kind not in CROSS_ATTENTIONS for kind in kinds):
            raise ValueError(
                f"ReformerEncoderDecoder: expected cross to be one of {tuple(CROSS_ATTENTIONS)}, "
                f"or one for each of {depth} decoder layers, got {cross!r}"
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
        check_padding(
            "ReformerEncoderDecoder: expected source_padding_mask", source_padding_mask, source
        )
        return self.encoder(source, key_padding_mask=source_padding_mask, n_hashes=n_hashes)

    def decode(
        self,
        tokens: Tensor,
        context: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        source_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """The decoder's hidden states ``(B, L, decoder dim)``; arguments as in :meth:`forward`,
        with what :meth:`encode` returned as context."""
        return self.decoder(
            tokens,
            context,
            key_padding_mask=key_padding_mask,
            context_padding_mask=source_padding_mask,
            n_hashes=n_hashes,
            cache=cache,
        )

    def new_cache(
        self, batch: int, capacity: int, source_capacity: int, **options: Any
    ) -> EncoderDecoderCache:
        """An empty cache for :meth:`forward`.

        Args:
            batch: pairs B.
            capacity: most target positions.
            source_capacity: most source positions M. Each step attends over all of them.
            **options: as in :meth:`Reformer.new_cache`, of the decoder.

        Raises:
            ValueError: an argument is out of range, or a decoder layer has LSH cross-attention,
                whose chunks depend on all queries: it has no step by step.
        """
        return self.decoder.new_cache(batch, capacity, source_capacity, **options)

    def forward(
        self,
        source: Tensor | None,
        tokens: Tensor,
        *,
        source_padding_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Logits of the next token.

        >>> config = ReformerConfig(dim=64, heads=2, layers=("local", "lsh"))
        >>> model = ReformerEncoderDecoder(dataclasses.replace(config, causal=False), config).eval()
        >>> source, start = torch.randint(256, (1, 1000)), torch.tensor([[0]])
        >>> cache = model.new_cache(batch=1, capacity=300, source_capacity=1000)
        >>> with torch.no_grad():
        ...     logits = model(source, start, cache=cache)  # source and prompt
        ...     logits = model(None, logits[:, -1:].argmax(-1), cache=cache)  # one token more

        Args:
            source: int64 ``(B, M)``, or embeddings, floating ``(B, M, encoder dim)``; None with a
                cache that has one.
            tokens: int64 ``(B, L)``, or embeddings, floating ``(B, L, decoder dim)``.
            source_padding_mask: bool ``(B, M)``, True = padding.
            key_padding_mask: bool ``(B, L)``, True = padding.
            n_hashes: hash rounds of this call, in all layers; default: the configurations'.
            cache: from :meth:`new_cache`. Empty: takes the source, which is encoded once, and the
                tokens, which begin the targets. Else the tokens continue those.

        Returns:
            ``(B, L, vocab_size)``.

        Raises:
            ValueError: wrong shapes, no source where there is need of one, or one too many.
            RuntimeError: a cache in training or where gradients are recorded.
        """
        context = None
        if source is not None:
            if cache is not None:
                self.decoder._check_cross(cache, True, tokens, n_hashes)
            context = self.encode(
                source, source_padding_mask=source_padding_mask, n_hashes=n_hashes
            )
        hidden = self.decode(
            tokens,
            context,
            key_padding_mask=key_padding_mask,
            source_padding_mask=source_padding_mask,
            n_hashes=n_hashes,
            cache=cache,
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


class DecoderAttentionBlock(nn.Module):
    """F of a decoder layer: ``a + cross(x + a, context)`` with ``a = attention(x)``."""

    def __init__(self, attention: AttentionBlock, cross: AttentionBlock) -> None:
        super().__init__()
        self.attention = attention
        self.cross = cross

    @property
    def self_attention(self) -> nn.Module:
        """The layer's attention over the target itself."""
        return self.attention.self_attention

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
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
            assert isinstance(block.f, AttentionBlock)
            attention = CROSS_ATTENTIONS[kind].of_layer(config, context_dim, index)
            block.f = DecoderAttentionBlock(block.f, AttentionBlock(config, attention))
        if any(layer.draws for layer in self.cross_layers()):
            self.layers.preserve_rng_state = True
        self._initialize()

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        context: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        context_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        self._check(tokens, key_padding_mask, n_hashes)
        tokens = without_padding(tokens, key_padding_mask)
        if cache is not None:
            self._check_cross(cache, context is not None, tokens, n_hashes)
            if context is not None:
                self._fill_cross(cache, context, context_padding_mask)
            elif context_padding_mask is not None:
                raise ValueError(
                    "ReformerEncoderDecoder: expected no source_padding_mask after the source, "
                    "got one"
                )
            return self._forward_cached(
                tokens,
                key_padding_mask,
                n_hashes,
                cache.decoder,
                [cache.cross[layer] for layer in self.config.schedule],
            )
        if context is None:
            raise ValueError("ReformerEncoderDecoder: expected a source or its context, got none")
        x = self._embed(tokens)
        length = x.shape[1]
        x, key_padding_mask = self._pad(x, key_padding_mask)
        self_kwargs = self._layer_kwargs(x, key_padding_mask, n_hashes)
        cross_kwargs = self._cross_kwargs(x, key_padding_mask, context_padding_mask, n_hashes)
        f_kwargs = [
            {"self_kwargs": for_self, "cross_kwargs": for_cross}
            for for_self, for_cross in zip(self_kwargs, cross_kwargs, strict=True)
        ]
        return self._unpad(self._run(x, f_kwargs, {"context": context}), length)

    def new_cache(  # type: ignore[override]
        self, batch: int, capacity: int, source_capacity: int, **options: Any
    ) -> EncoderDecoderCache:
        """See :meth:`ReformerEncoderDecoder.new_cache`."""
        name = "ReformerEncoderDecoder.new_cache"
        if not all(layer.decodes for layer in self.cross_layers()):
            raise ValueError(
                f"{name}: expected cross-attention 'full' in all decoder layers, got {self.cross}; "
                "where chunks of LSH cross-attention begin depends on all queries, so that it "
                "cannot go token by token (its weights fit a model with cross='full')"
            )
        if not is_int(source_capacity, 1):
            raise ValueError(
                f"{name}: expected source_capacity to be an integer >= 1, got {source_capacity}"
            )
        cache = super().new_cache(batch, capacity, **options)
        with torch.inference_mode(False):  # whose tensors nothing else may change in place
            return EncoderDecoderCache(cache, source_capacity)

    def _check_cross(
        self, cache: EncoderDecoderCache, has_source: bool, tokens: Tensor, n_hashes: int | None
    ) -> None:
        """Raises unless the cache may be used now, and has a source or gets one."""
        if not isinstance(cache, EncoderDecoderCache):
            raise TypeError(
                "ReformerEncoderDecoder: expected a cache from new_cache, got "
                f"{type(cache).__name__}"
            )
        self._check_cache(tokens, n_hashes, cache.decoder)
        if cache.filled == has_source:
            raise ValueError(
                "ReformerEncoderDecoder: expected "
                + ("no source after the prompt, got one" if has_source else "a source, got none")
            )

    def cross_layers(self) -> list[CrossAttention]:
        """The cross-attention of each layer."""
        return [block.f.cross.attention for block in self.layers.blocks]  # type: ignore

    def _fill_cross(
        self, cache: EncoderDecoderCache, context: Tensor, context_padding_mask: Tensor | None
    ) -> None:
        for layer, cross in zip(self.cross_layers(), cache.cross, strict=True):
            assert isinstance(cross, CrossCache)
            layer.fill_cache(cross, context, context_padding_mask)

    def _cross_kwargs(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        context_padding_mask: Tensor | None,
        n_hashes: int | None,
    ) -> list[dict[str, Any]]:
        """What each cross-attention gets beside x and context; after ``_layer_kwargs``, which
        counts ``hash_step``."""
        config, layers = self.config, self.cross_layers()
        step = self.hash_step.clone() if self.training else 0
        seed: Tensor | None = None
        if self.training and any(layer.dropout > 0.0 and not layer.draws for layer in layers):
            seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
        first = config.hash_seed + len(config.schedule)
        return [
            layers[index].cross_kwargs(
                context_padding_mask,
                query_padding_mask=key_padding_mask,
                n_hashes=n_hashes,
                hash_step=step,
                # A layer that is called again hashes anew, other than all self-attention.
                hash_seed=None if config.repeat == 1 else first + call,
                dropout_seed=None if seed is None else seed + call,
            )
            for call, index in enumerate(config.schedule)
        ]
