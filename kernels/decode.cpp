// A few rows times a matrix, y = x W^T for M rows of x (M, K): what decoding is made of. W is read from memory once, and that should be all that takes time.
// W is (N, K), float32 or int8 with a float32 scale for each row: weights are converted in registers, x stays float32.
// Each y[m][n] is a sum in one fixed order, whatever M, the neighbours and the threads are.
#include <type_traits>
#include "vec.h"

constexpr int TOGETHER = W == 16 ? 8 : 4;      // rows of x that share one reading of W: with two sums each, they fit the registers
constexpr size_t WORTH = 1 << 16;              // numbers in W from which a second thread pays
constexpr int AHEAD = 2048, FAR = 12288;        // bytes between what is read and what is asked for; with several rows of x the processor itself looks less far

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
// M rows of x, their vectors side by side, with one row of W: each product is two sums of vectors along K, so that one need not wait for the other
template <int M, class Weight>
static void along(int K, int N, const float* x, const float* rest, const Weight* row, float scale, float* y) {
    vec sums[M][2];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int i = 0; i < 2; i++) sums[m][i] = vec{};
    int k = 0;
    for (; k + 2 * W <= K; k += 2 * W, x += 2 * M * W) {
        for (int i = 0; i < 2 * W * (int)sizeof(Weight); i += 64) __builtin_prefetch((const char*)(row + k) + (M > 2 ? FAR : AHEAD) + i);
        UNROLL for (int i = 0; i < 2; i++) {
            const vec w = take(row + k + i * W);
            UNROLL for (int m = 0; m < M; m++) sums[m][i] += load(x + (i * M + m) * W) * w;
        }
    }
    for (int m = 0; m < M; m++) {
        float all = sum(sums[m][0] + sums[m][1]);
        for (int j = k; j < K; j++) all += rest[(size_t)m * K + j] * row[j];
        y[(size_t)m * N] = all * scale;
    }
}
// [end]

template <class Weight>
static void product(int M, int K, int N, int threads, const float* x, const Weight* weight, const float* scale, float* y) {
    const int whole = K / (2 * W) * 2 * W;
    Scratch scratch((size_t)M * K + 16);
    float* beside = scratch.take((size_t)M * K);
    auto groups = [&](auto each) {                                             // as many rows together as there are
        int m = 0;
        for (; m + TOGETHER <= M; m += TOGETHER) each(m, std::integral_constant<int, TOGETHER>());
        for (; m + 2 <= M; m += 2) each(m, std::integral_constant<int, 2>());
        for (; m < M; m++) each(m, std::integral_constant<int, 1>());
    };
    groups([&](int m, auto size) {
        for (int k = 0; k < whole; k += W) for (int i = 0; i < size; i++) store(beside + (size_t)m * K + (size_t)k * size + i * W, load(x + (size_t)(m + i) * K + k));
    });
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && (size_t)N * K >= WORTH)
    for (int n = 0; n < N; n++)
        groups([&](int m, auto size) {
            const size_t at = (size_t)m * K;
            along<size>(K, N, beside + at, x + at, weight + (size_t)n * K, scale ? scale[n] : 1.f, y + (size_t)m * N + n);
        });
}

extern "C" void few_rows(int M, int K, int N, int threads, const float* x, const float* weight, float* y) { product(M, K, N, threads, x, weight, nullptr, y); }

extern "C" void few_rows_int8(int M, int K, int N, int threads, const float* x, const int8_t* q, const float* scale, float* y) { product(M, K, N, threads, x, q, scale, y); }

// Who made the processor: MKL takes its widest code on Intel's only (kernels/product)
extern "C" int made_by_amd() { __builtin_cpu_init(); return __builtin_cpu_is("amd") != 0; }
