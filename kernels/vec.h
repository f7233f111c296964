// What every source here shares: the widest float vector of the instruction set it is compiled for, sums over its lanes, exp, and aligned scratch memory.
// x86-64 only; GCC or clang (vector extensions). One source, compiled once per instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <immintrin.h>
#include <omp.h>

#if defined(__AVX512F__)
constexpr int W = 16, TILE = 4, ROWS = 4;      // floats in a vector; vectors in a forward tile; state rows in a backward block
#elif defined(__AVX2__)
constexpr int W = 8, TILE = 2, ROWS = 1;
#else
constexpr int W = 4, TILE = 2, ROWS = 1;
#endif

#define UNROLL _Pragma("GCC unroll 16")        // arrays of vectors stay in registers only when each small loop over them is unrolled
typedef float vec __attribute__((vector_size(W * 4)));
typedef float vec_anywhere __attribute__((vector_size(W * 4), aligned(4), may_alias));
static inline vec load(const float* p) { return *(const vec_anywhere*)p; }
static inline void store(float* p, vec x) { *(vec_anywhere*)p = x; }

static inline void copy(float* to, const float* from, int n) {
    int j = 0;
    for (; j + W <= n; j += W) store(to + j, load(from + j));
    for (; j < n; j++) to[j] = from[j];
}
static inline void ask_for(const float* row, int n) {                      // into the second-level cache, without waiting
    for (int j = 0; j < n; j += 16) __builtin_prefetch(row + j, 0, 2);
}

static inline __m128 fold(vec x) {             // W lanes -> 4
#if defined(__AVX512F__)
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1)));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    return _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
    return (__m128)x;
#endif
}
static inline float sum(vec x) {
    __m128 q = fold(x);
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
static inline void sum4(float* out, vec a, vec b, vec c, vec d) {
    __m128 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    _MM_TRANSPOSE4_PS(p, q, r, s);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(p, q), _mm_add_ps(r, s)));
}

// exp to about one unit in the last place: x = n ln 2 + f, a polynomial in f (Cephes' coefficients) gives part = e^f - 1, and power = 2^n. Vectorises by itself.
static inline void split_exp(float x, float& part, float& power) {
    x = x < -87.f ? -87.f : (x > 88.f ? 88.f : x);
    float n = (x * 1.44269504f + 12582912.f) - 12582912.f;                 // adding 1.5 * 2^23 rounds to a whole number
    float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = ((((1.9875691500e-4f * f + 1.3981999507e-3f) * f + 8.3334519073e-3f) * f + 4.1665795894e-2f) * f + 1.6666665459e-1f) * f + 5.0000001201e-1f;
    int32_t bits = ((int32_t)n + 127) << 23;
    memcpy(&power, &bits, 4);
    part = p * (f * f) + f;
}
static inline float fast_exp(float x) {
    float part, power;
    split_exp(x, part, power);
    return (part + 1.f) * power;
}
static inline float fast_expm1(float x) {      // e^x - 1 with all its digits where x is near zero
    float part, power;
    split_exp(x, part, power);
    return part * power + (power - 1.f);
}

static inline float sigmoid(float x) { return 1.f / (1.f + fast_exp(-x)); }

struct FlushDenormals {                        // numbers below 1e-38 would be eight times slower; zero for this scope, and for this thread, only
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
};

struct Scratch {                               // one aligned block per thread, handed out in pieces
    float *block, *next;
    explicit Scratch(size_t floats) { block = next = (float*)aligned_alloc(64, (floats * 4 + 63) / 64 * 64); }
    ~Scratch() { free(block); }
    float* take(size_t floats) { float* p = next; next += floats; return p; }
};
static inline int padded(int n) { return (n + W - 1) / W * W; }

static inline void transpose(float* to, int to_stride, const float* from, int from_stride, int n) {
    int whole = n / 4 * 4;
    for (int i = 0; i < whole; i += 4)
        for (int j = 0; j < whole; j += 4) {
            __m128 p = _mm_loadu_ps(from + j * from_stride + i), q = _mm_loadu_ps(from + (j + 1) * from_stride + i);
            __m128 r = _mm_loadu_ps(from + (j + 2) * from_stride + i), s = _mm_loadu_ps(from + (j + 3) * from_stride + i);
            _MM_TRANSPOSE4_PS(p, q, r, s);
            _mm_storeu_ps(to + i * to_stride + j, p), _mm_storeu_ps(to + (i + 1) * to_stride + j, q);
            _mm_storeu_ps(to + (i + 2) * to_stride + j, r), _mm_storeu_ps(to + (i + 3) * to_stride + j, s);
        }
    for (int i = 0; i < n; i++)
        for (int j = i < whole ? whole : 0; j < n; j++) to[i * to_stride + j] = from[j * from_stride + i];
}

static inline void exp_row(float* out, const float* w, int n) {
    for (int j = 0; j < n; j++) out[j] = fast_exp(w[j]);
}
