"""A kind of attention of your own in a Reformer: registered, trained beside "lsh", generating.

``python examples/custom_attention.py`` trains for a few seconds on the CPU.

Causal linear attention (arXiv 2006.16236): with features ``f(x) = elu(x) + 1`` the weights of a
position are ``f(q_i) . f(k_j)``, so that all it needs of the positions before it are two sums. They
are also the whole cache, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_ext.nn import (
    ATTENTIONS,
    AttentionOptions,
    CacheSizes,
    Layer,
    LayerCache,
    ReformerConfig,
    ReformerLM,
    SelfAttention,
)


@dataclass(frozen=True)
class LinearOptions(AttentionOptions):
    """What a layer may set: ``Layer("linear", {"floor": 1e-3})``."""

    floor: float = 1e-6

    def check(self, name: str) -> None:
        if not self.floor > 0:
            raise ValueError(f"{name}: expected floor > 0, got {self.floor!r}")


class LinearSelfAttention(SelfAttention):
    """Causal linear attention; ``floor`` is the least sum of weights."""

    Options = LinearOptions

    def __init__(self, dim: int, heads: int, *, floor: float = 1e-6, **common: Any) -> None:
        super().__init__(dim, heads, n_projections=3, **common)
        self.floor = floor

    def new_cache(self, sizes: CacheSizes) -> LayerCache:
        return LinearCache(self, sizes)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        norm: nn.Module | None = None,
        cache: LinearCache | None = None,
        cache_lengths: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.project_in(x, norm)
        q, k, ones = F.elu(q) + 1, F.elu(k) + 1, torch.ones_like(v[..., :1])
        if key_padding_mask is not None:
            k = k.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        states = (k[..., None] * torch.cat([v, ones], -1)[..., None, :]).cumsum(2)
        if cache is not None:  # a prompt begins at zero, what follows continues
            states = cache.add(states)
        out = (q[..., None, :] @ states)[..., 0, :]
        return self.project_out(out[..., :-1] / out[..., -1:].clamp(min=self.floor))


class LinearCache(LayerCache):
    """The sums of ``f(k_j) v_j`` and ``f(k_j)`` so far, ``(B, H, D, D + 1)``."""

    state: Tensor

    def __init__(self, layer: LinearSelfAttention, sizes: CacheSizes) -> None:
        super().__init__()
        shape = (sizes.batch, layer.heads, layer.head_dim, layer.head_dim + 1)
        state = torch.zeros(shape, dtype=sizes.dtype, device=sizes.device)
        self.register_buffer("state", state, persistent=False)

    def add(self, states: Tensor) -> Tensor:
        """Sums within the new positions ``(B, H, T, D, D + 1)``, with those of all before."""
        states = states + self.state[:, :, None].to(states.dtype)
        self.state.copy_(states[:, :, -1])
        return states

    def reset(self) -> None:
        self.state.zero_()


ATTENTIONS["linear"] = LinearSelfAttention


def train(config: ReformerConfig, steps: int) -> tuple[ReformerLM, list[float]]:
    """On sequences that count up from anywhere; the losses in nats."""
    model = ReformerLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        start = torch.randint(config.vocab_size, (8, 1))
        tokens = (start + torch.arange(65)) % config.vocab_size
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]) + model.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


@torch.no_grad()
def generate(model: ReformerLM, prompt: Tensor, length: int) -> Tensor:
    """Continues ``prompt (B, P)`` greedily, one token a step on the cache: ``(B, length)``."""
    cache = model.new_cache(prompt.shape[0], prompt.shape[1] + length)
    found = []
    for _ in range(length):
        prompt = model(prompt, cache=cache)[:, -1:].argmax(-1)
        found.append(prompt)
    return torch.cat(found, dim=1)


def small_config() -> ReformerConfig:
    """Linear attention beside LSH attention, in one model of 32 tokens."""
    layers = ("lsh", Layer("linear", {"floor": 1e-3}))
    return ReformerConfig(vocab_size=32, dim=32, heads=2, layers=layers, n_hashes=2, chunk_size=16)


if __name__ == "__main__":
    torch.manual_seed(0)
    model, losses = train(small_config(), 150)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats")
    print("20 21 22, then", *generate(model, torch.tensor([[20, 21, 22]]), 16)[0].tolist())
