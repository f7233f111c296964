// The recurrence of RWKV-5 and RWKV-6 and its gradient on an NVIDIA GPU, in fp32 whatever the inputs are.
//     y = S r + (sum_j u_j k_j r_j) v,   S <- S diag(e^w) + v k^T          (S is [value][key]; w is the natural log of the decay)
#include "wkv.cuh"

struct Forward6 {
    int B, T, H, N, type;
    const void *r; const float *w; const void *k, *v; const float *u;
    const float *state, *initial; const uint8_t *resets;
    void *y; float *last, *kept;
};

// [forward] thread i owns row i of S in registers; it reads before it writes
template <int P> __global__ void __launch_bounds__(P) forward6(Forward6 x) {
    float* room = (float*)shared_memory;
    const int i = threadIdx.x, N = x.N;
    const size_t bh = blockIdx.x, batch = bh / x.H, h = bh % x.H, square = (size_t)N * N, blocks = (x.T + EVERY - 1) / EVERY;
    const float *fresh = x.initial ? x.initial + h * square : nullptr, u = i < N ? x.u[h * N + i] : 0.f;
    float S[P];
    fetch_row(S, beginning(x.state, x.initial, bh, h, square), i, N);
    for (int t = 0; t < x.T; t++) {
        const size_t at = ((batch * x.T + t) * x.H + h) * N + i;
        float *r = room + (t & 1) * 4 * P, *decay = r + P, *k = r + 2 * P, *ukr = r + 3 * P, v = 0;
        if (i < N) r[i] = get(x.r, at, x.type), decay[i] = expf(x.w[at]), k[i] = get(x.k, at, x.type), v = get(x.v, at, x.type);
        else r[i] = decay[i] = k[i] = 0;
        ukr[i] = u * k[i] * r[i];
        __syncthreads();
        if (x.resets && x.resets[batch * x.T + t]) fetch_row(S, fresh, i, N);
        if (x.kept && t % EVERY == 0 && i < N)
            UNROLL for (int j = 0; j < P; j++) if (j < N) x.kept[(bh * blocks + t / EVERY) * square + (size_t)j * N + i] = S[j];
        float bonus = 0;
        const float read = dot(S, r);
        UNROLL for (int j = 0; j < P; j += 4) {
            float fade[4], key[4], extra[4];
            four(fade, decay + j), four(key, k + j), four(extra, ukr + j);
            UNROLL for (int c = 0; c < 4; c++) S[j + c] = S[j + c] * fade[c] + v * key[c], bonus += extra[c];
        }
        if (i < N) put(x.y, at, x.type, read + bonus * v);
    }
    if (i < N) UNROLL for (int j = 0; j < P; j++) if (j < N) x.last[bh * square + (size_t)i * N + j] = S[j];
}
// [end]

struct Backward6 {
    int B, T, H, N, type;
    const void *r; const float *w; const void *k, *v; const float *u;
    const float *state, *initial; const uint8_t *resets;
    const float *kept; const void *dy; const float *dlast;
    void *dr; float *dw; void *dk, *dv; float *du, *dstate, *dinitial, *scratch;
};

// one token's six vectors into shared memory: r, e^w, k by the threads of rows, v, dy and u k r by those of columns
template <int P> __device__ inline float* stage6(const Backward6& x, float* room, int turn, size_t at, bool column, int lane, float u) {
    float *to = room + (turn & 1) * 6 * P, *mine = to + column * 3 * P + lane;
    const bool inside = lane < x.N;
    at += lane;
    mine[0] = inside ? get(column ? x.v : x.r, at, x.type) : 0.f;
    mine[P] = !inside ? 0.f : column ? get(x.dy, at, x.type) : expf(x.w[at]);
    mine[2 * P] = !inside ? 0.f : column ? u * get(x.k, at, x.type) * get(x.r, at, x.type) : get(x.k, at, x.type);
    return to;
}

