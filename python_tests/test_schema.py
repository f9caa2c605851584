"""Schemas are a contract with saved programs and C++ callers: what was valid stays valid."""

from __future__ import annotations

import pytest
import torch

import reformer_ext

_OPTIONS = (
    "int chunk_size=64, int look_back=1, int look_ahead=0, bool causal=False, "
    "bool? mask_self=None, bool? wrap=None, float? scale=None, Tensor? key_padding_mask=None, "
)
_DROPOUT = (
    "bool correct_duplicates=False, float dropout_p=0., Tensor? dropout_seed=None, "
    "Tensor? own_values=None, Tensor? value_mix=None"
)
SCHEMAS = {
    "apply_rotary": "reformer::apply_rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    "split_heads": (
        "reformer::split_heads(Tensor x, int parts, Tensor cos, Tensor sin) -> Tensor[]"
    ),
    "merge_heads": (
        "reformer::merge_heads(Tensor q, Tensor? k, Tensor v, Tensor cos, Tensor sin) -> Tensor"
    ),
    "next_values": (
        "reformer::next_values(Tensor v, Tensor value_mix, Tensor? key_padding_mask=None, *, "
        "bool causal=True) -> Tensor"
    ),
    "next_values_backward": (
        "reformer::next_values_backward(Tensor grad, Tensor v, Tensor value_mix, "
        "Tensor? key_padding_mask=None, *, bool causal=True, Tensor? own_grad=None, "
        "Tensor? lse=None) -> (Tensor grad_v, Tensor grad_value_mix)"
    ),
    "lsh_hash": (
        "reformer::lsh_hash(Tensor x, Tensor rotations, int[] n_buckets, "
        "Tensor? key_padding_mask=None) -> Tensor"
    ),
    "bucket_sort": "reformer::bucket_sort(Tensor buckets, int n_buckets) -> Tensor",
    "chunked_attention": (
        "reformer::chunked_attention(Tensor q, Tensor? k, Tensor v, Tensor? order=None, *, "
        f"{_OPTIONS}Tensor? buckets=None, {_DROPOUT}) -> (Tensor out, Tensor lse)"
    ),
    "chunked_attention_backward": (
        "reformer::chunked_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, "
        "Tensor? k, Tensor v, Tensor? order, Tensor out, Tensor lse, *, "
        f"{_OPTIONS}Tensor? buckets=None, {_DROPOUT}) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
    ),
    "lsh_attention": (
        "reformer::lsh_attention(Tensor qk, Tensor v, Tensor? rotations, int[] n_buckets, *, "
        f"Tensor? k=None, Tensor? buckets=None, bool same_bucket=False, {_OPTIONS}{_DROPOUT}) "
        "-> (Tensor out, Tensor lse, Tensor buckets)"
    ),
    "lsh_cross_attention": (
        "reformer::lsh_cross_attention(Tensor q, Tensor k, Tensor v, Tensor? rotations, "
        "int[] n_buckets, *, Tensor? query_padding_mask=None, Tensor? buckets=None, "
        f"bool same_bucket=False, {_OPTIONS}{_DROPOUT}) "
        "-> (Tensor out, Tensor lse, Tensor buckets)"
    ),
    "lsh_decode": (
        "reformer::lsh_decode(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor counts, "
        "Tensor buckets, *, Tensor? own_values=None, float? scale=None, "
        "bool correct_duplicates=False, Tensor? before=None) -> (Tensor out, Tensor lse)"
    ),
    "lsh_cache_append": (
        "reformer::lsh_cache_append(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) table, "
        "Tensor(d!) counts, Tensor k, Tensor v, Tensor buckets, Tensor lengths, *, "
        "bool normalize=False, Tensor? value_mix=None, Tensor(e!)? last_values=None) -> ()"
    ),
    "merge_attention": (
        "reformer::merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)"
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_accepts_what_it_did(name: str) -> None:
    frozen = torch._C.parse_schema(SCHEMAS[name])
    schema = getattr(torch.ops.reformer, name).default._schema
    assert schema.is_backward_compatible_with(frozen), str(schema)
    assert str(schema) == str(frozen), "what is new becomes part of the contract here"
    assert schema.is_mutable == (name == "lsh_cache_append")
    assert name.endswith("_backward") or hasattr(reformer_ext, name)


def test_no_operator_is_missing_here() -> None:
    registered = {
        schema.name.removeprefix("reformer::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("reformer::")
    }
    assert registered == set(SCHEMAS)
