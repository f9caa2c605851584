"""What LSH attention sees and what it misses: buckets, captured attention, repeated candidates.

Three questions about tensors, and :func:`inspect_model`, which asks them of every layer of a model:

* :func:`bucket_occupancy`: how evenly does the hash fill its buckets?
* :func:`captured_mass`: how much of exact attention falls on keys that a query meets at all, after
  1, 2 ... R hash rounds?
* :func:`round_collisions`: how many of a round's keys has a query met before?

The *candidates* of a query are the keys that :func:`reformer_ext.chunked_attention` lets it attend
to: those of its chunk in each round's sorted list and of the neighbouring chunks, less what
causality, padding, the buckets and the self rule exclude. A key that comes several times takes a
*slot* each time. The candidates of rounds 1 ... r are always those within the line of all R rounds:
with ``wrap``, the first chunk of round 1 looks back into round R whatever r is.

Shapes: B batch, H heads, L length, D head dimension, R hash rounds, S sampled queries. Memory is
O(R L + S L) and never L x L. For inspection, not for training: nothing is differentiable, and the
checks of the arguments synchronise with the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .nn import (
    LocalSelfAttention,
    LSHSelfAttention,
    Reformer,
    ReformerLM,
)
from .nn.encoder_decoder import DecoderAttentionBlock
from .reference import NORM_EPS

__all__ = [
    "BucketOccupancy",
    "CapturedMass",
    "LSHLayerReport",
    "LayerReport",
    "RoundCollisions",
    "bucket_occupancy",
    "captured_mass",
    "inspect_model",
    "round_collisions",
    "spaced_queries",
]

_BLOCK = 1 << 22  # elements of one temporary; queries go in blocks of as many as that allows


@dataclass(frozen=True, eq=False)
class BucketOccupancy:
    """How many positions fell into each bucket.

    Attributes:
        counts: int64 ``(B, H, R, n_buckets)``; padding is in none of them.
        chunk_size: positions in a chunk.
    """

    counts: Tensor
    chunk_size: int

    @property
    def mean(self) -> Tensor:
        """Positions per bucket, ``(B, H, R)``."""
        return self.counts.double().mean(dim=-1)

    @property
    def largest(self) -> Tensor:
        """Positions in the fullest bucket, ``(B, H, R)``."""
        return self.counts.amax(dim=-1)

    @property
    def load(self) -> Tensor:
        """The fullest bucket in chunks, ``(B, H, R)``. A bucket much larger than a query's window
        of chunks holds equal directions that do not meet."""
        return self.largest.double() / self.chunk_size

    @property
    def empty(self) -> Tensor:
        """Share of buckets without a position, ``(B, H, R)``."""
        return (self.counts == 0).double().mean(dim=-1)

    @property
    def entropy(self) -> Tensor:
        """Entropy of a position's bucket over that of the uniform distribution, ``(B, H, R)``: 1 if
        all buckets are equally full, 0 if one holds everything, NaN if there are only paddings."""
        shares = self.counts.double() / self.counts.sum(dim=-1, keepdim=True)
        return torch.special.entr(shares).sum(dim=-1) / math.log(self.counts.shape[-1])

    def quantiles(self, levels: Sequence[float] = (0.1, 0.5, 0.9)) -> Tensor:
        """Quantiles of the bucket sizes, ``(B, H, R, len(levels))``."""
        q = torch.tensor(levels, dtype=torch.float64, device=self.counts.device)
        return torch.quantile(self.counts.double(), q, dim=-1).movedim(0, -1)


@dataclass(frozen=True, eq=False)
class CapturedMass:
    """How much of exact attention falls on the candidates of rounds 1 ... r, for each r.

    All but ``queries`` and those by distance are float64 ``(B, H, R, S)``, shares in [0, 1]; NaN
    for a query with nothing to capture: padding, or one without any valid key but itself.

    Attributes:
        queries: their positions, int64 ``(S,)``.
        mass: the sum of the exact softmax weights of the candidates.
        best: the same for the likeliest keys, as many as there are candidates: no choice of that
            many keys holds more.
        uniform: the share of the valid keys that are candidates: what as many keys at random would
            hold on average.
        recall: the share of the ``top_k`` likeliest keys (of all, if fewer are valid) that are
            candidates.
        top_k: how many keys ``recall`` looks at.
        at_distance: how far from its query the mass of exact attention is, float64
            ``(B, H, n)``: the share at distance 0, 1, 2 and 3, 4 to 7, 8 to 15 ..., a mean over the
            queries with anything to capture; sums to 1, NaN without such a query.
        met_at_distance: the part of it on candidates of any round: at most as much.
    """

    queries: Tensor
    mass: Tensor
    best: Tensor
    uniform: Tensor
    recall: Tensor
    top_k: int
    at_distance: Tensor
    met_at_distance: Tensor


@dataclass(frozen=True, eq=False)
class RoundCollisions:
    """How often the candidates of one round are those of another, too.

    Attributes:
        queries: their positions, int64 ``(S,)``.
        slots: candidates of rounds 1 ... r, a key counted as often as it comes, int64
            ``(B, H, R, S)``.
        distinct: the same with every key counted once, int64 ``(B, H, R, S)``.
        multiplicity: the number of pairs of query and key that come together n = 1 ... R times in
            all rounds, int64 ``(B, H, R)``; the last entry is for R times and more, which can be
            where windows reach into neighbouring rounds.
    """

    queries: Tensor
    slots: Tensor
    distinct: Tensor
    multiplicity: Tensor

    @property
    def repeated(self) -> Tensor:
        """Share of the slots of all rounds whose key has one before, ``(B, H)``; NaN without
        slots."""
        slots = self.slots[:, :, -1].double().sum(dim=-1)
        return 1.0 - self.distinct[:, :, -1].sum(dim=-1) / slots

    @property
    def new(self) -> Tensor:
        """Keys that round r adds to those of the rounds before, per query, ``(B, H, R)``."""
        return self.distinct.double().mean(dim=-1).diff(dim=-1, prepend=self._zeros)

    @property
    def again(self) -> Tensor:
        """Slots of round r whose key came before, per query, ``(B, H, R)``."""
        return self.slots.double().mean(dim=-1).diff(dim=-1, prepend=self._zeros) - self.new

    @property
    def _zeros(self) -> Tensor:
        return self.slots.new_zeros((*self.slots.shape[:2], 1), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What :func:`inspect_model` finds out about one layer.

    Attributes:
        index: of the layer, from 0; where layers repeat, of its call.
        kind: "lsh", "local", "full" or another kind of the model's.
        mass: of LSH layers; of local layers what their window holds, R = 1; None of others.
    """

    index: int
    kind: str
    mass: CapturedMass | None


