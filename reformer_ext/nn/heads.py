"""Models for tasks other than generation: a :class:`Reformer` and a small head.

They are meant to read in both directions, with ``causal=False`` in the configuration. All but the
masked language model work with a causal one too, so as to start from a causal language model:
``model.reformer.load_state_dict(language_model.reformer.state_dict())``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..packed import sequence_lengths
from .checks import is_int
from .config import ReformerConfig
from .feed_forward import chunked_lm_loss
from .models import Reformer, ReformerLM
from .pretrained import PretrainedModel

__all__ = [
    "ReformerForMaskedLM",
    "ReformerForQuestionAnswering",
    "ReformerForSequenceClassification",
    "ReformerForTokenClassification",
]

POOLING_KINDS = ("mean", "first")


class ReformerForMaskedLM(ReformerLM):
    """Masked language model: predicts tokens from both sides, as BERT.

    A :class:`ReformerLM` that is not causal: ``model(tokens)`` are the logits of the token at each
    position itself, ``(B, L, vocab_size)``, and the targets of ``model.loss(tokens, targets)`` are
    the original tokens where the input was masked, and -100 elsewhere.

    Raises:
        ValueError: ``config.causal``.
    """

    def __init__(self, config: ReformerConfig) -> None:
        if config.causal:
            raise ValueError("ReformerForMaskedLM: expected config.causal to be False, got True")
        super().__init__(config)


class _ReformerHead(PretrainedModel):
    """A linear layer on the hidden states, after dropout in training."""

    config_class = ReformerConfig

    def __init__(self, config: ReformerConfig, outputs: int, hidden: int | None = None) -> None:
        super().__init__()
        if not is_int(outputs, 1):
            raise ValueError(f"{type(self).__name__}: expected num_labels >= 1, got {outputs!r}")
        self.config = config
        self.reformer = Reformer(config)
        self.dropout = nn.Dropout(config.dropout)
        width = config.output_width
        self.dense = None if hidden is None else nn.Linear(width, hidden)
        self.head = nn.Linear(width if hidden is None else hidden, outputs)
        for layer in (self.dense, self.head):
            if layer is not None:
                nn.init.normal_(layer.weight, std=config.initializer_range)
                nn.init.zeros_(layer.bias)


class ReformerForSequenceClassification(_ReformerHead):
    """One label for a sequence, from the mean of its hidden states; padding does not count.

    The mean, and not the first position, since an LSH or local layer shows each position a part of
    a long sequence only.

    Args:
        config: of the :class:`Reformer`.
        num_labels: how many there are.
        pooling: "mean", or "first": the first position that is not padding (as in transformers).
        hidden: width of a tanh layer before the labels (as in transformers); None: no such layer.

    Raises:
        ValueError: naming the argument.
    """

    saved_arguments = ("num_labels", "pooling", "hidden")

    def __init__(
        self,
        config: ReformerConfig,
        num_labels: int,
        *,
        pooling: str = "mean",
        hidden: int | None = None,
    ) -> None:
        name = type(self).__name__
        if pooling not in POOLING_KINDS:
            raise ValueError(f"{name}: expected pooling in {POOLING_KINDS}, got {pooling!r}")
        if hidden is not None and not is_int(hidden, 1):
            raise ValueError(f"{name}: expected hidden to be None or >= 1, got {hidden!r}")
        super().__init__(config, num_labels, hidden)
        self.num_labels = num_labels
        self.pooling = pooling
        self.hidden = hidden

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, num_labels)``, of n packed sequences ``(n, num_labels)``; arguments as in
        :meth:`Reformer.forward`. A sequence of padding alone, or a packed one without a position,
        counts as one of 0."""
        hidden = self.reformer(
            tokens, key_padding_mask=key_padding_mask, n_hashes=n_hashes, cu_seqlens=cu_seqlens
        )
        pooled = self.dropout(self._pool(hidden, key_padding_mask, cu_seqlens))
        if self.dense is not None:
            pooled = self.dropout(torch.tanh(self.dense(pooled)))
        return self.head(pooled)

    def _pool(
        self,
        hidden: Tensor,
        key_padding_mask: Tensor | None,
        cu_seqlens: Sequence[int] | Tensor | None,
    ) -> Tensor:
        first = self.pooling == "first"
        if cu_seqlens is not None:
            parts = _unpacked(hidden, cu_seqlens)
            parts = [part[:1] for part in parts] if first else parts
            return torch.stack([part.sum(0) if len(part) == 0 else part.mean(0) for part in parts])
        if key_padding_mask is None:
            return hidden[:, 0] if first else hidden.mean(dim=1)
        seen = ~key_padding_mask
        if first:
            seen = seen & (seen.cumsum(dim=1) == 1)
        length = seen.sum(dim=1, keepdim=True).clamp(min=1)
        hidden = hidden.masked_fill(~seen[..., None], 0.0)
        wide = torch.promote_types(hidden.dtype, torch.float32)  # float16 ends at 65,504
        return (hidden.sum(dim=1, dtype=wide) / length).to(hidden.dtype)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of the labels, int64 ``(B,)``, one for each packed sequence;
        -100 does not count."""
        logits = self(
            tokens, key_padding_mask=key_padding_mask, n_hashes=n_hashes, cu_seqlens=cu_seqlens
        )
        return _cross_entropy(type(self).__name__, "labels", logits, labels)


class ReformerForTokenClassification(_ReformerHead):
    """A label for every token.

    Args:
        config: of the :class:`Reformer`.
        num_labels: how many there are.

    Raises:
        ValueError: naming the argument.
    """

    saved_arguments = ("num_labels",)

    def __init__(self, config: ReformerConfig, num_labels: int) -> None:
        super().__init__(config, num_labels)
        self.num_labels = num_labels

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, L, num_labels)``; arguments as in :meth:`Reformer.forward`."""
        hidden = self.reformer(
            tokens, key_padding_mask=key_padding_mask, n_hashes=n_hashes, cu_seqlens=cu_seqlens
        )
        return self.head(self.dropout(hidden))

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        reduction: str = "mean",
        *,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats, without ever holding the logits of all positions.

        Args:
            tokens, key_padding_mask, n_hashes, cu_seqlens: as in :meth:`Reformer.forward`.
            labels: int64 ``(B, L)``; -100, as for padding, does not count.
            reduction: "mean", "sum" or "none", as in :func:`chunked_lm_loss`.
        """
        hidden = self.reformer(
            tokens, key_padding_mask=key_padding_mask, n_hashes=n_hashes, cu_seqlens=cu_seqlens
        )
        return chunked_lm_loss(
            self.dropout(hidden),
            self.head.weight,
            self.head.bias,
            labels,
            chunk_size=self.config.loss_chunk_size,
            reduction=reduction,
        )


class ReformerForQuestionAnswering(_ReformerHead):
    """The span of a text that answers a question, by its first and its last token.

    Args:
        config: of the :class:`Reformer`.
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__(config, 2)

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the start and of the end, ``(B, L)`` each, -inf at padding; arguments as in
        :meth:`Reformer.forward`. Of packed sequences, ``(1, total)``: those of each have their own
        softmax."""
        hidden = self.reformer(
            tokens, key_padding_mask=key_padding_mask, n_hashes=n_hashes, cu_seqlens=cu_seqlens
        )
        logits = self.head(self.dropout(hidden))
        if key_padding_mask is not None:
            logits = logits.masked_fill(key_padding_mask[..., None], -math.inf)
        start, end = logits.unbind(dim=-1)
        return start, end

    def loss(
        self,
        tokens: Tensor,
        starts: Tensor,
        ends: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats of start and end: the mean of their two means over the batch.

        Args:
            tokens, key_padding_mask, n_hashes, cu_seqlens: as in :meth:`Reformer.forward`.
            starts: int64 ``(B,)``, position of the first token; -100 does not count. Of n packed
                sequences, ``(n,)``; positions count from the start of each.
            ends: the same shape, position of the last token; -100 does not count.
        """
        name = type(self).__name__
        start, end = self(
            tokens, key_padding_mask=key_padding_mask, n_hashes=n_hashes, cu_seqlens=cu_seqlens
        )
        if cu_seqlens is not None:  # -inf beyond the end of each sequence, as at padding
            start, end = (
                nn.utils.rnn.pad_sequence(_unpacked(logits, cu_seqlens), True, -math.inf)
                for logits in (start, end)
            )
        start_loss = _cross_entropy(name, "starts", start, starts)
        return (start_loss + _cross_entropy(name, "ends", end, ends)) / 2


def _unpacked(x: Tensor, cu_seqlens: Sequence[int] | Tensor) -> list[Tensor]:
    """The sequences of a packed line ``(1, total, ...)``, ``(length, ...)`` each."""
    return list(torch.split(x[0], sequence_lengths("Reformer", cu_seqlens, x.shape[:2])))


def _cross_entropy(name: str, argument: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Of ``logits (B, n)`` and targets ``(B,)``, in float32 at least."""
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"{name}: expected {argument} {list(logits.shape[:1])}, got {list(targets.shape)}"
        )
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
