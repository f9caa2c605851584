"""What is timed: a case is sizes and flags, a workload its tensors and calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import reformer_ext
from python_tests.cases import AttentionCase, variant

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SETS = 4  # of inputs, used in turn: no call finds the inputs of the last one in a cache

Forward = Callable[..., Tensor]  # of a set of inputs
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Sizes and flags. ``variant``, as python_tests/cases.py has them: plain, with the last eighth
    of the positions padding, the same bucket only, duplicate pairs corrected, dropout, or local
    attention (no hash; separate keys)."""

    length: int
    variant: str = "plain"
    device: str = "cpu"
    dtype: str = "fp32"
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    n_hashes: int = 8
    chunk_size: int = 64
    causal: bool = True

    def __str__(self) -> str:
        sizes = f"B={self.batch} H={self.heads} L={self.length} D={self.head_dim}"
        rounds = "" if self.local else f", {self.n_hashes} rounds"
        causal = "causal" if self.causal else "not causal"
        return (
            f"{self.variant}, {sizes}{rounds}, chunks of {self.chunk_size}, {self.dtype}, {causal}"
        )

    @property
    def attention(self) -> AttentionCase:
        """The same in the terms of the tests."""
        return variant(
            self.variant,
            id=str(self),
            batch=self.batch,
            heads=self.heads,
            length=self.length,
            head_dim=self.head_dim,
            rounds=self.n_hashes,
            chunk_size=self.chunk_size,
            causal=self.causal,
        )

    @property
    def local(self) -> bool:
        return self.variant == "local"

    @property
    def rounds(self) -> int:
        return 1 if self.local else self.n_hashes

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.length, self.head_dim

    @property
    def n_buckets(self) -> list[int]:
        return reformer_ext.default_n_buckets(self.length, self.chunk_size)

    def counts(self) -> dict[str, tuple[float, float]]:
        """FLOP and compulsory bytes of each stage, ``name -> (flop, bytes)``.

        Attention: every pair of a query and a slot of its window, the masked ones too, since tiles
        compute them: 2 products of 2 D FLOP forward and 5 backward. Bytes: each input and result
        once, as if the rounds shared one read; the order in int32, the lse in float32.
        """
        rows = self.batch * self.heads * self.length
        vectors = rows * self.head_dim * self.torch_dtype.itemsize
        index = 0 if self.local else 4 * rows * self.n_hashes
        pairs = 2 * rows * self.rounds * self.chunk_size
        if self.local:  # the first chunk has none before it
            pairs -= self.batch * self.heads * self.chunk_size**2
        inputs = 3 if self.local else 2
        attention = {
            "forward": (4.0 * pairs * self.head_dim, (inputs + 1.0) * vectors + index + 4 * rows),
            "backward": (
                10.0 * pairs * self.head_dim,
                2.0 * (inputs + 1) * vectors + index + 4 * rows,
            ),
        }
        if self.local:
            return {"forward": attention["forward"], "attention backward": attention["backward"]}
        columns = sum(self.n_buckets) / 2
        return {
            "hash": (2.0 * rows * self.head_dim * self.n_hashes * columns, float(vectors + index)),
            "sort": (0.0, 2.0 * index),
            "attention forward": attention["forward"],
            "attention backward": attention["backward"],
        }


def cases(shapes: list[tuple[int, int, int, int]], **choices: list) -> list[Case]:
    """Every combination of ``(B, H, L, D)`` and the other fields' choices; local ones only once."""
    result = []
    for shape, *values in itertools.product(shapes, *choices.values()):
        batch, heads, length, head_dim = shape
        fields = dict(zip(choices, values, strict=True))
        case = Case(batch=batch, heads=heads, length=length, head_dim=head_dim, **fields)
        result.append(replace(case, n_hashes=1) if case.local else case)
    return list(dict.fromkeys(result))


