// Sort-chunk-attend: attention inside the chunks of a permutation and between neighbouring chunks,
// over several rounds (Reformer, section 2). Semantics: reformer_ext/reference.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "chunked_attention/params.h"

namespace reformer::kernels {

// Bytes of scratch the passes need for these sizes and flags (pointers are not read, except for
// null).
int64_t chunked_attention_forward_workspace(const ChunkedAttentionParams& params);
int64_t chunked_attention_backward_workspace(const ChunkedAttentionBackwardParams& params);

// Enqueue; never synchronise or allocate. Deterministic: no atomics.
cudaError_t chunked_attention_forward(const ChunkedAttentionParams& params, cudaStream_t stream);
cudaError_t chunked_attention_backward(const ChunkedAttentionBackwardParams& params,
                                       cudaStream_t stream);

}  // namespace reformer::kernels
