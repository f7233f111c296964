// The RWKV-7 recurrence and its gradient in fp32, one head at a time with its state in the first-level cache.
//     S <- S diag(e^w) + (S a) b^T + v k^T,   y = S r          (S is [value][key]; w is the natural log of the decay)
// Rows of (B, T, H, N) tensors are contiguous. Any N: rows are padded to whole vectors in scratch memory.
#include "vec.h"

// Raise it, here and in nbs/kernels/30_native.ipynb, whenever the arguments of a function in this folder change: a library built before is then refused instead of being called wrongly.
extern "C" int kernels_version() { return 5; }

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
                if (t + 4 < T) for (const float* row : {r, w, k, v, a, b}) ask_for(row + o + 4 * stride, N);
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

// Up to `every` tokens of one head: for each token its padded inputs of length P, and the gradients that they will get, side by side.
enum Field { R, DECAY, K, V, A, B_, HELD, DY, DR, DW, DK, DV, DA, DB, FIELDS };

// [backward] ROWS rows of the state, [value][key], through one stretch: first forward again from its first state, then back with D = dL/dS
template <int G>
static void rows_back(int n, int i, int padded, float* tokens, const float* S0, float* states, float* D) {
    const int groups = G ? G : padded / W, P = G ? G * W : padded, step = FIELDS * P;
    auto keep = [&](int t, int row, int g) -> float* { return states + (t * ROWS + row) * P + g * W; };     // the state before token t
    for (int row = 0; row < ROWS; row++) memcpy(keep(0, row, 0), S0 + (i + row) * P, P * 4);
    for (int t = 0; t < n; t++) {
        const float *x = tokens + t * step, *value = x + V * P + i, *held = x + HELD * P + i;
        UNROLL for (int g = 0; g < groups; g++) {
            const vec decay = load(x + DECAY * P + g * W), b = load(x + B_ * P + g * W), k = load(x + K * P + g * W);
            UNROLL for (int row = 0; row < ROWS; row++) store(keep(t + 1, row, g), load(keep(t, row, g)) * decay + held[row] * b + value[row] * k);
        }
    }
    vec d[ROWS][G ? G : 1];
    auto D_at = [&](int row, int g) -> float* { return D + (i + row) * P + g * W; };
    if (G) UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int g = 0; g < groups; g++) d[row][g] = load(D_at(row, g));
    for (int t = n - 1; t >= 0; t--) {
        float *x = tokens + t * step, *value = x + V * P + i, *held = x + HELD * P + i, *dy = x + DY * P + i, dheld[4];
        vec to_held[ROWS], to_v[ROWS];
        UNROLL for (int row = 0; row < ROWS; row++) to_held[row] = to_v[row] = vec{};
        UNROLL for (int g = 0; g < groups; g++) {                          // what does not wait for the sum over keys
            const vec r = load(x + R * P + g * W), b = load(x + B_ * P + g * W);
            vec dr = load(x + DR * P + g * W), db = load(x + DB * P + g * W);
            UNROLL for (int row = 0; row < ROWS; row++) {
                const vec Drow = (G ? d[row][G ? g : 0] : load(D_at(row, g))) + dy[row] * r;
                to_held[row] += Drow * b;
                dr += dy[row] * load(keep(t + 1, row, g));
                db += held[row] * Drow;
                if (G) d[row][G ? g : 0] = Drow; else store(D_at(row, g), Drow);
            }
            store(x + DR * P + g * W, dr), store(x + DB * P + g * W, db);
        }
        if (ROWS == 4) sum4(dheld, to_held[0], to_held[1 % ROWS], to_held[2 % ROWS], to_held[3 % ROWS]);
        else UNROLL for (int row = 0; row < ROWS; row++) dheld[row] = sum(to_held[row]);
        UNROLL for (int g = 0; g < groups; g++) {
            const vec k = load(x + K * P + g * W), decay = load(x + DECAY * P + g * W), a = load(x + A * P + g * W);
            vec dk = load(x + DK * P + g * W), dw = load(x + DW * P + g * W), da = load(x + DA * P + g * W);
            UNROLL for (int row = 0; row < ROWS; row++) {
                const vec Drow = G ? d[row][G ? g : 0] : load(D_at(row, g)), before = load(keep(t, row, g));
                to_v[row] += Drow * k;
                dk += value[row] * Drow;
                dw += Drow * before;
                da += dheld[row] * before;
                const vec next = Drow * decay + dheld[row] * a;
                if (G) d[row][G ? g : 0] = next; else store(D_at(row, g), next);
            }
            store(x + DK * P + g * W, dk), store(x + DW * P + g * W, dw), store(x + DA * P + g * W, da);
        }
        float* dv = x + DV * P + i;
        if (ROWS == 4) sum4(dv, to_v[0], to_v[1 % ROWS], to_v[2 % ROWS], to_v[3 % ROWS]);
        else UNROLL for (int row = 0; row < ROWS; row++) dv[row] = sum(to_v[row]);
    }
    if (G) UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int g = 0; g < groups; g++) store(D_at(row, g), d[row][g]);
}
// [end]