// [backward] 2P threads: the first P own a row of D = dL/dS each, the others a column of the same D
template <int P> __global__ void __launch_bounds__(2 * P) backward6(Backward6 x) {
    float* room = (float*)shared_memory;
    const int N = x.N, lane = threadIdx.x % P;
    const bool column = threadIdx.x >= P, inside = lane < N;
    const size_t bh = blockIdx.x, batch = bh / x.H, h = bh % x.H, square = (size_t)N * N, blocks = (x.T + EVERY - 1) / EVERY;
    float *dstate = x.dstate ? x.dstate + bh * square : nullptr, *dinitial = x.dinitial ? x.dinitial + bh * square : nullptr, *states = x.scratch + bh * EVERY * square, D[P];
    const float u = inside ? x.u[h * N + lane] : 0.f;
    float du = 0;
    start_back(D, x.dlast ? x.dlast + bh * square : nullptr, dstate, dinitial, column, lane, N);
    for (int end = x.T, first; end > 0; end = first) {
        bool reset;
        first = stretch_first(end, x.resets, batch * x.T, reset);
        auto offset = [&](int t) { return ((batch * x.T + first + t) * x.H + h) * N; };
        __syncthreads();                                                 // no one reads the stretch before any more
        copy_start(states, x.kept + (bh * blocks + first / EVERY) * square, x.initial ? x.initial + h * square : nullptr, reset, N);
        for (int t = 0; t < end - first - 1; t++) {                      // forward again: the state before every token of the stretch
            const float* q = stage6<P>(x, room, t, offset(t), column, lane, u);
            __syncthreads();
            for (int i = column; inside && i < N; i += 2) {
                const size_t at = t * square + (size_t)i * N + lane;
                states[at + square] = states[at] * q[P + lane] + q[3 * P + i] * q[2 * P + lane];
            }
        }
        __syncthreads();
        for (int t = end - first - 1; t >= 0; t--) {
            const float* q = stage6<P>(x, room, t, offset(t), column, lane, u);
            const float *r = q, *decay = q + P, *k = q + 2 * P, *v = q + 3 * P, *dy = q + 4 * P, *ukr = q + 5 * P, *before = states + t * square + lane;
            const size_t at = offset(t) + lane;
            __syncthreads();
            if (column) {
                const float rj = r[lane], fade = decay[lane], kj = k[lane];
                float dr = 0, dw = 0, dk = 0, dbonus = 0;
                UNROLL for (int i = 0; i < P; i++) {
                    const float s = inside && i < N ? before[(size_t)i * N] : 0.f;
                    dbonus += dy[i] * v[i];
                    dr += dy[i] * s;
                    dk += v[i] * D[i];
                    dw += s * D[i];
                    D[i] = D[i] * fade + dy[i] * rj;
                }
                du += dbonus * kj * rj;
                if (inside) put(x.dr, at, x.type, dr + dbonus * u * kj), x.dw[at] = dw * fade, put(x.dk, at, x.type, dk + dbonus * u * rj);
            } else {
                const float dyi = dy[lane];
                float bonus = 0;
                const float dv = dot(D, k);
                UNROLL for (int j = 0; j < P; j++) bonus += ukr[j], D[j] = D[j] * decay[j] + dyi * r[j];
                if (inside) put(x.dv, at, x.type, dv + bonus * dyi);
            }
        }
        if (reset) give_to(dinitial, D, column, lane, N);
    }
    give_to(x.state ? dstate : dinitial, D, column, lane, N);
    if (column && inside) x.du[bh * N + lane] = du;
}
// [end]

// u (H, N). Null for what isn't there: state, initial, resets, kept (B, H, ceil(T / 16), N, N). 0, or a CUDA error.
extern "C" int wkv6_forward(int B, int T, int H, int N, int type, const void* r, const float* w, const void* k, const void* v, const float* u,
                            const float* state, const float* initial, const uint8_t* resets, void* y, float* last, float* kept, void* stream) {
    Forward6 x{B, T, H, N, type, r, w, k, v, u, state, initial, resets, y, last, kept};
    return LAUNCH(forward6, x, 1, 8, stream);
}

// du (B, H, N), dinitial and dstate (B, H, N, N): what each row adds; the last two may be null. scratch (B, H, 16, N, N).
extern "C" int wkv6_backward(int B, int T, int H, int N, int type, const void* r, const float* w, const void* k, const void* v, const float* u,
                             const float* state, const float* initial, const uint8_t* resets, const float* kept, const void* dy, const float* dlast,
                             void* dr, float* dw, void* dk, void* dv, float* du, float* dstate, float* dinitial, float* scratch, void* stream) {
    Backward6 x{B, T, H, N, type, r, w, k, v, u, state, initial, resets, kept, dy, dlast, dr, dw, dk, dv, du, dstate, dinitial, scratch};
    return LAUNCH(backward6, x, 2, 12, stream);
}
