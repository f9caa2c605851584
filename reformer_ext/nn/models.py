"""The Reformer: configuration, model and language model (Reformer, arXiv 2001.04451)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import default_n_buckets, exports_any
from ..packed import map_sequences, sequence_lengths
from .attention import FullSelfAttention, LocalSelfAttention, LSHSelfAttention, check_padding
from .cache import DecodingCache
from .feed_forward import ACTIVATIONS, ChunkedFeedForward, chunked_lm_loss, map_positions
from .positions import AbsolutePositions, AxialPositions, RotaryPositions
from .pretrained import PretrainedModel
from .reversible import ReversibleStack

__all__ = ["Reformer", "ReformerConfig", "ReformerLM"]

LAYER_KINDS = ("local", "lsh", "full")
POSITION_KINDS = ("rotary", "axial", "absolute", "none")
STREAM_KINDS = ("mean", "concat")


@dataclass(frozen=True)
class ReformerConfig:
    """Everything that defines a :class:`Reformer`.

    Attributes:
        vocab_size: number of different tokens.
        dim: width of the model.
        layers: the attention of each layer, "local", "lsh" or "full".
        heads: attention heads H.
        head_dim: width D of a head, at most 256, on CUDA a multiple of 8; None: ``dim / heads``.
        heads_at_once: heads of an attention layer that are computed together where gradients are
            recorded, a divisor of heads; 0: all. The layer adds up what so many at a time give: the
            fewer, the less memory its backward pass takes in a reversible model, and the more
            launches. Dropout then masks each such share on its own. Not in decoders of a
            :class:`ReformerEncoderDecoder`.
        ff_hidden: width of the feed-forward layers; None: ``4 * dim``.
        ff_chunk_size: positions at a time in a feed-forward layer; 0: all, as always where
            ``torch.export`` makes the length dynamic. ``torch.compile`` compiles anew for each
            number of chunks. Where there are several, attention layers do not keep their
            normalised input, but normalise again in the backward pass.
        ff_activation: "gelu", "relu" or "silu".
        ff_glu: gated feed-forward layers.
        n_hashes: hash rounds R of LSH layers.
        chunk_size: positions in a chunk of LSH layers.
        n_buckets: of LSH layers, an even number or even factors of it; None: about
            ``2 * length / chunk_size``, by the length of each call. To be set for ``torch.export``
            with a dynamic length.
        look_back, look_ahead: chunks before and after its own that a query of an LSH layer attends
            to; look_ahead None: 0 if causal, else 1.
        local_chunk_size, local_look_back, local_look_ahead: the same for local layers.
        local_wrap: the first and the last chunk of local layers are neighbours (as in
            transformers).
        causal: positions see themselves and earlier ones only.
        same_bucket: LSH attention only within the same bucket (the paper; its code: no).
        correct_duplicates: a pair in several rounds counts once (the paper; its code: no).
        shared_qk_scale: of the logits of LSH layers and shared-QK full layers, query times
            unit-length key. 1.0 as in trax and transformers, since unit-length keys already lack
            the factor sqrt(D) that ``D ** -0.5`` makes up for; None: ``D ** -0.5``, the paper's
            formula.
        full_shared_qk: full layers share queries and keys, so that they are the exact limit of LSH
            layers.
        attention_out_bias: of the output projections of attention layers.
        attention_dropout: of attention weights.
        local_attention_dropout: of those of local layers; None: attention_dropout.
        ff_dropout: of the hidden activations of feed-forward layers.
        dropout: of the embeddings and of what attention and feed-forward layers add.
        output_dropout: of the final hidden states.
        positions: "rotary", "axial", "absolute" or "none".
        rotary_base: longest wavelength of rotary positions over 2 pi.
        rotary_before_hash: LSH layers hash with the rotary positions; else content alone.
        axial_shape: grid of axial positions; None: the smallest square that holds max_length.
        axial_dims: width per axis, summing to dim; None: as even as possible.
        axial_sum: the vectors of the axes are dim wide and added up (as in reformer-pytorch).
        max_length: most positions, with axial or absolute positions.
        length_multiple: inputs are padded to a multiple of it inside, with masked positions.
            Changes what the first chunk of a wrapped line looks back to, no more; transformers pads
            to common multiples of its chunk lengths.
        streams: how the two residual streams end: "mean" averages them, "concat" joins them, for
            hidden states of twice the width (as in trax and transformers).
        reversible: recompute activations in the backward pass instead of storing them.
        tie_embeddings: the language model's output matrix is its token embedding; for large
            vocabularies (with a small one and a wide model it starts out repeating its input).
        head_bias: of the language model's output.
        loss_chunk_size: positions at a time in the loss; 0: all.
        hash_seed: of the hashes, in evaluation and with the step number in training.
        norm_eps: of layer normalisation.
        initializer_range: standard deviation of initial weights; what feeds the residual streams is
            scaled down by ``sqrt(2 * number of layers)``.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    vocab_size: int = 256
    dim: int = 512
    layers: tuple[str, ...] = ("local", "lsh", "local", "lsh", "local", "lsh")
    heads: int = 8
    head_dim: int | None = None
    heads_at_once: int = 0
    ff_hidden: int | None = None
    ff_chunk_size: int = 0
    ff_activation: str = "gelu"
    ff_glu: bool = False
    n_hashes: int = 8
    chunk_size: int = 64
    n_buckets: int | tuple[int, ...] | None = None
    look_back: int = 1
    look_ahead: int | None = None
    local_chunk_size: int = 64
    local_look_back: int = 1
    local_look_ahead: int | None = None
    local_wrap: bool = False
    causal: bool = True
    same_bucket: bool = False
    correct_duplicates: bool = False
    shared_qk_scale: float | None = 1.0
    full_shared_qk: bool = False
    attention_out_bias: bool = False
    attention_dropout: float = 0.0
    local_attention_dropout: float | None = None
    ff_dropout: float = 0.0
    dropout: float = 0.0
    output_dropout: float = 0.0
    positions: str = "rotary"
    rotary_base: float = 10000.0
    rotary_before_hash: bool = False
    axial_shape: tuple[int, ...] | None = None
    axial_dims: tuple[int, ...] | None = None
    axial_sum: bool = False
    max_length: int = 65536
    length_multiple: int = 1
    streams: str = "mean"
    reversible: bool = True
    tie_embeddings: bool = False
    head_bias: bool = False
    loss_chunk_size: int = 4096
    hash_seed: int = 0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("layers", "n_buckets", "axial_shape", "axial_dims"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

        def check(name: str, condition: bool, expected: str) -> None:
            if not condition:
                raise ValueError(
                    f"ReformerConfig.{name}: expected {expected}, got {getattr(self, name)!r}"
                )

        for name in (
            "vocab_size",
            "dim",
            "heads",
            "n_hashes",
            "chunk_size",
            "local_chunk_size",
            "max_length",
            "length_multiple",
        ):
            check(name, _is_int(getattr(self, name), 1), "an integer >= 1")
        for name in (
            "heads_at_once",
            "ff_chunk_size",
            "look_back",
            "local_look_back",
            "loss_chunk_size",
            "hash_seed",
        ):
            check(name, _is_int(getattr(self, name), 0), "an integer >= 0")
        for name in ("look_ahead", "local_look_ahead"):
            value = getattr(self, name)
            check(name, value is None or _is_int(value, 0), "None or an integer >= 0")
        for name in ("head_dim", "ff_hidden"):
            value = getattr(self, name)
            check(name, value is None or _is_int(value, 1), "None or an integer >= 1")
        for name in ("attention_dropout", "ff_dropout", "dropout", "output_dropout"):
            value = getattr(self, name)
            check(name, _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
        local = self.local_attention_dropout
        check(
            "local_attention_dropout",
            local is None or (_is_number(local) and 0 <= local < 1),
            "None or a number in [0, 1)",
        )
        for name in ("rotary_base", "norm_eps", "initializer_range"):
            value = getattr(self, name)
            check(name, _is_number(value) and value > 0, "a number > 0")
        for name in (
            "ff_glu",
            "causal",
            "same_bucket",
            "correct_duplicates",
            "local_wrap",
            "full_shared_qk",
            "attention_out_bias",
            "rotary_before_hash",
            "axial_sum",
            "reversible",
            "tie_embeddings",
            "head_bias",
        ):
            check(name, isinstance(getattr(self, name), bool), "True or False")
        scale = self.shared_qk_scale
        check("shared_qk_scale", scale is None or _is_number(scale), "None or a number")
        check(
            "layers",
            isinstance(self.layers, tuple)
            and len(self.layers) > 0
            and all(kind in LAYER_KINDS for kind in self.layers),
            f"one or more of {LAYER_KINDS}",
        )
        check("ff_activation", self.ff_activation in ACTIVATIONS, f"one of {sorted(ACTIVATIONS)}")
        check("positions", self.positions in POSITION_KINDS, f"one of {POSITION_KINDS}")
        check("streams", self.streams in STREAM_KINDS, f"one of {STREAM_KINDS}")
        if self.streams == "concat":
            check("tie_embeddings", not self.tie_embeddings, "False with streams 'concat'")
        if self.tie_embeddings:
            check("head_bias", not self.head_bias, "False with tie_embeddings")
        check(
            "heads_at_once",
            self.heads_at_once == 0 or self.heads % self.heads_at_once == 0,
            f"0 or a divisor of heads = {self.heads}",
        )
        if self.head_dim is None:
            check("heads", self.dim % self.heads == 0, f"a divisor of dim = {self.dim}")
        width = self.head_width
        check("head_dim", width <= 256, f"at most 256 (it is {width})")
        if self.positions == "rotary":
            check(
                "head_dim", width % 2 == 0, f"an even number with rotary positions (it is {width})"
            )
        factors = (self.n_buckets,) if isinstance(self.n_buckets, int) else self.n_buckets
        if factors is not None:
            check(
                "n_buckets",
                isinstance(factors, tuple)
                and len(factors) > 0
                and all(_is_int(n, 2) and n % 2 == 0 for n in factors),
                "None, an even number >= 2 or a tuple of such",
            )
        if self.axial_shape is not None:
            check(
                "axial_shape",
                isinstance(self.axial_shape, tuple)
                and all(_is_int(n, 1) for n in self.axial_shape)
                and math.prod(self.axial_shape) >= self.max_length,
                f"sizes whose product is at least max_length = {self.max_length}",
            )

        if self.axial_dims is not None:
            check("axial_sum", not self.axial_sum, "False with axial_dims")
            check(
                "axial_dims",
                isinstance(self.axial_dims, tuple)
                and all(_is_int(n, 1) for n in self.axial_dims)
                and sum(self.axial_dims) == self.dim,
                f"widths that sum to dim = {self.dim}",
            )

    @property
    def output_width(self) -> int:
        """The width of the hidden states: dim, or twice that with concatenated streams."""
        return 2 * self.dim if self.streams == "concat" else self.dim

    @property
    def head_width(self) -> int:
        """The width D of a head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim


class _AttentionBlock(nn.Module):
    """F of a reversible layer: ``dropout(attention(norm(x)))``."""

    def __init__(self, config: ReformerConfig, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = attention
        takes_norm = isinstance(
            attention, (FullSelfAttention, LocalSelfAttention, LSHSelfAttention)
        )
        self.chunk_size = config.ff_chunk_size if takes_norm else 0
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        if self._norms_again(x):
            kwargs["norm"] = self.norm
        else:
            x = self.norm(x)
            if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
                # As the projection would, but without keeping the float32 beside it.
                x = x.to(torch.get_autocast_dtype(x.device.type))
        result = self.attention(x, **kwargs)
        if isinstance(result, Tensor):
            return self.dropout(result)
        # The recomputed input differs by rounding: without the buckets it could hash differently.
        y, buckets = result
        return self.dropout(y), {"buckets": buckets}

    def _norms_again(self, x: Tensor) -> bool:
        """In the backward, to save memory, where a feed-forward layer takes chunks for it."""
        if self.chunk_size == 0 or not torch.is_grad_enabled() or exports_any(x.shape[1]):
            return False
        return x.shape[1] > self.chunk_size


class _FeedForwardBlock(nn.Module):
    """G of a reversible layer: ``dropout(feed_forward(norm(x)))``, by chunks of positions."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.positionwise_chunk_size = config.ff_chunk_size
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = ChunkedFeedForward(
            config.dim,
            config.ff_hidden,
            activation=config.ff_activation,
            dropout=config.ff_dropout,
            glu=config.ff_glu,
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        drops = self.training and (self.dropout.p > 0.0 or self.feed_forward.dropout.p > 0.0)
        return map_positions(self._chunk, x, self.positionwise_chunk_size, preserve_rng_state=drops)

    def _chunk(self, x: Tensor) -> Tensor:
        return self.dropout(self.feed_forward(self.norm(x)))


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
        draws = (
            config.dropout > 0.0
            or config.ff_dropout > 0.0
            or (config.attention_dropout > 0.0 and "full" in config.layers)
        )
        self.layers = ReversibleStack(
            (
                (_AttentionBlock(config, _attention(config, index)), _FeedForwardBlock(config))
                for index in range(len(config.layers))
            ),
            reversible=config.reversible,
            preserve_rng_state=draws,
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
                depth_scale = (2 * len(self.config.layers)) ** -0.5 if residual else 1.0
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
        return self._unpad(self._run(x, self._by_heads(f_kwargs)), length)

    def _by_heads(self, f_kwargs: list[dict[str, Any]]) -> Sequence[Any]:
        """For each attention layer, in place of one call of it those for ``heads_at_once``."""
        heads, size = self.config.heads, self.config.heads_at_once or self.config.heads
        if size == heads or not torch.is_grad_enabled():
            return f_kwargs

        def parts(kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
            for index, first in enumerate(range(0, heads, size)):
                part = {**kwargs, "heads": (first, first + size)}
                if "dropout_seed" in kwargs:  # far from those of other layers and packed batches
                    part["dropout_seed"] = kwargs["dropout_seed"] + (index << 50)
                yield part

        return [list(parts(kwargs)) for kwargs in f_kwargs]

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
    ) -> DecodingCache:
        """An empty cache on the model's device, for use with and without inference mode.

        Args:
            batch: sequences B.
            capacity: most positions, of prompt and continuation together.
            n_hashes: hash rounds; default ``config.n_hashes``.
            n_buckets: an even number or even factors; default the config's, else
                :func:`reformer_ext.default_n_buckets` of the capacity.
            window: positions that a bucket remembers; default ``config.chunk_size``, twice the mean
                bucket of a full cache.
            dtype: of keys and values; default autocast's where that is on, else the parameters'.

        Raises:
            ValueError: the model is not causal, or an argument is out of range.
        """
        name = "Reformer.new_cache"
        config = self.config
        if not config.causal:
            raise ValueError(f"{name}: expected a causal model, got causal=False")
        sizes = {
            "batch": batch,
            "capacity": capacity,
            "n_hashes": config.n_hashes if n_hashes is None else n_hashes,
            "window": config.chunk_size if window is None else window,
        }
        for argument, value in sizes.items():
            if not _is_int(value, 1):
                raise ValueError(f"{name}: expected {argument} to be an integer >= 1, got {value}")
        if config.positions in ("axial", "absolute") and capacity > config.max_length:
            raise ValueError(
                f"{name}: expected capacity up to max_length = {config.max_length} "
                f"with {config.positions} positions, got {capacity}"
            )
        if n_buckets is None:
            n_buckets = config.n_buckets or default_n_buckets(capacity, config.chunk_size)
        factors = [n_buckets] if isinstance(n_buckets, int) else list(n_buckets)
        if not factors or not all(_is_int(n, 2) and n % 2 == 0 for n in factors):
            raise ValueError(
                f"{name}: expected n_buckets to be an even number >= 2 or such factors, "
                f"got {n_buckets}"
            )
        weight = self.embedding.weight
        if dtype is None:
            autocast = torch.is_autocast_enabled(weight.device.type)
            dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        elif not dtype.is_floating_point:
            raise ValueError(f"{name}: expected a floating dtype, got {dtype}")
        with torch.inference_mode(False):  # whose tensors nothing else may change in place
            rotations = [
                layer.rotations(factors, n_hashes, device=weight.device, dtype=dtype)
                for layer in self.layers.modules()
                if isinstance(layer, LSHSelfAttention)
            ]
            return DecodingCache(
                config,
                batch,
                capacity,
                rotations=rotations,
                n_buckets=factors,
                window=sizes["window"],
                dtype=dtype,
                device=weight.device,
            )

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
            hidden = self._run(x, _with_cross(steps, cross_caches))
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
        hidden = self._unpad(self._run(x, _with_cross(prompts, cross_caches)), length)
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
        if n_hashes is not None and not _is_int(n_hashes, 1):
            raise ValueError(
                f"Reformer: expected n_hashes to be None or an integer >= 1, got {n_hashes}"
            )

    def _embed(
        self, tokens: Tensor, lengths: list[int] | None = None, at: Tensor | None = None
    ) -> Tensor:
        """With the positions of one sequence, of packed ones of these lengths, or ``at (B, L)``."""
        x = tokens if tokens.is_floating_point() else self.embedding(tokens)
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
            if self.config.attention_dropout > 0.0 or self.config.local_attention_dropout:
                seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
        result = []
        for index, kind in enumerate(self.config.layers):
            kwargs = dict(common)
            if kind != "full" and seed is not None:
                kwargs["dropout_seed"] = seed + index
            if kind == "lsh":
                kwargs.update(n_hashes=n_hashes, hash_step=step, return_buckets=True)
            result.append(kwargs)
        return result


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


def lm_head(config: ReformerConfig) -> nn.Linear | None:
    """From hidden states to the vocabulary; None if the embedding serves."""
    if config.tie_embeddings:
        return None
    head = nn.Linear(config.output_width, config.vocab_size, bias=config.head_bias)
    nn.init.normal_(head.weight, std=config.initializer_range)
    if config.head_bias:
        nn.init.zeros_(head.bias)
    return head


def _with_cross(
    kwargs: list[dict[str, Any]], cross_caches: Sequence[nn.Module]
) -> list[dict[str, Any]]:
    """What each attention layer gets beside x, in an encoder-decoder for both attentions."""
    if not cross_caches:
        return kwargs
    return [
        {"self_kwargs": of_self, "cross_kwargs": {"cache": cross}}
        for of_self, cross in zip(kwargs, cross_caches, strict=True)
    ]


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Positions of ``x (B, L)`` or ``(B, L, dim)`` in ``order (B, L)``."""
    return x.gather(1, order if x.dim() == 2 else order[..., None].expand(-1, -1, x.shape[-1]))


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _attention(config: ReformerConfig, index: int) -> nn.Module:
    kind = config.layers[index]
    if kind == "lsh":
        return LSHSelfAttention(
            config.dim,
            config.heads,
            head_dim=config.head_dim,
            n_hashes=config.n_hashes,
            chunk_size=config.chunk_size,
            n_buckets=config.n_buckets,
            causal=config.causal,
            look_back=config.look_back,
            look_ahead=config.look_ahead,
            same_bucket=config.same_bucket,
            correct_duplicates=config.correct_duplicates,
            scale=config.shared_qk_scale,
            dropout=config.attention_dropout,
            out_bias=config.attention_out_bias,
            hash_seed=config.hash_seed + index,
            rotary_before_hash=config.rotary_before_hash,
        )
    if kind == "local":
        return LocalSelfAttention(
            config.dim,
            config.heads,
            head_dim=config.head_dim,
            chunk_size=config.local_chunk_size,
            causal=config.causal,
            look_back=config.local_look_back,
            look_ahead=config.local_look_ahead,
            wrap=config.local_wrap,
            dropout=config.attention_dropout
            if config.local_attention_dropout is None
            else config.local_attention_dropout,
            out_bias=config.attention_out_bias,
        )
    return FullSelfAttention(
        config.dim,
        config.heads,
        head_dim=config.head_dim,
        causal=config.causal,
        shared_qk=config.full_shared_qk,
        scale=config.shared_qk_scale if config.full_shared_qk else None,
        dropout=config.attention_dropout,
        out_bias=config.attention_out_bias,
    )
