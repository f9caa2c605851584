// Reformer attention operators for libtorch: everything a C++ user includes.
//
// Tensors are [B, H, L, D] (batch, heads, length, head dimension) with a contiguous last dimension,
// as in torch::scaled_dot_product_attention. All functions go through the dispatcher: CPU and CUDA,
// autograd, autocast. float32, float16, bfloat16 on both; float64 on the CPU. R is the number of
// hash rounds. Exact semantics: reformer_ext/reference.py and the README.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace reformer {

// What a pair of positions must satisfy, and how the chunks see each other.
struct AttentionOptions {
  int64_t chunk_size = 64;
  int64_t look_back = 1;                       // chunks before a query's own that it attends to
  int64_t look_ahead = 0;                      // chunks after it
  bool causal = false;                         // key position <= query position
  std::optional<bool> mask_self = {};          // attend to oneself only when nothing else is valid;
                                               // default: true for shared QK, false with keys
  std::optional<bool> wrap = {};               // neighbours taken circularly over all rounds;
                                               // default: true with an order, false without
  std::optional<double> scale = {};            // of the logits; default: D ** -0.5
  std::optional<at::Tensor> key_padding_mask;  // bool [B, L], true = padding
  bool correct_duplicates = false;             // count a pair once however many rounds hold it
  double dropout_p = 0.0;                      // of the attention weights
  std::optional<at::Tensor>
      dropout_seed;  // int64, one element, on q's device; required if dropout_p > 0
  // Only with mask_self. [B, H, L, D], what a query gets in place of its v that meets only itself.
  std::optional<at::Tensor> own_values;
  // Only with mask_self, without own_values. [2 or 3, H]: the values are next_values(v, value_mix,
  // key_padding_mask, causal), but a query that meets only itself gets its v; as these two calls
  // do, with fewer passes over the gradients.
  std::optional<at::Tensor> value_mix;
};

// Buckets of x by random rotations: per factor argmax([xR; -xR]) (Reformer, section 2).
// x [B, H, L, D], rotations [H or 1, D, R, sum(n_buckets) / 2], n_buckets even factors -> int32 [B,
// H, R, L]. Padding positions get the bucket prod(n_buckets). Not differentiable.
at::Tensor lsh_hash(const at::Tensor& x, const at::Tensor& rotations, at::IntArrayRef n_buckets,
                    const std::optional<at::Tensor>& key_padding_mask = {});

// Stable sort: order[b, h, r, :] lists the positions by (bucket, position).
// buckets int32 [B, H, R, L], all in [0, n_buckets) -> int32 [B, H, R, L].
at::Tensor bucket_sort(const at::Tensor& buckets, int64_t n_buckets);

// Attention inside the chunks of a permutation and their neighbours, one softmax over all rounds.
// q, v (and k) [B, H, L, D]; k absent: shared QK, keys are the length-normalised queries.
// order int32 [B, H, R, L] or absent (one round in natural order: local attention).
// buckets int32 [B, H, R, L]: only pairs of the same bucket attend.
// -> out [B, H, L, D] and lse [B, H, L], both differentiable.
std::tuple<at::Tensor, at::Tensor> chunked_attention(const at::Tensor& q,
                                                     const std::optional<at::Tensor>& k,
                                                     const at::Tensor& v,
                                                     const std::optional<at::Tensor>& order,
                                                     const AttentionOptions& options = {},
                                                     const std::optional<at::Tensor>& buckets = {});

// Hash, sort, attend. k absent: shared QK; with k, queries and keys sit where the hash of qk puts
// them. buckets: reuse these instead of hashing (rotations may then be absent). same_bucket: only
// pairs of the same bucket attend.
// -> out [B, H, L, D], lse [B, H, L], buckets int32 [B, H, R, L].
std::tuple<at::Tensor, at::Tensor, at::Tensor> lsh_attention(
    const at::Tensor& qk, const at::Tensor& v, const std::optional<at::Tensor>& rotations,
    at::IntArrayRef n_buckets, const AttentionOptions& options = {},
    const std::optional<at::Tensor>& k = {}, const std::optional<at::Tensor>& buckets = {},
    bool same_bucket = false);

// LSH attention of queries q [B, H, Lq, D] over keys and values k, v [B, H, Lk, D] of another
// sequence: both are hashed by the same rotations and sorted in one list of Lq + Lk rows, in a
// bucket the queries first. n_buckets: of the Lq + Lk rows. options.key_padding_mask bool [B, Lk],
// query_padding_mask bool [B, Lq]; in a chunk keys follow queries, so look_ahead is best 1; neither
// causal nor mask_self. buckets int32 [B, H, R, Lq + Lk]: reuse these instead of hashing.
// -> out [B, H, Lq, D] (0 for a query that meets no key), lse [B, H, Lq], buckets.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lsh_cross_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& rotations, at::IntArrayRef n_buckets,
    const AttentionOptions& options = {}, const std::optional<at::Tensor>& query_padding_mask = {},
    const std::optional<at::Tensor>& buckets = {}, bool same_bucket = false);

