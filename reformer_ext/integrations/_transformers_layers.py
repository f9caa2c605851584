"""transformers' Reformer layers on our operators: what ``transformers.accelerate`` puts in place.

Subclasses of the originals, whose parameters and options they take over as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.reformer import modeling_reformer as peer

from .. import ops
from ..nn import ReversibleStack

__all__ = ["accelerate"]


def accelerate(model: nn.Module) -> nn.Module:
    """See :func:`reformer_ext.integrations.transformers.accelerate`."""
    replacements: dict[type, type] = {
        peer.LSHSelfAttention: _LSHSelfAttention,
        peer.LocalSelfAttention: _LocalSelfAttention,
        peer.ReformerEncoder: _Encoder,
        peer.ReformerModel: ReformerModel,
    }
    attentions = [
        module
        for module in model.modules()
        if isinstance(module, (peer.LSHSelfAttention, peer.LocalSelfAttention))
    ]
    if not attentions:
        raise ValueError(
            "accelerate: expected a module with the Reformer attention of transformers inside, "
            f"got {type(model).__name__}"
        )
    for attention in attentions:
        if attention.attention_head_size > 256:
            raise ValueError(
                "accelerate: expected attention_head_size of at most 256, "
                f"got {attention.attention_head_size}"
            )
    for module in model.modules():
        if type(module) in replacements:
            module.__class__ = replacements[type(module)]
    return model


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None: transformers 5 no longer knows ``head_mask``."""
    return {name: value for name, value in options.items() if value is not None}


