from collections.abc import Sequence

import torch
from torch import Tensor

class AttentionOptions:
    chunk_size: int
    look_back: int
    look_ahead: int
    causal: bool
    mask_self: bool | None
    wrap: bool | None
    scale: float | None
    key_padding_mask: Tensor | None
    correct_duplicates: bool
    dropout_p: float
    dropout_seed: Tensor | None
    own_values: Tensor | None
    value_mix: Tensor | None
    def __init__(self) -> None: ...

def lsh_hash(
    x: Tensor, rotations: Tensor, n_buckets: Sequence[int], key_padding_mask: Tensor | None = None
) -> Tensor: ...
def bucket_sort(buckets: Tensor, n_buckets: int) -> Tensor: ...
def chunked_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor | None = None,
    options: AttentionOptions = ...,
    buckets: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def lsh_attention(
    qk: Tensor,
    v: Tensor,
    rotations: Tensor | None,
    n_buckets: Sequence[int],
    options: AttentionOptions = ...,
    k: Tensor | None = None,
    buckets: Tensor | None = None,
    same_bucket: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...
def lsh_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotations: Tensor | None,
    n_buckets: Sequence[int],
    options: AttentionOptions = ...,
    query_padding_mask: Tensor | None = None,
    buckets: Tensor | None = None,
    same_bucket: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...
def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]: ...
def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...
def split_heads(x: Tensor, parts: int, cos: Tensor, sin: Tensor) -> list[Tensor]: ...
def merge_heads(q: Tensor, k: Tensor | None, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...
def next_values(
    v: Tensor, value_mix: Tensor, key_padding_mask: Tensor | None = None, causal: bool = True
) -> Tensor: ...
def lsh_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    counts: Tensor,
    buckets: Tensor,
    own_values: Tensor | None = None,
    scale: float | None = None,
    correct_duplicates: bool = False,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def lsh_cache_append(
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    counts: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: Tensor,
    lengths: Tensor,
    normalize: bool = False,
    value_mix: Tensor | None = None,
    last_values: Tensor | None = None,
) -> None: ...
def default_n_buckets(length: int, chunk_size: int = 64) -> list[int]: ...
def set_workspace_limit(bytes: int) -> None: ...
def workspace_limit() -> int: ...

class KernelChoice:
    def __init__(self, *args: object, **kwargs: object) -> None: ...  # from C++ alone
    @property
    def kernel(self) -> str: ...
    @property
    def workspace(self) -> int: ...
    @property
    def group(self) -> int: ...

class KernelPlan:
    def __init__(self, *args: object, **kwargs: object) -> None: ...  # from C++ alone
    @property
    def arch(self) -> int: ...
    @property
    def multiprocessors(self) -> int: ...
    @property
    def hash(self) -> KernelChoice: ...
    @property
    def sort(self) -> KernelChoice: ...
    @property
    def forward(self) -> KernelChoice: ...
    @property
    def backward(self) -> KernelChoice: ...

def plan(
    shape: Sequence[int],
    dtype: torch.dtype,
    rounds: int,
    n_buckets: Sequence[int],
    shared_qk: bool,
    same_bucket: bool,
    options: AttentionOptions,
    arch: int,
    multiprocessors: int,
) -> KernelPlan: ...
def build_info() -> dict[str, str | None]: ...
