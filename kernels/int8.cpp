// Products with a frozen int8 matrix: q (rows, columns) int8 with one float scale a row, W = scale[row] * q. Forward y = x W^T and input gradient dx = g W read the same q.
// Activations become int8 row by row here (1, 2 or 3 digits of about 8 bits each), the products are whole numbers (AVX-512 VNNI: 64 multiply-adds an instruction), and scales are put on at the end.
// Sums of whole numbers have no order, so neither blocks nor threads change a bit.
#include "vec.h"
#include <algorithm>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {
constexpr int COLUMNS = 64, TALL = 6, DEEP = 2048;       // columns of a panel (4 vectors); rows of a register tile; inner length of a packed panel
constexpr float DIGIT = 254.f;                           // one digit's step over the next one's

// [digits]
// x ~ scale * (d0 + d1/254 + d2/254^2), each digit a whole number within +-127, rounded to nearest even; total[p] is the sum of a digit's row. A row with NaN or infinity gets the scale NaN.
VNNI void digits(const float* x, const float* fold, int K, int parts, int8_t* out, int64_t stride, float* scale, int32_t* total) {
    __m512i top = _mm512_setzero_si512();
    auto at = [&](int k, __mmask16 m) VNNI { __m512 v = _mm512_maskz_loadu_ps(m, x + k); return fold ? _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, fold + k)) : v; };
    for (int k = 0; k < K; k += 16) {                    // as whole numbers, so that NaN counts as larger than everything
        __mmask16 m = K - k >= 16 ? 0xffff : (1 << (K - k)) - 1;
        top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(at(k, m)), _mm512_set1_epi32(0x7fffffff)));
    }
    uint32_t bits = _mm512_reduce_max_epu32(top);
    float most;
    memcpy(&most, &bits, 4);
    bool finite = bits < 0x7f800000u, some = finite && most > 1e-35f;
    *scale = !finite ? __builtin_nanf("") : some ? most / 127.f : 0.f;
    __m512 r = _mm512_set1_ps(some ? 127.f / most : 0.f);
    __m512i sums[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t k = 0; k < stride; k += 16) {           // zeros up to the padded length
        __mmask16 m = k + 16 <= K ? 0xffff : k >= K ? 0 : (1 << (K - k)) - 1;
        __m512 z = some && m ? _mm512_mul_ps(at(k, m), r) : _mm512_setzero_ps();
        for (int p = 0; p < parts; p++) {
            __m512i d = _mm512_cvtps_epi32(z);
            _mm_storeu_si128((__m128i*)(out + p * stride + k), _mm512_cvtsepi32_epi8(d));
            sums[p] = _mm512_add_epi32(sums[p], d);
            z = _mm512_mul_ps(_mm512_sub_ps(z, _mm512_cvtepi32_ps(d)), _mm512_set1_ps(DIGIT));
        }
    }
    for (int p = 0; p < parts; p++) total[p] = _mm512_reduce_add_epi32(sums[p]);
}
// [end]

// Both packers lay a panel out as [K/4][64 columns][4 bytes], with 128 added to each byte: the instruction multiplies unsigned by signed bytes.
// Forward: column c of the panel is row c of q, so words of 4 bytes are transposed 16 by 16.
VNNI void pack_rows(const int8_t* q, int64_t width, int count, int K, uint8_t* panel) {
    for (int c0 = 0; c0 < COLUMNS; c0 += 16) for (int k = 0; k < K; k += 64) {
        __mmask64 m = K - k >= 64 ? ~0ull : (1ull << (K - k)) - 1;
        __m512i a[16], b[16];
        UNROLL for (int i = 0; i < 16; i++) a[i] = c0 + i < count ? _mm512_maskz_loadu_epi8(m, q + (c0 + i) * width + k) : _mm512_setzero_si512();
        UNROLL for (int i = 0; i < 16; i += 2) { b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]); b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]); }
        UNROLL for (int i = 0; i < 16; i += 4) {
            a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]); a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]); a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
        }                                                // a[4g + j], lane l: word 4l + j of rows 4g .. 4g+3
        UNROLL for (int j = 0; j < 4; j++) {
            __m512i lo01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), hi01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
            __m512i lo23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44), hi23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
            b[j] = _mm512_shuffle_i32x4(lo01, lo23, 0x88); b[4 + j] = _mm512_shuffle_i32x4(lo01, lo23, 0xdd);
            b[8 + j] = _mm512_shuffle_i32x4(hi01, hi23, 0x88); b[12 + j] = _mm512_shuffle_i32x4(hi01, hi23, 0xdd);
        }
        int words = std::min(16, (K - k + 3) / 4);
        for (int w = 0; w < words; w++) _mm512_storeu_si512(panel + ((int64_t)(k / 4 + w) * COLUMNS + c0) * 4, _mm512_xor_si512(b[w], _mm512_set1_epi8((char)0x80)));
    }
}

