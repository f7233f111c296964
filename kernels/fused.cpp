// The small steps around RWKV-7's matrix products, each in one pass over memory, forward and backward, fp32. A row is one token, C = H * N channels.
// `sums`, where a function takes it, holds the parameters' gradients, (number of parameters, C); null if nobody wants them.
#include "vec.h"
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(...) _Pragma(SIMD_TEXT(omp simd reduction(+ : __VA_ARGS__)))
#define SIMD_TEXT(x) #x

// Runs work(row, partial) for every row, `threads` at a time. A parameter's gradient is a sum over all rows: float over 32 rows, double beyond,
// per thread, then added up in the order of threads, so that the same number of threads gives the same bits.
template <typename Work>
static void each_row(size_t rows, int width, int threads, float* sums, Work work) {
    const size_t block = 32, blocks = (rows + block - 1) / block;
    if (blocks < (size_t)threads) threads = blocks ? blocks : 1;
    double* totals = sums ? (double*)calloc((size_t)threads * width, sizeof(double)) : nullptr;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        FlushDenormals flush;
        Scratch scratch(sums ? width : 1);
        double* total = totals + (sums ? (size_t)omp_get_thread_num() * width : 0);
        #pragma omp for schedule(static)
        for (size_t i = 0; i < blocks; i++) {
            if (sums) memset(scratch.block, 0, width * 4);
            for (size_t row = i * block; row < rows && row < (i + 1) * block; row++) work(row, sums ? scratch.block : nullptr);
            for (int j = 0; sums && j < width; j++) total[j] += scratch.block[j];
        }
    }
    for (int j = 0; sums && j < width; j++) {
        double all = 0;
        for (int thread = 0; thread < threads; thread++) all += totals[(size_t)thread * width + j];
        sums[j] = all;
    }
    free(totals);
}

// [mix] out_m = x + (shift(x) - x) mu_m, for M rows mu_m
extern "C" void mix_forward(int B, int T, int C, int M, int threads, const float* x, const float* last, const float* mus, const uint8_t* resets, float* const* out) {
    each_row((size_t)B * T, 0, threads, nullptr, [=](size_t row, float*) {
        const float *now = x + row * C, *before = row % T ? now - C : last + row / T * C;
        const bool reset = resets && resets[row];
        for (int m = 0; m < M; m++) {
            const float* mu = mus + (size_t)m * C;
            float* to = out[m] + row * C;
            if (reset) SIMD for (int j = 0; j < C; j++) to[j] = now[j] - now[j] * mu[j];
            else SIMD for (int j = 0; j < C; j++) to[j] = now[j] + (before[j] - now[j]) * mu[j];
        }
    });
}
// [end]

// g[m] may be null: no gradient came back from that output
extern "C" void mix_backward(int B, int T, int C, int M, int threads, const float* x, const float* last, const float* mus, const uint8_t* resets, const float* const* g,
                             float* dx, float* dlast, float* sums) {
    each_row((size_t)B * T, M * C, threads, sums, [=](size_t row, float* partial) {
        const bool begins = row % T == 0, reset = resets && resets[row], followed = (row + 1) % T && !(resets && resets[row + 1]);
        const float *now = x + row * C, *before = begins ? last + row / T * C : now - C;
        float *to = dx + row * C, *to_last = begins ? dlast + row / T * C : nullptr;
        memset(to, 0, C * 4);
        if (begins) memset(to_last, 0, C * 4);
        for (int m = 0; m < M; m++) {
            if (!g[m]) continue;
            const float *mu = mus + (size_t)m * C, *gm = g[m] + row * C, *next = gm + C;
            if (followed) SIMD for (int j = 0; j < C; j++) to[j] += gm[j] + mu[j] * (next[j] - gm[j]);
            else SIMD for (int j = 0; j < C; j++) to[j] += gm[j] - mu[j] * gm[j];
            if (begins && !reset) SIMD for (int j = 0; j < C; j++) to_last[j] += mu[j] * gm[j];
            if (!partial) continue;
            float* dmu = partial + (size_t)m * C;
            if (reset) SIMD for (int j = 0; j < C; j++) dmu[j] -= gm[j] * now[j];
            else SIMD for (int j = 0; j < C; j++) dmu[j] += gm[j] * (before[j] - now[j]);
        }
    });
}