static void stretch_back(int n, int P, float* tokens, const float* S0, float* states, float* D) {
    for (int i = 0; i < P; i += ROWS) switch (P / W) {
        case 1: rows_back<1>(n, i, P, tokens, S0, states, D); break;
        case 2: rows_back<2>(n, i, P, tokens, S0, states, D); break;
        case 4: rows_back<4>(n, i, P, tokens, S0, states, D); break;
        case 8: rows_back<8>(n, i, P, tokens, S0, states, D); break;
        default: rows_back<0>(n, i, P, tokens, S0, states, D);
    }
}

// dlast (B, H, N, N), or null for zero, is the gradient coming in from the last state. dstate and dinitial, both (B, H, N, N), may be null; dinitial is what each row adds to initial's gradient.
extern "C" void wkv7_backward(int B, int T, int H, int N, int every, int threads, const float* r, const float* w, const float* k, const float* v, const float* a, const float* b,
                              const float* state, const float* initial, const uint8_t* resets, const float* held, const float* kept, const float* dy, const float* dlast,
                              float* dr, float* dw, float* dk, float* dv, float* da, float* db, float* dstate, float* dinitial) {
    const int P = padded(N), blocks = (T + every - 1) / every;
    const size_t square = (size_t)N * N, stride = (size_t)H * N;
    #pragma omp parallel num_threads(threads) if (B * H > 1 && threads > 1)
    {
        FlushDenormals flush;
        const size_t floats = 2 * (size_t)P * P + (size_t)every * FIELDS * P + (size_t)(every + 1) * ROWS * P;
        Scratch scratch(floats);
        memset(scratch.block, 0, floats * 4);
        float *D = scratch.take((size_t)P * P), *S0 = scratch.take((size_t)P * P), *states = scratch.take((size_t)(every + 1) * ROWS * P), *tokens = scratch.take((size_t)every * FIELDS * P);
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
                    float* x = tokens + (size_t)t * FIELDS * P;
                    copy(x + R * P, r + o, N), copy(x + K * P, k + o, N), copy(x + V * P, v + o, N), copy(x + A * P, a + o, N);
                    copy(x + B_ * P, b + o, N), copy(x + HELD * P, held + o, N), copy(x + DY * P, dy + o, N);
                    exp_row(x + DECAY * P, w + o, N);
                    memset(x + DR * P, 0, (size_t)(FIELDS - DR) * P * 4);
                }
                if (!reset) transpose(S0, P, kept + ((size_t)bh * blocks + first / every) * square, N, N);
                else for (int i = 0; i < N; i++) {
                    if (initial) memcpy(S0 + (size_t)i * P, initial + h * square + (size_t)i * N, N * 4);
                    else memset(S0 + (size_t)i * P, 0, N * 4);
                }
                for (int t = first - every < 0 ? 0 : first - every; t < first; t++)        // the stretch before this one comes next: ask for it early
                    for (const float* row : {r, w, k, v, a, b, held, dy, (const float*)dr, (const float*)dw, (const float*)dk, (const float*)dv, (const float*)da, (const float*)db})
                        ask_for(row + ((size_t)batch * T + t) * stride + (size_t)h * N, N);
                if (first) ask_for(kept + ((size_t)bh * blocks + (first - 1) / every) * square, (int)square);
                stretch_back(n, P, tokens, S0, states, D);
                for (int t = 0; t < n; t++) {
                    const size_t o = ((size_t)batch * T + first + t) * stride + (size_t)h * N;
                    const float* x = tokens + (size_t)t * FIELDS * P;
                    for (int j = 0; j < N; j++) dw[o + j] = x[DW * P + j] * x[DECAY * P + j];
                    copy(dr + o, x + DR * P, N), copy(dk + o, x + DK * P, N), copy(dv + o, x + DV * P, N), copy(da + o, x + DA * P, N), copy(db + o, x + DB * P, N);
                }
                if (reset) give_to(dinitial);
            }
            if (dstate) memset(dstate + bh * square, 0, square * 4);
            give_to(state ? dstate : dinitial);
        }
    }
}
