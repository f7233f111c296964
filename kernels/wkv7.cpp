// The RWKV-7 recurrence and its gradient in fp32, one head at a time with its state in the first-level cache.
//     S <- S diag(e^w) + (S a) b^T + v k^T,   y = S r          (S is [value][key]; w is the natural log of the decay)
// Rows of (B, T, H, N) tensors are contiguous. Any N: rows are padded to whole vectors in scratch memory.
#include "vec.h"

// Raise it, here and in nbs/kernels/30_native.ipynb, whenever the arguments of a function in this folder change: a library built before is then refused instead of being called wrongly.
extern "C" int kernels_version() { return 3; }

// [read] held = S a, for a state stored [key][value]: vectors run over values, so that no sum crosses lanes
static void read_state(float* held, const float* S, const float* a, int N, int P) {
    for (int i = 0; i < P; i += W) {
        vec sum{};
        for (int j = 0; j < N; j++) sum += a[j] * load(S + j * P + i);
        store(held + i, sum);
    }
}

// [forward] one token, G vectors of values: fade, edit and write S; read y with r; and already read what the next token's a will ask for
template <int G>
static void token(int N, int P, float* S, const float* decay, const float* b, const float* k, const float* r, const float* next_a,
                  const float* v, float* held, float* y) {
    vec old[G], value[G], read[G], next[G];
    UNROLL for (int g = 0; g < G; g++) old[g] = load(held + g * W), value[g] = load(v + g * W), read[g] = next[g] = vec{};
    for (int j = 0; j < N; j++, S += P)
        UNROLL for (int g = 0; g < G; g++) {
            vec s = load(S + g * W) * decay[j] + old[g] * b[j] + value[g] * k[j];
            store(S + g * W, s);
            read[g] += s * r[j];
            next[g] += s * next_a[j];
        }
    UNROLL for (int g = 0; g < G; g++) store(y + g * W, read[g]), store(held + g * W, next[g]);
}
// [end]

// state (B, H, N, N) or null; initial (H, N, N) or null; resets (B, T) or null; y, last always written.
// held (B, T, H, N), S a before each token, and kept (B, H, ceil(T / every), N, N), the state as [key][value] before every `every`-th token: both or neither.
extern "C" void wkv7_forward(int B, int T, int H, int N, int every, int threads, const float* r, const float* w, const float* k, const float* v, const float* a, const float* b,
                             const float* state, const float* initial, const uint8_t* resets, float* y, float* last, float* held, float* kept) {
    const int P = padded(N), blocks = (T + every - 1) / every;
    const size_t square = (size_t)N * N, stride = (size_t)H * N;
    #pragma omp parallel num_threads(threads) if (B * H > 1 && threads > 1)
    {
        FlushDenormals flush;
        Scratch scratch((size_t)N * P + 5 * P);
        float *S = scratch.take((size_t)N * P), *old = scratch.take(P), *value = scratch.take(P), *out = scratch.take(P), *decay = scratch.take(P), *zeros = scratch.take(P);
        memset(S, 0, ((size_t)N * P + 5 * P) * 4);
        #pragma omp for schedule(dynamic, 1)
        for (int bh = 0; bh < B * H; bh++) {
            const int batch = bh / H, h = bh % H;
            auto start_from = [&](const float* from) {
                if (from) transpose(S, P, from, N, N);
                else memset(S, 0, (size_t)N * P * 4);
            };
            const float* fresh = initial ? initial + h * square : nullptr;
            start_from(state ? state + bh * square : fresh);
            for (int t = 0; t < T; t++) {
                const size_t o = ((size_t)batch * T + t) * stride + (size_t)h * N;
                const bool reset = resets && resets[(size_t)batch * T + t];
                if (reset) start_from(fresh);
                if (reset || t == 0) read_state(old, S, a + o, N, P);
                if (held) memcpy(held + o, old, N * 4);
                if (kept && t % every == 0)
                    for (int j = 0; j < N; j++) memcpy(kept + ((size_t)bh * blocks + t / every) * square + (size_t)j * N, S + (size_t)j * P, N * 4);
                exp_row(decay, w + o, N);
                memcpy(value, v + o, N * 4);
                const float* next_a = t + 1 < T ? a + o + stride : zeros;
                int i = 0;
                for (; i + TILE * W <= P; i += TILE * W) token<TILE>(N, P, S + i, decay, b + o, k + o, r + o, next_a, value + i, old + i, out + i);
                for (; i < P; i += W) token<1>(N, P, S + i, decay, b + o, k + o, r + o, next_a, value + i, old + i, out + i);
                memcpy(y + o, out, N * 4);
            }
            transpose(last + bh * square, N, S, P, N);
        }
    }
}

