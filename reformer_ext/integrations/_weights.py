"""Weights under other names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import AxialPositions

__all__ = ["Weight", "affine", "axial", "load_weights", "read_weights", "write_weights"]


@dataclass(frozen=True)
class Weight:
    """One of our tensors, and the tensors of another model that it consists of.

    Attributes:
        name: of ours, in our state dict.
        sources: names of theirs: equal parts of ours along the first axis.
        shape: of each source; None: like its part of ours.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...] | None = None

    def parts(self, ours: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Their names, and our parts in their shapes."""
        parts = ours[self.name].chunk(len(self.sources))
        return [
            (name, part if self.shape is None else part.reshape(self.shape))
            for name, part in zip(self.sources, parts, strict=True)
        ]


def affine(ours: str, theirs: str) -> list[Weight]:
    """Weight and bias of a linear map or a normalization."""
    return [Weight(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in ("weight", "bias")]


def axial(positions: AxialPositions, ours: str, theirs: str, leading: int) -> list[Weight]:
    """One tensor per axis: theirs broadcast over the grid, after ``leading`` more dimensions."""
    result = []
    for axis, weight in enumerate(positions.weights):
        shape = [1] * (leading + len(positions.shape)) + [weight.shape[1]]
        shape[leading + axis] = weight.shape[0]
        result.append(Weight(f"{ours}.{axis}", (f"{theirs}.{axis}",), tuple(shape)))
    return result


def read_weights(
    caller: str,
    weights: Sequence[Weight],
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    ignore: Callable[[str], bool],
) -> dict[str, Tensor]:
    """Our tensors, put together from theirs.

    Args:
        caller: named in errors.
        weights: which of theirs make ours.
        theirs: their state dict.
        ours: tensors of our names and shapes.
        ignore: names of theirs that mean nothing here.

    Raises:
        ValueError: names that are missing or unknown, or a tensor of another shape.
    """
    names = {name for weight in weights for name in weight.sources}
    missing = sorted(names - theirs.keys())
    unknown = sorted(name for name in theirs.keys() - names if not ignore(name))
    if missing or unknown:
        raise ValueError(f"{caller}: state dict lacks {missing} and has unknown {unknown}")
    result = {}
    for weight in weights:
        for name, part in weight.parts(ours):
            if theirs[name].shape != part.shape:
                raise ValueError(
                    f"{caller}: expected {name} of shape {list(part.shape)}, "
                    f"got {list(theirs[name].shape)}"
                )
        joined = torch.cat([theirs[name] for name in weight.sources])
        result[weight.name] = joined.reshape(ours[weight.name].shape)
    return result


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies all weights into the model, which moves to their device and dtype."""
    first = next(iter(weights.values()))
    model.to(device=first.device, dtype=first.dtype)
    # Not strict: only the counter of training steps is ours alone.
    model.load_state_dict(weights, strict=False)


def write_weights(weights: Sequence[Weight], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of our tensors under their names and in their shapes."""
    return {name: part.clone() for weight in weights for name, part in weight.parts(ours)}
