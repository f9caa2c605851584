// Functions for both sides: this header, and what includes no more than it, compiles without CUDA.
#pragma once

#ifdef __CUDACC__
#define REFORMER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define REFORMER_HOST_DEVICE inline
#endif
