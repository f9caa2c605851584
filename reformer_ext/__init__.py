"""Reformer attention over very long sequences: LSH hashing, bucket sort and chunked attention.

Operators (``reformer_ext.ops``, re-exported here) run on CPU and CUDA, forward and backward;
``reformer_ext.nn`` has the modules and the models built from them.
"""

from __future__ import annotations

from . import _startup

_startup.begin()  # before torch is imported

from .ops import (  # noqa: E402
    apply_rotary,
    bucket_sort,
    chunked_attention,
    default_n_buckets,
    lsh_attention,
    lsh_cache_append,
    lsh_cross_attention,
    lsh_decode,
    lsh_hash,
    merge_attention,
    merge_heads,
    next_values,
    plan,
    sample_rotations,
    set_workspace_limit,
    split_heads,
    workspace_limit,
)
from .packed import chunked_attention_packed, lsh_attention_packed  # noqa: E402

__version__ = "0.2.0"

__all__ = [
    "__version__",
    "apply_rotary",
    "bucket_sort",
    "chunked_attention",
    "chunked_attention_packed",
    "default_n_buckets",
    "lsh_attention",
    "lsh_attention_packed",
    "lsh_cache_append",
    "lsh_cross_attention",
    "lsh_decode",
    "lsh_hash",
    "merge_attention",
    "merge_heads",
    "next_values",
    "plan",
    "sample_rotations",
    "set_workspace_limit",
    "split_heads",
    "workspace_limit",
]
