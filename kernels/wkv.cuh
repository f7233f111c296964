// What the CUDA kernels share: numbers of three types read as fp32, and how a kernel is started. The CUDA runtime alone: no torch header, so that nvcc needs seconds, not minutes.
#pragma once
#include <cuda_runtime.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <stdint.h>

#define UNROLL _Pragma("unroll")
constexpr int EVERY = 16;                      // tokens between two kept states; 80_cuda says the same

extern __shared__ float4 shared_memory[];

// Types of numbers: 0 fp32, 1 fp16, 2 bf16. Every thread of a launch takes the same branch.
__device__ inline float get(const void* from, size_t at, int type) {
    if (type == 1) return __half2float(((const __half*)from)[at]);
    if (type == 2) return __bfloat162float(((const __nv_bfloat16*)from)[at]);
    return ((const float*)from)[at];
}

__device__ inline void put(void* to, size_t at, int type, float value) {
    if (type == 1) ((__half*)to)[at] = __float2half(value);
    else if (type == 2) ((__nv_bfloat16*)to)[at] = __float2bfloat16(value);
    else ((float*)to)[at] = value;
}

// four neighbours of a row in shared memory by one instruction
__device__ inline void four(float (&out)[4], const float* row) {
    float4 x = *(const float4*)row;
    out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
}

// sum of S[j] x[j], in four sums that don't wait for one another
template <int P> __device__ inline float dot(const float (&S)[P], const float* x) {
    float sum[4] = {0, 0, 0, 0}, q[4];
    UNROLL for (int j = 0; j < P; j += 4) {
        four(q, x + j);
        UNROLL for (int c = 0; c < 4; c++) sum[c] += S[j + c] * q[c];
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// One block per row and head. Head sizes up to 128 are padded with zeros to 16, 32, 64 or 128, and the kernel is compiled for each.
template <class Arguments> int launch(void (*kernel)(Arguments), Arguments x, int threads, size_t floats, void* stream) {
    void* arguments[] = {&x};
    return (int)cudaLaunchKernel(kernel, dim3((unsigned)(x.B * x.H)), dim3((unsigned)threads), arguments, floats * sizeof(float), (cudaStream_t)stream);
}
#define LAUNCH(kernel, x, per_row, rows, stream) \
    ((x).N <= 16 ? launch(kernel<16>, x, per_row * 16, (size_t)(rows) * 16, stream) : (x).N <= 32 ? launch(kernel<32>, x, per_row * 32, (size_t)(rows) * 32, stream) : \
     (x).N <= 64 ? launch(kernel<64>, x, per_row * 64, (size_t)(rows) * 64, stream) : launch(kernel<128>, x, per_row * 128, (size_t)(rows) * 128, stream))

// where a row of B starts: what an earlier piece left, else the initial state, else (null) zero
__device__ inline const float* beginning(const float* state, const float* initial, size_t bh, size_t h, size_t square) {
    return state ? state + bh * square : initial ? initial + h * square : nullptr;
}

// thread `row` fetches its row of an N x N state
template <int P> __device__ inline void fetch_row(float (&S)[P], const float* from, int row, int N) {
    UNROLL for (int j = 0; j < P; j++) S[j] = from && row < N && j < N ? from[row * N + j] : 0.f;
}

// all threads copy the state that a stretch starts from to `to`, [value][key]
__device__ inline void copy_start(float* to, const float* kept, const float* fresh, bool reset, int N) {
    for (int e = threadIdx.x; e < N * N; e += blockDim.x) {
        if (reset) to[e] = fresh ? fresh[e] : 0.f;
        else to[e % N * N + e / N] = kept[e];                            // kept states are [key][value]
    }
}

// the first token of the stretch that ends before `end`: where a document begins or a state was kept
__device__ inline int stretch_first(int end, const uint8_t* resets, size_t row, bool& reset) {
    int first = end - 1;
    while (!(reset = resets && resets[row + first]) && first % EVERY) first--;
    return first;
}

// D, the state's gradient, has reached a beginning: a column's thread adds it there; everyone starts anew
template <int P> __device__ inline void give_to(float* gradient, float (&D)[P], bool column, int lane, int N) {
    UNROLL for (int i = 0; i < P; i++) {
        if (gradient && column && i < N && lane < N) gradient[i * N + lane] += D[i];
        D[i] = 0;
    }
}

// a thread's part of the gradient that comes in from the last state: a row of it, or a column; and zeros where gradients of beginnings will be added
template <int P> __device__ inline void start_back(float (&D)[P], const float* dlast, float* dstate, float* dinitial, bool column, int lane, int N) {
    UNROLL for (int i = 0; i < P; i++) {
        const bool inside = i < N && lane < N;
        D[i] = dlast && inside ? dlast[column ? i * N + lane : lane * N + i] : 0.f;
        if (inside && column && dstate) dstate[i * N + lane] = 0;
        if (inside && column && dinitial) dinitial[i * N + lane] = 0;
    }
}
