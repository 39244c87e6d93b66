// Causal attention with grouped heads, in tiles (FlashAttention, arXiv 2205.14135 and 2307.08691): scores
// are never held whole. These kernels compute in float on the plain cores, for any type and any head of
// up to 256 elements that is a multiple of 8; `attention_mma.cu` holds those for tensor cores.
//
// q, out, dout, dq: [batch * seq, heads, d]; k, v, dk, dv: [batch * seq, kv_heads, d]; lse and delta:
// [batch, heads, seq]. Everything is summed in a fixed order.

constexpr int ROWS = 32;     // rows of a tile
constexpr int THREADS = 256; // 8 of them a row

// A tile of rows [first, first + ROWS) of one head into shared memory, `pad` floats apart; zeros beyond `seq`.
template <class T>
__device__ __forceinline__ void load(const T* from, float* to, u32 first, u32 seq, u64 pitch, u32 d, u32 pad) {
    for (u32 i = threadIdx.x; i < ROWS * d; i += THREADS) {
        u32 row = i / d, c = i % d;
        to[row * pad + c] = first + row < seq ? get(from[(first + row) * pitch + c]) : 0.0f;
    }
}

// s[r][c] = a[r] . b[c] over d, each thread 4 entries.
__device__ __forceinline__ void products(const float* a, const float* b, float* s, u32 d, u32 pad) {
    u32 r = threadIdx.x / 8, c = threadIdx.x % 8;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (u32 i = 0; i < d; i++) {
        float x = a[r * pad + i];
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += x * b[(c + 8 * k) * pad + i];
    }
#pragma unroll
    for (int k = 0; k < 4; k++) s[r * (ROWS + 1) + c + 8 * k] = sum[k];
}

struct Dims {
    u32 batch, seq, heads, kv_heads, d;
};

// grid (tiles of q, heads, batch)
template <class T>
__device__ void forward(const T* q, const T* k, const T* v, T* out, float* lse, Dims n) {
    extern __shared__ float memory[];
    u32 pad = n.d + 1;
    float *sq = memory, *sk = sq + ROWS * pad, *sv = sk + ROWS * pad, *s = sv + ROWS * pad;
    u32 tile = blockIdx.x, head = blockIdx.y, kv = head / (n.heads / n.kv_heads);
    u64 qp = (u64)n.heads * n.d, kp = (u64)n.kv_heads * n.d;
    const T* qh = q + (u64)blockIdx.z * n.seq * qp + (u64)head * n.d;
    const T* kh = k + (u64)blockIdx.z * n.seq * kp + (u64)kv * n.d;
    const T* vh = v + (u64)blockIdx.z * n.seq * kp + (u64)kv * n.d;
    u32 first = tile * ROWS, r = threadIdx.x / 8, lane = threadIdx.x % 8;
    float scale = 1.0f / sqrtf((float)n.d), most = -INFINITY_F, sum = 0.0f, acc[32];
#pragma unroll
    for (int j = 0; j < 32; j++) acc[j] = 0.0f;
    load(qh, sq, first, n.seq, qp, n.d, pad);
    for (u32 key = 0; key <= first && key < n.seq; key += ROWS) {
        __syncthreads();
        load(kh, sk, key, n.seq, kp, n.d, pad);
        load(vh, sv, key, n.seq, kp, n.d, pad);
        __syncthreads();
        products(sq, sk, s, n.d, pad);
        __syncwarp();
        // The 8 threads of a row share its softmax.
        float tile_most = -INFINITY_F;
        for (u32 c = lane; c < ROWS; c += 8) {
            bool seen = key + c <= first + r && key + c < n.seq;
            float x = seen ? s[r * (ROWS + 1) + c] * scale : -INFINITY_F;
            s[r * (ROWS + 1) + c] = x;
            tile_most = fmaxf(tile_most, x);
        }
#pragma unroll
        for (int step = 4; step > 0; step /= 2)
            tile_most = fmaxf(tile_most, __shfl_xor_sync(0xffffffffu, tile_most, step));
        float now = fmaxf(most, tile_most);
        float keep = most == -INFINITY_F ? 0.0f : expf(most - now), part = 0.0f;
        for (u32 c = lane; c < ROWS; c += 8) {
            float x = s[r * (ROWS + 1) + c];
            float p = x == -INFINITY_F ? 0.0f : expf(x - now);
            s[r * (ROWS + 1) + c] = p;
            part += p;
        }
#pragma unroll
        for (int step = 4; step > 0; step /= 2) part += __shfl_xor_sync(0xffffffffu, part, step);
        sum = sum * keep + part;
        most = now;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 32; j++) {
            u32 c = lane + 8 * j;
            if (c < n.d) {
                float a = acc[j] * keep;
#pragma unroll 4
                for (u32 x = 0; x < ROWS; x++) a += s[r * (ROWS + 1) + x] * sv[x * pad + c];
                acc[j] = a;
            }
        }
    }
    if (first + r >= n.seq) return;
    T* oh = out + ((u64)blockIdx.z * n.seq + first + r) * qp + (u64)head * n.d;
