// The RWKV-7 recurrence and its gradient on an NVIDIA GPU, in fp32 whatever the inputs are.
//     S <- S diag(e^w) + (S a) b^T + v k^T,   y = S r          (S is [value][key]; w is the natural log of the decay)
#include "wkv.cuh"

struct Forward7 {
    int B, T, H, N, type;
    const void *r; const float *w; const void *k, *v, *a, *b;
    const float *state, *initial; const uint8_t *resets;
    void *y; float *last, *held, *kept;
};

// [forward] thread i owns row i of S in registers; r, e^w, k, a, b of one token pass through shared memory, two tokens' room in turns
template <int P> __global__ void __launch_bounds__(P) forward7(Forward7 x) {
    float* room = (float*)shared_memory;
    const int i = threadIdx.x, N = x.N;
    const size_t bh = blockIdx.x, batch = bh / x.H, h = bh % x.H, square = (size_t)N * N, blocks = (x.T + EVERY - 1) / EVERY;
    const float* fresh = x.initial ? x.initial + h * square : nullptr;
    float S[P];
    fetch_row(S, beginning(x.state, x.initial, bh, h, square), i, N);
    for (int t = 0; t < x.T; t++) {
        const size_t at = ((batch * x.T + t) * x.H + h) * N + i;
        float *r = room + (t & 1) * 5 * P, *decay = r + P, *k = r + 2 * P, *a = r + 3 * P, *b = r + 4 * P, v = 0;
        if (i < N) r[i] = get(x.r, at, x.type), decay[i] = expf(x.w[at]), k[i] = get(x.k, at, x.type), a[i] = get(x.a, at, x.type), b[i] = get(x.b, at, x.type), v = get(x.v, at, x.type);
        else r[i] = decay[i] = k[i] = a[i] = b[i] = 0;
        __syncthreads();
        if (x.resets && x.resets[batch * x.T + t]) fetch_row(S, fresh, i, N);
        if (x.kept && t % EVERY == 0 && i < N)
            UNROLL for (int j = 0; j < P; j++) if (j < N) x.kept[(bh * blocks + t / EVERY) * square + (size_t)j * N + i] = S[j];
        const float held = dot(S, a);
        UNROLL for (int j = 0; j < P; j += 4) {
            float fade[4], edit[4], key[4];
            four(fade, decay + j), four(edit, b + j), four(key, k + j);
            UNROLL for (int c = 0; c < 4; c++) S[j + c] = S[j + c] * fade[c] + held * edit[c] + v * key[c];
        }
        const float y = dot(S, r);
        if (i < N) put(x.y, at, x.type, y);
        if (i < N && x.held) x.held[at] = held;
    }
    if (i < N) UNROLL for (int j = 0; j < P; j++) if (j < N) x.last[bh * square + (size_t)i * N + j] = S[j];
}
// [end]

struct Backward7 {
    int B, T, H, N, type;
    const void *r; const float *w; const void *k, *v, *a, *b;
    const float *state, *initial; const uint8_t *resets;
    const float *held, *kept; const void *dy; const float *dlast;
    void *dr; float *dw; void *dk, *dv, *da, *db; float *dstate, *dinitial, *scratch;
};

// one token's eight vectors into shared memory: r, e^w, k, v by the threads of rows, a, b, held, dy by those of columns
template <int P> __device__ inline float* stage7(const Backward7& x, float* room, int turn, size_t at, bool column, int lane) {
    float *to = room + (turn & 1) * 8 * P, *mine = to + column * 4 * P + lane;
    const bool inside = lane < x.N;
    at += lane;
    mine[0] = inside ? get(column ? x.a : x.r, at, x.type) : 0.f;
    mine[P] = !inside ? 0.f : column ? get(x.b, at, x.type) : expf(x.w[at]);
    mine[2 * P] = !inside ? 0.f : column ? x.held[at] : get(x.k, at, x.type);
    mine[3 * P] = inside ? get(column ? x.dy : x.v, at, x.type) : 0.f;
    return to;
}

