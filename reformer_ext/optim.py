"""The optimiser of ``reformer train``: Muon for the weight matrices, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "learning_rate_factor", "split_parameters"]


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024): momentum whose update is the nearest semi-orthogonal matrix.

    Not ``torch.optim.Muon``: that one works in bfloat16, which CPUs without AVX-512 emulate slowly,
    and one matrix at a time; here matrices of one shape go through one batched product, in bfloat16
    on CUDA and float32 elsewhere. The update has root mean square 0.2 lr per element, whatever the
    shape, about AdamW's (Moonshot AI, arXiv 2502.16982).

    Args:
        params: 2-D parameters.
        lr: learning rate.
        momentum: of the gradients, Nesterov's form.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Muon: expected 2-D parameters, got shape {list(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon: a closure is not supported")
        for group in self.param_groups:
            same_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in same_shape.items():
                gradients = [p.grad for p in parameters if p.grad is not None]
                for parameter in parameters:
                    if "momentum" not in self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                momenta = [self.state[parameter]["momentum"] for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
                update = orthogonalize(torch.stack(list(ahead))) * (0.2 * math.sqrt(max(shape)))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    parameters, list(update.to(parameters[0].dtype)), alpha=-group["lr"]
                )


def orthogonalize(matrices: Tensor) -> Tensor:
    """About ``U V^T`` of each matrix's SVD, by five Newton-Schulz steps. ``(n, rows, columns)``.

    The quintic's coefficients favour speed: singular values end between 0.7 and 1.2, not at 1.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.transpose(1, 2) if tall else x


def split_parameters(model: nn.Module, head: nn.Module | None) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of the linear layers except the output ``head``, and all other parameters."""
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    parameters = list(model.parameters())
    return (
        [parameter for parameter in parameters if id(parameter) in matrices],
        [parameter for parameter in parameters if id(parameter) not in matrices],
    )


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then linear decay to zero after the last step. ``step`` counts from 0."""
    return min((step + 1) / (warmup + 1), (steps - step) / max(steps - warmup, 1))
