// Enough of CUDA for g++ to run kernels/*.cu as they are: a block's threads are fibers of one processor thread, which change places at barriers.
// Stricter than a GPU: shared memory starts as NaN and has a guarded end, a thread that leaves while others wait at a barrier is an error,
// and threads run in opposite orders between one barrier and the next, so that a result which depends on the order shows.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(n)

struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
struct alignas(16) float4 { float x, y, z, w; };
typedef int cudaError_t;
typedef void* cudaStream_t;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr size_t SHARED = 48 * 1024, GUARD = 4096;
inline float4 shared_memory[(SHARED + GUARD) / 16];

struct Fiber { ucontext_t context; std::vector<char> stack; bool done; };
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned running;
inline std::function<void()> body;
inline const char* failure = nullptr;

inline void __syncthreads() { swapcontext(&fibers[running].context, &scheduler); }
inline void fiber_main() { body(); fibers[running].done = true; }

inline void run_block(unsigned threads) {
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        f.stack.resize(64 * 1024), f.done = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size(), f.context.uc_link = &scheduler;
        makecontext(&f.context, fiber_main, 0);
    }
    for (unsigned round = 0, left = threads; left; round++) {
        for (unsigned n = 0; n < threads; n++) {
            running = round % 2 ? threads - 1 - n : n, threadIdx.x = running;
            swapcontext(&scheduler, &fibers[running].context);
            left -= fibers[running].done;
        }
        if (left && left < threads) { failure = "a thread left the kernel while others waited at a barrier"; return; }
    }
}

template <class A> cudaError_t cudaLaunchKernel(void (*kernel)(A), dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
    failure = nullptr;
    if (shared > SHARED || block.x > 1024) { failure = "more shared memory or threads than a block may have"; return 1; }
    A x = *(A*)arguments[0];
    body = [&] { kernel(x); };
    gridDim = grid, blockDim = block;
    for (unsigned b = 0; b < grid.x && !failure; b++) {
        memset(shared_memory, 0xff, sizeof shared_memory);                                    // NaN
        blockIdx.x = b;
        run_block(block.x);
        for (size_t i = shared; i < sizeof shared_memory; i++)
            if (((unsigned char*)shared_memory)[i] != 0xff) failure = "a write past the end of shared memory";
    }
    return failure ? 1 : 0;
}
inline const char* cudaGetErrorString(cudaError_t code) { return failure ? failure : code ? "unknown" : "no error"; }