// The head size as a constant where it is the usual 64: the compiler then unrolls the loops over a head.
#define FOR_HEADS(body) if (N == 64) for (int h = 0; h < H; h++) body(std::integral_constant<int, 64>(), h); else for (int h = 0; h < H; h++) body(N, h);
#include <type_traits>

// [before] w = -e^-1/2 sigmoid(w0 + decay);  rate = sigmoid(a0 + iclr);  v += (v_first - v) sigmoid(v0 + v_mix);  kk = k k_k / |k k_k| per head;
//          a = -kk;  b = kk rate;  k *= 1 + (rate - 1) k_a
extern "C" void before_forward(int rows, int H, int N, int threads, const float* decay, const float* k, const float* v, const float* iclr, const float* v_mix, const float* v_first,
                               const float* w0, const float* a0, const float* v0, const float* k_k, const float* k_a, float* w, float* to_k, float* to_v, float* a, float* b) {
    each_row(rows, 0, threads, nullptr, [=](size_t row, float*) {
        auto head = [=](auto N, int h) __attribute__((always_inline)) {
            const int c = h * N;
            const size_t o = row * H * N + c;
            float square = 0;
            SIMD_SUM(square) for (int j = 0; j < N; j++) { float u = k[o + j] * k_k[c + j]; square += u * u; }
            const float scale = 1.f / (square > 1e-24f ? sqrtf(square) : 1e-12f);
            SIMD for (int j = 0; j < N; j++) {
                float rate = sigmoid(a0[c + j] + iclr[o + j]), kk = k[o + j] * k_k[c + j] * scale;
                w[o + j] = -0.60653066f * sigmoid(w0[c + j] + decay[o + j]);
                a[o + j] = -kk;
                b[o + j] = kk * rate;
                to_k[o + j] = k[o + j] * (1.f + (rate - 1.f) * k_a[c + j]);
            }
            if (v_mix) SIMD for (int j = 0; j < N; j++) to_v[o + j] = v[o + j] + (v_first[o + j] - v[o + j]) * sigmoid(v0[c + j] + v_mix[o + j]);
        };
        FOR_HEADS(head)
    });
}
// [end]

