"""The configuration of a Reformer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .checks import is_int, is_number, is_scale
from .feed_forward import ACTIVATIONS

__all__ = ["ATTENTIONS", "Layer", "ReformerConfig"]

# The kinds of attention by name, each a class derived from SelfAttention. The library's are entered
# by reformer_ext.nn.attention, a user's by the user; what reads a configuration needs them all.
ATTENTIONS: dict[str, type[Any]] = {}
REPEAT_ORDERS = ("cycle", "layer")
POSITION_KINDS = ("rotary", "axial", "absolute", "none")
STREAM_KINDS = ("mean", "concat")


@dataclass(frozen=True)
class Layer:
    """One layer of a :class:`ReformerConfig`.

    A plain string in ``ReformerConfig.layers`` means ``Layer(string)``. From JSON a layer is
    ``{"attention": "lsh", "n_hashes": 4}``, or with all options in one entry ``"options"``, a
    mapping or pairs, as they are saved.

    Attributes:
        attention: a key of :data:`ATTENTIONS`.
        options: of that kind, as pairs of name and value (a mapping is taken too); what is not
            there has the value of the configuration's field for all such layers.
        feed_forward: whether a feed-forward layer follows.

    Raises:
        ValueError: naming the field.
    """

    attention: str
    options: tuple[tuple[str, Any], ...] = ()
    feed_forward: bool = True

    def __post_init__(self) -> None:
        options = self.options.items() if isinstance(self.options, Mapping) else self.options
        try:
            pairs = tuple(sorted((str(name), _frozen(value)) for name, value in options))
        except (TypeError, ValueError):
            raise ValueError(
                f"Layer.options: expected names and values, got {self.options!r}"
            ) from None
        object.__setattr__(self, "options", pairs)
        if not isinstance(self.feed_forward, bool):
            raise ValueError(
                f"Layer.feed_forward: expected True or False, got {self.feed_forward!r}"
            )

    @classmethod
    def of(cls, layer: object) -> object:
        """A mapping from JSON as a Layer; anything else as it is."""
        if not isinstance(layer, Mapping):
            return layer
        fields = {str(name): value for name, value in layer.items()}
        own = {name: fields.pop(name) for name in ("feed_forward", "options") if name in fields}
        if "attention" not in fields:
            raise ValueError(f"Layer: expected attention, got {sorted(fields)} alone")
        attention = fields.pop("attention")
        if fields and "options" in own:
            raise ValueError(
                f"Layer: expected options in one place, got options and {sorted(fields)}"
            )
        return cls(attention, **{"options": fields, **own})


@dataclass(frozen=True)
class ReformerConfig:
    """Everything that defines a :class:`Reformer`.

    Attributes:
        vocab_size: number of different tokens.
        dim: width of the model.
        layers: the attention of each layer, "local", "lsh", "full" or another key of
            :data:`ATTENTIONS`; or a :class:`Layer`, which has options of its own.
        repeat: how often the layers are applied, each time with the same weights (ALBERT, arXiv
            1909.11942; Universal Transformer, arXiv 1807.03819). LSH layers hash anew each time.
        repeat_order: "cycle": 1 2 1 2, or "layer": 1 1 2 2.
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
        next_values: LSH layers, and full ones with shared queries and keys, attend to values that
            say what comes next (:func:`reformer_ext.next_values`); None: if causal.
        shared_qk_rotary: those layers turn by the rotary positions; None: without next values
            alone. A match far away is found by its content, and turned away by its position.
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
            scaled down by ``sqrt(2 * number of layers)``, repetitions counted.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    vocab_size: int = 256
    dim: int = 512
    layers: tuple[str | Layer, ...] = ("local", "lsh", "local", "lsh", "local", "lsh")
    repeat: int = 1
    repeat_order: str = "cycle"
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
    next_values: bool | None = None
    shared_qk_rotary: bool | None = None
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
        if isinstance(self.layers, tuple):
            object.__setattr__(self, "layers", tuple(map(Layer.of, self.layers)))

        def check(name: str, condition: bool, expected: str) -> None:
            if not condition:
                raise ValueError(
                    f"ReformerConfig.{name}: expected {expected}, got {getattr(self, name)!r}"
                )

        for name in (
            "vocab_size",
            "dim",
            "repeat",
            "heads",
            "n_hashes",
            "chunk_size",
            "local_chunk_size",
            "max_length",
            "length_multiple",
        ):
            check(name, is_int(getattr(self, name), 1), "an integer >= 1")
        for name in (
            "heads_at_once",
            "ff_chunk_size",
            "look_back",
            "local_look_back",
            "loss_chunk_size",
            "hash_seed",
        ):
            check(name, is_int(getattr(self, name), 0), "an integer >= 0")
        for name in ("look_ahead", "local_look_ahead"):
            value = getattr(self, name)
            check(name, value is None or is_int(value, 0), "None or an integer >= 0")
        for name in ("head_dim", "ff_hidden"):
            value = getattr(self, name)
            check(name, value is None or is_int(value, 1), "None or an integer >= 1")
        for name in ("attention_dropout", "ff_dropout", "dropout", "output_dropout"):
            value = getattr(self, name)
            check(name, is_number(value) and 0 <= value < 1, "a number in [0, 1)")
        local = self.local_attention_dropout
        check(
            "local_attention_dropout",
            local is None or (is_number(local) and 0 <= local < 1),
            "None or a number in [0, 1)",
        )
        for name in ("rotary_base", "norm_eps", "initializer_range"):
            value = getattr(self, name)
            check(name, is_number(value) and value > 0, "a number > 0")
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
        for name in ("next_values", "shared_qk_rotary"):
            value = getattr(self, name)
            check(name, value is None or isinstance(value, bool), "None, True or False")
        scale = self.shared_qk_scale
        check("shared_qk_scale", is_scale(scale), "None or a number")
        check(
            "layers",
            isinstance(self.layers, tuple)
            and len(self.layers) > 0
            and all(
                isinstance(layer, (str, Layer)) and _kind(layer) in ATTENTIONS
                for layer in self.layers
            ),
            f"one or more of {tuple(ATTENTIONS)}",
        )
        check("repeat_order", self.repeat_order in REPEAT_ORDERS, f"one of {REPEAT_ORDERS}")
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
                and all(is_int(n, 2) and n % 2 == 0 for n in factors),
                "None, an even number >= 2 or a tuple of such",
            )
        if self.axial_shape is not None:
            check(
                "axial_shape",
                isinstance(self.axial_shape, tuple)
                and all(is_int(n, 1) for n in self.axial_shape)
                and math.prod(self.axial_shape) >= self.max_length,
                f"sizes whose product is at least max_length = {self.max_length}",
            )

        if self.axial_dims is not None:
            check("axial_sum", not self.axial_sum, "False with axial_dims")
            check(
                "axial_dims",
                isinstance(self.axial_dims, tuple)
                and all(is_int(n, 1) for n in self.axial_dims)
                and sum(self.axial_dims) == self.dim,
                f"widths that sum to dim = {self.dim}",
            )

        for index, layer in enumerate(self.each_layer()):
            options = ATTENTIONS[layer.attention].Options
            options.of(self, dict(layer.options), f"ReformerConfig.layers[{index}]")

    def each_layer(self) -> Iterator[Layer]:
        """The layers, strings too."""
        for layer in self.layers:
            yield Layer(layer) if isinstance(layer, str) else layer

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer."""
        return tuple(map(_kind, self.layers))

    @property
    def schedule(self) -> tuple[int, ...]:
        """The index of the layer of each call, in order."""
        indices = range(len(self.layers))
        if self.repeat_order == "layer":
            return tuple(index for index in indices for _ in range(self.repeat))
        return tuple(indices) * self.repeat

    @property
    def mixes_next_values(self) -> bool:
        """Whether layers with shared queries and keys attend to next values."""
        return self.causal if self.next_values is None else self.next_values

    @property
    def turns_shared_qk(self) -> bool:
        """Whether layers with shared queries and keys turn by rotary positions."""
        if self.shared_qk_rotary is None:
            return not self.mixes_next_values
        return self.shared_qk_rotary

    @property
    def local_dropout(self) -> float:
        """Of the attention weights of local layers."""
        own = self.local_attention_dropout
        return self.attention_dropout if own is None else own

    @property
    def output_width(self) -> int:
        """The width of the hidden states: dim, or twice that with concatenated streams."""
        return 2 * self.dim if self.streams == "concat" else self.dim

    @property
    def head_width(self) -> int:
        """The width D of a head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim


def _kind(layer: str | Layer) -> str:
    return layer if isinstance(layer, str) else layer.attention


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
