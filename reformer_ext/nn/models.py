"""The Reformer and the language model (Reformer, arXiv 2001.04451)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import exports_any
from ..packed import map_sequences, sequence_lengths
from .attention import ATTENTIONS, AttentionCall, SelfAttention, check_padding
from .blocks import (
    AttentionBlock,
    FeedForwardBlock,
    autocast_dtype,
    by_heads,
    lm_head,
    look_up,
    with_cross,
    without_padding,
)
from .cache import CacheSizes, DecodingCache
from .checks import is_int
from .config import ReformerConfig
from .feed_forward import chunked_lm_loss
from .positions import AbsolutePositions, AxialPositions, RotaryPositions
from .pretrained import PretrainedModel
from .reversible import ReversibleStack

__all__ = ["Reformer", "ReformerConfig", "ReformerLM"]


class Reformer(nn.Module):
    """Tokens or embeddings to hidden states.

    Every layer is ``y1 = x1 + attention(norm(x2))``, ``y2 = x2 + feed_forward(norm(y1))``
    (Reformer, section 3). Both streams start as the embedding; the result is their mean, or the two
    side by side, normalised. Any length; with axial or absolute positions, up to ``max_length``.

    In training the hash of each forward pass follows from ``hash_seed`` and the buffer
    ``hash_step``, which counts them and is saved with the weights; in evaluation it is always the
    same. Dropout takes its seeds from torch's global generator, so ``torch.manual_seed`` makes
    training reproducible.
    """

    hash_step: Tensor

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions: AxialPositions | AbsolutePositions | None = None
        self.rotary: RotaryPositions | None = None
        if config.positions == "axial":
            side = math.isqrt(config.max_length - 1) + 1
            self.positions = AxialPositions(
                config.axial_shape or (side, side),
                config.dim,
                config.axial_dims,
                summed=config.axial_sum,
            )
        elif config.positions == "absolute":
            self.positions = AbsolutePositions(config.max_length, config.dim)
        elif config.positions == "rotary":
            self.rotary = RotaryPositions(config.head_width, config.rotary_base)
        self.dropout = nn.Dropout(config.dropout)
        attentions: list[SelfAttention] = [
            ATTENTIONS[layer.attention].from_config(
                config, dict(layer.options), index, f"ReformerConfig.layers[{index}]"
            )
            for index, layer in enumerate(config.each_layer())
        ]
        self.layers = ReversibleStack(
            (
                (
                    AttentionBlock(config, attention),
                    FeedForwardBlock(config) if layer.feed_forward else None,
                )
                for attention, layer in zip(attentions, config.each_layer(), strict=True)
            ),
            schedule=None if config.repeat == 1 else config.schedule,
            reversible=config.reversible,
            preserve_rng_state=config.dropout > 0.0
            or config.ff_dropout > 0.0
            or any(attention.draws for attention in attentions),
        )
        self.norm = nn.LayerNorm(config.output_width, eps=config.norm_eps)
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.register_buffer("hash_step", torch.zeros(1, dtype=torch.int64))
        self._initialize()

    def _initialize(self) -> None:
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, nn.Linear):
                residual = name.endswith("out_proj")
                depth_scale = (2 * len(self.config.schedule)) ** -0.5 if residual else 1.0
                nn.init.normal_(module.weight, std=std * depth_scale)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (AxialPositions, AbsolutePositions)):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, std=std)

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cache: DecodingCache | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Hidden states.

        Args:
            tokens: int64 ``(B, L)``, or embeddings, floating ``(B, L, dim)``.
            key_padding_mask: bool ``(B, L)``, True = padding.
            n_hashes: hash rounds of this call; default ``config.n_hashes``.
            cache: from :meth:`new_cache`. Empty: the tokens begin the sequences, padded on either
                side where there is a mask. Else they continue them, at a cost that does not depend
                on how long they are (but for full layers).
            cu_seqlens: tokens are packed sequences in a batch of one, each computed as alone; see
                :mod:`reformer_ext.packed`.

        Returns:
            ``(B, L, config.output_width)``.

        Raises:
            ValueError: wrong shape, wrong cu_seqlens, more positions than there are, or than the
                cache has room for.
            RuntimeError: a cache in training or where gradients are recorded.
        """
        self._check(tokens, key_padding_mask, n_hashes)
        tokens = without_padding(tokens, key_padding_mask)
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("Reformer: expected cu_seqlens or a cache, got both")
            return self._forward_cached(tokens, key_padding_mask, n_hashes, cache)
        lengths = None
        if cu_seqlens is not None:
            lengths = sequence_lengths("Reformer", cu_seqlens, tokens.shape[:2], key_padding_mask)
            if self.config.length_multiple > 1:
                raise ValueError(
                    "Reformer: expected a model without length_multiple with cu_seqlens, got "
                    f"{self.config.length_multiple}"
                )
        x = self._embed(tokens, lengths)
        length = x.shape[1]
        x, key_padding_mask = self._pad(x, key_padding_mask)
        f_kwargs = self._layer_kwargs(x, key_padding_mask, n_hashes, lengths)
        return self._unpad(self._run(x, by_heads(self.config, f_kwargs)), length)

    def _run(
        self,
        x: Tensor,
        f_kwargs: Sequence[Any],
        context: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        y1, y2 = self.layers(x, f_kwargs=f_kwargs, context=context)
        y = torch.cat([y1, y2], dim=-1) if self.config.streams == "concat" else (y1 + y2) / 2
        return self.output_dropout(self.norm(y))

    def new_cache(
        self,
        batch: int,
        capacity: int,
        *,
        n_hashes: int | None = None,
        n_buckets: int | Sequence[int] | None = None,
        window: int | None = None,
        dtype: torch.dtype | None = None,
        hash_length: int | None = None,
    ) -> DecodingCache:
        """An empty cache on the model's device, for use with and without inference mode.

        Args:
            batch: sequences B.
            capacity: most positions, of prompt and continuation together.
            n_hashes: hash rounds; default ``config.n_hashes``.
            n_buckets: an even number or even factors; default the layer's, else
                :func:`reformer_ext.default_n_buckets` of hash_length.
            window: positions that a bucket remembers; default the layer's chunk size, twice the
                mean bucket of a full cache.
            dtype: of keys and values; default autocast's where that is on, else the parameters'.
            hash_length: how long the sequences are that the hash is made for; default capacity.

        Raises:
            ValueError: the model is not causal, or an argument is out of range.
        """
        name = "Reformer.new_cache"
        config = self.config
        if not config.causal:
            raise ValueError(f"{name}: expected a causal model, got causal=False")
        weight = self.embedding.weight
        if dtype is None:
            dtype = autocast_dtype(weight.device) or weight.dtype
        factors = (n_buckets,) if isinstance(n_buckets, int) else n_buckets
        if factors is not None:
            factors = tuple(factors)
        sizes = CacheSizes(
            batch, capacity, dtype, weight.device, n_hashes, factors, window, hash_length
        )
        sizes.check(name)
        if config.positions in ("axial", "absolute") and capacity > config.max_length:
            raise ValueError(
                f"{name}: expected capacity up to max_length = {config.max_length} "
                f"with {config.positions} positions, got {capacity}"
            )
        with torch.inference_mode(False):  # whose tensors nothing else may change in place
            layers = [
                attention.new_cache(dataclasses.replace(sizes, shift=shift))
                for attention, shift in self.attention_calls()
            ]
            return DecodingCache(config, sizes, layers)

    def attention_calls(self) -> Iterator[tuple[SelfAttention, int]]:
        """The attention layer of each call, and its :attr:`AttentionCall.shift`."""
        for call, layer in enumerate(self.config.schedule):
            attention: SelfAttention = self.layers.blocks[layer].f.self_attention  # type: ignore
            yield attention, call - layer

    def penalty(self) -> Tensor:
        """What the layers add to the loss, a scalar: see :meth:`SelfAttention.penalty`. A layer
        counts once, however often it is applied. ``loss`` of the models does not include it."""
        total = self.embedding.weight.new_zeros(())
        for module in self.layers.modules():
            if isinstance(module, SelfAttention):
                total = total + module.penalty()
        return total

    def _forward_cached(
        self,
        tokens: Tensor,
        key_padding_mask: Tensor | None,
        n_hashes: int | None,
        cache: DecodingCache,
        cross_caches: Sequence[nn.Module] = (),
    ) -> Tensor:
        """``cross_caches`` of an encoder-decoder's layers, filled."""
        self._check_cache(tokens, n_hashes, cache)
        length = tokens.shape[1]
        if cache.filled:
            if key_padding_mask is not None:
                raise ValueError("Reformer: expected no key_padding_mask after the prompt, got one")
            positions = cache.lengths[:, None]
            if length != 1:
                positions = positions + torch.arange(length, device=tokens.device)
            rotary = None if self.rotary is None else self.rotary.at(positions[:, None])
            x = self._embed(tokens, at=positions)
            steps = [{"rotary": rotary, **step} for step in cache.steps(length)]
            hidden = self._run(x, with_cross(steps, cross_caches))
            cache.extend(length, length)
            return hidden

        cache.reset()  # of what a prompt that failed halfway may have left
        lengths = torch.full_like(cache.lengths, length)
        order: Tensor | None = None
        if key_padding_mask is not None:
            # Padding goes to the end: every sequence is as if it were alone, but that the first
            # chunk of a hash round looks back to padding.
            lengths = (~key_padding_mask).sum(1)
            order = key_padding_mask.to(torch.uint8).argsort(dim=1, stable=True)
            key_padding_mask = key_padding_mask.gather(1, order)
            tokens = _take(tokens, order)
        x, key_padding_mask = self._pad(self._embed(tokens), key_padding_mask)
        rotary = None if self.rotary is None else self.rotary(x.shape[1], x.device)
        common = {"rotary": rotary, "key_padding_mask": key_padding_mask}
        prompts = [{**common, "cache": layer} for layer in cache.layers]
        hidden = self._unpad(self._run(x, with_cross(prompts, cross_caches)), length)
        cache.extend(lengths, length)
        return hidden if order is None else _take(hidden, order.argsort(dim=1))

    def _check_cache(self, tokens: Tensor, n_hashes: int | None, cache: DecodingCache) -> None:
        """Raises unless the cache may be used now and has room for the tokens."""
        if not isinstance(cache, DecodingCache):
            raise TypeError(
                f"Reformer: expected a DecodingCache from new_cache, got {type(cache).__name__}"
            )
        if self.training or torch.is_grad_enabled():
            raise RuntimeError(
                "Reformer: expected evaluation mode and torch.no_grad() with a cache, got "
                f"training={self.training} and gradients {torch.is_grad_enabled()}"
            )
        if n_hashes is not None:
            raise ValueError("Reformer: n_hashes is the cache's; give it to new_cache")
        if not torch.compiler.is_compiling():
            cache.check(self.config, tokens.shape[0], tokens.shape[1])

    def _check(self, tokens: Tensor, key_padding_mask: Tensor | None, n_hashes: int | None) -> None:
        """Raises ValueError unless the arguments have the shapes that :meth:`forward` says."""
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"Reformer: expected tokens to be a tensor, got {type(tokens).__name__}"
            )
        if tokens.is_floating_point():
            if tokens.dim() != 3 or tokens.shape[-1] != self.config.dim:
                raise ValueError(
                    f"Reformer: expected embeddings [B, L, {self.config.dim}], "
                    f"got {list(tokens.shape)}"
                )
        elif tokens.dim() != 2:
            raise ValueError(f"Reformer: expected tokens [B, L], got {list(tokens.shape)}")
        elif tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"Reformer: expected tokens of int64 or int32, got {tokens.dtype}")
        if tokens.shape[1] < 1:
            raise ValueError(f"Reformer: expected at least one position, got {list(tokens.shape)}")
        check_padding("Reformer: expected key_padding_mask", key_padding_mask, tokens)
        if n_hashes is not None and not is_int(n_hashes, 1):
            raise ValueError(
                f"Reformer: expected n_hashes to be None or an integer >= 1, got {n_hashes}"
            )

    def _embed(
        self, tokens: Tensor, lengths: list[int] | None = None, at: Tensor | None = None
    ) -> Tensor:
        """With the positions of one sequence, of packed ones of these lengths, or ``at (B, L)``."""
        x = tokens if tokens.is_floating_point() else look_up(self.embedding, tokens)
        positions = self.positions
        if positions is None:
            return self.dropout(x)
        if at is not None:
            return self.dropout(x + positions.at(at))
        longest, limit = max(lengths or [x.shape[1]]), self.config.max_length
        if longest > limit:  # an axial grid may have more
            raise ValueError(
                f"Reformer: expected at most max_length = {limit} positions, got {longest}"
            )
        if lengths is None:
            return self.dropout(x + positions(x.shape[1]))
        (x,) = map_sequences(lambda _, x: (x + positions(x.shape[1]),), lengths, [(x, 1)], (1,))
        return self.dropout(x)

    def _pad(self, x: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Masked positions up to a whole multiple of ``config.length_multiple``."""
        length, multiple = x.shape[1], self.config.length_multiple
        if multiple > 1 and exports_any(length):
            # Whether there is an excess would fix the graph: an index that stops at the last.
            places = torch.arange(length + -length % multiple, device=x.device)
            padding = (places >= length).expand(x.shape[0], -1)
            places = places.clamp(max=length - 1)
            if key_padding_mask is not None:
                padding = padding | key_padding_mask[:, places]
            return x[:, places], padding
        excess = -length % multiple
        if excess == 0:
            return x, key_padding_mask
        if key_padding_mask is None:
            key_padding_mask = x.new_zeros(x.shape[:2], dtype=torch.bool)
        return F.pad(x, (0, 0, 0, excess)), F.pad(key_padding_mask, (0, excess), value=True)

    def _unpad(self, hidden: Tensor, length: int) -> Tensor:
        """Without the positions that :meth:`_pad` added."""
        if self.config.length_multiple > 1 and exports_any(length):
            # A slice would ask whether it leaves anything out.
            return hidden[:, torch.arange(length, device=hidden.device)]
        return hidden[:, :length]

    def _layer_kwargs(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        n_hashes: int | None,
        lengths: list[int] | None = None,
    ) -> list[dict[str, Any]]:
        """What each attention layer gets beside x: one draw of a seed for all of them."""
        common: dict[str, Any] = {"key_padding_mask": key_padding_mask}
        if self.rotary is not None:
            common["rotary"] = self.rotary(
                x.shape[1] if lengths is None else max(lengths), x.device
            )
        if lengths is not None:
            common["cu_seqlens"] = list(accumulate(lengths, initial=0))
            if self.rotary is not None:
                common["rotary"] = tuple(
                    torch.cat([table[:length] for length in lengths]) for table in common["rotary"]
                )
        step: int | Tensor = 0
        seed: Tensor | None = None
        if self.training:
            self.hash_step.add_(1)
            step = self.hash_step.clone()  # the buffer moves on before this pass's backward
            if any(attention.dropout > 0.0 for attention, _ in self.attention_calls()):
                seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
        return [
            attention.call_kwargs(
                AttentionCall(
                    common,
                    shift,
                    n_hashes,
                    step,
                    None if seed is None else seed + index,
                )
            )
            for index, (attention, shift) in enumerate(self.attention_calls())
        ]


class ReformerLM(PretrainedModel):
    """Language model: :class:`Reformer` and a projection onto the vocabulary.

    >>> model = ReformerLM(ReformerConfig(dim=64, heads=2, layers=("local", "lsh")))
    >>> tokens = torch.randint(256, (1, 1000))
    >>> loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    >>> loss.backward()
    """

    config_class = ReformerConfig

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.config = config
        self.reformer = Reformer(config)
        self.head = lm_head(config)

    @property
    def output_weight(self) -> Tensor:
        """``(vocab_size, output_width)``: the head's, or the token embedding's if tied."""
        return self.reformer.embedding.weight if self.head is None else self.head.weight

    @property
    def output_bias(self) -> Tensor | None:
        """``(vocab_size,)``, or None without a bias."""
        return None if self.head is None else self.head.bias

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cache: DecodingCache | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, L, vocab_size)`` of the next token; arguments as in
        :meth:`Reformer.forward`.

        >>> model = ReformerLM(ReformerConfig(dim=64, heads=2, layers=("local", "lsh"))).eval()
        >>> cache = model.new_cache(batch=1, capacity=2000)
        >>> with torch.no_grad():
        ...     logits = model(torch.randint(256, (1, 1000)), cache=cache)  # the prompt
        ...     logits = model(logits[:, -1:].argmax(-1), cache=cache)  # one token more
        """
        hidden = self.reformer(
            tokens,
            key_padding_mask=key_padding_mask,
            n_hashes=n_hashes,
            cache=cache,
            cu_seqlens=cu_seqlens,
        )
        return F.linear(hidden, self.output_weight, self.output_bias)

    def new_cache(self, batch: int, capacity: int, **options: Any) -> DecodingCache:
        """An empty cache for :meth:`forward`; see :meth:`Reformer.new_cache`."""
        return self.reformer.new_cache(batch, capacity, **options)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        reduction: str = "mean",
        *,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats, without ever holding the logits of all positions.

        Args:
            tokens: int64 ``(B, L)``.
            targets: int64 ``(B, L)``, the tokens to predict; -100 does not count.
            reduction: "mean", "sum" or "none", as in :func:`chunked_lm_loss`.
            key_padding_mask, n_hashes, cu_seqlens: as in :meth:`Reformer.forward`.
        """
        hidden = self.reformer(
            tokens, key_padding_mask=key_padding_mask, n_hashes=n_hashes, cu_seqlens=cu_seqlens
        )
        return chunked_lm_loss(
            hidden,
            self.output_weight,
            self.output_bias,
            targets,
            chunk_size=self.config.loss_chunk_size,
            reduction=reduction,
        )


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Positions of ``x (B, L)`` or ``(B, L, dim)`` in ``order (B, L)``."""
    return x.gather(1, order if x.dim() == 2 else order[..., None].expand(-1, -1, x.shape[-1]))
