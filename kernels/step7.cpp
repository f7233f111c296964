// One token through the layers of RWKV-7, for B rows: everything between two states, in one call. Weights are read once; what lies between them stays in cache.
#include "vec.h"
#define SIMD _Pragma("omp simd")

extern "C" {
void few_rows(int M, int K, int N, int threads, const float* x, const float* weight, float* y);
void few_rows_int8(int M, int K, int N, int threads, const float* x, const int8_t* q, const float* scale, float* y);
void before_forward(int rows, int H, int N, int threads, const float* decay, const float* k, const float* v, const float* iclr, const float* v_mix, const float* v_first,
                    const float* w0, const float* a0, const float* v0, const float* k_k, const float* k_a, float* w, float* to_k, float* to_v, float* a, float* b);
void after_forward(int rows, int H, int N, float eps, int threads, const float* y, const float* r, const float* k, const float* v, const float* g,
                   const float* r_k, const float* weight, const float* bias, float* out);
}

struct Matrix { const void* weight; const float* scale; };                    // (out, in) float32, or with a scale int8
struct Layer {                                                                // in the order in which Python lists them
    const float *ln1, *ln1_bias, *ln2, *ln2_bias, *mus[6], *w1, *w2, *a1, *a2, *g1, *g2, *v1, *v2, *w0, *a0, *v0, *k_k, *k_a, *r_k, *ln_x, *ln_x_bias, *ffn_mu;
    Matrix receptance, key, value, output, ffn_key, ffn_value;
};

static void times(int B, int K, int N, int threads, const float* x, Matrix m, float* y) {
    if (m.scale) few_rows_int8(B, K, N, threads, x, (const int8_t*)m.weight, m.scale, y);
    else few_rows(B, K, N, threads, x, (const float*)m.weight, y);
}

// y = x W for W (K, N) as low-rank pairs are stored: its rows, each times one number of x, are added up
static void across(int M, int K, int N, const float* x, const float* weight, float* y) {
    memset(y, 0, (size_t)M * N * 4);
    for (int k = 0; k < K; k++) for (int m = 0; m < M; m++) {
        const float *row = weight + (size_t)k * N, factor = x[(size_t)m * K + k];
        float* to = y + (size_t)m * N;
        int n = 0;
        for (; n + W <= N; n += W) {
            if (m == 0) __builtin_prefetch((const char*)(row + n) + 4096);
            store(to + n, load(to + n) + factor * load(row + n));
        }
        for (; n < N; n++) to[n] += factor * row[n];
    }
}

static void norm(int B, int C, const float* x, const float* weight, const float* bias, float* y) {
    for (int b = 0; b < B; b++, x += C, y += C) {
        double total = 0, square = 0;
        SIMD for (int j = 0; j < C; j++) total += x[j];
        const float mean = total / C;
        for (int j = 0; j < C; j++) { float d = x[j] - mean; square += (double)d * d; }
        const float scale = 1 / std::sqrt((float)(square / C) + 1e-5f);
        SIMD for (int j = 0; j < C; j++) y[j] = (x[j] - mean) * scale * weight[j] + bias[j];
    }
}

static void lerp(int n, int C, const float* x, const float* last, const float* mu, float* y) {
    for (int i = 0; i < n; i += C) SIMD for (int j = 0; j < C; j++) y[i + j] = x[i + j] + (last[i + j] - x[i + j]) * mu[j];
}

// One token of the recurrence for every head, as the states lie there, [value][key]: a row reads what it held at a, is faded, corrected and written, and is read at r
static void remember(int heads, int N, const float* r, const float* w, const float* k, const float* v, const float* a, const float* b, const float* S, float* to, float* y, float* decay) {
    for (int h = 0; h < heads; h++, r += N, w += N, k += N, v += N, a += N, b += N, y += N) {
        exp_row(decay, w, N);
        for (int i = 0; i < N; i++, S += N, to += N) {
            float held = 0, out = 0;
            _Pragma("omp simd reduction(+:held)") for (int j = 0; j < N; j++) held += S[j] * a[j];
            _Pragma("omp simd reduction(+:out)") for (int j = 0; j < N; j++) out += (to[j] = S[j] * decay[j] + held * b[j] + v[i] * k[j]) * r[j];
            y[i] = out;
        }
    }
}

