"""Whether the results are right, in float64: nothing is timed that is wrong.

Two checks. The whole of a small twin (at most 1,000 positions, one batch row, two heads) against
``reformer_ext.reference``, gradients included. And the length itself, by sampling: some queries of
the first and the last head, and all gradients of a loss that reads only them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_ext import reference

from .case import Case, Forward, Workload

TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}  # relative RMS
HASH_TOLERANCE = 2e-3  # share of buckets that differ: near-ties
TWIN_LENGTH, QUERIES = 1000, 64


def relative_rms(got: Tensor, expected: Tensor) -> float:
    error = (got.double() - expected).square().mean() / expected.square().mean()
    return math.sqrt(error.item())


def check(work: Workload) -> dict[str, float]:
    """Errors by stage: relative RMS, of the hash the share of other buckets. Exits if one is large.

    The errors are those of the worst output: ``forward`` of the outputs, ``attention backward`` and
    ``forward+backward`` of the gradients.
    """
    twin = Workload(replace(work.case, batch=1, heads=2, length=min(work.case.length, TWIN_LENGTH)))
    parts = [check_twin(twin), check_sampled(work)]
    forward = max(part["out"] for part in parts)
    backward = max(part[name] for part in parts for name in part if name != "out")
    errors = {"attention forward": forward, "forward": forward}
    errors |= {"attention backward": backward, "forward+backward": backward}
    tolerances = dict.fromkeys(errors, TOLERANCES[work.case.torch_dtype])
    if not work.case.local:
        errors["hash"] = check_hash(work)
        in_order = reference.bucket_sort(work.buckets, 0)
        errors["sort"] = (work.order != in_order).double().mean().item()
        tolerances |= {"hash": HASH_TOLERANCE, "sort": 1e-12}
    wrong = {name: error for name, error in errors.items() if not error < tolerances[name]}
    if wrong:
        raise SystemExit(f"benchmarks.ops: wrong results, nothing timed ({work.case}): {wrong}")
    return errors


def gradients(out: Tensor, inputs: list[Tensor], cotangent: Tensor, work: Workload) -> dict:
    grads = torch.autograd.grad(out, inputs, cotangent.to(out.dtype))
    return {f"grad_{name}": grad for name, grad in zip(work.names, grads, strict=True)}


def check_twin(twin: Workload) -> dict[str, float]:
    """Errors of ``out`` and of every gradient."""
    inputs = twin.sets[0]
    oracle = [x.detach().double().requires_grad_() for x in inputs]
    got = twin.forward(*inputs)
    *query_key, v = oracle
    q, k = query_key if twin.case.local else (query_key[0], None)
    buckets = twin.buckets if twin.same_bucket else None
    expected, _ = reference.chunked_attention(q, k, v, twin.order, buckets=buckets, **twin.options)
    results = gradients(got, inputs, twin.cotangent, twin)
    wanted = gradients(expected, oracle, twin.cotangent, twin)
    return {"out": relative_rms(got, expected)} | {
        name: relative_rms(grad, wanted[name]) for name, grad in results.items()
    }


def check_hash(work: Workload) -> float:
    """The share of buckets that differ from float64's, at sampled positions of every head."""
    at = sample(work.case, TWIN_LENGTH)
    expected = reference.lsh_hash(
        work.sets[0][0].detach()[:, :, at].double(),
        work.rotations.double(),
        work.case.n_buckets,
        None if work.padding is None else work.padding[:, at],
    )
    return (work.buckets[..., at] != expected).double().mean().item()


def sample(case: Case, n: int) -> Tensor:
    n = min(n, case.length)
    return torch.linspace(0, case.length - 1, n, device=case.device).long()


def check_sampled(work: Workload) -> dict[str, float]:
    """Errors of ``out`` at sampled queries and of the gradients they give; with dropout, whose
    mask the reference makes only as a whole, of ``lse`` in place of both."""
    case, queries, inputs = work.case, sample(work.case, QUERIES), work.sets[0]

    def some_heads(x: Tensor) -> Tensor:  # [B, H, ...] -> [2, ...]
        return x.flatten(0, 1)[[0, -1]]

    oracle = [some_heads(x.detach()).double().requires_grad_() for x in inputs]
    expected, expected_lse = sampled_attention(work, oracle, queries, some_heads)
    if case.attention.dropout_p > 0.0:
        _, lse = work.lsh_attention(*[x.detach() for x in inputs], return_lse=True)
        ordinary = expected_lse > reference.SELF_ONLY_LSE
        got = some_heads(lse)[:, queries][ordinary]
        return {"out": relative_rms(got, expected_lse[ordinary])}
    out = work.forward(*inputs)
    cotangent = torch.zeros_like(out)
    cotangent[:, :, queries] = work.cotangent[:, :, queries]
    results = gradients(out, inputs, cotangent, work)
    wanted = gradients(expected, oracle, some_heads(cotangent)[:, queries], work)
    return {"out": relative_rms(some_heads(out)[:, queries], expected)} | {
        name: relative_rms(some_heads(grad), wanted[name]) for name, grad in results.items()
    }


