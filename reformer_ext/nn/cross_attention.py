"""Attention of one sequence over another, ``(B, L, dim)`` over ``(B, M, context_dim)``: full and
LSH."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from .attention import LSHOptions, SelfAttention, check_padding, hash_rotations, narrow_buckets
from .checks import check_int
from .config import ReformerConfig

__all__ = [
    "CROSS_ATTENTIONS",
    "CrossAttention",
    "CrossCache",
    "FullCrossAttention",
    "LSHCrossAttention",
]


class CrossCache(nn.Module):
    """Keys and values of a context, computed once and attended to at every decoding step.

    Args:
        batch, heads, head_dim: B, H, D.
        capacity: most positions of a context.
        dtype: of keys and values.
    """

    keys: Tensor
    values: Tensor
    padding: Tensor

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        for name in ("keys", "values"):
            rows = torch.zeros(batch, heads, capacity, head_dim, dtype=dtype, device=device)
            self.register_buffer(name, rows, persistent=False)
        padding = torch.ones(batch, capacity, dtype=torch.bool, device=device)
        self.register_buffer("padding", padding, persistent=False)

    def fill(self, k: Tensor, v: Tensor, context_padding_mask: Tensor | None) -> None:
        """Takes ``k, v (B, H, M, D)`` of a context with padding ``(B, M)`` instead of the last."""
        length = k.shape[2]
        self.keys[:, :, :length].copy_(k)
        self.values[:, :, :length].copy_(v)
        self.padding.fill_(True)
        self.padding[:, :length] = False if context_padding_mask is None else context_padding_mask


class CrossAttention(SelfAttention):
    """Queries from x, keys and values from the context.

    Attributes:
        decodes: whether it can attend token by token over what ``fill_cache`` has put into a
            :class:`CrossCache`.
    """

    takes_norm = False
    decodes: ClassVar[bool] = False

    @classmethod
    def of_layer(cls, config: ReformerConfig, context_dim: int, index: int) -> Self:
        """Of the decoder layer ``index``, over a context of that width."""
        raise NotImplementedError

    def cross_kwargs(self, context_padding_mask: Tensor | None, **of_call: Any) -> dict[str, Any]:
        """The keyword arguments of ``forward`` in a call beside x and context, of those that
        :meth:`LSHCrossAttention.forward` has."""
        return {"context_padding_mask": context_padding_mask}

    def fill_cache(
        self, cache: CrossCache, context: Tensor, context_padding_mask: Tensor | None = None
    ) -> None:
        """See :meth:`FullCrossAttention.fill_cache`."""
        raise NotImplementedError

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        context_dim: int | None,
        head_dim: int | None,
        scale: float | None,
        dropout: float,
        bias: bool,
    ) -> None:
        super().__init__(
            dim, heads, head_dim, 1, causal=False, scale=scale, dropout=dropout, bias=bias
        )
        context_dim = dim if context_dim is None else context_dim
        check_int(type(self).__name__, "context_dim", context_dim)
        self.context_proj = nn.Linear(context_dim, 2 * heads * self.head_dim, bias=bias)

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q ``(B, H, L, D)`` and k, v ``(B, H, M, D)``."""
        (q,) = self.project_in(x)
        return q, *self._project_context(x.shape[0], context)

    def _project_context(self, batch: int, context: Tensor) -> tuple[Tensor, Tensor]:
        width = self.context_proj.in_features
        if context.dim() != 3 or context.shape[0] != batch or context.shape[2] != width:
            raise ValueError(
                f"{type(self).__name__}: expected context [{batch}, M, {width}], "
                f"got {list(context.shape)}"
            )
        kv = self.context_proj(context).unflatten(-1, (2, self.heads, self.head_dim))
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        return k, v