#pragma unroll
    for (int j = 0; j < 32; j++)
        if (lane + 8 * j < n.d) put(oh[lane + 8 * j], acc[j] / sum);
    if (lane == 0) lse[((u64)blockIdx.z * n.heads + head) * n.seq + first + r] = most + logf(sum);
}

// delta[b, h, t] = out . dout; a warp a row
template <class T> __device__ void delta(const T* out, const T* dout, float* to, Dims n) {
    u64 row = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= (u64)n.batch * n.seq * n.heads) return;
    float sum = 0.0f;
    for (u32 c = lane; c < n.d; c += 32) sum += get(out[row * n.d + c]) * get(dout[row * n.d + c]);
    sum = warp_sum(sum);
    u64 head = row % n.heads, token = row / n.heads;
    if (lane == 0) to[((token / n.seq) * n.heads + head) * n.seq + token % n.seq] = sum;
}

// p = exp(q.k scale - lse), ds = p (dout.v - delta) scale, of the tile of queries `first` and keys `key`; in s and t.
__device__ __forceinline__ void scores(float* s, float* t, const float* lse, const float* delta, u32 first, u32 key,
                                       float scale, u32 seq) {
    u32 r = threadIdx.x / 8, lane = threadIdx.x % 8;
    bool row = first + r < seq;
    float l = row ? lse[first + r] : 0.0f, dl = row ? delta[first + r] : 0.0f;
    for (u32 c = lane; c < ROWS; c += 8) {
        bool seen = row && key + c <= first + r && key + c < seq;
        u32 at = r * (ROWS + 1) + c;
        float p = seen ? expf(s[at] * scale - l) : 0.0f;
        s[at] = p;
        t[at] = p * (t[at] - dl) * scale;
    }
}

// grid (tiles of q, heads, batch): dq
template <class T>
__device__ void backward_q(const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* dout,
                           T* dq, Dims n) {
    extern __shared__ float memory[];
    u32 pad = n.d + 1;
    float *sq = memory, *sk = sq + ROWS * pad, *sv = sk + ROWS * pad, *so = sv + ROWS * pad, *s = so + ROWS * pad,
          *t = s + ROWS * (ROWS + 1);
    u32 head = blockIdx.y, kv = head / (n.heads / n.kv_heads), first = blockIdx.x * ROWS;
    u64 qp = (u64)n.heads * n.d, kp = (u64)n.kv_heads * n.d, base = (u64)blockIdx.z * n.seq;
    u64 rows = ((u64)blockIdx.z * n.heads + head) * n.seq;
    u32 r = threadIdx.x / 8, lane = threadIdx.x % 8;
    float scale = 1.0f / sqrtf((float)n.d), acc[32];
#pragma unroll
    for (int j = 0; j < 32; j++) acc[j] = 0.0f;
    load(q + base * qp + head * n.d, sq, first, n.seq, qp, n.d, pad);
    load(dout + base * qp + head * n.d, so, first, n.seq, qp, n.d, pad);
    for (u32 key = 0; key <= first && key < n.seq; key += ROWS) {
        __syncthreads();
        load(k + base * kp + kv * n.d, sk, key, n.seq, kp, n.d, pad);
        load(v + base * kp + kv * n.d, sv, key, n.seq, kp, n.d, pad);
        __syncthreads();
        products(sq, sk, s, n.d, pad);
        products(so, sv, t, n.d, pad);
        __syncwarp();
        scores(s, t, lse + rows, delta + rows, first, key, scale, n.seq);
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 32; j++) {
            u32 c = lane + 8 * j;
            if (c < n.d) {
                float a = acc[j];
#pragma unroll 4
                for (u32 x = 0; x < ROWS; x++) a += t[r * (ROWS + 1) + x] * sk[x * pad + c];
                acc[j] = a;
            }
        }
    }
    if (first + r >= n.seq) return;
    T* to = dq + (base + first + r) * qp + head * n.d;
