"""Where a token is: axial, absolute and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .checks import check_int, check_number, is_int

__all__ = ["AbsolutePositions", "AxialPositions", "RotaryPositions", "apply_rotary"]


class AbsolutePositions(nn.Module):
    """A learned vector per position: ``max_length * dim`` parameters.

    Raises:
        ValueError: max_length or dim is no integer >= 1.
    """

    def __init__(self, max_length: int, dim: int) -> None:
        super().__init__()
        check_int("AbsolutePositions", "max_length", max_length)
        check_int("AbsolutePositions", "dim", dim)
        self.weight = nn.Parameter(torch.empty(max_length, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, length: int) -> Tensor:
        """The first ``length`` vectors, ``(length, dim)``. Raises ValueError unless length is in
        0 .. max_length."""
        _check_length("AbsolutePositions", length, self.weight.shape[0])
        return self.weight[:length]

    def at(self, positions: Tensor) -> Tensor:
        """The vectors of ``positions``, int64 ``(...)`` below max_length: ``(..., dim)``."""
        return F.embedding(positions, self.weight)


class AxialPositions(nn.Module):
    """Learned positions on a grid: long sequences from few parameters (Reformer's code; axial
    positional embeddings).

    Position p sits at the coordinates of p in a row-major grid of the given shape; its vector
    joins one learned vector per axis. ``sum(shape[a] * dims[a])`` parameters for ``prod(shape)``
    positions, and any length up to that.

    Args:
        shape: of the grid, e.g. ``(256, 256)`` for 65,536 positions.
        dim: width of a position's vector.
        dims: width per axis, summing to dim; default: as even as possible.
        summed: the vectors of the axes, each dim wide, are added up instead of joined (as in
            reformer-pytorch).

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        dims: Sequence[int] | None = None,
        *,
        summed: bool = False,
    ) -> None:
        super().__init__()
        check_int("AxialPositions", "dim", dim)
        if not shape or not all(is_int(size, 1) for size in shape):
            raise ValueError(
                f"AxialPositions: expected shape of positive sizes, got {tuple(shape)}"
            )
        if summed and dims is not None:
            raise ValueError(f"AxialPositions: expected no dims if summed, got {tuple(dims)}")
        if summed:
            dims = [dim] * len(shape)
        elif dims is None:
            small, larger = divmod(dim, len(shape))
            dims = [small + (axis < larger) for axis in range(len(shape))]
        total = len(shape) * dim if summed else dim
        whole = all(is_int(width, 1) for width in dims)
        if len(dims) != len(shape) or not whole or sum(dims) != total:
            raise ValueError(
                f"AxialPositions: expected {len(shape)} positive dims that sum to {total}, "
                f"got {tuple(dims)}"
            )
        self.shape = tuple(shape)
        self.summed = summed
        self.weights = nn.ParameterList(
            torch.empty(size, width) for size, width in zip(shape, dims, strict=True)
        )
        for weight in self.weights:
            nn.init.normal_(weight, std=0.02)

    def forward(self, length: int) -> Tensor:
        """The first ``length`` vectors, ``(length, dim)``. Raises ValueError unless length is in
        0 .. ``prod(shape)``."""
        _check_length("AxialPositions", length, math.prod(self.shape))
        if torch.compiler.is_compiling() and not self.training:
            # A graph for any length: how many whole rows there are would fix it.
            return self.at(torch.arange(length, device=self.weights[0].device))
        # Whole rows of the first axis, broadcast: a gather's backward would need atomics.
        rows = -(-length // math.prod(self.shape[1:]))
        grid = (rows, *self.shape[1:])
        parts = []
        for axis, weight in enumerate(self.weights):
            view = [1] * len(grid) + [weight.shape[1]]
            view[axis] = grid[axis]
            parts.append(weight[: grid[axis]].view(view).expand(*grid, -1))
        vectors = torch.stack(parts).sum(dim=0) if self.summed else torch.cat(parts, dim=-1)
        return vectors.flatten(0, -2)[:length]

    def at(self, positions: Tensor) -> Tensor:
        """The vectors of ``positions``, int64 ``(...)`` below ``prod(shape)``: ``(..., dim)``."""
        parts = []
        for size, weight in zip(reversed(self.shape), reversed([*self.weights]), strict=True):
            parts.append(F.embedding(positions % size, weight))
            positions = positions // size
        return torch.stack(parts).sum(dim=0) if self.summed else torch.cat(parts[::-1], dim=-1)


class RotaryPositions(nn.Module):
    """Angles of rotary position embeddings (RoFormer): relative positions, any length, no
    parameters.

    Args:
        head_dim: D, even.
        base: wavelengths go from 2 pi to ``2 pi * base``; above 0.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if not is_int(head_dim, 2) or head_dim % 2:
            raise ValueError(f"RotaryPositions: expected an even head_dim >= 2, got {head_dim!r}")
        check_number("RotaryPositions", "base", base, 0)
        self.head_dim = head_dim
        self.base = base

    def forward(self, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Factors for :func:`apply_rotary`, float32 ``(length, head_dim)`` each. Raises ValueError
        for a length below 0."""
        _check_length("RotaryPositions", length)
        return self.at(torch.arange(length, device=device))

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Factors for ``positions (...)``, float32 ``(..., head_dim)`` each: ``[cos, cos]`` and
        ``[-sin, sin]`` of the angles."""
        # In float64: a float32 angle is off by 0.06 at a million positions.
        half = self.head_dim // 2
        frequencies = torch.logspace(  # base ** (-2 i / D)
            0, (1 - half) / half, half, self.base, dtype=torch.float64, device=positions.device
        )
        angles = positions[..., None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        factors = torch.cat([cos, cos, -sin, sin], dim=-1).float()
        return factors[..., : self.head_dim], factors[..., self.head_dim :]


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs ``(x[d], x[d + D/2])`` by the angles of :class:`RotaryPositions`.

    Args:
        x: ``(B, H, L, D)`` or ``(N, B, H, L, D)``.
        rotary: its factors, ``(L, D)`` or ``(B, 1, L, D)``.

    Returns:
        The shape and dtype of x.
    """
    return ops.apply_rotary(x, *rotary)


def _check_length(name: str, length: int, limit: int | None = None) -> None:
    if not isinstance(length, torch.SymInt):  # of a graph that takes any length
        check_int(name, "length", length, 0)
    if limit is not None and length > limit:
        raise ValueError(f"{name}: expected at most {limit} positions, got {length}")