def sampled_attention(
    work: Workload, inputs: list[Tensor], queries: Tensor, some_heads: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """``out (S, n, D)`` and ``lse (S, n)`` of n queries of S heads, by the definition.

    ``inputs``: ``(S, L, D)`` each.
    """
    case, device = work.case, queries.device
    chunk, length, rounds = case.chunk_size, case.length, case.rounds
    if work.order is None:
        order = torch.arange(length, device=device).expand(len(inputs[0]), 1, length)
    else:
        order = some_heads(work.order).long()
    # The rounds' lists end to end, each padded to whole chunks; -1: no key.
    per_round = math.ceil(length / chunk)
    line = F.pad(order, (0, per_round * chunk - length), value=-1).flatten(1)
    wrap = not case.local
    own = order.argsort(dim=-1)[..., queries] // chunk  # [S, R, n]
    own += per_round * torch.arange(rounds, device=device)[:, None]
    back = min(1, (rounds if wrap else 1) * per_round - 1)
    chunks = own[..., None] - torch.arange(back + 1, device=device)
    round_of_query = torch.arange(rounds, device=device)[:, None, None]
    same_round = chunks.div(per_round, rounding_mode="floor") == round_of_query
    slots = (chunks % (rounds * per_round))[..., None] * chunk + torch.arange(chunk, device=device)
    keys = line.gather(1, slots.flatten(1)).view(slots.shape)  # [S, R, n, back + 1, chunk]
    valid = keys >= 0
    if not wrap:
        valid &= same_round[..., None]
    keys = keys.clamp(min=0)
    if case.causal:
        valid &= keys <= queries[:, None, None]
    if not case.local:  # shared QK
        valid &= keys != queries[:, None, None]
    padding = None
    if work.padding is not None:
        padding = some_heads(work.padding[:, None].expand(-1, case.heads, -1))
        valid &= ~padding.gather(1, keys.flatten(1)).view(keys.shape)
    if work.same_bucket:
        buckets = some_heads(work.buckets)
        theirs = buckets.gather(2, keys.flatten(2)).view(keys.shape)
        valid &= same_round[..., None] & (theirs == buckets[..., queries, None, None])

    def by_query(x: Tensor) -> Tensor:  # [S, R, n, back + 1, chunk] -> [S, n, slots]
        return x.transpose(1, 2).flatten(2)

    keys, valid = by_query(keys), by_query(valid)

    def rows(x: Tensor) -> Tensor:
        index = keys.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
        return x.gather(1, index).view(*keys.shape, -1)

    *query_key, v = inputs
    key_rows = rows(query_key[-1])
    if not case.local:
        key_rows = F.normalize(key_rows, dim=-1, eps=reference.NORM_EPS)
    logits = torch.einsum("snd,snkd->snk", query_key[0][:, queries], key_rows)
    logits = logits * case.head_dim**-0.5
    if case.attention.correct_duplicates:
        met = torch.where(valid, keys, -1)
        in_order = met.sort(dim=-1).values
        count = torch.searchsorted(in_order, met, right=True) - torch.searchsorted(in_order, met)
        logits = logits - count.to(logits.dtype).log()
    has_key = valid.any(dim=-1)
    logits = logits.masked_fill(~valid & has_key[..., None], -math.inf)
    lse = logits.logsumexp(dim=-1)
    out = torch.einsum("snk,snkd->snd", torch.exp(logits - lse[..., None]), rows(v))
    self_only = ~has_key & (not case.local)
    if padding is not None:
        self_only &= ~padding[:, queries]
    nothing = ~has_key & ~self_only
    out = torch.where(self_only[..., None], v[:, queries], out)
    out = out.masked_fill(nothing[..., None], 0.0)
    lse = lse.masked_fill(self_only, reference.SELF_ONLY_LSE).masked_fill(nothing, -math.inf)
    return out, lse


def check_peer(forward: Forward, sees: Callable, work: Workload) -> float:
    """Relative RMS of a peer's outputs at sampled queries of the first and the last head, where
    ``sees(query, key)`` says which keys a query attends to. Exits if it is large."""
    queries = sample(work.case, QUERIES)
    with torch.no_grad():
        out = forward(*[x.detach() for x in work.sets[0]])
        heads = [x.flatten(0, 1)[[0, -1]].double() for x in (*work.sets[0], out)]
        *query_key, v, got = heads
        logits = query_key[0][:, queries] @ query_key[-1].transpose(1, 2)
        positions = torch.arange(work.case.length, device=queries.device)
        allowed = sees(queries[:, None], positions[None, :])
        logits = (work.case.head_dim**-0.5 * logits).masked_fill(~allowed, -math.inf)
        error = relative_rms(got[:, queries], logits.softmax(dim=-1) @ v)
    if not error < TOLERANCES[work.case.torch_dtype]:
        raise SystemExit(f"benchmarks.ops: wrong results of a peer ({work.case}): {error}")
    return error
