"""What all kinds of self-attention share, over ``(B, L, dim)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from ... import ops
from ..cache import CacheSizes, LayerCache
from ..checks import check_dropout, check_int, check_scale, is_int
from ..config import ReformerConfig
from ..positions import apply_rotary

__all__ = [
    "AttentionCall",
    "AttentionOptions",
    "RowCache",
    "SelfAttention",
    "check_padding",
    "join_positions",
    "prompt_lengths",
]


@dataclass(frozen=True)
class AttentionCall:
    """A forward pass of a :class:`Reformer`, as one call of one of its attention layers sees it.

    Attributes:
        common: keyword arguments that every kind takes: key_padding_mask, and where there are such
            rotary and cu_seqlens.
        shift: the number of this call less the number of its layer: 0, but in a model that repeats
            its layers. Seeds that tell layers apart tell calls apart if it is added to them.
        n_hashes: hash rounds that the caller asks for.
        hash_step: what changes the hash: the number of the training step; 0 in evaluation.
        dropout_seed: of this call; None without dropout.
    """

    common: Mapping[str, Any]
    shift: int = 0
    n_hashes: int | None = None
    hash_step: int | Tensor = 0
    dropout_seed: Tensor | None = None


@dataclass(frozen=True)
class AttentionOptions:
    """The options of a kind of attention: a frozen dataclass of the constructor's keyword arguments
    that a layer of a model may set. A kind with options of its own derives from it.

    ``config_fields`` names the :class:`ReformerConfig` field that an option has its value from
    where the layer does not give it; an option that is not named there has its default. ``check``
    raises ValueError, in the name of a class or of a layer, for a value that is none.
    """

    config_fields: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def of(cls, config: ReformerConfig, given: Mapping[str, Any], name: str) -> Self:
        """Those of a layer: as given, else as the configuration says. Raises ValueError in the
        name of the layer for an option that the kind has not, or a value that is none."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not set(given) <= known:
            raise ValueError(
                f"{name}: expected options among {sorted(known)}, got {sorted(set(given) - known)}"
            )
        from_config = {
            option: getattr(config, field) for option, field in cls.config_fields.items()
        }
        options = cls(**{**from_config, **given})
        options.check(name)
        return options

    def check(self, name: str) -> None:
        """Raises ValueError naming the option, what was expected and what came."""


