"""lucidrains' reformer-pytorch: its language model as ours, and its attention layer as a drop-in.

Written against reformer_pytorch 1.4.4, which need not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import AxialPositions, Reformer, ReformerConfig, ReformerLM, hash_rotations
from ..nn.checks import check_dropout, check_int
from ..nn.pretrained import lasting_config
from ._weights import Weight, affine, axial, load_weights, read_weights

__all__ = ["LSHSelfAttention", "from_reformer_pytorch"]

_ACTIVATIONS: dict[type[nn.Module] | None, str] = {
    None: "gelu",
    nn.GELU: "gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}

# What its options must be, where we have no counterpart.
_MODEL_OPTIONS: dict[str, object] = {
    "weight_tie": False,
    "layer_dropout": 0.0,
    "use_scale_norm": False,
    "use_rezero": False,
    "full_attn_thres": 0,
    "num_mem_kv": 0,
    "one_value_head": False,
    "emb_dim": None,
    "weight_tie_embedding": False,
    "fixed_position_emb": False,
    "n_local_attn_heads": 0,
    "pkm_layers": (),
}
_LAYER_OPTIONS: dict[str, object] = {
    "num_mem_kv": 0,
    "one_value_head": False,
    "return_attn": False,
    "n_local_attn_heads": 0,
    "rehash_each_round": True,
    "drop_for_hash_rate": 0.0,
}


def from_reformer_pytorch(
    state_dict: Mapping[str, Tensor],
    *,
    num_tokens: int,
    dim: int,
    depth: int,
    max_seq_len: int,
    heads: int = 8,
    dim_head: int = 64,
    bucket_size: int = 64,
    n_hashes: int = 4,
    ff_chunks: int = 100,
    attn_chunks: int = 1,
    causal: bool = False,
    lsh_dropout: float = 0.0,
    ff_dropout: float = 0.0,
    ff_mult: int = 4,
    ff_activation: type[nn.Module] | None = None,
    ff_glu: bool = False,
    post_attn_dropout: float = 0.0,
    random_rotations_per_head: bool = False,
    use_full_attn: bool = False,
    reverse_thres: int = 0,
    return_embeddings: bool = False,
    absolute_position_emb: bool = False,
    axial_position_emb: bool = False,
    axial_position_shape: Sequence[int] | None = None,
    pkm_num_keys: int = 128,
    n_buckets: int | Sequence[int] | None = None,
    **others: object,
) -> Reformer | ReformerLM:
    """Our model with the weights of a ``reformer_pytorch.ReformerLM``.

    Logits are its own, given the same hash, at lengths where ``n_buckets`` is what it would take.
    Unlike it, we take any length up to ``max_seq_len`` (any at all with rotary positions), hash
    alike in every evaluation, and keep padding in a bucket of its own.

    Args:
        state_dict: of the model.
        num_tokens, dim, depth, max_seq_len, heads, dim_head, bucket_size, n_hashes, ff_chunks,
            causal, lsh_dropout, ff_dropout, ff_mult, ff_activation, ff_glu, use_full_attn,
            return_embeddings, absolute_position_emb, axial_position_emb, axial_position_shape:
            what its constructor got; its defaults.
        attn_chunks, post_attn_dropout, random_rotations_per_head, reverse_thres, pkm_num_keys:
            accepted; they do not change what its model computes, or nothing that matters here.
        n_buckets: as in :class:`ReformerConfig`; default: what it takes for ``max_seq_len``
            positions, a chunk each.
        others: its other options, at the values that turn them off.

    Returns:
        :class:`ReformerLM`, or with return_embeddings :class:`Reformer`, in evaluation mode, with a
        copy of the weights on their device and in their dtype.

    Raises:
        TypeError: an option that its constructor does not have.
        ValueError: an option without a counterpart here, missing or unknown weights, or weights of
            another shape.
    """
    _refuse("from_reformer_pytorch", _MODEL_OPTIONS, others)
    if ff_activation not in _ACTIVATIONS:
        raise ValueError(
            "from_reformer_pytorch: expected ff_activation None, nn.GELU, nn.ReLU or nn.SiLU, "
            f"got {ff_activation}"
        )
    if n_buckets is None:
        n_buckets = _peer_n_buckets(max_seq_len, bucket_size)
    # In this order of precedence; its full attention does not turn rotary positions.
    positions = "none" if use_full_attn else "rotary"
    if axial_position_emb:
        positions = "axial"
        axial_position_shape = axial_position_shape or (-(-max_seq_len // bucket_size), bucket_size)
    elif absolute_position_emb:
        positions = "absolute"
    config = lasting_config(
        ReformerConfig,
        vocab_size=num_tokens,
        dim=dim,
        layers=("full" if use_full_attn else "lsh",) * depth,
        heads=heads,
        head_dim=dim_head,
        ff_hidden=ff_mult * dim,
        ff_chunk_size=-(-max_seq_len // ff_chunks) if ff_chunks > 1 else 0,
        ff_activation=_ACTIVATIONS[ff_activation],
        ff_glu=ff_glu,
        n_hashes=n_hashes,
        chunk_size=bucket_size,
        n_buckets=n_buckets if isinstance(n_buckets, int) else tuple(n_buckets),
        look_ahead=0,
        causal=causal,
        shared_qk_scale=None,
        full_shared_qk=True,
        attention_out_bias=True,
        attention_dropout=lsh_dropout,
        ff_dropout=ff_dropout,
        positions=positions,
        axial_shape=tuple(axial_position_shape) if axial_position_shape else None,
        axial_sum=axial_position_emb,
        max_length=max_seq_len,
        head_bias=True,
    )
    model = Reformer(config) if return_embeddings else ReformerLM(config)
    weights = read_weights(
        "from_reformer_pytorch",
        _weights(model),
        state_dict,
        model.state_dict(),
        # The same tensors again, and a constant.
        lambda name: name.startswith("reformer.layers.irrev_blocks.") or name.endswith("inv_freq"),
    )
    for name, weight in weights.items():
        if name.endswith("attention.in_proj.weight") and positions == "rotary":
            weights[name] = _halves_from_pairs(weight, heads, dim_head)
        elif ff_glu and ".feed_forward.in_proj." in name:  # its gate comes first
            weights[name] = weight.roll(ff_mult * dim, 0)
    load_weights(model, weights)
    return model.eval()


class LSHSelfAttention(nn.Module):
    """``reformer_pytorch.LSHSelfAttention`` on our operators: same constructor, same state dict.

    Given the same hash it computes the same function of an unmasked x; any length will do. In
    evaluation the hash is always the same; in training its seed is drawn from torch's global
    generator. Masked positions are hashed to a bucket of their own, so that they neither change nor
    displace anything, and ``allow_duplicate_attention=False`` corrects pairs that meet across the
    boundary of two rounds, whose weight the original multiplies by 1e9.

    Args:
        dim: width of input and output.
        heads, dim_head: H and D; dim_head None: ``dim / heads``.
        bucket_size: positions in a chunk; there are about as many buckets as chunks.
        n_hashes: rounds.
        causal: positions see themselves and earlier ones only.
        attn_chunks: accepted; memory is linear without it.
        random_rotations_per_head: else all heads hash with the same rotations.
        attend_across_buckets: False: only pairs in the same bucket attend.
        allow_duplicate_attention: False: a pair that meets in several rounds counts once.
        use_full_attn: no hash; every position meets every other.
        full_attn_thres: the same up to this length; None: bucket_size.
        dropout: of the attention weights.
        post_attn_dropout: of the output.
        others: its other options, at the values that turn them off.

    Raises:
        TypeError: an option that the original does not have.
        ValueError: an option without a counterpart here, or out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        bucket_size: int = 64,
        n_hashes: int = 8,
        causal: bool = False,
        dim_head: int | None = None,
        attn_chunks: int = 1,
        random_rotations_per_head: bool = False,
        attend_across_buckets: bool = True,
        allow_duplicate_attention: bool = True,
        *,
        use_full_attn: bool = False,
        full_attn_thres: int | None = None,
        post_attn_dropout: float = 0.0,
        dropout: float = 0.0,
        **others: object,
    ) -> None:
        super().__init__()
        _refuse("LSHSelfAttention", _LAYER_OPTIONS, others)
        sizes = {"dim": dim, "heads": heads, "bucket_size": bucket_size, "n_hashes": n_hashes}
        if dim_head is not None:
            sizes["dim_head"] = dim_head
        for argument, value in sizes.items():
            check_int("LSHSelfAttention", argument, value)
        if full_attn_thres is not None:
            check_int("LSHSelfAttention", "full_attn_thres", full_attn_thres, 0)
        check_dropout("LSHSelfAttention", dropout)
        if dim_head is None:
            if dim % heads:
                raise ValueError(
                    f"LSHSelfAttention: expected dim divisible by heads, got {dim} and {heads}"
                )
            dim_head = dim // heads
        self.heads = heads
        self.dim_head = dim_head
        self.bucket_size = bucket_size
        self.n_hashes = n_hashes
        self.causal = causal
        self.random_rotations_per_head = random_rotations_per_head
        self.attend_across_buckets = attend_across_buckets
        self.allow_duplicate_attention = allow_duplicate_attention
        self.use_full_attn = use_full_attn
        self.full_attn_thres = bucket_size if full_attn_thres is None else full_attn_thres
        self.dropout = dropout
        self.toqk = nn.Linear(dim, heads * dim_head, bias=False)
        self.tov = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.post_attn_dropout = nn.Dropout(post_attn_dropout)

    def forward(
        self,
        x: Tensor,
        keys: None = None,
        input_mask: Tensor | None = None,
        input_attn_mask: None = None,
        context_mask: None = None,
        pos_emb: None = None,
    ) -> Tensor:
        """Attends within x.

        Args:
            x: ``(B, L, dim)``.
            input_mask: bool ``(B, L)``, False = padding.
            keys, input_attn_mask, context_mask, pos_emb: None.

        Returns:
            ``(B, L, dim)``.

        Raises:
            ValueError: an argument that must be None, or x or input_mask of another shape.
        """
        rest = {
            "keys": keys,
            "input_attn_mask": input_attn_mask,
            "context_mask": context_mask,
            "pos_emb": pos_emb,
        }
        _refuse("LSHSelfAttention", dict.fromkeys(rest), rest)
        if x.dim() != 3 or x.shape[-1] != self.toqk.in_features:
            raise ValueError(
                f"LSHSelfAttention: expected x [B, L, {self.toqk.in_features}], got {list(x.shape)}"
            )
        batch, length, _ = x.shape
        if input_mask is not None and input_mask.shape != (batch, length):
            raise ValueError(
                f"LSHSelfAttention: expected input_mask {[batch, length]}, "
                f"got {list(input_mask.shape)}"
            )
        padding = None if input_mask is None else ~input_mask.bool()
        qk, v = (
            project(x).unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2)
            for project in (self.toqk, self.tov)
        )
        dropout_p = self.dropout if self.training else 0.0
        if self.use_full_attn or length <= self.full_attn_thres:
            out, _ = ops.chunked_attention(
                qk,
                None,
                v,
                chunk_size=length,
                causal=self.causal,
                key_padding_mask=padding,
                dropout_p=dropout_p,
            )
        else:
            out = self._lsh_attention(qk, v, padding, dropout_p)
        return self.post_attn_dropout(self.to_out(out.transpose(1, 2).flatten(2)))

    def _lsh_attention(
        self, qk: Tensor, v: Tensor, padding: Tensor | None, dropout_p: float
    ) -> Tensor:
        n_buckets = [_peer_n_buckets(qk.shape[2], self.bucket_size)]
        step: int | Tensor = 0
        if self.training:
            step = torch.randint(2**31, (1,), device=qk.device)
        rotations = hash_rotations(
            0,
            step,
            self.heads if self.random_rotations_per_head else 1,
            self.dim_head,
            self.n_hashes,
            n_buckets,
            device=qk.device,
            dtype=qk.dtype,
        )
        out = ops.lsh_attention(
            qk,
            v,
            n_buckets=n_buckets,
            rotations=rotations,
            chunk_size=self.bucket_size,
            causal=self.causal,
            key_padding_mask=padding,
            same_bucket=not self.attend_across_buckets,
            correct_duplicates=not self.allow_duplicate_attention,
            dropout_p=dropout_p,
        )
        assert isinstance(out, Tensor)
        return out