#pragma unroll
    for (int j = 0; j < 32; j++)
        if (lane + 8 * j < n.d) put(to[lane + 8 * j], acc[j]);
}

// grid (tiles of k, kv_heads, batch): dk and dv, over the heads of the group in turn
template <class T>
__device__ void backward_kv(const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* dout,
                            T* dk, T* dv, Dims n) {
    extern __shared__ float memory[];
    u32 pad = n.d + 1, group = n.heads / n.kv_heads;
    float *sq = memory, *sk = sq + ROWS * pad, *sv = sk + ROWS * pad, *so = sv + ROWS * pad, *s = so + ROWS * pad,
          *t = s + ROWS * (ROWS + 1);
    u32 kv = blockIdx.y, key = blockIdx.x * ROWS;
    u64 qp = (u64)n.heads * n.d, kp = (u64)n.kv_heads * n.d, base = (u64)blockIdx.z * n.seq;
    u32 r = threadIdx.x / 8, lane = threadIdx.x % 8;
    float scale = 1.0f / sqrtf((float)n.d), ak[32], av[32];
#pragma unroll
    for (int j = 0; j < 32; j++) ak[j] = av[j] = 0.0f;
    load(k + base * kp + kv * n.d, sk, key, n.seq, kp, n.d, pad);
    load(v + base * kp + kv * n.d, sv, key, n.seq, kp, n.d, pad);
    for (u32 head = kv * group; head < (kv + 1) * group; head++) {
        u64 rows = ((u64)blockIdx.z * n.heads + head) * n.seq;
        for (u32 first = key; first < n.seq; first += ROWS) {
            __syncthreads();
            load(q + base * qp + head * n.d, sq, first, n.seq, qp, n.d, pad);
            load(dout + base * qp + head * n.d, so, first, n.seq, qp, n.d, pad);
            __syncthreads();
            products(sq, sk, s, n.d, pad);
            products(so, sv, t, n.d, pad);
            __syncwarp();
            scores(s, t, lse + rows, delta + rows, first, key, scale, n.seq);
            __syncthreads();
            // Row r is a key now.
#pragma unroll
            for (int j = 0; j < 32; j++) {
                u32 c = lane + 8 * j;
                if (c < n.d) {
                    float a = ak[j], b = av[j];
#pragma unroll 4
                    for (u32 x = 0; x < ROWS; x++) {
                        a += t[x * (ROWS + 1) + r] * sq[x * pad + c];
                        b += s[x * (ROWS + 1) + r] * so[x * pad + c];
                    }
                    ak[j] = a, av[j] = b;
                }
            }
        }
    }
    if (key + r >= n.seq) return;
    u64 to = (base + key + r) * kp + kv * n.d;
#pragma unroll
    for (int j = 0; j < 32; j++)
        if (lane + 8 * j < n.d) put(dk[to + lane + 8 * j], ak[j]), put(dv[to + lane + 8 * j], av[j]);
}

#define KERNELS(T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        attention_##T(const T* q, const T* k, const T* v, T* out, float* lse, Dims n) {                         \
        forward(q, k, v, out, lse, n);                                                                          \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                           \
        attention_delta_##T(const T* out, const T* dout, float* to, Dims n) {                                   \
        delta(out, dout, to, n);                                                                                \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        attention_backward_q_##T(const T* q, const T* k, const T* v, const float* lse, const float* delta,      \
                                 const T* dout, T* dq, Dims n) {                                                \
        backward_q(q, k, v, lse, delta, dout, dq, n);                                                           \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        attention_backward_kv_##T(const T* q, const T* k, const T* v, const float* lse, const float* delta,     \
                                  const T* dout, T* dk, T* dv, Dims n) {                                        \
        backward_kv(q, k, v, lse, delta, dout, dk, dv, n);                                                      \
    }
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