class SelfAttention(nn.Module):
    """Projections into heads and back, and what all kinds have in common.

    A kind is a subclass and an entry in :data:`reformer_ext.nn.ATTENTIONS`. It defines ``forward``,
    ``Options`` if it has any, and for generation :meth:`new_cache`; see
    ``examples/custom_attention.py``.

    Args:
        dim: width of input and output.
        heads: H.
        head_dim: D; default ``dim / heads``.
        n_projections: vectors that each position and head gets: queries, keys, values.
        causal: positions attend to themselves and earlier ones only.
        scale: of the logits; None: ``D ** -0.5``.
        dropout: of the attention weights, in training.
        bias, out_bias: of the projections in and out; out_bias None: as bias.
        rotary: whether queries and keys turn by the rotary positions of the model.

    Raises:
        ValueError: naming the argument.
    """

    Options: ClassVar[type[AttentionOptions]] = AttentionOptions
    takes_norm: ClassVar[bool] = True  # forward has an argument norm

    @classmethod
    def from_config(
        cls, config: ReformerConfig, given: Mapping[str, Any], index: int, name: str
    ) -> Self:
        """The layer ``index`` of a model, with options as given, else the configuration's."""
        options = cls.Options.of(config, given, name)
        return cls(
            config.dim,
            config.heads,
            head_dim=config.head_dim,
            causal=config.causal,
            **{f.name: getattr(options, f.name) for f in dataclasses.fields(options)},
            **cls.arguments_of_layer(config, index),
        )

    @classmethod
    def arguments_of_layer(cls, config: ReformerConfig, index: int) -> dict[str, Any]:
        """Constructor arguments that follow from the layer's place in the model."""
        return {}

    @property
    def draws(self) -> bool:
        """Whether a forward pass in training draws from torch's global generator. A kind whose
        dropout goes by ``dropout_seed`` says False."""
        return self.dropout > 0.0

    def call_kwargs(self, call: AttentionCall) -> dict[str, Any]:
        """The keyword arguments of ``forward`` in this call."""
        return dict(call.common)

    def new_cache(self, sizes: CacheSizes) -> LayerCache:
        """An empty cache, which ``forward`` gets as ``cache``: with a prompt alone, which begins
        the sequences, later with what :meth:`LayerCache.step` says. Raises NotImplementedError for
        a kind that cannot generate."""
        raise NotImplementedError(f"{type(self).__name__}.new_cache: this kind has no cache")

    def penalty(self) -> Tensor | float:
        """What the layer adds to the loss: a scalar made of its parameters, not of what a forward
        pass has seen, which a reversible model does not keep."""
        return 0.0

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        n_projections: int = 3,
        *,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        out_bias: bool | None = None,
        rotary: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_int(name, "dim", dim)
        check_int(name, "heads", heads)
        if head_dim is None:
            if dim % heads:
                raise ValueError(f"{name}: expected dim divisible by heads, got {dim} and {heads}")
            head_dim = dim // heads
        if not is_int(head_dim, 1) or head_dim > 256:
            raise ValueError(f"{name}: expected head_dim in 1 .. 256, got {head_dim!r}")
        check_dropout(name, dropout)
        check_scale(name, scale)
        self.heads = heads
        self.head_dim = head_dim
        self.causal = causal
        self.scale = scale
        self.dropout = dropout
        self.n_projections = n_projections
        self.rotary = rotary
        self.value_mix: nn.Parameter | None = None
        self.in_proj = nn.Linear(dim, n_projections * heads * head_dim, bias=bias)
        out_bias = bias if out_bias is None else out_bias
        self.out_proj = nn.Linear(heads * head_dim, dim, bias=out_bias)

    def project_in(
        self, x: Tensor, norm: nn.Module | None = None, heads: tuple[int, int] | None = None
    ) -> Tensor:
        """``(B, L, dim) -> (n_projections, B, H, L, D)``, a view of one matrix product; H those of
        ``heads``, default all. What a norm before it gives is computed again for the backward, not
        kept."""
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.in_proj.in_features:
            raise ValueError(
                f"{type(self).__name__}: expected x [B, L, {self.in_proj.in_features}], "
                f"got {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        in_proj = self.in_proj if heads is None else self._part_of_in_proj(*heads)
        if norm is None:
            projected = in_proj(x)
        else:  # checkpoint stops early: the product is not computed again
            projected = checkpoint(
                lambda x: in_proj(norm(x)), x, use_reentrant=False, preserve_rng_state=False
            )
        projected = projected.unflatten(-1, (self.n_projections, -1, self.head_dim))
        return projected.permute(2, 0, 3, 1, 4)

    def _part_of_in_proj(self, first: int, end: int) -> Callable[[Tensor], Tensor]:
        """``in_proj`` to the heads ``first .. end - 1`` alone."""

        def rows(parameter: Tensor) -> Tensor:
            by_head = torch.unflatten(parameter, 0, (self.n_projections, -1, self.head_dim))
            return by_head[:, first:end].flatten(0, 2)

        weight, bias = self.in_proj.weight, self.in_proj.bias
        return lambda x: F.linear(x, rows(weight), None if bias is None else rows(bias))

    def turn(self, projected: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Sequence[Tensor]:
        """Queries, keys and values ``(B, H, L, D)``, all but the values in their positions."""
        if rotary is None or not self.rotary:
            return projected.unbind()
        if rotary[0].shape[-1] != self.head_dim:
            raise ValueError(
                f"{type(self).__name__}: expected rotary of head_dim = {self.head_dim}, "
                f"got factors {list(rotary[0].shape)}"
            )
        if torch.is_grad_enabled():
            # Values as a view would keep the unturned rest for the backward, which would gather
            # the projection's gradient from pieces.
            rows = projected.permute(1, 3, 0, 2, 4).flatten(2)
            return ops.split_heads(rows, self.n_projections, *rotary)
        return *apply_rotary(projected[:-1], rotary), projected[-1]

    def project_out(self, out: Tensor, heads: tuple[int, int] | None = None) -> Tensor:
        """``(B, H, L, D) -> (B, L, dim)``, of all heads or the share of some in the sum."""
        out = out.transpose(1, 2).flatten(2)
        if heads is None:
            return self.out_proj(out)
        first, end = heads
        columns = self.out_proj.weight[:, first * self.head_dim : end * self.head_dim]
        return F.linear(out, columns, self.out_proj.bias if first == 0 else None)  # bias once

    def _mix_values(self) -> None:
        """Gives the layer ``value_mix``, the factors of next values: ``(2, H)``, of a value and the
        next, or if not causal ``(3, H)``, of the one before, the value and the next."""
        start = [0.5, 0.5] if self.causal else [0.25, 0.5, 0.25]
        self.value_mix = nn.Parameter(torch.tensor(start)[:, None].repeat(1, self.heads))

    def _value_mix_of(self, heads: tuple[int, int] | None) -> Tensor | None:
        """The factors of next values for the heads ``(first, end)``, default all; None without."""
        if self.value_mix is None or heads is None:
            return self.value_mix
        return self.value_mix[:, slice(*heads)]

    def check_heads(self, heads: tuple[int, int] | None, cache: nn.Module | None) -> None:
        """Raises ValueError unless there are such heads, and no cache of all."""
        if heads is None:
            return
        if cache is not None or not 0 <= heads[0] < heads[1] <= self.heads:
            raise ValueError(
                f"{type(self).__name__}: expected heads (first, end) with 0 <= first < end <= "
                f"{self.heads} and no cache, got {heads} and "
                f"{'no cache' if cache is None else 'one'}"
            )

    def dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


def check_padding(expected: str, mask: Tensor | None, x: Tensor) -> None:
    """Raises ValueError unless the mask is that of ``x (B, L, ...)``, or None."""
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"{expected} {list(x.shape[:2])} of torch.bool, got {list(mask.shape)} of {mask.dtype}"
        )


def prompt_lengths(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Of the sequences ``x (B, L, dim)``, padded at their ends."""
    if key_padding_mask is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
    return (~key_padding_mask).sum(1)


def join_positions(parts: list[Tensor]) -> Tensor:
    """Along the positions. A single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class RowCache(LayerCache):
    """Keys and values in rows, each position at a place of its own."""

    keys: Tensor
    values: Tensor

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        places: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        for name in ("keys", "values"):
            rows = torch.zeros(batch, heads, places, head_dim, dtype=dtype, device=device)
            self.register_buffer(name, rows, persistent=False)

    def write(self, k: Tensor, v: Tensor, places: Tensor) -> None:
        """Rows ``(B, H, T, D)`` to different ``places (B, T)``."""
        index = places[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index, k.to(self.keys.dtype))
        self.values.scatter_(2, index, v.to(self.values.dtype))

    def attend_to(
        self, q: Tensor, mask: Tensor, scale: float | None, values: Tensor | None = None
    ) -> Tensor:
        """``q (B, H, T, D)`` to the places that ``mask (B, T, places)`` allows: bool, or the keys'
        dtype and added to the logits; with other values than those kept, if given."""
        values = self.values if values is None else values
        out = F.scaled_dot_product_attention(
            q.to(self.keys.dtype), self.keys, values, attn_mask=mask[:, None], scale=scale
        )
        return out.to(q.dtype)
