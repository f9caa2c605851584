"""Text from a trained model, one byte or token at a time, at a constant cost a byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import load_model
from .nn import DecodingCache, ReformerEncoderDecoder, ReformerLM

__all__ = [
    "Sampling",
    "autocast",
    "generate",
    "generate_batch",
    "generate_from_source",
    "load_model",
    "sample",
]


@dataclass(frozen=True)
class Sampling:
    """How a byte is drawn from its probabilities.

    Attributes:
        temperature: divides the logits; 0 takes the most probable byte.
        top_k: sample among the k most probable; 0: all.
        top_p: sample among the fewest whose probabilities sum to at least p.
        repetition_penalty: logits of bytes in the context are divided by it where positive, else
            multiplied (CTRL, arXiv 1909.05858); 1: none.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _expect("temperature", self.temperature, self.temperature >= 0, ">= 0")
        _expect("top_k", self.top_k, self.top_k >= 0, ">= 0")
        _expect("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _expect("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "> 0")


def _expect(name: str, value: object, condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"generate: expected {name} {expected}, got {value}")


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU; float32 stays float32 on the CPU, where not all have bfloat16 units."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def generate(
    model: ReformerLM,
    prompt: bytes,
    length: int,
    *,
    sampling: Sampling = Sampling(),
    stop: Sequence[bytes] = (),
    seed: int = 0,
) -> Iterator[bytes]:
    """Continues ``prompt`` by at most ``length`` bytes, yielding them one by one.

    The prompt takes one forward pass, every byte after it one step on a cache, whose cost does not
    depend on the context. The context is the last ``max_length`` bytes at most: when it is full,
    the later half of it begins anew. An empty prompt stands for the beginning of a file. The same
    seed gives the same bytes.

    Args:
        model: causal, with a vocabulary of at least 256, in evaluation mode.
        prompt: any bytes.
        length: how many to generate at most.
        sampling: how each byte is drawn.
        stop: generation ends after any of these has been written.
        seed: of the sampling.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(model, [prompt], length, stop, seed)
    steps = _continue(model, [prompt], length, sampling, stop, seed)
    return (bytes([token]) for (token,) in steps if token is not None)


def generate_batch(
    model: ReformerLM,
    prompts: Sequence[bytes],
    length: int,
    *,
    sampling: Sampling = Sampling(),
    stop: Sequence[bytes] = (),
    seed: int = 0,
) -> list[bytes]:
    """The continuations of several prompts, of any lengths, computed together.

    Prompt i is continued as by :func:`generate` with ``seed + i``, but for two things: in LSH
    layers the first chunk of a round looks back to the padding of a shorter prompt, and all
    contexts begin anew when the longest is full. Arguments and errors are the same; no prompts give
    no continuations.
    """
    _check(model, prompts, length, stop, seed)
    texts = [bytearray() for _ in prompts]
    if prompts:
        for tokens in _continue(model, prompts, length, sampling, stop, seed):
            for text, token in zip(texts, tokens, strict=True):
                if token is not None:
                    text.append(token)
    return [bytes(text) for text in texts]


def generate_from_source(
    model: ReformerEncoderDecoder,
    source: Tensor,
    prompt: Tensor,
    length: int,
    *,
    end: int | None = None,
    source_padding_mask: Tensor | None = None,
    sampling: Sampling = Sampling(temperature=0.0),
    seed: int = 0,
) -> Tensor:
    """The targets of an encoder-decoder with full cross-attention, greedy by default.

    The source is encoded once; every token takes one step on a cache. Sequences that end leave the
    batch.

    Args:
        model: in evaluation mode.
        source, source_padding_mask: as in :meth:`ReformerEncoderDecoder.forward`.
        prompt: int64 ``(B, P)``, how the targets begin, such as a start token.
        length: how many tokens to generate at most.
        end: the token that ends a target.
        sampling: how each token is drawn.
        seed: of the sampling, plus i for pair i.

    Returns:
        int64 ``(B, n)`` without the prompt, n at most length; ``end`` from the end of a target on.

    Raises:
        ValueError: an argument is out of range.
    """
    batch = source.shape[0]
    if prompt.dim() != 2 or prompt.shape[0] != batch or prompt.dtype != torch.int64:
        raise ValueError(
            f"generate_from_source: expected prompt [{batch}, P] of torch.int64, "
            f"got {list(prompt.shape)} of {prompt.dtype}"
        )
    if length < 1:
        raise ValueError(f"generate_from_source: expected length >= 1, got {length}")
    _check_seed(seed, batch)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    texts: list[list[int]] = prompt.tolist()
    running = list(range(batch))
    with torch.inference_mode():
        cache = model.new_cache(batch, prompt.shape[1] + length, source.shape[1])
        hidden = model.decode(
            prompt,
            model.encode(source, source_padding_mask=source_padding_mask),
            source_padding_mask=source_padding_mask,
            cache=cache,
        )
        for _ in range(length):
            logits = F.linear(hidden[:, -1], model.output_weight, model.output_bias).float().cpu()
            for row, i in zip(logits, running, strict=True):
                texts[i].append(sample(row, sampling, generators[i], texts[i]))
            going = [k for k, i in enumerate(running) if texts[i][-1] != end]
            if not going or len(texts[running[0]]) == prompt.shape[1] + length:
                break
            if len(going) < len(running):
                cache.reorder(going)
                running = [running[k] for k in going]
            last = torch.tensor([[texts[i][-1]] for i in running], device=source.device)
            hidden = model.decode(last, cache=cache)
    longest = max(map(len, texts))
    filled = [text + [end or 0] * (longest - len(text)) for text in texts]
    return torch.tensor(filled, device=source.device)[:, prompt.shape[1] :]


def _check(
    model: ReformerLM, prompts: Sequence[bytes], length: int, stop: Sequence[bytes], seed: int
) -> None:
    for prompt in prompts:
        _expect("prompt", type(prompt).__name__, isinstance(prompt, (bytes, bytearray)), "of bytes")
    vocabulary = model.config.vocab_size
    _expect("model.config.vocab_size", vocabulary, vocabulary >= 256, ">= 256")
    _expect("length", length, length >= 0, ">= 0")
    _expect("stop", list(stop), all(stop), "without an empty string")
    _check_seed(seed, len(prompts))


def _check_seed(seed: int, count: int) -> None:
    _expect("seed", seed, -(2**63) <= seed <= 2**64 - max(count, 1), "of 64 bits")


def _continue(
    model: ReformerLM,
    prompts: Sequence[bytes],
    length: int,
    sampling: Sampling,
    stop: Sequence[bytes],
    seed: int,
) -> Iterator[list[int | None]]:
    """The next byte of every prompt, None for those that have stopped, until all have."""
    device = next(model.parameters()).device
    config = model.config
    limit = config.max_length
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    contexts = [list(prompt[-limit:]) or [0] for prompt in prompts]
    # No more room than will be used; the hash is that of the full context nevertheless, so
    # that the text does not depend on the length.
    capacity = min(limit, max(map(len, contexts)) + length)
    written = [bytearray() for _ in prompts]
    running = [True] * len(prompts)
    with torch.inference_mode(), autocast(device):
        cache = model.new_cache(len(prompts), capacity, hash_length=limit)
    held = 0  # positions in the cache, which does not count the steps of a compiled model
    for _ in range(length):
        with torch.inference_mode(), autocast(device):
            if 0 < held < capacity:
                last = torch.tensor([[context[-1]] for context in contexts], device=device)
                logits = model(last, cache=cache)[:, -1]
                held += 1
            else:
                if held == capacity:
                    contexts = [context[-max(limit // 2, 1) :] for context in contexts]
                    cache.reset()
                logits = _logits_after(model, contexts, cache)
                held = max(map(len, contexts))
        rows = logits[:, :256].float().cpu()
        tokens: list[int | None] = []
        for i, context in enumerate(contexts):
            # A sequence that has stopped goes on unheard, so that the batch keeps its shape.
            token = sample(rows[i], sampling, generators[i], context)
            context.append(token)
            tokens.append(token if running[i] else None)
            if running[i]:
                written[i].append(token)
                running[i] = not any(written[i].endswith(end) for end in stop)
        yield tokens
        if not any(running):
            return


def _logits_after(model: ReformerLM, contexts: list[list[int]], cache: DecodingCache) -> Tensor:
    """Fills the cache with contexts of any lengths; the logits ``(B, V)`` of what comes next."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(context) for context in contexts])
    longest = int(lengths.max())
    tokens = torch.tensor([context + [0] * (longest - len(context)) for context in contexts])
    padding = torch.arange(longest) >= lengths[:, None]
    mask = padding.to(device) if padding.any() else None
    hidden = model.reformer(tokens.to(device), key_padding_mask=mask, cache=cache)
    last = hidden[torch.arange(len(contexts), device=device), (lengths - 1).to(device)]
    return F.linear(last, model.output_weight, model.output_bias)


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator, context: Sequence[int] = ()
) -> int:
    """Draws an index from ``logits (V,)`` on the CPU, after a context of indices. Raises ValueError
    for logits that are not finite: the model has diverged."""
    penalty = sampling.repetition_penalty
    if penalty != 1.0 and context:
        seen = torch.tensor(sorted(set(context)))
        old = logits[seen]
        logits = logits.clone()
        logits[seen] = torch.where(old > 0, old / penalty, old * penalty)
    if sampling.temperature == 0:
        best = logits.argmax()
        _check_logit(float(logits[best]))
        return int(best)
    values, indices = logits.sort(descending=True, stable=True)
    _check_logit(float(values[0]))
    scaled = values / sampling.temperature
    if not scaled.isfinite().all():  # of a tiny temperature
        scaled = (values - values[0]).double() / sampling.temperature
    probabilities = torch.softmax(scaled, dim=0)
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    # Those before which less than p has been summed, so at least one.
    threshold = sampling.top_p * probabilities.sum()
    rest = probabilities.cumsum(0) - probabilities >= threshold
    rest[0] = False  # of a p that rounds to 0
    probabilities[rest] = 0
    return int(indices[torch.multinomial(probabilities, 1, generator=generator)])


def _check_logit(largest: float) -> None:
    _expect("logits", largest, math.isfinite(largest), "that are finite: the model has diverged")