class _LSHSelfAttention(peer.LSHSelfAttention):  # type: ignore[misc]
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        num_hashes: int | None = None,
        buckets: Tensor | None = None,
        past_buckets_states: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        def original(buckets: Tensor | None) -> Any:
            return super(_LSHSelfAttention, self).forward(
                hidden_states,
                attention_mask,
                num_hashes=num_hashes,
                buckets=buckets,
                past_buckets_states=past_buckets_states,
                use_cache=use_cache,
                output_attentions=output_attentions,
                **_given(head_mask=head_mask),
            )

        if past_buckets_states is not None and len(past_buckets_states) > self.layer_idx:
            return original(buckets)
        # Drawn whether or not it is needed: what is drawn after it must not depend on buckets.
        seed = self.hash_seed
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        qk, v = _split(self, self.query_key(hidden_states)), _split(self, self.value(hidden_states))
        length = qk.shape[2]
        n_hashes = self.num_hashes if num_hashes is None else num_hashes
        chunked = length > self.chunk_length
        padding = None if attention_mask is None else ~attention_mask.bool()
        if chunked and self.num_buckets is None:
            self._set_num_buckets(length)
        if chunked and buckets is None:
            buckets = self._hash(qk, n_hashes, padding, seed)
        if head_mask is not None or output_attentions or _looks_twice(self, length, n_hashes):
            return original(buckets)
        options = {
            "chunk_size": self.chunk_length,
            "causal": self.is_decoder,
            "scale": 1.0,
            "key_padding_mask": padding,
            "dropout_p": self.dropout if self.training else 0.0,
        }
        if chunked:
            assert buckets is not None
            digits = buckets.view(*qk.shape[:2], n_hashes, length) - self._offsets(
                n_hashes, padding, qk.device
            )
            out, lse = ops.lsh_attention(
                qk,
                v,
                n_buckets=self._factors(),
                buckets=digits.to(torch.int32),
                look_back=self.num_chunks_before,
                look_ahead=self.num_chunks_after,
                return_lse=True,
                **options,
            )
        else:
            out, lse = ops.chunked_attention(qk, None, v, **options)
        if padding is not None:  # padding that sees nothing sees itself
            out = torch.where(lse[..., None] == -math.inf, v, out)
        return peer.LSHSelfAttentionOutput(_merge(out), (), buckets)

    def _factors(self) -> list[int]:
        return [self.num_buckets] if isinstance(self.num_buckets, int) else list(self.num_buckets)

    def _hash(self, qk: Tensor, n_hashes: int, padding: Tensor | None, seed: int) -> Tensor:
        """Buckets ``(B, H, R, L)`` of transformers, which numbers those of all rounds through."""
        factors = self._factors()
        rotations = torch.randn(
            (self.num_attention_heads, self.attention_head_size, n_hashes, sum(factors) // 2),
            generator=torch.Generator(qk.device).manual_seed(seed),
            device=qk.device,
            dtype=qk.dtype,
        )
        digits = ops.lsh_hash(qk.detach(), rotations, factors, padding)
        return digits + self._offsets(n_hashes, padding, qk.device)

    def _offsets(self, n_hashes: int, padding: Tensor | None, device: torch.device) -> Tensor:
        """Number of a round's first bucket, ``(R, 1)``: there is one for padding if there is
        padding."""
        per_round = math.prod(self._factors()) + (0 if padding is None else padding.any().long())
        return torch.arange(n_hashes, device=device)[:, None] * per_round


class _LocalSelfAttention(peer.LocalSelfAttention):  # type: ignore[misc]
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_buckets_states: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        cached = past_buckets_states is not None and len(past_buckets_states) > self.layer_idx
        length = hidden_states.shape[1]
        if cached or head_mask is not None or output_attentions or _looks_twice(self, length, 1):
            return super().forward(
                hidden_states,
                attention_mask,
                past_buckets_states=past_buckets_states,
                use_cache=use_cache,
                output_attentions=output_attentions,
                **_given(head_mask=head_mask),
            )
        q, k, v = (
            _split(self, project(hidden_states)) for project in (self.query, self.key, self.value)
        )
        padding = None if attention_mask is None else ~attention_mask.bool()
        out, lse = ops.chunked_attention(
            q,
            k,
            v,
            chunk_size=self.chunk_length,
            look_back=self.num_chunks_before,
            look_ahead=self.num_chunks_after,
            causal=self.is_decoder,
            wrap=True,
            key_padding_mask=padding,
            dropout_p=self.dropout if self.training else 0.0,
        )
        if padding is not None:
            out = torch.where(lse[..., None] == -math.inf, self._attend_to_nothing(v), out)
        return peer.LocalSelfAttentionOutput(_merge(out), ())

    def _attend_to_nothing(self, v: Tensor) -> Tensor:
        """What transformers gives padding all of whose logits are masked: its values weighted
        alike, by 1 / n, which its finite mask value rounds to 1 in float32. ``(B, H, L, D)``."""
        batch, heads, length, dim = v.shape
        if length <= self.chunk_length:
            n = length
            sums = v.sum(dim=2, keepdim=True)
        else:
            shifts = range(-self.num_chunks_after, self.num_chunks_before + 1)
            n = self.chunk_length * len(shifts)
            chunks = v.reshape(batch, heads, -1, self.chunk_length, dim).sum(dim=3)
            windows = torch.stack([chunks.roll(shift, dims=2) for shift in shifts]).sum(dim=0)
            sums = windows.repeat_interleave(self.chunk_length, dim=2)
        half = v.dtype == torch.float16
        masked = self.mask_value_float16 if half else self.mask_value_float32
        logits = masked.to(v.dtype).expand(n)
        return sums * torch.exp(logits[0] - torch.logsumexp(logits, dim=0))


class _Encoder(peer.ReformerEncoder):  # type: ignore[misc]
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Any = None,
        num_hashes: int | None = None,
        past_buckets_states: Any = None,
        use_cache: bool = False,
        orig_sequence_length: int | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Any:
        if past_buckets_states is not None:
            return super().forward(
                hidden_states,
                attention_mask,
                num_hashes=num_hashes,
                past_buckets_states=past_buckets_states,
                use_cache=use_cache,
                orig_sequence_length=orig_sequence_length,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                **_given(head_mask=head_mask),
            )
        cache = peer.ReformerDynamicCache() if use_cache else None
        all_hidden_states: list[Tensor] = []
        all_attentions: list[Any] = []
        blocks = [
            (
                _AttentionBlock(
                    layer.attention,
                    cache,
                    orig_sequence_length,
                    all_hidden_states if output_hidden_states else None,
                    all_attentions if output_attentions else None,
                ),
                layer.feed_forward,
            )
            for layer in self.layers
        ]
        kwargs = {"attention_mask": attention_mask, "num_hashes": num_hashes}
        head_masks = [None] * len(blocks) if head_mask is None else head_mask
        y1, y2 = ReversibleStack(blocks)(
            hidden_states,
            f_kwargs=[{**kwargs, **_given(head_mask=mask)} for mask in head_masks],
        )
        if output_hidden_states:
            all_hidden_states.append(y2)
        hidden_states = self.layer_norm(torch.cat([y1, y2], dim=-1))
        hidden_states = nn.functional.dropout(hidden_states, self.dropout, self.training)
        return peer.ReformerEncoderOutput(hidden_states, all_hidden_states, all_attentions, cache)


class ReformerModel(peer.ReformerModel):  # type: ignore[misc]
    """Under the name of the original, which ``save_pretrained`` writes into the configuration."""

    def _pad_to_mult_of_chunk_length(
        self,
        input_ids: Tensor | None,
        *args: Any,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        padded = super()._pad_to_mult_of_chunk_length(input_ids, *args, **kwargs)
        if position_ids is None:
            return padded
        attention_mask = padded[2]
        more = torch.arange(
            position_ids.shape[1], attention_mask.shape[1], device=position_ids.device
        )
        position_ids = torch.cat([position_ids, more.expand(len(position_ids), -1)], dim=1)
        return (*padded[:3], position_ids, *padded[4:])


class _AttentionBlock(nn.Module):
    """F of a reversible layer. Fills the caller's lists and cache in the first pass only: the
    recomputation is the pass that gets buckets back, empty ones where there was no hash."""

    def __init__(
        self,
        attention: nn.Module,
        cache: Any,
        cached_length: int | None,
        all_hidden_states: list[Tensor] | None,
        all_attentions: list[Any] | None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.cache = cache
        self.cached_length = cached_length
        self.all_hidden_states = all_hidden_states
        self.all_attentions = all_attentions

    def forward(
        self, x: Tensor, *, buckets: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        attention: Any = self.attention
        first = buckets is None
        if buckets is not None and isinstance(attention.self_attention, _LSHSelfAttention):
            kwargs["buckets"] = buckets if buckets.numel() else None
        normalized = attention.layer_norm(x)
        result = attention.self_attention(
            normalized, output_attentions=self.all_attentions is not None, **kwargs
        )
        buckets = getattr(result, "buckets", None)
        if first:
            if self.all_hidden_states is not None:
                self.all_hidden_states.append(x)
            if self.all_attentions is not None:
                self.all_attentions.append(result.attention_probs)
            if self.cache is not None:
                n = self.cached_length
                self.cache.update(
                    None if buckets is None else buckets[..., :n],
                    normalized[:, :n],
                    attention.layer_id,
                )
        replay = x.new_empty(0) if buckets is None else buckets
        return attention.output(result.hidden_states), {"buckets": replay}


def _looks_twice(attention: Any, length: int, n_hashes: int) -> bool:
    """transformers meets a chunk twice where the line is shorter than what a query looks at; our
    operators do not."""
    n_chunks = n_hashes * -(-length // attention.chunk_length)
    window = attention.num_chunks_before + 1 + attention.num_chunks_after
    return length > attention.chunk_length and n_chunks < window


def _split(attention: Any, x: Tensor) -> Tensor:
    """``(B, L, H * D) -> (B, H, L, D)``."""
    return x.view(*x.shape[:2], attention.num_attention_heads, -1).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