// sums: gradients of w0, a0, k_k, k_a, v0
extern "C" void before_backward(int rows, int H, int N, int threads, const float* decay, const float* k, const float* v, const float* iclr, const float* v_mix, const float* v_first,
                                const float* w0, const float* a0, const float* v0, const float* k_k, const float* k_a, const float* gw, const float* gk, const float* gv, const float* ga, const float* gb,
                                float* ddecay, float* dk, float* dv, float* diclr, float* dv_mix, float* dv_first, float* sums) {
    const int C = H * N;
    each_row(rows, 5 * C, threads, sums, [=](size_t row, float* partial) {
        auto head = [=](auto N, int h) __attribute__((always_inline)) {
            const int c = h * N;
            const size_t o = row * H * N + c;
            float square = 0, along = 0;
            SIMD_SUM(square) for (int j = 0; j < N; j++) { float u = k[o + j] * k_k[c + j]; square += u * u; }
            const float scale = 1.f / (square > 1e-24f ? sqrtf(square) : 1e-12f);
            SIMD_SUM(along) for (int j = 0; j < N; j++) {
                float rate = sigmoid(a0[c + j] + iclr[o + j]), kk = k[o + j] * k_k[c + j] * scale, fade = sigmoid(w0[c + j] + decay[o + j]);
                along += kk * (gb[o + j] * rate - ga[o + j]);
                diclr[o + j] = (gb[o + j] * kk + gk[o + j] * k[o + j] * k_a[c + j]) * rate * (1.f - rate);
                ddecay[o + j] = -0.60653066f * gw[o + j] * fade * (1.f - fade);
                dk[o + j] = gk[o + j] * (1.f + (rate - 1.f) * k_a[c + j]);
            }
            if (square <= 1e-24f) along = 0;                             // below the floor the length counts as a constant
            SIMD for (int j = 0; j < N; j++) {
                float rate = sigmoid(a0[c + j] + iclr[o + j]), kk = k[o + j] * k_k[c + j] * scale;
                dk[o + j] += (gb[o + j] * rate - ga[o + j] - kk * along) * scale * k_k[c + j];
            }
            if (v_mix) SIMD for (int j = 0; j < N; j++) {
                float share = sigmoid(v0[c + j] + v_mix[o + j]);
                dv[o + j] = gv[o + j] * (1.f - share);
                dv_first[o + j] = gv[o + j] * share;
                dv_mix[o + j] = gv[o + j] * (v_first[o + j] - v[o + j]) * share * (1.f - share);
            }
            if (!partial) return;
            SIMD for (int j = 0; j < N; j++) {
                float rate = sigmoid(a0[c + j] + iclr[o + j]), kk = k[o + j] * k_k[c + j] * scale;
                partial[c + j] += ddecay[o + j];
                partial[C + c + j] += diclr[o + j];
                partial[2 * C + c + j] += (gb[o + j] * rate - ga[o + j] - kk * along) * scale * k[o + j];
                partial[3 * C + c + j] += gk[o + j] * k[o + j] * (rate - 1.f);
            }
            if (v_mix) SIMD for (int j = 0; j < N; j++) partial[4 * C + c + j] += dv_mix[o + j];
        };
        FOR_HEADS(head)
    });
}

// [after] out = ((y - mean) / sqrt(variance + eps) weight + bias + (sum_j r_j k_j r_k_j) v) g, mean, variance and sum over a head
extern "C" void after_forward(int rows, int H, int N, float eps, int threads, const float* y, const float* r, const float* k, const float* v, const float* g,
                              const float* r_k, const float* weight, const float* bias, float* out) {
    each_row(rows, 0, threads, nullptr, [=](size_t row, float*) {
        auto head = [=](auto N, int h) __attribute__((always_inline)) {
            const int c = h * N;
            const size_t o = row * H * N + c;
            float total = 0, bonus = 0, square = 0;
            SIMD_SUM(total, bonus) for (int j = 0; j < N; j++) total += y[o + j], bonus += r[o + j] * k[o + j] * r_k[c + j];
            const float mean = total / N;
            SIMD_SUM(square) for (int j = 0; j < N; j++) square += (y[o + j] - mean) * (y[o + j] - mean);
            const float scale = 1.f / sqrtf(square / N + eps);
            SIMD for (int j = 0; j < N; j++) out[o + j] = ((y[o + j] - mean) * scale * weight[c + j] + bias[c + j] + bonus * v[o + j]) * g[o + j];
        };
        FOR_HEADS(head)
    });
}
// [end]