@dataclass(frozen=True, eq=False)
class LSHLayerReport(LayerReport):
    """What there is to say about an LSH layer."""

    mass: CapturedMass
    occupancy: BucketOccupancy
    collisions: RoundCollisions


def spaced_queries(
    length: int, count: int = 256, *, device: torch.device | str | None = None
) -> Tensor:
    """At most ``count`` evenly spaced positions below ``length``, the last included: int64
    ``(S,)``. Raises ValueError if either is below 1."""
    if length < 1 or count < 1:
        raise ValueError(
            f"spaced_queries: expected length and count >= 1, got {length} and {count}"
        )
    count = min(count, length)
    return torch.arange(1, count + 1, device=device) * length // count - 1


def bucket_occupancy(
    buckets: Tensor, n_buckets: int | Sequence[int], *, chunk_size: int = 64
) -> BucketOccupancy:
    """Counts the positions in each bucket.

    Args:
        buckets: integers ``(B, H, R, L)`` as from :func:`reformer_ext.lsh_hash`; the value
            ``prod(n_buckets)`` is padding and not counted.
        n_buckets: their number, or its factors.
        chunk_size: positions in a chunk, to compare with.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "bucket_occupancy"
    total = n_buckets if isinstance(n_buckets, int) else math.prod(n_buckets)
    _check(op, "n_buckets", total >= 2, "at least 2 buckets", n_buckets)
    _check(op, "chunk_size", chunk_size >= 1, "at least 1", chunk_size)
    _check_integers(op, "buckets", buckets)
    if buckets.numel() > 0:
        low, high = (int(value) for value in buckets.aminmax())
        _check(op, "buckets", low >= 0 and high <= total, f"0 .. {total}", f"{low} .. {high}")
    index = buckets.long()
    counts = index.new_zeros((*buckets.shape[:-1], total + 1))
    counts.scatter_add_(-1, index, torch.ones_like(index))
    return BucketOccupancy(counts[..., :total], chunk_size)


@torch.no_grad()
def captured_mass(
    qk: Tensor,
    order: Tensor | None = None,
    *,
    k: Tensor | None = None,
    chunk_size: int = 64,
    look_back: int = 1,
    look_ahead: int = 0,
    causal: bool = False,
    mask_self: bool | None = None,
    wrap: bool | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    buckets: Tensor | None = None,
    queries: Tensor | None = None,
    top_k: int = 16,
) -> CapturedMass:
    """The share of exact attention that falls on the candidates of chunked attention.

    Exact attention is one softmax over all valid keys, each once: not padding, not after the query
    if causal and, with ``mask_self``, not the query itself. Its weights are computed in float64 for
    the sampled queries, O(S L D) time. A query to which chunked attention offers nothing (and which
    attends to itself therefore) captures 0.

    Args:
        qk: shared queries and keys, ``(B, H, L, D)``, or the queries alone if ``k`` is given.
        order: int32 ``(B, H, R, L)`` as from :func:`reformer_ext.bucket_sort`; None: one round in
            natural order, which is local attention.
        k: separate keys, of the same shape; None: ``qk / |qk|``.
        chunk_size, look_back, look_ahead, causal, mask_self, wrap, scale, key_padding_mask,
            buckets: as in :func:`reformer_ext.chunked_attention`, defaults included.
        queries: int64 ``(S,)``, the positions to look at; default :func:`spaced_queries`.
        top_k: the number of likeliest keys whose recall is measured.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "captured_mass"
    _check(op, "qk", qk.dim() == 4, "[B, H, L, D]", list(qk.shape))
    if k is not None:
        _check(op, "k", k.shape == qk.shape, f"{list(qk.shape)} as qk", list(k.shape))
    _check(op, "top_k", top_k >= 1, "at least 1", top_k)
    batch, heads, length, head_dim = qk.shape
    asked, top_k = top_k, min(top_k, length)
    windows = _Windows(
        op,
        (batch, heads, length),
        order,
        chunk_size=chunk_size,
        look_back=look_back,
        look_ahead=look_ahead,
        causal=causal,
        mask_self=k is None if mask_self is None else mask_self,
        wrap=order is not None if wrap is None else wrap,
        key_padding_mask=key_padding_mask,
        buckets=buckets,
        device=qk.device,
    )
    queries = _checked_queries(op, queries, length, qk.device)
    scale = head_dim**-0.5 if scale is None else scale
    q = qk.double()
    keys = F.normalize(q, dim=-1, eps=NORM_EPS) if k is None else k.double()

    parts = []
    positions = torch.arange(length, device=qk.device)
    by_distance = q.new_zeros(2, batch, heads, (length - 1).bit_length() + 1)
    counted = q.new_zeros(batch, heads)
    for block in windows.blocks(queries, length):
        allowed = windows.allowed(block).expand(batch, heads, -1, -1)
        n_valid = allowed.sum(dim=-1, dtype=torch.float64)
        logits = (scale * (q[:, :, block] @ keys.mT)).masked_fill(~allowed, -math.inf)
        weights = logits.softmax(dim=-1)
        slot_keys, _, times = windows.slots(block)
        new = times > 0
        n_met = new.sum(dim=-1).cumsum(dim=2)
        likeliest = logits.topk(min(length, max(windows.n_slots, top_k)), dim=-1).indices
        mass_of_likeliest = F.pad(weights.gather(-1, likeliest).cumsum(dim=-1), (1, 0))
        top = torch.zeros_like(weights).scatter_(-1, likeliest[..., :top_k], 1.0)

        part = torch.stack(
            [
                _sums_over_met(weights, slot_keys, new),
                mass_of_likeliest.gather(-1, n_met.transpose(2, 3)).transpose(2, 3),
                n_met / n_valid[:, :, None],
                _sums_over_met(top, slot_keys, new) / n_valid.clamp(max=top_k)[:, :, None],
            ]
        )
        nothing = n_valid == 0
        if key_padding_mask is not None:
            nothing = nothing | key_padding_mask[:, None, block]
        parts.append(part.masked_fill(nothing[:, :, None], math.nan))

        # The exponent of 2 ** n ... 2 ** (n + 1) - 1 is n + 1, of 0 it is 0.
        far = (block[:, None] - positions).abs().double().frexp().exponent.long()
        far = far.flatten().expand(batch, heads, -1)
        weights = weights.masked_fill(nothing[..., None], 0.0)
        met = torch.zeros_like(weights).scatter_add_(
            -1,
            slot_keys.transpose(2, 3).flatten(3),
            new.transpose(2, 3).flatten(3).to(weights.dtype),
        )
        by_distance[0].scatter_add_(-1, far, weights.flatten(2))
        by_distance[1].scatter_add_(-1, far, (weights * met).flatten(2))
        counted += (~nothing).sum(dim=-1)
    mass, best, uniform, recall = torch.cat(parts, dim=-1).unbind(0)
    at_distance, met_at_distance = by_distance / counted[..., None]
    return CapturedMass(queries, mass, best, uniform, recall, asked, at_distance, met_at_distance)