class FullCrossAttention(CrossAttention):
    """Exact cross-attention (:func:`torch.nn.functional.scaled_dot_product_attention`).

    Args:
        dim: width of x and of the result.
        heads: H.
        context_dim: width of the context; default ``dim``.
        head_dim: D; default ``dim / heads``.
        scale: of the logits; default ``D ** -0.5``.
        dropout: of the attention weights, in training.
        bias: of the projections.

    Raises:
        ValueError: naming the argument.
    """

    decodes = True

    @classmethod
    def of_layer(cls, config: ReformerConfig, context_dim: int, index: int) -> Self:
        return cls(
            config.dim,
            config.heads,
            context_dim=context_dim,
            head_dim=config.head_dim,
            dropout=config.attention_dropout,
        )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        context_dim: int | None = None,
        head_dim: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            heads,
            context_dim=context_dim,
            head_dim=head_dim,
            scale=scale,
            dropout=dropout,
            bias=bias,
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        context_padding_mask: Tensor | None = None,
        cache: CrossCache | None = None,
    ) -> Tensor:
        """Attends over the context.

        Args:
            x: ``(B, L, dim)``.
            context: ``(B, M, context_dim)``; None with a cache.
            context_padding_mask: bool ``(B, M)``, True = padding. Over padding alone, the result
                is that of no attention (zero, but for a bias). Dropout draws from the global
                generator.
            cache: attend over what :meth:`fill_cache` put into it instead.

        Returns:
            ``(B, L, dim)``.

        Raises:
            ValueError: wrong shapes, or not one of context and cache.
        """
        if cache is not None and context is None and context_padding_mask is None:
            (q,) = self.project_in(x)
            out = self._attend(q.to(cache.keys.dtype), cache.keys, cache.values, cache.padding)
            return self.project_out(out.to(q.dtype))
        if context is None or cache is not None:
            raise ValueError("FullCrossAttention: expected a context or a cache, got both or none")
        q, k, v = self._project(x, context)
        check_padding(
            "FullCrossAttention: expected context_padding_mask", context_padding_mask, context
        )
        return self.project_out(self._attend(q, k, v, context_padding_mask))

    def fill_cache(
        self, cache: CrossCache, context: Tensor, context_padding_mask: Tensor | None = None
    ) -> None:
        """Puts the keys and values of a context into the cache, in place of what it held.

        Args:
            cache: with room for M positions.
            context, context_padding_mask: as in :meth:`forward`.

        Raises:
            ValueError: wrong shapes, or no room; nothing is changed.
        """
        batch, _, capacity, _ = cache.keys.shape
        k, v = self._project_context(batch, context)
        check_padding(
            "FullCrossAttention: expected context_padding_mask", context_padding_mask, context
        )
        if context.shape[1] > capacity:
            raise ValueError(
                f"FullCrossAttention: expected a context of at most {capacity} positions, as the "
                f"cache, got {context.shape[1]}"
            )
        cache.fill(k, v, context_padding_mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        mask = nothing = None
        if padding is not None:
            # Over padding alone all is let in, and thrown away: finite, and without gradient.
            nothing = padding.all(dim=1)[:, None, None, None]
            mask = ~padding[:, None, None, :] | nothing
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout_p(), scale=self.scale
        )
        return out if nothing is None else out.masked_fill(nothing, 0.0)