class Workload:
    """The tensors of a case, and the public calls on a set of inputs: ``(qk, v)``, or ``(q, k, v)``
    of local attention."""

    def __init__(self, case: Case) -> None:
        self.case = case
        options = {"device": case.device, "dtype": case.torch_dtype}
        names = ("q", "k", "v") if case.local else ("qk", "v")
        self.names = names
        self.sets = [
            tuple(torch.randn(case.shape, **options, requires_grad=True) for _ in names)
            for _ in range(SETS)
        ]
        self.cotangent = torch.randn(case.shape, **options)
        attention = case.attention
        self.same_bucket = attention.same_bucket
        self.padding = None if attention.padding is None else attention.mask().to(case.device)
        self.options: dict[str, object] = {
            **attention.options,
            "key_padding_mask": self.padding,
        }
        if attention.dropout_p > 0.0:  # on the device: no copy is timed
            seed = self.options["dropout_seed"]
            self.options["dropout_seed"] = torch.tensor([seed], device=case.device)
        self.order = self.buckets = None
        if not case.local:
            self.rotations = reformer_ext.sample_rotations(
                case.heads, case.head_dim, case.n_hashes, case.n_buckets, **options
            )
            self.buckets = self.hash(self.sets[0][0].detach())
            self.order = self.sort()

    def hash(self, qk: Tensor) -> Tensor:
        return reformer_ext.lsh_hash(qk, self.rotations, self.case.n_buckets, self.padding)

    def sort(self) -> Tensor:
        return reformer_ext.bucket_sort(self.buckets, math.prod(self.case.n_buckets) + 1)

    def attend(self, *inputs: Tensor) -> Tensor:
        """The attention alone, in the order of the first set of inputs."""
        *query_key, v = inputs
        q, k = query_key if self.case.local else (query_key[0], None)
        buckets = self.buckets if self.same_bucket else None
        return reformer_ext.chunked_attention(q, k, v, self.order, buckets=buckets, **self.options)[
            0
        ]

    def forward(self, *inputs: Tensor) -> Tensor:
        """The public call: all stages."""
        return self.attend(*inputs) if self.case.local else self.lsh_attention(*inputs)

    def lsh_attention(self, qk: Tensor, v: Tensor, **options: object) -> Any:
        return reformer_ext.lsh_attention(
            qk,
            v,
            rotations=self.rotations,
            n_buckets=self.case.n_buckets,
            same_bucket=self.same_bucket,
            **self.options,
            **options,
        )

    def stages(self, modes: set[str]) -> dict[str, list[Call]]:
        """A call on each set of inputs, by the name of the stage; modes: fwd, bwd or both."""
        stages: dict[str, list[Call]] = {}
        if "fwd" in modes:
            if not self.case.local:
                stages["hash"] = self.forwards(lambda qk, v: self.hash(qk))
                stages["sort"] = self.forwards(lambda qk, v: self.sort())
                stages["attention forward"] = self.forwards(self.attend)
            stages["forward"] = self.forwards(self.forward)
        if "bwd" in modes:
            stages["attention backward"] = self.backwards(self.attend)
            stages["forward+backward"] = self.both(self.forward)
        return stages

    def forwards(self, forward: Forward) -> list[Call]:
        def call(inputs: list[Tensor]) -> Call:
            return torch.no_grad()(lambda: forward(*inputs))

        return [call([x.detach() for x in inputs]) for inputs in self.sets]

    def backwards(self, forward: Forward) -> list[Call]:
        """Backwards of graphs that are built here."""

        def call(out: Tensor, inputs: tuple[Tensor, ...]) -> Call:
            return lambda: torch.autograd.grad(out, inputs, self.cotangent, retain_graph=True)

        return [call(forward(*inputs), inputs) for inputs in self.sets]

    def both(self, forward: Forward) -> list[Call]:
        def call(inputs: tuple[Tensor, ...]) -> Call:
            return lambda: torch.autograd.grad(forward(*inputs), inputs, self.cotangent)

        return [call(inputs) for inputs in self.sets]
