// A few rows times a matrix, y = x W^T for M rows of x (M, K): what decoding is made of. W is read from memory once, and that should be all that takes time.
// W is (N, K), float32 or int8 with a float32 scale for each row: weights are converted in registers, x stays float32.
// Each y[m][n] is a sum in one fixed order, whatever M, the neighbours and the threads are.
#include "vec.h"

constexpr int TOGETHER = W == 16 ? 4 : 2;      // rows of x that share one reading of W: with four sums each, they fit the registers
constexpr size_t WORTH = 1 << 16;              // numbers in W from which a second thread pays
constexpr int AHEAD = 2048;                    // bytes between what is read and what is asked for

static inline vec take(const float* p) { return load(p); }
static inline vec take(const int8_t* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return vec{(float)p[0], (float)p[1], (float)p[2], (float)p[3]};
#endif
}

// [few_rows]
// M rows of x with one row of W: each product is four sums of vectors along K, so that none waits for the one before
template <int M, class Weight>
static void along(int K, int N, const float* x, const Weight* row, float scale, float* y) {
    vec sums[M][4], w[4];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int i = 0; i < 4; i++) sums[m][i] = vec{};
    int k = 0;
    for (; k + 4 * W <= K; k += 4 * W) {
        for (int i = 0; i < 4 * W * (int)sizeof(Weight); i += 64) __builtin_prefetch((const char*)(row + k) + AHEAD + i);
        UNROLL for (int i = 0; i < 4; i++) w[i] = take(row + k + i * W);
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int i = 0; i < 4; i++) sums[m][i] += load(x + (size_t)m * K + k + i * W) * w[i];
    }
    for (int m = 0; m < M; m++) {
        float all = sum((sums[m][0] + sums[m][1]) + (sums[m][2] + sums[m][3]));
        for (int j = k; j < K; j++) all += x[(size_t)m * K + j] * row[j];
        y[(size_t)m * N] = all * scale;
    }
}
// [end]

template <class Weight>
static void product(int M, int K, int N, int threads, const float* x, const Weight* weight, const float* scale, float* y) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && (size_t)N * K >= WORTH)
    for (int n = 0; n < N; n++) {
        const Weight* row = weight + (size_t)n * K;
        int m = 0;
        for (; m + TOGETHER <= M; m += TOGETHER) along<TOGETHER>(K, N, x + (size_t)m * K, row, scale ? scale[n] : 1.f, y + (size_t)m * N + n);
        for (; m < M; m++) along<1>(K, N, x + (size_t)m * K, row, scale ? scale[n] : 1.f, y + (size_t)m * N + n);
    }
}

extern "C" void few_rows(int M, int K, int N, int threads, const float* x, const float* weight, float* y) { product(M, K, N, threads, x, weight, nullptr, y); }

extern "C" void few_rows_int8(int M, int K, int N, int threads, const float* x, const int8_t* q, const float* scale, float* y) { product(M, K, N, threads, x, q, scale, y); }

// Who made the processor: MKL takes its widest code on Intel's only (kernels/product)
extern "C" int made_by_amd() { __builtin_cpu_init(); return __builtin_cpu_is("amd") != 0; }