struct Stretch {                               // up to `every` tokens of one head, padded rows of length P; and the gradients that they will get
    float *r, *decay, *k, *v, *a, *b, *held, *dy, *dr, *dw, *dk, *dv, *da, *db;
};

// [backward] ROWS rows of the state, [value][key], through one stretch: first forward again from its first state, then back with D = dL/dS
template <int G>
static void rows_back(int n, int i, int P, const Stretch& x, const float* S0, float* states, float* D) {
    const int groups = G ? G : P / W;
    for (int row = 0; row < ROWS; row++) memcpy(states + row * P, S0 + (i + row) * P, P * 4);
    for (int t = 0; t < n; t++) {
        const float* before = states + (size_t)t * ROWS * P;
        float* after = states + (size_t)(t + 1) * ROWS * P;
        UNROLL for (int g = 0; g < groups; g++) {
            vec decay = load(x.decay + t * P + g * W), b = load(x.b + t * P + g * W), k = load(x.k + t * P + g * W);
            UNROLL for (int row = 0; row < ROWS; row++)
                store(after + row * P + g * W, load(before + row * P + g * W) * decay + x.held[t * P + i + row] * b + x.v[t * P + i + row] * k);
        }
    }
    vec d[ROWS][G ? G : 1];
    auto D_at = [&](int row, int g) -> float* { return D + (i + row) * P + g * W; };
    if (G) UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int g = 0; g < groups; g++) d[row][g] = load(D_at(row, g));
    for (int t = n - 1; t >= 0; t--) {
        const float *before = states + (size_t)t * ROWS * P, *after = states + (size_t)(t + 1) * ROWS * P;
        vec to_v[ROWS], to_held[ROWS];
        UNROLL for (int row = 0; row < ROWS; row++) to_v[row] = to_held[row] = vec{};
        UNROLL for (int g = 0; g < groups; g++) {
            const int at = t * P + g * W;
            vec r = load(x.r + at), k = load(x.k + at), b = load(x.b + at), dr = load(x.dr + at), dk = load(x.dk + at), db = load(x.db + at), dw = load(x.dw + at);
            UNROLL for (int row = 0; row < ROWS; row++) {
                const int value = t * P + i + row;
                vec Drow = (G ? d[row][G ? g : 0] : load(D_at(row, g))) + x.dy[value] * r;
                dr += x.dy[value] * load(after + row * P + g * W);
                dk += x.v[value] * Drow;
                db += x.held[value] * Drow;
                dw += Drow * load(before + row * P + g * W);
                to_v[row] += Drow * k;
                to_held[row] += Drow * b;
                if (G) d[row][G ? g : 0] = Drow; else store(D_at(row, g), Drow);
            }
            store(x.dr + at, dr), store(x.dk + at, dk), store(x.db + at, db), store(x.dw + at, dw);
        }
        float dheld[4];
        if (ROWS == 4) sum4(dheld, to_held[0], to_held[1 % ROWS], to_held[2 % ROWS], to_held[3 % ROWS]), sum4(x.dv + t * P + i, to_v[0], to_v[1 % ROWS], to_v[2 % ROWS], to_v[3 % ROWS]);
        else UNROLL for (int row = 0; row < ROWS; row++) dheld[row] = sum(to_held[row]), x.dv[t * P + i + row] = sum(to_v[row]);
        UNROLL for (int g = 0; g < groups; g++) {
            const int at = t * P + g * W;
            vec decay = load(x.decay + at), a = load(x.a + at), da = load(x.da + at);
            UNROLL for (int row = 0; row < ROWS; row++) {
                da += dheld[row] * load(before + row * P + g * W);
                vec Drow = (G ? d[row][G ? g : 0] : load(D_at(row, g))) * decay + dheld[row] * a;
                if (G) d[row][G ? g : 0] = Drow; else store(D_at(row, g), Drow);
            }
            store(x.da + at, da);
        }
    }
    if (G) UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int g = 0; g < groups; g++) store(D_at(row, g), d[row][g]);
}
// [end]

static void stretch_back(int n, int P, const Stretch& x, const float* S0, float* states, float* D) {
    for (int i = 0; i < P; i += ROWS) switch (P / W) {
        case 1: rows_back<1>(n, i, P, x, S0, states, D); break;
        case 2: rows_back<2>(n, i, P, x, S0, states, D); break;
        case 4: rows_back<4>(n, i, P, x, S0, states, D); break;
        case 8: rows_back<8>(n, i, P, x, S0, states, D); break;
        default: rows_back<0>(n, i, P, x, S0, states, D);
    }
}