// Scratch memory that chunked_attention takes on CUDA, in bytes: heads that need more together are
// worked on in groups, with the same results; one head takes what it needs. Of the whole process;
// 1.25 GiB at first.
void set_workspace_limit(int64_t bytes);
int64_t workspace_limit();

// Joins attentions of the same queries over disjoint key sets by their log-sum-exp. Differentiable.
// outs: n times [B, H, L, D], lses: n times [B, H, L] -> out [B, H, L, D], lse [B, H, L].
std::tuple<at::Tensor, at::Tensor> merge_attention(at::TensorList outs, at::TensorList lses);

// Rotary positions: turns the pairs (x[d], x[d + D/2]) of x [B, H, L, D] or [N, B, H, L, D] to
// x * cos + roll(x, D/2) * sin, in float32 at least. cos, sin: float32 [L, D] or [B, 1, L, D],
// [c, c] and [-s, s] of the angles. Differentiable in x. -> like x.
at::Tensor apply_rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

// A projection x [B, L, parts * H * D] as `parts` tensors of heads [B, H, L, D]: queries, keys
// unless they are the queries, and values. All but the values are turned, as by apply_rotary.
// Differentiable in x, by the next.
std::vector<at::Tensor> split_heads(const at::Tensor& x, int64_t parts, const at::Tensor& cos,
                                    const at::Tensor& sin);

// Heads side by side in one projection, q and k turned; with the opposite sin, the inverse of
// split_heads. Differentiable in q, k and v.
at::Tensor merge_heads(const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& v,
                       const at::Tensor& cos, const at::Tensor& sin);

// Values that say what comes next, for a causal attention whose queries never attend to themselves
// (mask_self): w_j = m[0, h] v_j + m[1, h] v_{j+1}. Not causal: w_j = m[0, h] v_{j-1} + m[1, h] v_j
// + m[2, h] v_{j+1}. A neighbour that does not exist or is padding is v_j itself; w is zero at
// padding. v [B, H, L, D], value_mix [2 or 3, H], key_padding_mask bool [B, L] -> like v.
// Differentiable in v and value_mix.
at::Tensor next_values(const at::Tensor& v, const at::Tensor& value_mix,
                       const std::optional<at::Tensor>& key_padding_mask = {}, bool causal = true);

// Decoding. The cache of a layer: keys and values [B, H, C, D], and per head, round and bucket the
// last W positions that fell into it: table int32 [B, H, R, N, W], and how many did: counts int32
// [B, H, R, N]; position number i of a bucket is in slot i % W. All contiguous, counts zero at
// first.

// Attention of new queries to the positions in their buckets, one softmax over all rounds, at a
// cost that does not depend on how many positions the cache holds. q [B, H, T, D] of the keys'
// dtype; buckets int32 [B, H, R, T] of the queries, N or more: padding, which finds nothing. A
// query that finds no key gets its row of own_values (like q) and the lse -1e5, or 0 and -inf
// without them. correct_duplicates: a key found in several rounds counts once. before int64 [B]:
// query t of batch b finds only positions below before[b] + t. Not differentiable.
// -> out [B, H, T, D], lse [B, H, T].
std::tuple<at::Tensor, at::Tensor> lsh_decode(const at::Tensor& q, const at::Tensor& keys,
                                              const at::Tensor& values, const at::Tensor& table,
                                              const at::Tensor& counts, const at::Tensor& buckets,
                                              const std::optional<at::Tensor>& own_values = {},
                                              std::optional<double> scale = {},
                                              bool correct_duplicates = false,
                                              const std::optional<at::Tensor>& before = {});

// Puts T positions into the cache, in place: row t of batch b becomes position lengths[b] + t
// (lengths int64 [B]). k, v [B, H, T, D] of the keys' dtype. normalize: keys of length one are made
// of k, as of the queries of shared QK. buckets int32 [B, H, R, T]; N or more: padding, which no
// bucket takes. Positions beyond the capacity C are dropped.
// value_mix [2, H], with last_values [B, H, D]: values are kept as next_values makes them of all
// there have been, padding being what no bucket of the first round takes. The newest is kept as it
// is until the next comes; its v is in last_values, which is changed in place. So that a query
// finds the value before it complete, append its position first and decode with `before` set to
// that.
void lsh_cache_append(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
                      const at::Tensor& counts, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& buckets, const at::Tensor& lengths, bool normalize = false,
                      const std::optional<at::Tensor>& value_mix = {},
                      const std::optional<at::Tensor>& last_values = {});

// About 2 * length / chunk_size buckets (half a chunk each) as a short list of even factors.
std::vector<int64_t> default_n_buckets(int64_t length, int64_t chunk_size);

}  // namespace reformer