// sums: gradients of r_k, weight, bias
extern "C" void after_backward(int rows, int H, int N, float eps, int threads, const float* y, const float* r, const float* k, const float* v, const float* g,
                               const float* r_k, const float* weight, const float* bias, const float* go,
                               float* dy, float* dr, float* dk, float* dv, float* dg, float* sums) {
    const int C = H * N;
    each_row(rows, 3 * C, threads, sums, [=](size_t row, float* partial) {
        auto head = [=](auto N, int h) __attribute__((always_inline)) {
            const int c = h * N;
            const size_t o = row * H * N + c;
            float total = 0, bonus = 0, square = 0, dbonus = 0, sum_u = 0, sum_ux = 0;
            SIMD_SUM(total, bonus) for (int j = 0; j < N; j++) total += y[o + j], bonus += r[o + j] * k[o + j] * r_k[c + j];
            const float mean = total / N;
            SIMD_SUM(square) for (int j = 0; j < N; j++) square += (y[o + j] - mean) * (y[o + j] - mean);
            const float scale = 1.f / sqrtf(square / N + eps);
            SIMD_SUM(dbonus, sum_u, sum_ux) for (int j = 0; j < N; j++) {
                float x = (y[o + j] - mean) * scale, e = go[o + j] * g[o + j], u = e * weight[c + j];
                dg[o + j] = go[o + j] * (x * weight[c + j] + bias[c + j] + bonus * v[o + j]);
                dv[o + j] = e * bonus;
                dbonus += e * v[o + j], sum_u += u, sum_ux += u * x;
            }
            sum_u /= N, sum_ux /= N;
            SIMD for (int j = 0; j < N; j++) {
                float x = (y[o + j] - mean) * scale, u = go[o + j] * g[o + j] * weight[c + j];
                dy[o + j] = (u - sum_u - x * sum_ux) * scale;
                dr[o + j] = dbonus * k[o + j] * r_k[c + j];
                dk[o + j] = dbonus * r[o + j] * r_k[c + j];
            }
            if (partial) SIMD for (int j = 0; j < N; j++) {
                float e = go[o + j] * g[o + j];
                partial[c + j] += dbonus * r[o + j] * k[o + j];
                partial[C + c + j] += e * (y[o + j] - mean) * scale;
                partial[2 * C + c + j] += e;
            }
        };
        FOR_HEADS(head)
    });
}

// [relu squared] y = max(x, 0)^2 and dx = 2 sqrt(y) g, in rows of 1024 numbers, the last one shorter
extern "C" void relu_squared_forward(int64_t n, int threads, const float* x, float* out) {
    each_row((n + 1023) / 1024, 0, threads, nullptr, [=](size_t row, float*) {
        const int64_t from = row * 1024, to = from + 1024 < n ? from + 1024 : n;
        SIMD for (int64_t i = from; i < to; i++) { float z = x[i] < 0.f ? 0.f : x[i]; out[i] = z * z; }     // written so that a NaN stays one
    });
}
extern "C" void relu_squared_backward(int64_t n, int threads, const float* y, const float* g, float* dx) {
    each_row((n + 1023) / 1024, 0, threads, nullptr, [=](size_t row, float*) {
        const int64_t from = row * 1024, to = from + 1024 < n ? from + 1024 : n;
        SIMD for (int64_t i = from; i < to; i++) dx[i] = 2.f * sqrtf(y[i]) * g[i];
    });
}
// [end]

// [softmax] logits (n, V) become their own gradient, weight * (softmax - one at the target); losses (n,) = weight * (log sum exp - logit of the target)
extern "C" void softmax_cross_entropy(int n, int V, int threads, float* logits, const int64_t* targets, const float* weights, float* losses) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int i = 0; i < n; i++) {
        FlushDenormals flush;
        float *x = logits + (size_t)i * V, top = -INFINITY;
        _Pragma("omp simd reduction(max : top)") for (int j = 0; j < V; j++) top = x[j] > top ? x[j] : top;
        const float at_target = x[targets[i]];
        double total = 0;
        for (int from = 0; from < V; from += 1024) {                   // float within a thousand numbers, double beyond
            const int to = from + 1024 < V ? from + 1024 : V;
            float part = 0;
            SIMD_SUM(part) for (int j = from; j < to; j++) { x[j] = fast_exp(x[j] - top); part += x[j]; }
            total += part;
        }
        const float scale = weights[i] / total;
        SIMD for (int j = 0; j < V; j++) x[j] *= scale;
        x[targets[i]] -= weights[i];
        losses[i] = weights[i] * (std::log(total) + top - at_target);
    }
}
// [end]
