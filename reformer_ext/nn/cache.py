"""What generation remembers: each attention layer keeps what it needs to go on at constant cost.

The buffers have a fixed size and are changed in place, so a decoding step can be captured in a CUDA
graph, compiled and exported. What a layer keeps is its kind's to say: see the files of
:mod:`reformer_ext.nn.attention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .checks import is_int
from .config import ReformerConfig

__all__ = ["CacheSizes", "DecodingCache", "LayerCache", "reorder_rows"]


@dataclass(frozen=True)
class CacheSizes:
    """What a layer's cache is made for.

    Attributes:
        batch: sequences B.
        capacity: most positions.
        dtype: of keys and values.
        device: of all buffers.
        n_hashes: hash rounds; None: the layer's.
        n_buckets: even factors; None: the layer's, else by hash_length.
        window: positions that a bucket remembers; None: the layer's chunk size.
        hash_length: how long the sequences are that the hash is made for; None: as the capacity.
        shift: of the call: see :class:`AttentionCall`.
    """

    batch: int
    capacity: int
    dtype: torch.dtype
    device: torch.device
    n_hashes: int | None = None
    n_buckets: tuple[int, ...] | None = None
    window: int | None = None
    hash_length: int | None = None
    shift: int = 0

    def check(self, name: str) -> None:
        """Raises ValueError in the name of a function for a size that is none."""
        for field in ("batch", "capacity", "n_hashes", "window", "hash_length"):
            value = getattr(self, field)
            optional = field not in ("batch", "capacity") and value is None
            if not (optional or is_int(value, 1)):
                raise ValueError(f"{name}: expected {field} to be an integer >= 1, got {value}")
        factors = self.n_buckets
        if factors is not None and not (
            factors and all(is_int(n, 2) and n % 2 == 0 for n in factors)
        ):
            raise ValueError(
                f"{name}: expected n_buckets to be an even number >= 2 or such factors, "
                f"got {factors[0] if len(factors) == 1 else [*factors]}"
            )
        if not self.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a floating dtype, got {self.dtype}")


class LayerCache(nn.Module):
    """The cache of one call of an attention layer: buffers ``(B, ...)``, changed in place."""

    not_by_sequence: ClassVar[tuple[str, ...]] = ()  # buffers without a row for each sequence

    def step(self, lengths: Tensor, n: int, common: dict[Any, Any]) -> dict[str, Any]:
        """What the layer's forward gets to continue sequences of ``lengths (B,)`` with n positions;
        ``common`` holds what layers share within the step."""
        return {"cache": self, "cache_lengths": lengths}

    def reset(self) -> None:
        """Forgets everything that the lengths do not tell."""


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
        layers: a cache for each call of an attention layer, in their order.
    """

    lengths: Tensor

    def __init__(
        self,
        config: ReformerConfig,
        sizes: CacheSizes,
        layers: Iterable[LayerCache],
    ) -> None:
        super().__init__()
        self.config = config
        self.capacity = sizes.capacity
        self.dtype = sizes.dtype
        self.filled = False
        self.used = 0
        self.layers = nn.ModuleList(layers)
        lengths = torch.zeros(sizes.batch, dtype=torch.int64, device=sizes.device)
        self.register_buffer("lengths", lengths, persistent=False)

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
        common: dict[Any, Any] = {}
        return [layer.step(self.lengths, n, common) for layer in self._layers()]

    def _layers(self) -> Iterable[LayerCache]:
        for layer in self.layers:
            assert isinstance(layer, LayerCache)
            yield layer

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
        for layer in self._layers():
            layer.reset()

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
    """Takes rows of all buffers inside that have one for each sequence; see
    :meth:`DecodingCache.reorder`."""
    buffers = [
        (module, name, buffer)
        for module in cache.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in getattr(module, "not_by_sequence", ())
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