// Input gradient: the inner index runs down q's rows, so bytes of 4 rows are interleaved.
VNNI void pack_columns(const int8_t* q, int64_t width, int count, int K, uint8_t* panel) {
    __mmask64 m = count >= 64 ? ~0ull : (1ull << count) - 1;
    for (int k = 0; k < K; k += 4) {
        __m512i a[4], b[4];
        UNROLL for (int i = 0; i < 4; i++) a[i] = k + i < K ? _mm512_maskz_loadu_epi8(m, q + (k + i) * width) : _mm512_setzero_si512();
        b[0] = _mm512_unpacklo_epi8(a[0], a[1]); b[1] = _mm512_unpackhi_epi8(a[0], a[1]);
        b[2] = _mm512_unpacklo_epi8(a[2], a[3]); b[3] = _mm512_unpackhi_epi8(a[2], a[3]);
        a[0] = _mm512_unpacklo_epi16(b[0], b[2]); a[1] = _mm512_unpackhi_epi16(b[0], b[2]);
        a[2] = _mm512_unpacklo_epi16(b[1], b[3]); a[3] = _mm512_unpackhi_epi16(b[1], b[3]);   // a[t], lane l: columns 16l + 4t .. + 3
        __m512i lo01 = _mm512_shuffle_i32x4(a[0], a[1], 0x44), hi01 = _mm512_shuffle_i32x4(a[0], a[1], 0xee);
        __m512i lo23 = _mm512_shuffle_i32x4(a[2], a[3], 0x44), hi23 = _mm512_shuffle_i32x4(a[2], a[3], 0xee);
        b[0] = _mm512_shuffle_i32x4(lo01, lo23, 0x88); b[1] = _mm512_shuffle_i32x4(lo01, lo23, 0xdd);
        b[2] = _mm512_shuffle_i32x4(hi01, hi23, 0x88); b[3] = _mm512_shuffle_i32x4(hi01, hi23, 0xdd);
        UNROLL for (int i = 0; i < 4; i++) _mm512_storeu_si512(panel + (int64_t)k * COLUMNS + i * 64, _mm512_xor_si512(b[i], _mm512_set1_epi8((char)0x80)));
    }
}

// [tile]
// R rows by 64 columns in registers: 4 inner steps of 16 columns are one instruction.
template <int R> VNNI void tile(const int8_t* x, int64_t stride, const uint8_t* panel, int words, int32_t* sums, bool first) {
    __m512i c[R][4];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 4; j++) c[i][j] = first ? _mm512_setzero_si512() : _mm512_load_si512(sums + i * COLUMNS + j * 16);
    for (int w = 0; w < words; w++, panel += COLUMNS * 4, x += 4) {
        __m512i b[4];
        UNROLL for (int j = 0; j < 4; j++) b[j] = _mm512_load_si512(panel + j * 64);
        UNROLL for (int i = 0; i < R; i++) {
            __m512i a = _mm512_set1_epi32(*(const int32_t*)(x + i * stride));
            UNROLL for (int j = 0; j < 4; j++) c[i][j] = _mm512_dpbusd_epi32(c[i][j], b[j], a);
        }
    }
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 4; j++) _mm512_store_si512(sums + i * COLUMNS + j * 16, c[i][j]);
}
// [end]

