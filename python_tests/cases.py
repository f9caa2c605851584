"""Sample inputs of every operator, once: the tests and the benchmarks read them here.

A case is sizes and flags; its methods make the tensors on a device, in a dtype, from a seed. Values
are drawn on the CPU in float64 and rounded, so every device and dtype sees the same numbers (the
benchmarks, whose tensors are large, draw theirs on the device). ``VARIANTS`` are what they time:
each is in the list of the tests too, in a small size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reformer_ext.nn import ReformerConfig


@dataclass(frozen=True)
class AttentionCase:
    """Sizes and flags of a call of ``chunked_attention``; None leaves an option to its default."""

    id: str
    batch: int = 1
    heads: int = 2
    length: int = 65
    head_dim: int = 16
    rounds: int = 2  # 0: no order, one round in natural order
    n_buckets: int = 5
    shared: bool = True
    chunk_size: int = 16
    look_back: int = 1
    look_ahead: int = 0
    causal: bool = False
    mask_self: bool | None = None
    wrap: bool | None = None
    scale: float | None = None
    padding: str | None = None  # tail, eighth, head, scattered, row (a whole batch row) or all
    same_bucket: bool = False
    correct_duplicates: bool = False
    dropout_p: float = 0.0
    layout: str = "contiguous"  # transposed, sliced or expanded
    values: str = "normal"  # large, equal, zeros; of queries and keys also norms, denormal

    def __str__(self) -> str:
        return self.id

    @property
    def runs_on_cuda(self) -> bool:
        return self.head_dim % 8 == 0

    @property
    def masks_self(self) -> bool:
        """Whether a query attends to itself only if it meets nothing else."""
        return self.shared if self.mask_self is None else self.mask_self

    @property
    def options(self) -> dict[str, object]:
        """The keyword arguments that are no tensors; the dropout seed is an int."""
        names = {field.name for field in fields(self)} & {
            "chunk_size",
            "look_back",
            "look_ahead",
            "causal",
            "mask_self",
            "wrap",
            "scale",
            "correct_duplicates",
            "dropout_p",
        }
        options = {name: getattr(self, name) for name in sorted(names)}
        return {**options, "dropout_seed": 2**40 + 77} if self.dropout_p > 0.0 else options

    def vectors(
        self, device: str, dtype: torch.dtype, seed: int = 0, requires_grad: bool = True
    ) -> dict[str, Tensor]:
        """``q``, ``k`` unless shared, and ``v``: leaves in the case's memory layout."""
        generator = torch.Generator().manual_seed(1000 * seed + self.length)
        return {
            name: self._vectors(name, generator, device, dtype).requires_grad_(requires_grad)
            for name in (("q", "v") if self.shared else ("q", "v", "k"))
        }

    def _vectors(
        self, name: str, generator: torch.Generator, device: str, dtype: torch.dtype
    ) -> Tensor:
        shape = (self.batch, self.heads, self.length, self.head_dim)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.values == "large":
            x = 1e3 * torch.nn.functional.normalize(x, dim=-1)
        elif self.values == "norms" and name != "v":  # from 0.1 to 1e3
            exponents = torch.rand(*shape[:3], 1, generator=generator, dtype=torch.float64)
            x = 10.0 ** (4.0 * exponents - 1.0) * torch.nn.functional.normalize(x, dim=-1)
        elif self.values == "denormal" and name != "v":  # float32, bfloat16; zero in float16
            x = 1e-40 * x
        elif self.values == "equal":
            x = x[:, :, :1].expand(shape)
        elif self.values == "zeros":
            x = torch.zeros(shape, dtype=torch.float64)
        x = x.to(device=device, dtype=dtype)
        if self.layout == "transposed":  # a (B, L, H, D) projection
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "sliced":  # a slice of a fused projection, rows wider than D
            return torch.cat([x, x + 1.0], dim=-1)[..., : self.head_dim].detach()
        if self.layout == "expanded":  # one head read by all
            return x[:, :1].contiguous().expand(shape)
        return x.contiguous()

    def mask(self, generator: torch.Generator | None = None) -> Tensor:
        """Where padding is, ``(B, L)``; scattered padding is drawn."""
        mask = torch.zeros(self.batch, self.length, dtype=torch.bool)
        if self.padding == "tail":
            mask[:, self.length - self.length // 3 :] = True
        elif self.padding == "eighth":
            mask[:, self.length - self.length // 8 :] = True
        elif self.padding == "head":
            mask[:, :2] = True
        elif self.padding == "scattered":
            mask = torch.rand(mask.shape, generator=generator) < 0.4
        elif self.padding == "row":
            mask[-1] = True
            mask[0, -1:] = True
        elif self.padding == "all":
            mask[:] = True
        return mask

    def indices(self, device: str, seed: int = 0) -> dict[str, Tensor | None]:
        """``order``, ``buckets`` and ``key_padding_mask``."""
        generator = torch.Generator().manual_seed(7 + seed)
        mask = self.mask(generator)
        result: dict[str, Tensor | None] = {
            "order": None,
            "buckets": None,
            "key_padding_mask": None,
        }
        if self.padding is not None:
            result["key_padding_mask"] = mask.to(device)
        buckets = torch.randint(
            self.n_buckets,
            (self.batch, self.heads, max(self.rounds, 1), self.length),
            generator=generator,
        )
        buckets = buckets.masked_fill(mask[:, None, None, :], self.n_buckets)
        if self.rounds > 0:
            result["order"] = buckets.argsort(dim=-1, stable=True).to(torch.int32).to(device)
        if self.same_bucket:
            result["buckets"] = buckets.to(torch.int32).to(device)
        return result


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "padding": {"padding": "eighth"},
    "same-bucket": {"same_bucket": True},
    "duplicates": {"correct_duplicates": True},
    "dropout": {"dropout_p": 0.1},
    "local": {"rounds": 0, "shared": False},
}


def variant(name: str, id: str = "", **fields: object) -> AttentionCase:
    """What the benchmarks time under that name."""
    return AttentionCase(id or f"timed-{name}", **{**fields, **VARIANTS[name]})  # type: ignore[arg-type]


def _crossed() -> list[AttentionCase]:
    """Every pair of the flags that decide which pairs of positions attend, in small sizes."""
    cases = []
    for shared in (True, False):
        for causal in (False, True):
            for mask_self in (False, True):
                for number, wrap in enumerate((False, True)):
                    name = (
                        f"{'shared' if shared else 'separate'}{'-causal' if causal else ''}"
                        f"{'-mask_self' if mask_self else ''}{'-wrap' if wrap else ''}"
                    )
                    cases.append(
                        AttentionCase(
                            name,
                            length=37,
                            rounds=3,
                            chunk_size=8,
                            shared=shared,
                            causal=causal,
                            mask_self=mask_self,
                            wrap=wrap,
                            look_ahead=number,
                            padding="scattered" if causal != shared else None,
                            same_bucket=mask_self != wrap,
                            correct_duplicates=causal != mask_self,
                            dropout_p=0.3 if shared == wrap else 0.0,
                        )
                    )
    return cases


_C = AttentionCase
ATTENTION_CASES: list[AttentionCase] = [
    _C("default", length=200, head_dim=64, chunk_size=64),
    _C("local", rounds=0, shared=False, causal=True),
    _C("local-shared", rounds=0, length=100),
    _C("local-wrap", rounds=0, shared=False, wrap=True, look_ahead=1),
    _C("local-short-last-chunk", rounds=0, shared=False, length=17, look_ahead=2, look_back=2),
    *_crossed(),
    # Lengths off the tiles.
    *[
        _C(f"length-{length}", length=length, chunk_size=64, rounds=2, causal=causal)
        for length, causal in [
            (1, True),
            (2, False),
            (31, True),
            (63, False),
            (64, True),
            (65, True),
            (127, True),
            (257, False),
        ]
    ],
    _C("length-997", length=997, heads=1, head_dim=32, chunk_size=64, rounds=4, causal=True),
    # Chunks and windows.
    _C("chunk-1", length=31, chunk_size=1, look_back=3, look_ahead=2, rounds=3),
    _C("chunk-4", length=63, chunk_size=4, look_back=2, rounds=4, shared=False),
    _C("chunk-100", length=257, chunk_size=100, look_ahead=1),
    _C("chunk-beyond-length", length=31, chunk_size=1000, rounds=2, correct_duplicates=True),
    _C("own-chunk-only", length=100, look_back=0, rounds=3),
    _C("look-ahead-only", length=100, look_back=0, look_ahead=2, shared=False),
    _C("look-far", length=130, chunk_size=8, look_back=3, look_ahead=2, rounds=3, causal=True),
    _C("window-wider-than-line", length=40, chunk_size=16, look_back=3, look_ahead=2, rounds=1),
    _C("window-meets-itself", length=64, chunk_size=16, look_back=2, look_ahead=1, rounds=1),
    _C("window-wider-no-wrap", length=40, look_back=3, look_ahead=2, rounds=2, wrap=False),
    _C("one-round-wrap", length=65, rounds=1, causal=True),
    # Who is alone: the self rule, padding, nothing to attend to.
    _C("alone-in-bucket", length=64, n_buckets=60, same_bucket=True, rounds=2),
    _C("alone-dropout", length=31, n_buckets=30, same_bucket=True, rounds=2, dropout_p=0.5),
    _C("alone-separate", length=64, n_buckets=60, same_bucket=True, shared=False, mask_self=True),
    _C("nothing-separate", length=64, shared=False, causal=True, padding="head", wrap=False),
    _C("padding-tail", length=100, padding="tail", causal=True, rounds=3),
    _C("padding-head", length=65, padding="head", causal=True),
    _C("padding-head-separate", length=65, padding="head", causal=True, shared=False),
    _C("padding-row", batch=2, length=40, padding="row"),
    _C("padding-row-separate", batch=2, length=40, padding="row", shared=False, causal=True),
    _C("padding-all", length=31, padding="all"),
    _C("padding-local", rounds=0, shared=False, padding="scattered", look_ahead=1),
    _C("self-allowed-shared", length=65, mask_self=False, causal=True),
    # Duplicates: pairs that meet in many rounds, also across a round's boundary.
    _C("duplicates", length=100, rounds=4, n_buckets=2, correct_duplicates=True),
    _C("duplicates-boundary", length=64, rounds=4, chunk_size=8, correct_duplicates=True),
    _C("duplicates-causal", rounds=4, correct_duplicates=True, causal=True, padding="scattered"),
    _C("duplicates-bucket", rounds=4, n_buckets=3, correct_duplicates=True, same_bucket=True),
    _C("duplicates-dropout", rounds=4, correct_duplicates=True, dropout_p=0.2, look_ahead=1),
    _C("duplicates-separate", rounds=3, correct_duplicates=True, shared=False, wrap=False),
    # Dropout.
    _C("dropout", batch=2, length=100, rounds=4, dropout_p=0.1),
    _C("dropout-most", length=65, rounds=2, dropout_p=0.9, causal=True, shared=False),
    _C("dropout-local", rounds=0, shared=False, dropout_p=0.5, padding="tail"),
    # Head dimensions, layouts, values.
    *[
        _C(f"head_dim-{size}", length=70, head_dim=size, heads=1, causal=size > 64, chunk_size=32)
        for size in (8, 32, 64, 80, 128, 256)
    ],
    _C("head_dim-128-separate", length=70, head_dim=128, heads=1, shared=False, look_ahead=1),
    _C("head_dim-1", length=33, head_dim=1, shared=False),
    _C("head_dim-20", length=33, head_dim=20),
    _C("batch-0", batch=0),
    _C("transposed", batch=2, heads=3, layout="transposed", causal=True),
    _C("transposed-separate", batch=2, heads=3, layout="transposed", shared=False),
    _C("sliced", batch=2, layout="sliced", padding="tail"),
    _C("expanded", batch=2, heads=3, layout="expanded"),
    _C("large", values="large", length=65, causal=True),
    _C("large-separate", values="large", length=65, shared=False, scale=1e-4),
    _C("norms", values="norms", length=65, causal=True),
    _C("norms-separate", values="norms", length=65, shared=False, scale=1e-4),
    _C("denormal", values="denormal", length=65),
    _C("denormal-separate", values="denormal", length=65, shared=False, causal=True),
    _C("equal", values="equal", length=65, rounds=3),
    _C("zeros", values="zeros", length=65),
    _C("zeros-separate", values="zeros", length=65, shared=False, causal=True),
    _C("scale", length=65, scale=1.0),
    _C("scale-zero", length=65, scale=0.0),
    # The fused CUDA path: head_dim 64, chunks of 64, one look back, causal.
    *[
        _C(
            f"fast-{length}x{rounds}{'' if causal else '-full'}",
            batch=1 if rounds == 8 else 2,
            heads=2,
            length=length,
            head_dim=64,
            rounds=rounds,
            n_buckets=max(2, length // 32),
            chunk_size=64,
            causal=causal,
            layout="transposed" if rounds == 4 else "contiguous",
        )
        for length, rounds, causal in [
            (64, 2, True),
            (128, 8, True),
            (129, 4, True),
            (200, 3, True),
            (200, 2, False),
            (320, 8, True),
            (448, 4, False),
        ]
    ],
    *[
        _C(
            f"fast-head_dim-128-{name}",
            length=length,
            head_dim=128,
            rounds=rounds,
            chunk_size=64,
            causal=causal,
            padding=padding,
            layout=layout,
        )
        for name, length, rounds, causal, padding, layout in [
            ("causal", 200, 4, True, None, "contiguous"),
            ("full", 320, 3, False, None, "transposed"),
            ("padding", 129, 2, True, "tail", "contiguous"),
        ]
    ],
    _C("fast-head_dim-32", heads=1, length=200, head_dim=32, rounds=4, chunk_size=64, causal=True),
    # The fused CUDA path of local attention: separate keys, chunks of whole tiles of 64.
    *[
        _C(
            f"fast-local-{chunk}-{length}x{head_dim}{'-causal' if causal else ''}",
            rounds=0,
            shared=False,
            length=length,
            head_dim=head_dim,
            chunk_size=chunk,
            look_back=back,
            look_ahead=ahead,
            causal=causal,
            padding=padding,
            layout="transposed" if head_dim == 64 else "contiguous",
        )
        for chunk, length, head_dim, back, ahead, causal, padding in [
            (64, 256, 64, 1, 0, True, None),
            (64, 301, 64, 2, 1, False, "scattered"),
            (128, 301, 64, 1, 0, True, "tail"),
            (128, 500, 32, 1, 1, False, None),
            (128, 300, 128, 1, 0, True, "head"),
            (256, 600, 64, 1, 0, True, None),
            (256, 300, 128, 0, 0, False, "tail"),
        ]
    ],
    _C(
        "fast-local-wrap-mask_self",
        rounds=0,
        shared=False,
        length=300,
        head_dim=64,
        chunk_size=64,
        causal=True,
        mask_self=True,
        wrap=True,
        padding="head",
    ),
    _C("fast-local-one-chunk", rounds=0, shared=False, length=100, head_dim=64, chunk_size=100),
    _C("fast-padding", length=200, head_dim=64, chunk_size=64, causal=True, padding="tail"),
    *[
        variant(name, length=330, head_dim=64, rounds=8, n_buckets=10, chunk_size=64, causal=True)
        for name in VARIANTS
    ],
    # Masks of the wgmma kernels.
    *[
        _C(
            f"fast-{name}-{head_dim}{'' if causal else '-full'}",
            length=330,
            head_dim=head_dim,
            rounds=4,
            n_buckets=10,
            chunk_size=64,
            causal=causal,
            padding=None if causal else "scattered",
            same_bucket="bucket" in name,
            correct_duplicates="duplicates" in name,
            dropout_p=0.1 if "dropout" in name else 0.0,
        )
        for name in ("bucket", "dropout", "bucket-dropout", "duplicates")
        for head_dim in (32, 64, 128)
        for causal in (True, False)
    ],
]
assert len({case.id for case in ATTENTION_CASES}) == len(ATTENTION_CASES)


# Values and their neighbours: sizes, layouts, padding and causality.
NEXT_VALUES_CASES: list[AttentionCase] = [
    _C("default", batch=2, heads=3, length=200, head_dim=64, causal=True),
    _C("default-full", batch=2, heads=3, length=200, head_dim=64),
    *[
        _C(f"length-{length}{'' if causal else '-full'}", length=length, causal=causal)
        for length in (1, 2, 3, 63, 65)
        for causal in (True, False)
    ],
    *[
        _C(f"head_dim-{size}{'' if causal else '-full'}", head_dim=size, heads=3, causal=causal)
        for size in (1, 8, 20, 32, 80, 128, 256)
        for causal in (True, False)
    ],
    *[
        _C(
            f"padding-{padding}{'' if causal else '-full'}",
            batch=2,
            length=70,
            padding=padding,
            causal=causal,
        )
        for padding in ("tail", "head", "scattered", "row", "all")
        for causal in (True, False)
    ],
    _C("long", length=3000, heads=1, head_dim=8, causal=True, padding="scattered"),
    _C("transposed", batch=2, heads=3, layout="transposed", causal=True),
    _C("sliced", batch=2, layout="sliced", padding="tail"),
    _C("expanded", batch=2, heads=3, layout="expanded", causal=True),
    _C("batch-0", batch=0, causal=True),
]


@dataclass(frozen=True)
class HashCase:
    """Sizes of one call of ``lsh_hash``."""

    id: str
    batch: int = 2
    heads: int = 2
    length: int = 65
    head_dim: int = 16
    rounds: int = 2
    n_buckets: int | tuple[int, ...] = 8
    shared_rotations: bool = False
    padding: bool = False
    layout: str = "contiguous"
    values: str = "normal"

    def __str__(self) -> str:
        return self.id

    @property
    def factors(self) -> list[int]:
        return [self.n_buckets] if isinstance(self.n_buckets, int) else list(self.n_buckets)

    @property
    def total(self) -> int:
        return math.prod(self.factors)

    @property
    def runs_on_cuda(self) -> bool:
        return self.head_dim % 8 == 0

    def inputs(
        self, device: str, dtype: torch.dtype, seed: int = 0
    ) -> tuple[Tensor, Tensor, list[int], Tensor | None]:
        """``x, rotations, n_buckets, key_padding_mask``."""
        vectors = AttentionCase(
            self.id,
            batch=self.batch,
            heads=self.heads,
            length=self.length,
            head_dim=self.head_dim,
            layout=self.layout,
            values=self.values,
        ).vectors(device, dtype, seed, requires_grad=False)
        generator = torch.Generator().manual_seed(seed)
        heads = 1 if self.shared_rotations else self.heads
        rotations = torch.randn(
            heads, self.head_dim, self.rounds, sum(self.factors) // 2, generator=generator
        )
        mask = None
        if self.padding:
            mask = torch.rand(self.batch, self.length, generator=generator) < 0.3
            mask = mask.to(device)
        return vectors["q"], rotations.to(device, dtype), self.factors, mask


_H = HashCase
HASH_CASES: list[HashCase] = [
    _H("default", length=200, head_dim=64, rounds=4),
    _H("two-buckets", n_buckets=2),
    _H("six-buckets", n_buckets=6),
    _H("factors", n_buckets=(4, 6), rounds=3),
    _H("three-factors", n_buckets=(2, 16, 32), head_dim=64),
    _H("eight-factors", n_buckets=(2,) * 8),
    _H("many-buckets", n_buckets=254, length=127),
    _H("shared-rotations", shared_rotations=True, n_buckets=(8, 16)),
    _H("padding", padding=True, n_buckets=(4, 4)),
    _H("one-position", length=1),
    _H("decoding", heads=16, batch=1, length=1, head_dim=64, rounds=8, n_buckets=(128, 256)),
    _H("few-positions", length=3, head_dim=64, layout="transposed", n_buckets=(8, 6), padding=True),
    _H("prime", length=257, head_dim=32, rounds=1),
    _H("wide", head_dim=256, length=70, n_buckets=(32, 64)),
    _H("head_dim-80", head_dim=80),
    _H("head_dim-20", head_dim=20),
    _H("fast", heads=8, batch=1, length=1000, head_dim=64, rounds=8, n_buckets=(32, 64)),
    _H("fast-128", heads=2, batch=1, length=300, head_dim=128, rounds=8, n_buckets=64),
    _H("transposed", layout="transposed", heads=3),
    _H("sliced", layout="sliced"),
    _H("expanded", layout="expanded"),
    _H("batch-0", batch=0),
    _H("large", values="large"),
    _H("norms", values="norms"),
    _H("zeros", values="zeros"),
    _H("equal", values="equal"),
]


@dataclass(frozen=True)
class SortCase:
    """Sizes of one call of ``bucket_sort``."""

    id: str
    shape: tuple[int, int, int, int]
    n_buckets: int
    values: str = "random"  # equal, sorted, reversed or skewed

    def __str__(self) -> str:
        return self.id

    def inputs(self, device: str, seed: int = 0) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(seed)
        buckets = torch.randint(self.n_buckets, self.shape, generator=generator)
        if self.values == "equal":
            buckets = torch.full(self.shape, self.n_buckets - 1)
        elif self.values == "skewed":
            buckets = torch.minimum(buckets, buckets.roll(1, -1)) % max(1, self.n_buckets // 7)
        elif self.values in ("sorted", "reversed"):
            buckets = buckets.sort(dim=-1, descending=self.values == "reversed").values
        return buckets.to(device=device, dtype=torch.int32), self.n_buckets


_S = SortCase
SORT_CASES: list[SortCase] = [
    _S("default", (2, 3, 4, 200), 9),
    _S("one-position", (1, 2, 3, 1), 5),
    _S("one-bucket", (1, 1, 2, 70), 1),
    _S("two-positions", (1, 1, 1, 2), 3),
    _S("prime", (1, 1, 3, 997), 33),
    _S("more-buckets-than-positions", (1, 2, 2, 65), 4097),
    _S("equal", (1, 1, 2, 300), 17, "equal"),
    _S("sorted", (1, 1, 2, 257), 31, "sorted"),
    _S("reversed", (1, 1, 2, 257), 31, "reversed"),
    _S("skewed", (1, 2, 2, 5000), 129, "skewed"),
    _S("batch-0", (0, 2, 2, 64), 5),
    _S("many-segments", (3, 5, 7, 33), 4),
    _S("many-buckets", (1, 1, 2, 5000), 2049),
    _S("very-many-buckets", (1, 1, 1, 3000), 70001),
    _S("most-buckets", (1, 1, 2, 3000), 2**20 + 5),
    _S("long", (1, 2, 2, 66000), 2049),
    _S("very-long", (1, 1, 2, 300_001), 4097),
    _S("very-long-few-buckets", (1, 2, 2, 300_001), 65),
]


@dataclass(frozen=True)
class MergeCase:
    """Sizes of one call of ``merge_attention``."""

    id: str
    parts: int = 2
    batch: int = 2
    heads: int = 2
    length: int = 65
    head_dim: int = 16
    empty_rows: bool = False  # some queries have no key in a part, one has none in any
    layout: str = "contiguous"

    def __str__(self) -> str:
        return self.id

    def inputs(
        self, device: str, dtype: torch.dtype, seed: int = 0, requires_grad: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """``outs, lses``: leaves; lses float32, or float64 with float64 outs."""
        shape = AttentionCase(
            self.id,
            batch=self.batch,
            heads=self.heads,
            length=self.length,
            head_dim=self.head_dim,
            layout=self.layout,
        )
        generator = torch.Generator().manual_seed(seed)
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        outs, lses = [], []
        for part in range(self.parts):
            out = shape.vectors(device, dtype, seed + part, requires_grad=False)["q"]
            lse = 3.0 * torch.randn(self.batch, self.heads, self.length, generator=generator)
            if self.empty_rows:
                lse[..., part::3] = -math.inf
                lse[..., 4] = -math.inf
            outs.append(out.requires_grad_(requires_grad))
            lses.append(lse.to(device, lse_dtype).requires_grad_(requires_grad))
        return outs, lses


_M = MergeCase
MERGE_CASES: list[MergeCase] = [
    _M("default"),
    _M("one", parts=1),
    _M("five", parts=5, length=127),
    _M("empty-rows", empty_rows=True),
    _M("empty-rows-three", empty_rows=True, parts=3),
    _M("one-position", length=1),
    _M("head_dim-20", head_dim=20),
    _M("transposed", layout="transposed", heads=3),
    _M("batch-0", batch=0),
]


def tiny_config(**fields: object) -> ReformerConfig:
    """Of a model in small sizes, of both kinds of chunked layers; ``fields`` instead."""
    defaults = {
        "dim": 16,
        "heads": 2,
        "layers": ("local", "lsh"),
        "n_hashes": 2,
        "chunk_size": 4,
        "local_chunk_size": 4,
    }
    return ReformerConfig(**{**defaults, **fields})