// dlast (B, H, N, N), or null for zero, is the gradient coming in from the last state. dstate and dinitial, both (B, H, N, N), may be null; dinitial is what each row adds to initial's gradient.
extern "C" void wkv7_backward(int B, int T, int H, int N, int every, int threads, const float* r, const float* w, const float* k, const float* v, const float* a, const float* b,
                              const float* state, const float* initial, const uint8_t* resets, const float* held, const float* kept, const float* dy, const float* dlast,
                              float* dr, float* dw, float* dk, float* dv, float* da, float* db, float* dstate, float* dinitial) {
    const int P = padded(N), blocks = (T + every - 1) / every;
    const size_t square = (size_t)N * N, stride = (size_t)H * N, rows = (size_t)every * P;
    #pragma omp parallel num_threads(threads) if (B * H > 1 && threads > 1)
    {
        FlushDenormals flush;
        const size_t floats = 2 * (size_t)P * P + 14 * rows + (size_t)(every + 1) * ROWS * P;
        Scratch scratch(floats);
        memset(scratch.block, 0, floats * 4);
        float *D = scratch.take((size_t)P * P), *S0 = scratch.take((size_t)P * P), *states = scratch.take((size_t)(every + 1) * ROWS * P);
        Stretch x;
        for (float** row : {&x.r, &x.decay, &x.k, &x.v, &x.a, &x.b, &x.held, &x.dy, &x.dr, &x.dw, &x.dk, &x.dv, &x.da, &x.db}) *row = scratch.take(rows);
        #pragma omp for schedule(dynamic, 1)
        for (int bh = 0; bh < B * H; bh++) {
            const int batch = bh / H, h = bh % H;
            for (int i = 0; dlast && i < N; i++) memcpy(D + (size_t)i * P, dlast + bh * square + (size_t)i * N, N * 4);
            if (dinitial) memset(dinitial + bh * square, 0, square * 4);
            auto give_to = [&](float* gradient) {                        // the state's gradient has reached a beginning: add it there, and start anew
                for (int i = 0; gradient && i < N; i++)
                    for (int j = 0; j < N; j++) gradient[bh * square + (size_t)i * N + j] += D[(size_t)i * P + j];
                memset(D, 0, (size_t)P * P * 4);
            };
            for (int end = T, first; end > 0; end = first) {
                // a stretch ends where a kept state or a document begins
                bool reset = false;
                for (first = end - 1; !(reset = resets && resets[(size_t)batch * T + first]) && first % every; first--) {}
                const int n = end - first;
                for (int t = 0; t < n; t++) {
                    const size_t o = ((size_t)batch * T + first + t) * stride + (size_t)h * N;
                    memcpy(x.r + t * P, r + o, N * 4), memcpy(x.k + t * P, k + o, N * 4), memcpy(x.v + t * P, v + o, N * 4), memcpy(x.a + t * P, a + o, N * 4);
                    memcpy(x.b + t * P, b + o, N * 4), memcpy(x.held + t * P, held + o, N * 4), memcpy(x.dy + t * P, dy + o, N * 4);
                    exp_row(x.decay + t * P, w + o, N);
                }
                for (float* gradient : {x.dr, x.dw, x.dk, x.da, x.db}) memset(gradient, 0, (size_t)n * P * 4);
                if (!reset) transpose(S0, P, kept + ((size_t)bh * blocks + first / every) * square, N, N);
                else for (int i = 0; i < N; i++) {
                    if (initial) memcpy(S0 + (size_t)i * P, initial + h * square + (size_t)i * N, N * 4);
                    else memset(S0 + (size_t)i * P, 0, N * 4);
                }
                stretch_back(n, P, x, S0, states, D);
                for (int t = 0; t < n; t++) {
                    const size_t o = ((size_t)batch * T + first + t) * stride + (size_t)h * N;
                    for (int j = 0; j < N; j++) dw[o + j] = x.dw[t * P + j] * x.decay[t * P + j];
                    memcpy(dr + o, x.dr + t * P, N * 4), memcpy(dk + o, x.dk + t * P, N * 4), memcpy(dv + o, x.dv + t * P, N * 4);
                    memcpy(da + o, x.da + t * P, N * 4), memcpy(db + o, x.db + t * P, N * 4);
                }
                if (reset) give_to(dinitial);
            }
            if (dstate) memset(dstate + bh * square, 0, square * 4);
            give_to(state ? dstate : dinitial);
        }
    }
}
