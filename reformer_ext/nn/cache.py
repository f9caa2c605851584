"""What generation remembers: a layer's keys and values, found again at constant cost a token.

LSH layers keep, per head, round and bucket, the last positions that fell into the bucket; a new
token attends to those in its own buckets. Local layers keep the chunks of their window, full layers
everything. The buffers have a fixed size and are changed in place, so a decoding step can be
captured in a CUDA graph, compiled and exported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

if TYPE_CHECKING:
    from .models import ReformerConfig

__all__ = ["DecodingCache", "FullCache", "LSHCache", "LocalCache"]


class LSHCache(nn.Module):
    """Keys, values and bucket table of an LSH layer; see :func:`reformer_ext.lsh_decode`.

    Args:
        batch, heads, head_dim: B, H, D.
        capacity: C positions.
        rotations: ``(H, D, R, sum(n_buckets) / 2)``, of the layer's hash.
        n_buckets: even factors.
        window: W positions that a bucket remembers.
        dtype: of keys and values.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    counts: Tensor
    rotations: Tensor

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        capacity: int,
        *,
        rotations: Tensor,
        n_buckets: Sequence[int],
        window: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        device = rotations.device
        table = (batch, heads, rotations.shape[2], math.prod(n_buckets))
        rows = (batch, heads, capacity, head_dim)
        self.n_buckets = list(n_buckets)
        for name, buffer in {
            "keys": torch.zeros(rows, dtype=dtype, device=device),
            "values": torch.zeros(rows, dtype=dtype, device=device),
            "table": torch.zeros(*table, window, dtype=torch.int32, device=device),
            "counts": torch.zeros(table, dtype=torch.int32, device=device),
            "rotations": rotations,
        }.items():
            self.register_buffer(name, buffer, persistent=False)

    def append(self, qk: Tensor, v: Tensor, buckets: Tensor, lengths: Tensor) -> None:
        """Adds positions ``(B, H, T, D)`` with buckets int32 ``(B, H, R, T)`` after ``lengths``."""
        ops.lsh_cache_append(
            self.keys,
            self.values,
            self.table,
            self.counts,
            qk.to(self.keys.dtype),
            v.to(self.values.dtype),
            buckets,
            lengths,
            normalize=True,
        )

    def attend(
        self,
        qk: Tensor,
        hashed: Tensor,
        v: Tensor,
        lengths: Tensor,
        *,
        scale: float | None,
        correct_duplicates: bool,
    ) -> Tensor:
        """Each of T new positions ``(B, H, T, D)`` attends to those before it and is added."""
        dtype = self.keys.dtype
        buckets = ops.lsh_hash(hashed, self.rotations.to(hashed.dtype), self.n_buckets)
        outs = []
        for t in range(qk.shape[2]):
            now = slice(t, t + 1)
            out, _ = ops.lsh_decode(
                qk[:, :, now].to(dtype),
                self.keys,
                self.values,
                self.table,
                self.counts,
                buckets[..., now],
                own_values=v[:, :, now].to(dtype),
                scale=scale,
                correct_duplicates=correct_duplicates,
            )
            at = lengths + t if t else lengths
            self.append(qk[:, :, now], v[:, :, now], buckets[..., now], at)
            outs.append(out)
        return _joined(outs).to(qk.dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    """Along the positions. A single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _RowCache(nn.Module):
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

    def _write(self, k: Tensor, v: Tensor, places: Tensor) -> None:
        """Rows ``(B, H, T, D)`` to different ``places (B, T)``."""
        index = places[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index, k.to(self.keys.dtype))
        self.values.scatter_(2, index, v.to(self.values.dtype))

    def _attend(self, q: Tensor, mask: Tensor, scale: float | None) -> Tensor:
        """``q (B, H, T, D)`` to the places that ``mask (B, T, places)`` allows: bool, or the keys'
        dtype and added to the logits."""
        out = F.scaled_dot_product_attention(
            q.to(self.keys.dtype), self.keys, self.values, attn_mask=mask[:, None], scale=scale
        )
        return out.to(q.dtype)


class LocalCache(_RowCache):
    """The chunks that a causal local layer looks at: position p is at place ``p % places``."""

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        chunk_size: int,
        look_back: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.chunk_size, self.look_back = chunk_size, look_back
        places = (1 + look_back) * chunk_size
        super().__init__(batch, heads, head_dim, places, dtype=dtype, device=device)

    def append(self, k: Tensor, v: Tensor, lengths: Tensor) -> None:
        """Adds the first ``lengths (B,)`` of T positions ``(B, H, T, D)`` to an empty cache."""
        # Every place looks up the newest position that belongs there: no two writes meet.
        last = lengths - 1
        positions = (last[:, None] - self._ages(last)).clamp(0, k.shape[2] - 1)
        index = positions[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        self.keys.copy_(k.gather(2, index))
        self.values.copy_(v.gather(2, index))

    def windows(self, lengths: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
        """For each of n positions after ``lengths (B,)``: its place ``(B, 1)``, and what is added
        to its logits ``(B, 1, places)``. The same for all layers of a model."""
        result = []
        for t in range(n):
            last = lengths + t if t else lengths
            age = self._ages(last)
            oldest = torch.minimum(last, last % self.chunk_size + self.look_back * self.chunk_size)
            bias = torch.zeros_like(age, dtype=self.keys.dtype)
            bias.masked_fill_(age > oldest[:, None], -math.inf)
            result.append(((last % self.keys.shape[2])[:, None], bias[:, None]))
        return result

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        windows: Sequence[tuple[Tensor, Tensor]],
        *,
        scale: float | None,
    ) -> Tensor:
        """Each of T new positions ``(B, H, T, D)`` is added and attends to its window; see
        :meth:`windows`."""
        outs = []
        for t, (place, bias) in enumerate(windows):
            now = slice(t, t + 1)
            self._write(k[:, :, now], v[:, :, now], place)
            outs.append(self._attend(q[:, :, now], bias, scale))
        return _joined(outs)

    def _ages(self, last: Tensor) -> Tensor:
        """How far before ``last (B,)`` is the newest position of each place, ``(B, places)``."""
        places = torch.arange(self.keys.shape[2], device=last.device)
        return (last[:, None] - places) % self.keys.shape[2]


class FullCache(_RowCache):
    """Everything a causal full layer has seen. ``shared_qk``: keys are normalised queries."""

    def append(self, k: Tensor, v: Tensor, lengths: Tensor) -> None:
        """Adds T positions ``(B, H, T, D)`` after ``lengths (B,)``."""
        k, v = k[:, :, : self.keys.shape[2]], v[:, :, : self.keys.shape[2]]  # padding may go beyond
        places = lengths[:, None] + torch.arange(k.shape[2], device=k.device)
        self._write(k, v, places.clamp(max=self.keys.shape[2] - 1))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        *,
        scale: float | None,
        mask_self: bool,
    ) -> Tensor:
        """T new positions ``(B, H, T, D)`` are added and attend to what is not after them."""
        self.append(k, v, lengths)
        queries = lengths[:, None, None] + torch.arange(q.shape[2], device=q.device)[:, None]
        places = torch.arange(self.keys.shape[2], device=q.device)
        if not mask_self:
            return self._attend(q, places <= queries, scale)
        out = self._attend(q, places < queries.clamp(min=1), scale)
        return torch.where(queries[:, None] == 0, v, out)  # the first has nothing but itself


class DecodingCache(nn.Module):
    """The caches of all layers of a causal :class:`Reformer`, and how long each sequence is.

    Made by :meth:`ReformerLM.new_cache`. The first forward pass with it (a prompt of any length)
    fills it, later ones decode. Memory per position and layer: keys and values; per LSH layer also
    ``4 * R * H * N * W`` bytes of tables.

    Compiled, exported and captured steps do not count in ``used``: that they stay within the
    capacity is the caller's to see to. A step that fails halfway leaves the cache of no use until
    :meth:`reset`.

    Attributes:
        config: of the model.
        capacity: positions there is room for.
        filled: whether there has been a prompt.
        used: the longest length, known without asking the device.
        dtype: of keys and values.
        lengths: int64 ``(B,)``, positions of each sequence.
        layers: the layers' caches.
    """

    lengths: Tensor

    def __init__(
        self,
        config: ReformerConfig,
        batch: int,
        capacity: int,
        *,
        rotations: Sequence[Tensor],  # of the LSH layers
        n_buckets: Sequence[int],
        window: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config = config
        self.capacity = capacity
        self.dtype = dtype
        self.filled = False
        self.used = 0
        sizes = (batch, config.heads, config.head_width)
        layers: list[nn.Module] = []
        of_layer = iter(rotations)
        for kind in config.layers:
            if kind == "lsh":
                layers.append(
                    LSHCache(
                        *sizes,
                        capacity,
                        rotations=next(of_layer),
                        n_buckets=n_buckets,
                        window=window,
                        dtype=dtype,
                    )
                )
            elif kind == "local":
                window_of = (config.local_chunk_size, config.local_look_back)
                layers.append(LocalCache(*sizes, *window_of, dtype=dtype, device=device))
            else:
                layers.append(FullCache(*sizes, capacity, dtype=dtype, device=device))
        self.layers = nn.ModuleList(layers)
        self.register_buffer(
            "lengths", torch.zeros(batch, dtype=torch.int64, device=device), persistent=False
        )

    @property
    def batch(self) -> int:
        """B."""
        return self.lengths.shape[0]

    def check(self, config: ReformerConfig, batch: int, length: int) -> None:
        """Raises ValueError unless the cache is of this configuration and there is room for
        ``length`` more positions of ``batch`` sequences."""
        if config != self.config:
            raise ValueError(
                "DecodingCache: expected the model that made it, got one of another configuration"
            )
        if batch != self.batch:
            raise ValueError(
                f"DecodingCache: expected {self.batch} sequences, got {batch}; make another cache"
            )
        if self.used + length > self.capacity:
            raise ValueError(
                f"DecodingCache: expected at most {self.capacity} positions, got {length} more "
                f"after {self.used}; make a cache with a larger capacity"
            )

    def steps(self, n: int) -> list[dict[str, Any]]:
        """What each layer's attention needs to continue with n positions."""
        windows: list[tuple[Tensor, Tensor]] | None = None
        result: list[dict[str, Any]] = []
        for layer in self.layers:
            if isinstance(layer, LocalCache):
                windows = windows or layer.windows(self.lengths, n)
                result.append({"cache": layer, "cache_windows": windows})
            else:
                result.append({"cache": layer, "cache_lengths": self.lengths})
        return result

    def extend(self, lengths: Tensor | int, longest: int) -> None:
        """Records that sequences have grown by ``lengths (B,)``, none by more than ``longest``."""
        self.lengths.add_(lengths)
        if not self.filled:
            self.filled, self.used = True, longest
        elif not torch.compiler.is_compiling():  # a number that changes would be compiled in
            self.used += longest

    def reset(self) -> None:
        """Forgets everything, so that the next tokens begin new sequences."""
        self.used = 0
        self.filled = False
        self.lengths.zero_()
        for layer in self.layers:
            if isinstance(layer, LSHCache):  # the others know by the lengths
                layer.counts.zero_()

    def reorder(self, indices: Tensor | Sequence[int]) -> None:
        """Sequence i becomes what sequence ``indices[i]`` was, in place.

        For beam search, where a beam may go on twice and another not at all, and to drop sequences
        that have ended: with fewer indices than sequences the batch shrinks, for good.

        Args:
            indices: integers ``(n,)``, 1 <= n <= B, in 0 .. B - 1. A CUDA tensor is not checked
                for that range, which would cost a synchronisation.

        Raises:
            ValueError: naming what was expected and what came; nothing is changed.
        """
        reorder_rows(self, indices, self.batch)


@torch.no_grad()
def reorder_rows(cache: nn.Module, indices: Tensor | Sequence[int], batch: int) -> None:
    """Takes rows of all buffers inside but the rotations, which have none; see
    :meth:`DecodingCache.reorder`."""
    buffers = [
        (module, name, buffer)
        for module in cache.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name != "rotations"
    ]
    indices = torch.as_tensor(indices)
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise ValueError(
            f"{type(cache).__name__}.reorder: expected indices [n] of int32 or int64, "
            f"got {list(indices.shape)} of {indices.dtype}"
        )
    if not 1 <= len(indices) <= batch:
        raise ValueError(
            f"{type(cache).__name__}.reorder: expected 1 to {batch} indices, got {len(indices)}"
        )
    if indices.device.type == "cpu" and not ((indices >= 0) & (indices < batch)).all():
        raise ValueError(
            f"{type(cache).__name__}.reorder: expected indices in 0 .. {batch - 1}, "
            f"got {indices.tolist()}"
        )
    with torch.inference_mode(False):  # whose views nothing else may change in place
        for module, name, buffer in buffers:
            rows = buffer[: len(indices)]
            rows.copy_(buffer.index_select(0, indices.to(buffer.device)))
            if len(rows) < len(buffer):
                setattr(module, name, rows)
