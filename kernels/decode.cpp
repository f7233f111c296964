// A few rows times a matrix, y = x W^T for M rows of x (M, K): what decoding is made of. W is read from memory once, and that should be all that takes time.
// W is (N, K), float32 or int8 with a float32 scale for each row: weights are converted in registers, x stays float32.
// Each y[m][n] is a sum in one fixed order, whatever M, the neighbours and the threads are.
#include "vec.h"
#include <type_traits>

constexpr int TOGETHER = W == 16 ? 4 : 2;      // rows of x that share one reading of W: with four vectors of W, their sums fit the registers
constexpr size_t WORTH = 1 << 16;              // numbers in W from which a second thread pays
constexpr int AHEAD = 8192;                    // bytes between what is read and what is asked for

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
// M rows of x with R rows of W: M * R sums run along K together, a vector at a time
template <int M, int R, class Weight>
static void along(int K, int N, const float* x, const Weight* weight, const float* scale, float* y) {
    vec sums[M][R], w[R];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int i = 0; i < R; i++) sums[m][i] = vec{};
    const char* soon = (const char*)weight + AHEAD;
    int k = 0;
    for (; k + W <= K; k += W, soon += R * W * sizeof(Weight)) {
        UNROLL for (int i = 0; i < R * W * (int)sizeof(Weight); i += 64) __builtin_prefetch(soon + i);
        UNROLL for (int i = 0; i < R; i++) w[i] = take(weight + (size_t)i * K + k);
        UNROLL for (int m = 0; m < M; m++) {
            vec row = load(x + (size_t)m * K + k);
            UNROLL for (int i = 0; i < R; i++) sums[m][i] += row * w[i];
        }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int i = 0; i < R; i += 4) {
        float alone[4], *to = R > 1 ? y + (size_t)m * N + i : alone;
        sum4(to, sums[m][i], sums[m][(i + 1) % R], sums[m][(i + 2) % R], sums[m][(i + 3) % R]);
        if (R == 1) y[(size_t)m * N] = alone[0];
    }
    if (k == K && !scale) return;
    for (int m = 0; m < M; m++) for (int i = 0; i < R; i++) {
        float& to = y[(size_t)m * N + i];
        for (int j = k; j < K; j++) to += x[(size_t)m * K + j] * weight[(size_t)i * K + j];
        if (scale) to *= scale[i];
    }
}
// [end]

template <int R, class Weight>
static void together(int M, int K, int N, const float* x, const Weight* weight, const float* scale, float* y) {
    int m = 0;
    for (; R <= 4 && m + TOGETHER <= M; m += TOGETHER) along<TOGETHER, R <= 4 ? R : 4>(K, N, x + (size_t)m * K, weight, scale, y + (size_t)m * N);
    for (; m < M; m++) along<1, R>(K, N, x + (size_t)m * K, weight, scale, y + (size_t)m * N);
}

template <class Weight>
static void product(int M, int K, int N, int threads, const float* x, const Weight* weight, const float* scale, float* y) {
    const int R = M == 1 ? 8 : 4;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && (size_t)N * K >= WORTH)
    for (int n = 0; n < N; n += R) {
        auto rows = [&](auto step, int at) { together<decltype(step)::value>(M, K, N, x, weight + (size_t)at * K, scale ? scale + at : nullptr, y + at); };
        if (n + R > N) for (int at = n; at < N; at++) rows(std::integral_constant<int, 1>{}, at);
        else if (M == 1) rows(std::integral_constant<int, 8>{}, n);
        else rows(std::integral_constant<int, 4>{}, n);
    }
}

extern "C" void few_rows(int M, int K, int N, int threads, const float* x, const float* weight, float* y) { product(M, K, N, threads, x, weight, nullptr, y); }

extern "C" void few_rows_int8(int M, int K, int N, int threads, const float* x, const int8_t* q, const float* scale, float* y) { product(M, K, N, threads, x, q, scale, y); }