class LSHCrossAttention(CrossAttention):
    """LSH cross-attention, with memory linear in both lengths
    (:func:`reformer_ext.lsh_cross_attention`).

    Hashes as :class:`LSHSelfAttention`, with separate queries and keys, which are not normalised.

    Args:
        dim, heads, context_dim, head_dim, scale, dropout, bias: as in :class:`FullCrossAttention`.
        n_hashes: rounds R.
        chunk_size: rows of the joint list of queries and keys in a chunk.
        n_buckets: an even number or a list of even factors; default
            :func:`reformer_ext.default_n_buckets` of each call's L + M.
        look_back, look_ahead: chunks before and after its own that a query attends to.
        same_bucket, correct_duplicates, hash_seed: as in :class:`LSHSelfAttention`.

    Raises:
        ValueError: naming the argument.
    """

    @classmethod
    def of_layer(cls, config: ReformerConfig, context_dim: int, index: int) -> Self:
        return cls(
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

    @property
    def draws(self) -> bool:
        return False  # dropout has its own seed

    def cross_kwargs(self, context_padding_mask: Tensor | None, **of_call: Any) -> dict[str, Any]:
        return {"context_padding_mask": context_padding_mask, **of_call, "return_buckets": True}

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        context_dim: int | None = None,
        head_dim: int | None = None,
        n_hashes: int = 8,
        chunk_size: int = 64,
        n_buckets: int | Sequence[int] | None = None,
        look_back: int = 1,
        look_ahead: int = 1,
        same_bucket: bool = False,
        correct_duplicates: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        hash_seed: int = 0,
    ) -> None:
        super().__init__(
            dim,
            heads,
            context_dim=context_dim,
            head_dim=head_dim,
            scale=scale,
            dropout=dropout,
            bias=bias,
        )
        LSHOptions(
            n_hashes=n_hashes,
            chunk_size=chunk_size,
            n_buckets=n_buckets,
            look_back=look_back,
            look_ahead=look_ahead,
            same_bucket=same_bucket,
            correct_duplicates=correct_duplicates,
        ).check("LSHCrossAttention")
        self.n_hashes = n_hashes
        self.chunk_size = chunk_size
        self.n_buckets = [n_buckets] if isinstance(n_buckets, int) else n_buckets
        self.look_back = look_back
        self.look_ahead = look_ahead
        self.same_bucket = same_bucket
        self.correct_duplicates = correct_duplicates
        self.hash_seed = hash_seed

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        query_padding_mask: Tensor | None = None,
        context_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        hash_step: int | Tensor = 0,
        hash_seed: int | None = None,
        dropout_seed: int | Tensor | None = None,
        buckets: Tensor | None = None,
        return_buckets: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends over the context.

        Args:
            x: ``(B, L, dim)``.
            context: ``(B, M, context_dim)``.
            query_padding_mask: bool ``(B, L)``, True = padding.
            context_padding_mask: bool ``(B, M)``, True = padding.
            n_hashes, hash_step, hash_seed, dropout_seed: as in
                :meth:`LSHSelfAttention.forward`.
            buckets: of an earlier call on x and context, to attend alike: nothing is hashed.
            return_buckets: return the buckets too.

        Returns:
            ``(B, L, dim)``, and with return_buckets ``(B, H, R, L + M)`` of int16 where they fit,
            else int32.
        """
        q, k, v = self._project(x, context)
        n_buckets = self.n_buckets or ops.default_n_buckets(
            x.shape[1] + context.shape[1], self.chunk_size
        )
        rotations = None
        if buckets is None:
            rotations = hash_rotations(
                self.hash_seed if hash_seed is None else hash_seed,
                hash_step,
                self.heads,
                self.head_dim,
                self.n_hashes if n_hashes is None else n_hashes,
                n_buckets,
                device=q.device,
                dtype=q.dtype,
            )
        result = ops.lsh_cross_attention(
            q,
            k,
            v,
            chunk_size=self.chunk_size,
            n_buckets=n_buckets,
            rotations=rotations,
            buckets=None if buckets is None else buckets.to(torch.int32),
            look_back=self.look_back,
            look_ahead=self.look_ahead,
            scale=self.scale,
            query_padding_mask=query_padding_mask,
            key_padding_mask=context_padding_mask,
            same_bucket=self.same_bucket,
            correct_duplicates=self.correct_duplicates,
            dropout_p=self.dropout_p(),
            dropout_seed=dropout_seed,
            return_buckets=True,
        )
        out, buckets = result
        y = self.project_out(out)
        if not return_buckets:
            return y
        return y, narrow_buckets(buckets, n_buckets)


CROSS_ATTENTIONS: dict[str, type[CrossAttention]] = {
    "full": FullCrossAttention,
    "lsh": LSHCrossAttention,
}