typedef void (*Tile)(const int8_t*, int64_t, const uint8_t*, int, int32_t*, bool);
const Tile tiles[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// [finish]
// Takes the added 128 out again (128 times the row's sum), joins the digits, and puts the scales on.
VNNI void finish(const int32_t* sums, const int32_t* total, float scale, int parts, const float* columns, int count, float* y) {
    for (int j = 0; j < count; j += 16) {
        __mmask16 m = count - j >= 16 ? 0xffff : (1 << (count - j)) - 1;
        __m512 v = _mm512_setzero_ps();
        for (int p = parts; p-- > 0;)
            v = _mm512_fmadd_ps(v, _mm512_set1_ps(1.f / DIGIT), _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums + p * COLUMNS + j), _mm512_set1_epi32((int32_t)(128u * (uint32_t)total[p])))));
        v = _mm512_mul_ps(v, _mm512_set1_ps(scale));
        if (columns) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, columns + j));
        _mm512_mask_storeu_ps(y + j, m, v);
    }
}
// [end]

// y (M, N) = x (M, K) times the matrix, whose inner index runs along q's rows (back = false: N = rows, K = width) or down its columns (back: N = width, K = rows).
VNNI void product(int64_t M, int64_t N, int64_t K, int parts, bool back, int threads, const float* x, const int8_t* q, const float* scale, float* y) {
    const int64_t rows = M * parts, stride = (K + 63) / 64 * 64 + 64, strips = (N + COLUMNS - 1) / COLUMNS, width = back ? N : K;
    int64_t blocks = (rows + 767) / 768;
    while (blocks * strips < 3 * threads && rows / blocks > 96) blocks *= 2;
    const int64_t unit = TALL * parts, tall = ((rows + blocks - 1) / blocks + unit - 1) / unit * unit;      // a block ends with all digits of a row
    blocks = (rows + tall - 1) / tall;
    int8_t* digit = (int8_t*)aligned_alloc(64, rows * stride);
    float* scales = (float*)malloc(M * 4);
    int32_t* totals = (int32_t*)malloc(rows * 4);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < M; i++) digits(x + i * K, back ? scale : nullptr, K, parts, digit + i * parts * stride, stride, scales + i, totals + i * parts);
        uint8_t* panel = (uint8_t*)aligned_alloc(64, DEEP * COLUMNS);
        int32_t* sums = (int32_t*)aligned_alloc(64, tall * COLUMNS * 4);
        #pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * strips; task++) {
            const int64_t n = task % strips * COLUMNS, r0 = task / strips * tall, r1 = std::min(rows, r0 + tall);
            const int count = std::min<int64_t>(COLUMNS, N - n);
            for (int64_t k = 0; k < K; k += DEEP) {
                const int deep = std::min<int64_t>(DEEP, K - k);
                if (back) pack_columns(q + k * width + n, width, count, deep, panel);
                else pack_rows(q + n * width + k, width, count, deep, panel);
                for (int64_t r = r0; r < r1; r += TALL)
                    tiles[std::min<int64_t>(TALL, r1 - r)](digit + r * stride + k, stride, panel, (deep + 3) / 4, sums + (r - r0) * COLUMNS, k == 0);
            }
            for (int64_t r = r0; r < r1; r += parts)
                finish(sums + (r - r0) * COLUMNS, totals + r, scales[r / parts], parts, back ? nullptr : scale + n, count, y + r / parts * N + n);
        }
        free(panel);
        free(sums);
    }
    free(digit); free(scales); free(totals);
}
}

extern "C" int int8_products() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"); }

// y (M, rows) = x (M, width) W^T; dx (M, width) = g (M, rows) W: there the weight's scales go into g before it is rounded.
extern "C" void int8_forward(int M, int rows, int width, int parts, int threads, const float* x, const int8_t* q, const float* scale, float* y) { product(M, rows, width, parts, false, threads, x, q, scale, y); }
extern "C" void int8_backward(int M, int rows, int width, int parts, int threads, const float* g, const int8_t* q, const float* scale, float* dx) { product(M, width, rows, parts, true, threads, g, q, scale, dx); }