// [backward] 2P threads: the first P own a row of D = dL/dS each, the others a column of the same D, so that every sum, along rows or columns, stays inside one thread
template <int P> __global__ void __launch_bounds__(2 * P) backward7(Backward7 x) {
    float *room = (float*)shared_memory, *dheld = room + 16 * P;
    const int N = x.N, lane = threadIdx.x % P;
    const bool column = threadIdx.x >= P, inside = lane < N;
    const size_t bh = blockIdx.x, batch = bh / x.H, h = bh % x.H, square = (size_t)N * N, blocks = (x.T + EVERY - 1) / EVERY;
    float *dstate = x.dstate ? x.dstate + bh * square : nullptr, *dinitial = x.dinitial ? x.dinitial + bh * square : nullptr, *states = x.scratch + bh * EVERY * square, D[P];
    start_back(D, x.dlast ? x.dlast + bh * square : nullptr, dstate, dinitial, column, lane, N);
    for (int end = x.T, first; end > 0; end = first) {
        bool reset;
        first = stretch_first(end, x.resets, batch * x.T, reset);
        auto offset = [&](int t) { return ((batch * x.T + first + t) * x.H + h) * N; };
        __syncthreads();                                                 // no one reads the stretch before any more
        copy_start(states, x.kept + (bh * blocks + first / EVERY) * square, x.initial ? x.initial + h * square : nullptr, reset, N);
        for (int t = 0; t < end - first - 1; t++) {                      // forward again: the state before every token of the stretch
            const float* q = stage7<P>(x, room, t, offset(t), column, lane);
            __syncthreads();
            for (int i = column; inside && i < N; i += 2) {
                const size_t at = t * square + (size_t)i * N + lane;
                states[at + square] = states[at] * q[P + lane] + q[6 * P + i] * q[5 * P + lane] + q[3 * P + i] * q[2 * P + lane];
            }
        }
        __syncthreads();
        for (int t = end - first - 1; t >= 0; t--) {
            const float* q = stage7<P>(x, room, t, offset(t), column, lane);
            const float *r = q, *decay = q + P, *k = q + 2 * P, *v = q + 3 * P, *a = q + 4 * P, *b = q + 5 * P, *held = q + 6 * P, *dy = q + 7 * P, *before = states + t * square + lane;
            const size_t at = offset(t) + lane;
            __syncthreads();
            if (column) {
                const float rj = r[lane], fade = decay[lane], kj = k[lane], bj = b[lane];
                float dr = 0, dw = 0, dk = 0, db = 0;
                UNROLL for (int i = 0; i < P; i++) {
                    const float s = inside && i < N ? before[(size_t)i * N] : 0.f;
                    D[i] += dy[i] * rj;
                    dr += dy[i] * (s * fade + held[i] * bj + v[i] * kj);
                    dk += v[i] * D[i];
                    db += held[i] * D[i];
                    dw += s * D[i];
                }
                if (inside) put(x.dr, at, x.type, dr), x.dw[at] = dw * fade, put(x.dk, at, x.type, dk), put(x.db, at, x.type, db);
            } else {
                const float dyi = dy[lane];
                UNROLL for (int j = 0; j < P; j++) D[j] += dyi * r[j];
                dheld[lane] = dot(D, b);
                const float dv = dot(D, k);
                if (inside) put(x.dv, at, x.type, dv);
            }
            __syncthreads();                                             // columns wait for dL/d(S a) of every row
            if (column) {
                const float fade = decay[lane], aj = a[lane];
                float da = 0;
                UNROLL for (int i = 0; i < P; i++) {
                    da += dheld[i] * (inside && i < N ? before[(size_t)i * N] : 0.f);
                    D[i] = D[i] * fade + dheld[i] * aj;
                }
                if (inside) put(x.da, at, x.type, da);
            } else {
                const float back = dheld[lane];
                UNROLL for (int j = 0; j < P; j++) D[j] = D[j] * decay[j] + back * a[j];
            }
        }
        if (reset) give_to(dinitial, D, column, lane, N);
    }
    give_to(x.state ? dstate : dinitial, D, column, lane, N);
}
// [end]

// Null for what isn't there: state, initial, resets; held (B, T, H, N) and kept (B, H, ceil(T / 16), N, N) both or neither. 0, or a CUDA error.
extern "C" int wkv7_forward(int B, int T, int H, int N, int type, const void* r, const float* w, const void* k, const void* v, const void* a, const void* b,
                            const float* state, const float* initial, const uint8_t* resets, void* y, float* last, float* held, float* kept, void* stream) {
    Forward7 x{B, T, H, N, type, r, w, k, v, a, b, state, initial, resets, y, last, held, kept};
    return LAUNCH(forward7, x, 1, 10, stream);
}

// dstate and dinitial, both (B, H, N, N) or null; dinitial is what each row adds to initial's gradient. scratch (B, H, 16, N, N).
extern "C" int wkv7_backward(int B, int T, int H, int N, int type, const void* r, const float* w, const void* k, const void* v, const void* a, const void* b,
                             const float* state, const float* initial, const uint8_t* resets, const float* held, const float* kept, const void* dy, const float* dlast,
                             void* dr, float* dw, void* dk, void* dv, void* da, void* db, float* dstate, float* dinitial, float* scratch, void* stream) {
    Backward7 x{B, T, H, N, type, r, w, k, v, a, b, state, initial, resets, held, kept, dy, dlast, dr, dw, dk, dv, da, db, dstate, dinitial, scratch};
    return LAUNCH(backward7, x, 2, 17, stream);
}

extern "C" const char* wkv_error(int code) { return cudaGetErrorString((cudaError_t)code); }
