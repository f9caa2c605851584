"""Hugging Face transformers' Reformer: its models as ours, ours as its, and its own made fast.

Written against transformers 4.57. Given the same rotations and buckets, both compute the same
function, but for one constant: transformers adds 1e-6 to the mean square of a key before it divides
by the root, which changes logits by a relative 5e-7 where that mean square is 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import (
    AxialPositions,
    Reformer,
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerLM,
)
from ..nn.pretrained import lasting_config
from ._weights import Weight, affine, axial, load_weights, read_weights, write_weights

__all__ = ["accelerate", "from_transformers", "to_transformers"]

# The names of transformers' models with heads, and what tells the weights of theirs.
_HEADS = {
    "ReformerModelWithLMHead": "lm_head.",
    "ReformerForMaskedLM": "lm_head.",
    "ReformerForSequenceClassification": "classifier.",
    "ReformerForQuestionAnswering": "qa_outputs.",
}
_Model = Reformer | ReformerLM | ReformerForSequenceClassification | ReformerForQuestionAnswering
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}


def from_transformers(source: Any, state_dict: Mapping[str, Tensor] | None = None) -> _Model:
    """Our model with the configuration and the weights of one of transformers.

    Outputs at positions that are not padding are transformers', given the same hash. That is ours
    here: a function of ``hash_seed`` and of the training step, without the global generator, and
    with ``num_buckets=None`` over our default number of buckets. Unlike transformers, training
    takes any length, any number of forwards before a backward, and frozen embeddings. The limits:

    * where the chunks of all rounds together are fewer than the chunks that a query looks at,
      transformers counts some of them twice; we do not;
    * in training, transformers drops hidden activations before the activation function (the same
      with "relu"), drops whole rows of axial positions, and nothing before the output layer of
      question answering;
    * the loss of a sequence classifier is a cross-entropy whatever ``problem_type``; from padding
      on the left it takes the first position after it, and transformers the padding.

    Args:
        source: a ``ReformerModel``, ``ReformerModelWithLMHead``, ``ReformerForMaskedLM``,
            ``ReformerForSequenceClassification`` or ``ReformerForQuestionAnswering``; or, with a
            state dict, a transformers ``ReformerConfig``.
        state_dict: the weights of one of these.

    Returns:
        :class:`Reformer` for a bare ``ReformerModel``, :class:`ReformerLM` for one with
        ``is_decoder``, else our class of the same name, with a copy of the weights on their device
        and in their dtype; in evaluation mode unless the source trains.

    Raises:
        ImportError: transformers is not installed.
        TypeError: source is something else.
        ValueError: a configuration value without a counterpart here, missing or unknown weights,
            or weights of another shape.
    """
    peer = _peer()
    if state_dict is None:
        names = ("ReformerModel", *_HEADS)
        models: Any = tuple(getattr(peer, name) for name in names)
        if not isinstance(source, models):
            raise TypeError(
                f"from_transformers: expected one of {', '.join(names)}, or a ReformerConfig and a "
                f"state dict, got {type(source).__name__}"
            )
        config, training = source.config, source.training
        state = source.state_dict()
    else:
        if not isinstance(source, peer.ReformerConfig):
            raise TypeError(
                "from_transformers: expected a transformers ReformerConfig with the state dict, "
                f"got {type(source).__name__}"
            )
        config, training = source, False
        state = dict(state_dict)
    model = _model_of(config, state)
    if isinstance(model, ReformerLM):
        _join_head_biases(state)
    weights = read_weights(
        "from_transformers",
        _weights(model),
        state,
        model.state_dict(),
        # Constants that old versions saved.
        lambda name: re.search(r"\.(self_)?mask_value_float(16|32)$", name) is not None,
    )
    load_weights(model, weights)
    return model.train(training)


def to_transformers(model: _Model) -> tuple[Any, dict[str, Tensor]]:
    """The transformers configuration of a model, and a copy of its weights under their names there.

    >>> from transformers import ReformerModelWithLMHead
    >>> options = {"positions": "axial", "streams": "concat", "head_bias": True, "local_wrap": True}
    >>> model = ReformerLM(ReformerConfig(dim=64, heads=2, layers=("local", "lsh"), **options))
    >>> config, weights = to_transformers(model)
    >>> theirs = ReformerModelWithLMHead(config)
    >>> theirs.load_state_dict(weights)
    <All keys matched successfully>

    ``config.architectures`` names the class: ``ReformerModel``, ``ReformerModelWithLMHead``
    (causal), ``ReformerForMaskedLM``, ``ReformerForSequenceClassification`` (with pooling "first"
    and a hidden layer of width dim) or ``ReformerForQuestionAnswering``. ``hash_seed`` 0 becomes
    None, a new hash at each call. Undoes :func:`from_transformers` exactly, but for
    ``chunk_size_lm_head``, which is left at 0: in transformers chunks have to divide the length.

    Raises:
        ImportError: transformers is not installed.
        TypeError: model is something else.
        ValueError: a field of ``model.config``, or of the head, that transformers cannot express.
    """
    peer = _peer()
    if not isinstance(model, _Model):
        raise TypeError(
            "to_transformers: expected Reformer, ReformerLM, ReformerForSequenceClassification or "
            f"ReformerForQuestionAnswering, got {type(model).__name__}"
        )
    config = _config_to(peer, model)
    weights = write_weights(_weights(model), model.state_dict())
    if isinstance(model, ReformerLM):
        weights["lm_head.bias"] = weights["lm_head.decoder.bias"]  # one parameter, two names
    return config, weights


def accelerate(model: nn.Module) -> nn.Module:
    """Makes the Reformer layers of a live transformers model compute with our operators, in place.

    Outputs, buckets, caches, state dicts and the model's interface stay what they are, for every
    model of transformers that has Reformer attention inside; the rotations come from ``hash_seed``
    as before, or, without one, from torch's global generator. A position that sees itself alone,
    like the first of a causal sequence, gets exactly its value, which transformers rounds (to 0.4 %
    in float32). What improves beside time and memory:

    * gradients are right with dropout, whose masks the reversible backward of transformers does not
      repeat in LSH layers, and with ``num_hashes`` given in a training step, which fails there;
    * ``position_ids`` work at any length, where transformers pads them to the wrong one;
    * several forwards may precede a backward, a backward in evaluation mode works, layers train
      under frozen embeddings;
    * ``torch.manual_seed`` makes training reproducible; nothing else seeds the global generator.

    transformers' own code still runs where we have no counterpart: decoding with a filled cache,
    ``head_mask``, ``output_attentions``, and lines so short that a query looks at a chunk twice.
    Forward hooks of ``ReformerLayer`` and ``ReformerAttention`` are not called; those of the
    modules in them are.

    Args:
        model: e.g. a ``ReformerModelWithLMHead``; any module that contains one, or a layer. Its
            heads: at most 256 wide, on CUDA a multiple of 8.

    Returns:
        The same object.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no Reformer attention inside, or heads wider than 256; nothing is changed.
    """
    _peer()
    from . import _transformers_layers

    return _transformers_layers.accelerate(model)


def _peer() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "reformer_ext.integrations.transformers needs the package transformers "
            "(pip install transformers)"
        ) from error
    return transformers


def _length_multiple(layers: tuple[str, ...], chunk_sizes: dict[str, int]) -> int:
    """What transformers pads to; 1 where padding adds no chunk."""
    sizes = {chunk_sizes[kind] for kind in layers}
    return 1 if len(sizes) == 1 else math.lcm(*sizes)


def _model_of(config: Any, state: Mapping[str, Tensor]) -> _Model:
    """Our model, untrained, of theirs with this configuration and weights of these names."""
    if not any(name.startswith("reformer.") for name in state):
        return Reformer(_config_from(config, has_lm_head=False))

    def has(head: str) -> bool:
        return any(name.startswith(_HEADS[head]) for name in state)

    if has("ReformerForSequenceClassification"):
        return ReformerForSequenceClassification(
            _config_from(config, has_lm_head=False),
            config.num_labels,
            pooling="first",
            hidden=config.hidden_size,
        )
    if has("ReformerForQuestionAnswering"):
        return ReformerForQuestionAnswering(_config_from(config, has_lm_head=False))
    ours = _config_from(config, has_lm_head=True)
    return ReformerLM(ours) if ours.causal else ReformerForMaskedLM(ours)


def _config_from(config: Any, has_lm_head: bool) -> ReformerConfig:
    def check(name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(
                f"from_transformers: expected {name} to be {expected}, "
                f"got {getattr(config, name)!r}"
            )

    layers = tuple(config.attn_layers)
    check("attn_layers", set(layers) <= {"local", "lsh"}, "'local' and 'lsh' only")
    check(
        "hidden_act",
        isinstance(config.hidden_act, str) and config.hidden_act in _ACTIVATIONS,
        f"one of {sorted(_ACTIVATIONS)}",
    )
    if has_lm_head:  # tied, it would be half as wide as its input
        check("tie_word_embeddings", not config.tie_word_embeddings, "False")
    dropout = config.hidden_dropout_prob
    check("classifier_dropout", config.classifier_dropout in (None, dropout), f"None or {dropout}")
    axial = config.axial_pos_embds
    max_length = config.max_position_embeddings
    return lasting_config(
        ReformerConfig,
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        layers=layers,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_size,
        ff_hidden=config.feed_forward_size,
        ff_chunk_size=config.chunk_size_feed_forward,
        ff_activation=_ACTIVATIONS[config.hidden_act],
        n_hashes=config.num_hashes,
        chunk_size=config.lsh_attn_chunk_length,
        n_buckets=config.num_buckets,
        look_back=config.lsh_num_chunks_before,
        look_ahead=config.lsh_num_chunks_after,
        local_chunk_size=config.local_attn_chunk_length,
        local_look_back=config.local_num_chunks_before,
        local_look_ahead=config.local_num_chunks_after,
        local_wrap=True,
        causal=config.is_decoder,
        shared_qk_scale=1.0,
        attention_dropout=config.lsh_attention_probs_dropout_prob,
        local_attention_dropout=config.local_attention_probs_dropout_prob,
        ff_dropout=config.hidden_dropout_prob,
        dropout=config.hidden_dropout_prob,
        output_dropout=config.hidden_dropout_prob,
        positions="axial" if axial else "absolute",
        axial_shape=tuple(config.axial_pos_shape) if axial else None,
        axial_dims=tuple(config.axial_pos_embds_dim) if axial else None,
        max_length=min(max_length, math.prod(config.axial_pos_shape)) if axial else max_length,
        length_multiple=_length_multiple(
            layers, {"lsh": config.lsh_attn_chunk_length, "local": config.local_attn_chunk_length}
        ),
        streams="concat",
        head_bias=True,
        hash_seed=config.hash_seed or 0,
        norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
    )


def _config_to(peer: Any, model: _Model) -> Any:
    config = model.config

    def check(name: str, condition: bool, expected: object) -> None:
        if not condition:
            raise ValueError(
                f"to_transformers: expected config.{name} to be {expected}, "
                f"got {getattr(config, name)!r}"
            )

    check("layers", set(config.layers) <= {"local", "lsh"}, "'local' and 'lsh' only")
    check("positions", config.positions in ("axial", "absolute"), "'axial' or 'absolute'")
    required: dict[str, object] = {
        "repeat": 1,
        "streams": "concat",
        "ff_glu": False,
        "attention_out_bias": False,
        "axial_sum": False,
        "ff_dropout": config.dropout,
        "output_dropout": config.dropout,
        "length_multiple": _length_multiple(
            config.kinds, {"lsh": config.chunk_size, "local": config.local_chunk_size}
        ),
    }
    if isinstance(model, ReformerLM):
        required["head_bias"] = True
    if "lsh" in config.layers:
        required.update(same_bucket=False, correct_duplicates=False, shared_qk_scale=1.0)
    if "local" in config.layers:
        required["local_wrap"] = True
    for name, value in required.items():
        check(name, getattr(config, name) == value, repr(value))

    architecture, labels = "ReformerModel", {}
    if isinstance(model, ReformerLM):
        architecture = "ReformerModelWithLMHead" if config.causal else "ReformerForMaskedLM"
    elif not isinstance(model, Reformer):
        architecture = type(model).__name__
    if isinstance(model, ReformerForSequenceClassification):
        if (model.pooling, model.hidden) != ("first", config.dim):
            raise ValueError(
                "to_transformers: expected pooling 'first' and hidden to be dim = "
                f"{config.dim}, got {model.pooling!r} and {model.hidden}"
            )
        labels = {"num_labels": model.num_labels}

    ahead = 0 if config.causal else 1
    positions: dict[str, Any] = {"axial_pos_embds": False}
    table = _reformer(model).positions
    if isinstance(table, AxialPositions):
        widths = [weight.shape[1] for weight in table.weights]
        positions = {"axial_pos_shape": table.shape, "axial_pos_embds_dim": widths}
    local_dropout = config.local_attention_dropout
    return peer.ReformerConfig(
        architectures=[architecture],
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        attn_layers=list(config.layers),
        num_attention_heads=config.heads,
        attention_head_size=config.head_width,
        feed_forward_size=4 * config.dim if config.ff_hidden is None else config.ff_hidden,
        chunk_size_feed_forward=config.ff_chunk_size,
        hidden_act=config.ff_activation,
        num_hashes=config.n_hashes,
        lsh_attn_chunk_length=config.chunk_size,
        num_buckets=config.n_buckets,
        lsh_num_chunks_before=config.look_back,
        lsh_num_chunks_after=ahead if config.look_ahead is None else config.look_ahead,
        local_attn_chunk_length=config.local_chunk_size,
        local_num_chunks_before=config.local_look_back,
        local_num_chunks_after=(
            ahead if config.local_look_ahead is None else config.local_look_ahead
        ),
        is_decoder=config.causal,
        lsh_attention_probs_dropout_prob=config.attention_dropout,
        local_attention_probs_dropout_prob=(
            config.attention_dropout if local_dropout is None else local_dropout
        ),
        hidden_dropout_prob=config.dropout,
        max_position_embeddings=config.max_length,
        hash_seed=config.hash_seed or None,
        layer_norm_eps=config.norm_eps,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        **labels,
        **positions,
    )


def _reformer(model: _Model) -> Reformer:
    return model if isinstance(model, Reformer) else model.reformer


def _weights(model: _Model) -> list[Weight]:
    """Our weights and those of ``ReformerModel``, or of the models around it."""
    prefix = "" if isinstance(model, Reformer) else "reformer."
    table = _reformer(model).positions
    ours, theirs = f"{prefix}positions", f"{prefix}embeddings.position_embeddings"
    result = [
        Weight(f"{prefix}embedding.weight", (f"{prefix}embeddings.word_embeddings.weight",)),
        *(
            axial(table, f"{ours}.weights", f"{theirs}.weights", 0)
            if isinstance(table, AxialPositions)
            else [Weight(f"{ours}.weight", (f"{theirs}.embedding.weight",))]
        ),
    ]
    for index, kind in enumerate(model.config.layers):
        f, g = (f"{prefix}layers.blocks.{index}.{block}" for block in "fg")
        attention = f"{prefix}encoder.layers.{index}.attention"
        feed_forward = f"{prefix}encoder.layers.{index}.feed_forward"
        projections = ("query_key", "value") if kind == "lsh" else ("query", "key", "value")
        sources = tuple(f"{attention}.self_attention.{name}.weight" for name in projections)
        result += [
            *affine(f"{f}.norm", f"{attention}.layer_norm"),
            Weight(f"{f}.attention.in_proj.weight", sources),
            Weight(f"{f}.attention.out_proj.weight", (f"{attention}.output.dense.weight",)),
            *affine(f"{g}.norm", f"{feed_forward}.layer_norm"),
            *affine(f"{g}.feed_forward.in_proj", f"{feed_forward}.dense.dense"),
            *affine(f"{g}.feed_forward.out_proj", f"{feed_forward}.output.dense"),
        ]
    result += affine(f"{prefix}norm", f"{prefix}encoder.layer_norm")
    if isinstance(model, ReformerLM):
        result += affine("head", "lm_head.decoder")
    elif isinstance(model, ReformerForSequenceClassification):
        result += affine("dense", "classifier.dense") + affine("head", "classifier.out_proj")
    elif isinstance(model, ReformerForQuestionAnswering):
        result += affine("head", "qa_outputs")
    return result


def _join_head_biases(state: dict[str, Tensor]) -> None:
    """transformers has one bias under two names; files may hold either or both."""
    alone = state.pop("lm_head.bias", None)
    if alone is None:
        return
    bias = state.setdefault("lm_head.decoder.bias", alone)
    if not torch.equal(bias, alone):
        raise ValueError(
            "from_transformers: expected lm_head.bias equal to lm_head.decoder.bias, "
            "got two different tensors"
        )