def _refuse(caller: str, expected: Mapping[str, object], given: Mapping[str, object]) -> None:
    """Errors unless every option given is known and at its expected value."""
    for name, value in given.items():
        if name not in expected:
            raise TypeError(f"{caller}: expected an option of reformer-pytorch, got {name!r}")
        if value is not expected[name] and value != expected[name]:
            raise ValueError(
                f"{caller}: expected {name} to be {expected[name]!r} (nothing else is supported), "
                f"got {value!r}"
            )


def _peer_n_buckets(length: int, bucket_size: int) -> int:
    """One for each chunk, as far as whole pairs of chunks go."""
    return 2 * max(1, length // (2 * bucket_size))


def _halves_from_pairs(in_proj: Tensor, heads: int, head_dim: int) -> Tensor:
    """Reorders the rows of qk within heads, which matters to rotary positions alone: its turn pairs
    of neighbours, ours ``(d, d + D/2)``."""
    qk, v = in_proj.chunk(2)
    qk = qk.view(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(qk.shape)
    return torch.cat([qk, v])


def _weights(model: Reformer | ReformerLM) -> list[Weight]:
    """Our weights and those of ``reformer_pytorch.ReformerLM``."""
    reformer = model.reformer if isinstance(model, ReformerLM) else model
    prefix = "reformer." if isinstance(model, ReformerLM) else ""
    result = [Weight(f"{prefix}embedding.weight", ("token_emb.weight",))]
    if isinstance(reformer.positions, AxialPositions):
        result += axial(reformer.positions, f"{prefix}positions.weights", "pos_emb.weights", 1)
    elif reformer.positions is not None:
        result.append(Weight(f"{prefix}positions.weight", ("pos_emb.emb.weight",)))
    for index in range(len(model.config.layers)):
        f, g = (f"{prefix}layers.blocks.{index}.{block}" for block in "fg")
        attention, feed_forward = (f"reformer.layers.blocks.{index}.{block}.net" for block in "fg")
        sources = (f"{attention}.fn.toqk.weight", f"{attention}.fn.tov.weight")
        result += [
            *affine(f"{f}.norm", f"{attention}.norm"),
            Weight(f"{f}.attention.in_proj.weight", sources),
            *affine(f"{f}.attention.out_proj", f"{attention}.fn.to_out"),
            *affine(f"{g}.norm", f"{feed_forward}.norm"),
            *affine(f"{g}.feed_forward.in_proj", f"{feed_forward}.fn.fn.w1"),
            *affine(f"{g}.feed_forward.out_proj", f"{feed_forward}.fn.fn.w2"),
        ]
    result += affine(f"{prefix}norm", "norm")
    if isinstance(model, ReformerLM):
        result += affine("head", "out.1")
    return result