@torch.no_grad()
def round_collisions(
    order: Tensor,
    *,
    chunk_size: int = 64,
    look_back: int = 1,
    look_ahead: int = 0,
    causal: bool = False,
    mask_self: bool = True,
    wrap: bool = True,
    key_padding_mask: Tensor | None = None,
    buckets: Tensor | None = None,
    queries: Tensor | None = None,
) -> RoundCollisions:
    """How many of the candidates of a round are new, and how often pairs meet.

    Args:
        order: int32 ``(B, H, R, L)`` as from :func:`reformer_ext.bucket_sort`.
        chunk_size, look_back, look_ahead, causal, mask_self, wrap, key_padding_mask, buckets: as in
            :func:`reformer_ext.chunked_attention`, with the defaults of shared QK.
        queries: int64 ``(S,)``, the positions to look at; default :func:`spaced_queries`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "round_collisions"
    _check(op, "order", order.dim() == 4, "[B, H, R, L]", list(order.shape))
    batch, heads, rounds, length = order.shape
    windows = _Windows(
        op,
        (batch, heads, length),
        order,
        chunk_size=chunk_size,
        look_back=look_back,
        look_ahead=look_ahead,
        causal=causal,
        mask_self=mask_self,
        wrap=wrap,
        key_padding_mask=key_padding_mask,
        buckets=buckets,
        device=order.device,
    )
    queries = _checked_queries(op, queries, length, order.device)
    slots, distinct = [], []
    multiplicity = torch.zeros(batch, heads, rounds, dtype=torch.int64, device=order.device)
    for block in windows.blocks(queries):
        _, valid, times = windows.slots(block)
        slots.append(valid.sum(dim=-1).cumsum(dim=2))
        distinct.append((times > 0).sum(dim=-1).cumsum(dim=2))
        times = times.clamp(max=rounds)
        for n in range(1, rounds + 1):
            multiplicity[:, :, n - 1] += (times == n).sum(dim=(2, 3, 4))
    return RoundCollisions(queries, torch.cat(slots, -1), torch.cat(distinct, -1), multiplicity)


def inspect_model(
    model: Reformer | ReformerLM,
    tokens: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    n_hashes: int | None = None,
    context: Tensor | None = None,
    context_padding_mask: Tensor | None = None,
    n_queries: int = 256,
    top_k: int = 16,
) -> tuple[LayerReport, ...]:
    """Looks at every attention layer of a model in one forward pass.

    The pass is one of evaluation, in the autocast state of the caller. The model is left as it was:
    its mode, its hooks, the count of its hashes, torch's random numbers.

    Args:
        model: a Reformer, or a language model around one. Of a
            :class:`~reformer_ext.nn.ReformerEncoderDecoder`, its ``encoder`` or ``decoder``.
        tokens, key_padding_mask, n_hashes: as in :meth:`Reformer.forward`. More rounds than the
            model was trained with show what they would capture; each number of rounds draws its
            own hash.
        context, context_padding_mask: of a decoder: what ``encode`` returned, and the padding of
            the source. Its self-attention is looked at.
        n_queries: at most how many queries of each sequence to look at.
        top_k: as in :func:`captured_mass`.

    Returns:
        A report for each layer, in order; of LSH layers a :class:`LSHLayerReport`.

    Raises:
        ValueError: wrong arguments; says which.
    """
    reformer = model.reformer if isinstance(model, ReformerLM) else model
    if not isinstance(reformer, Reformer):
        raise ValueError(
            f"inspect_model: expected a Reformer or ReformerLM, got {type(model).__name__}"
        )
    of_context = {"context": context, "context_padding_mask": context_padding_mask}
    of_context = {name: tensor for name, tensor in of_context.items() if tensor is not None}
    is_decoder = any(isinstance(module, DecoderAttentionBlock) for module in reformer.modules())
    _check(
        "inspect_model",
        "context",
        is_decoder == (context is not None) and (is_decoder or not of_context),
        "given for the decoder of a ReformerEncoderDecoder, and for no other model",
        type(reformer).__name__ + (" without" if context is None else " with") + " context",
    )
    _check("inspect_model", "n_queries", n_queries >= 1, "at least 1", n_queries)
    _check("inspect_model", "top_k", top_k >= 1, "at least 1", top_k)
    reports: list[LayerReport] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        queries = spaced_queries(args[0].shape[1], n_queries, device=args[0].device)
        options = {"queries": queries, "top_k": top_k}
        index = len(reports)
        if isinstance(module, LSHSelfAttention):
            _, buckets = out
            reports.append(_inspect_lsh(index, module, args[0], kwargs, buckets, options))
        elif isinstance(module, LocalSelfAttention):
            reports.append(_inspect_local(index, module, args[0], kwargs, options))
        else:
            config = reformer.config
            kind = config.kinds[config.schedule[index]]
            reports.append(LayerReport(index, kind, None))

    hooks = [
        attention.register_forward_hook(look, with_kwargs=True)
        for attention in {attention for attention, _ in reformer.attention_calls()}
    ]
    modes = [(module, module.training) for module in reformer.modules()]
    try:
        reformer.eval()
        with torch.no_grad():
            reformer(tokens, key_padding_mask=key_padding_mask, n_hashes=n_hashes, **of_context)
    finally:
        for module, training in modes:
            module.training = training
        for hook in hooks:
            hook.remove()
    return tuple(reports)


def _inspect_lsh(
    index: int,
    module: LSHSelfAttention,
    x: Tensor,
    kwargs: dict[str, Any],
    buckets: Tensor,
    options: dict[str, Any],
) -> LSHLayerReport:
    qk, _ = module.turn(module.project_in(x), kwargs.get("rotary"))
    n_buckets = math.prod(module.n_buckets or ops.default_n_buckets(x.shape[1], module.chunk_size))
    buckets = buckets.to(torch.int32)
    order = ops.bucket_sort(buckets, n_buckets + 1)
    window: dict[str, Any] = {
        "chunk_size": module.chunk_size,
        "look_back": module.look_back,
        "look_ahead": module.look_ahead,
        "causal": module.causal,
        "key_padding_mask": kwargs.get("key_padding_mask"),
        "buckets": buckets if module.same_bucket else None,
    }
    return LSHLayerReport(
        index,
        "lsh",
        captured_mass(qk, order, scale=module.scale, **window, **options),
        occupancy=bucket_occupancy(buckets, n_buckets, chunk_size=module.chunk_size),
        collisions=round_collisions(order, queries=options["queries"], **window),
    )


def _inspect_local(
    index: int,
    module: LocalSelfAttention,
    x: Tensor,
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> LayerReport:
    q, k, _ = module.turn(module.project_in(x), kwargs.get("rotary"))
    mass = captured_mass(
        q,
        k=k,
        chunk_size=module.chunk_size,
        look_back=module.look_back,
        look_ahead=module.look_ahead,
        causal=module.causal,
        wrap=module.wrap,
        scale=module.scale,
        key_padding_mask=kwargs.get("key_padding_mask"),
        **options,
    )
    return LayerReport(index, "local", mass)


class _Windows:
    """Which keys the queries of a chunked attention meet; arguments as its.

    Raises ValueError in the name of ``op``, for tensors of ``shape`` (B, H, L).
    """

    def __init__(
        self,
        op: str,
        shape: tuple[int, int, int],
        order: Tensor | None,
        *,
        chunk_size: int,
        look_back: int,
        look_ahead: int,
        causal: bool,
        mask_self: bool,
        wrap: bool,
        key_padding_mask: Tensor | None,
        buckets: Tensor | None,
        device: torch.device,
    ) -> None:
        batch, heads, length = shape
        _check(op, "the length", length >= 1, "at least 1", length)
        _check(op, "chunk_size", chunk_size >= 1, "at least 1", chunk_size)
        _check(op, "look_back", look_back >= 0, "at least 0", look_back)
        _check(op, "look_ahead", look_ahead >= 0, "at least 0", look_ahead)
        positions = torch.arange(length, device=device)
        if order is None:
            order = positions.expand(batch, heads, 1, length)
        else:
            _check_integers(op, "order", order)
            rounds = max(order.shape[2], 1)
            expected = [batch, heads, rounds, length]
            _check(op, "order", list(order.shape) == expected, str(expected), list(order.shape))
            order = order.long()
            _check(
                op,
                "order",
                torch.equal(order.sort(dim=-1).values, positions.expand_as(order)),
                f"permutations of 0 .. {length - 1}",
                "repeated or other values",
            )
        if buckets is not None:
            _check_integers(op, "buckets", buckets)
            _check(
                op,
                "buckets",
                buckets.shape == order.shape,
                str(list(order.shape)),
                list(buckets.shape),
            )
        if key_padding_mask is not None:
            _check(
                op,
                "key_padding_mask",
                key_padding_mask.dtype == torch.bool
                and list(key_padding_mask.shape) == [batch, length],
                f"bool {[batch, length]}",
                f"{key_padding_mask.dtype} {list(key_padding_mask.shape)}",
            )
        self.order = order
        self.rounds = order.shape[2]
        # The inverse: where a position is in each round's list.
        self.place = torch.empty_like(order, memory_format=torch.contiguous_format)
        self.place.scatter_(-1, order, positions.expand_as(order))
        self.chunk_size = min(chunk_size, length)
        self.chunks = -(-length // chunk_size)  # of a round
        # The chunks of a window, relative to the query's: a set, none twice.
        line = self.rounds * self.chunks if wrap else self.chunks
        back, ahead = min(look_back, line - 1), min(look_ahead, line - 1)
        self.offsets = torch.arange(-back, ahead + 1, device=device)
        if wrap:
            self.offsets = self.offsets[:line]
        self.causal = causal
        self.mask_self = mask_self
        self.wrap = wrap
        self.key_padding_mask = key_padding_mask
        self.buckets = buckets

    @property
    def n_slots(self) -> int:
        """Slots of a query, valid or not."""
        return self.rounds * len(self.offsets) * self.chunk_size

    def blocks(self, queries: Tensor, columns: int = 1) -> Iterator[Tensor]:
        """The queries in blocks, such that no temporary of a block is large. ``columns``: elements
        that a query takes beside its slots."""
        batch, heads = self.order.shape[:2]
        per_query = max(1, batch * heads) * max(columns, self.n_slots)
        yield from torch.split(queries, max(1, _BLOCK // per_query))

    def slots(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The slots of ``queries (S,)``, all ``(B, H, R, S, slots of a round)``.

        Returns:
            ``keys``; ``valid``, which slots count; ``times``, how many slots a key has, at the
            first of them, else 0.
        """
        rounds, chunks, length = self.rounds, self.chunks, self.order.shape[-1]
        device = self.order.device
        query_round = torch.arange(rounds, device=device).view(rounds, 1, 1)
        near = (self.place[..., queries] // self.chunk_size)[..., None] + self.offsets
        valid = torch.ones_like(near, dtype=torch.bool)
        if not self.wrap:
            valid = (near >= 0) & (near < chunks)
        chunk = (query_round * chunks + near) % (rounds * chunks)
        key_round = chunk // chunks
        if self.buckets is not None:  # of another round: never the same bucket
            valid = valid & (key_round == query_round)
        columns = torch.arange(self.chunk_size, device=device)
        at = (chunk % chunks * self.chunk_size)[..., None] + columns
        valid = (valid[..., None] & (at < length)).flatten(-2)
        at = (key_round[..., None] * length + at.clamp(max=length - 1)).flatten(-2)
        keys = self.order.flatten(2).gather(-1, at.flatten(2)).view_as(at)

        if self.causal:
            valid = valid & (keys <= queries[:, None])
        if self.mask_self:
            valid = valid & (keys != queries[:, None])
        if self.key_padding_mask is not None:
            padding = self.key_padding_mask[:, None].expand(-1, keys.shape[1], -1)
            valid = valid & ~padding.gather(-1, keys.flatten(2)).view_as(keys)
        if self.buckets is not None:
            digits = self.buckets.gather(-1, keys.flatten(3)).view_as(keys)
            valid = valid & (digits == self.buckets[..., queries, None])

        # Equal keys side by side, a key's first slot first; before all, as -1, what does not count.
        ranked, ranking = torch.where(valid, keys, -1).transpose(2, 3).flatten(3).sort(stable=True)
        first = ranked.diff(dim=-1, prepend=torch.full_like(ranked[..., :1], -1)) != 0
        run = first.cumsum(dim=-1)
        lengths = torch.zeros_like(F.pad(ranked, (0, 1)))
        lengths.scatter_add_(-1, run, torch.ones_like(run))
        times = torch.empty_like(run).scatter_(-1, ranking, lengths.gather(-1, run) * first)
        return keys, valid, times.view(keys.transpose(2, 3).shape).transpose(2, 3)

    def allowed(self, queries: Tensor) -> Tensor:
        """What exact attention sees: bool ``(B or 1, 1, S, L)``."""
        positions = torch.arange(self.order.shape[-1], device=self.order.device)
        query = queries[:, None]
        shape = (1, 1, len(queries), len(positions))
        allowed = torch.ones(shape, dtype=torch.bool, device=positions.device)
        if self.causal:
            allowed = allowed & (positions <= query)
        if self.mask_self:
            allowed = allowed & (positions != query)
        if self.key_padding_mask is not None:
            allowed = allowed & ~self.key_padding_mask[:, None, None, :]
        return allowed


def _sums_over_met(values: Tensor, keys: Tensor, new: Tensor) -> Tensor:
    """Sums of ``values (B, H, S, L)`` over the candidates of rounds 1 ... r, ``(B, H, R, S)``;
    ``new`` is true of one slot of each."""
    of_slots = values[:, :, None].expand(-1, -1, keys.shape[2], -1, -1).gather(-1, keys)
    return (of_slots * new).sum(dim=-1).cumsum(dim=2)


def _checked_queries(op: str, queries: Tensor | None, length: int, device: torch.device) -> Tensor:
    if queries is None:
        return spaced_queries(length, device=device)
    _check(
        op,
        "queries",
        queries.dtype == torch.int64 and queries.dim() == 1 and len(queries) > 0,
        "int64 [S]",
        f"{queries.dtype} {list(queries.shape)}",
    )
    low, high = (int(value) for value in queries.aminmax())
    _check(op, "queries", low >= 0 and high < length, f"0 .. {length - 1}", f"{low} .. {high}")
    return queries


def _check_integers(op: str, name: str, x: Tensor) -> None:
    _check(
        op,
        name,
        x.dim() == 4 and not (x.is_floating_point() or x.dtype == torch.bool),
        "integers [B, H, R, L]",
        f"{x.dtype} {list(x.shape)}",
    )


def _check(op: str, name: str, condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{op}: expected {name} to be {expected}, got {got}")