// [step]
static void layer_step(int B, int C, int N, int F, int RW, int RA, int RG, int RV, int first, int threads, const Layer& p, float* x, float* v_first,
                       const float* att, const float* wkv, const float* ffn, float* new_att, float* new_wkv, float* new_ffn) {
    const int n = B * C, H = C / N, wide = F > C ? F : C;
    Scratch scratch((size_t)15 * (n + 16) + (size_t)B * (wide + RW + RA + RG + RV + 80));
    auto take = [&](int size) { return scratch.take((size_t)(size + 15) / 16 * 16); };
    float *z = take(n), *r = take(n), *k = take(n), *v = take(n), *decay = take(n), *iclr = take(n), *g = take(n), *v_mix = take(n), *w = take(n), *to_k = take(n), *to_v = take(n), *a = take(n), *b = take(n), *y = take(n);
    float* low = take(B * wide);
    auto pair = [&](int mu, int rank, const float* one, const float* two, auto between, float* out) {
        lerp(n, C, new_att, att, p.mus[mu], z);
        across(B, C, rank, z, one, low);
        for (int j = 0; j < B * rank; j++) low[j] = between(low[j]);
        across(B, rank, C, low, two, out);
    };
    auto same = [](float x) { return x; };
    norm(B, C, x, p.ln1, p.ln1_bias, new_att);
    lerp(n, C, new_att, att, p.mus[0], z), times(B, C, C, threads, z, p.receptance, r);
    lerp(n, C, new_att, att, p.mus[2], z), times(B, C, C, threads, z, p.key, k);
    lerp(n, C, new_att, att, p.mus[3], z), times(B, C, C, threads, z, p.value, v);
    pair(1, RW, p.w1, p.w2, [](float x) { return std::tanh(x); }, decay);
    pair(4, RA, p.a1, p.a2, same, iclr);
    pair(5, RG, p.g1, p.g2, [](float x) { return sigmoid(x); }, g);
    if (!first) pair(3, RV, p.v1, p.v2, same, v_mix);
    before_forward(B, H, N, 1, decay, k, v, iclr, first ? nullptr : v_mix, first ? nullptr : v_first, p.w0, p.a0, first ? nullptr : p.v0, p.k_k, p.k_a, w, to_k, to_v, a, b);
    if (first) memcpy(v_first, v, (size_t)n * 4), to_v = v;
    remember(B * H, N, r, w, to_k, to_v, a, b, wkv, new_wkv, y, low);
    after_forward(B, H, N, 64e-5f, 1, y, r, to_k, to_v, g, p.r_k, p.ln_x, p.ln_x_bias, z);
    times(B, C, C, threads, z, p.output, y);
    for (int j = 0; j < n; j++) x[j] += y[j];
    norm(B, C, x, p.ln2, p.ln2_bias, new_ffn);
    lerp(n, C, new_ffn, ffn, p.ffn_mu, z), times(B, C, F, threads, z, p.ffn_key, low);
    for (int j = 0; j < B * F; j++) low[j] = low[j] > 0 ? low[j] * low[j] : 0;
    times(B, F, C, threads, low, p.ffn_value, y);
    for (int j = 0; j < n; j++) x[j] += y[j];
}
// [end]

// ranks (L, 4): of each layer's w, a, g and v pair. x (B, C) is changed in place. The states (L, B, ...) are read from the first three and written to the last three.
extern "C" void step7(int L, int B, int C, int N, int F, const int* ranks, int threads, const Layer* layers, float* x, float* v_first,
                      const float* att, const float* wkv, const float* ffn, float* new_att, float* new_wkv, float* new_ffn) {
    FlushDenormals flush;
    const size_t shift = (size_t)B * C, memory = shift * N;
    for (int i = 0; i < L; i++, ranks += 4)
        layer_step(B, C, N, F, ranks[0], ranks[1], ranks[2], ranks[3], i == 0, threads, layers[i], x, v_first, att + i * shift, wkv + i * memory, ffn + i * shift,
                   new_att + i * shift, new_wkv + i * memory, new_ffn + i * shift);
}
