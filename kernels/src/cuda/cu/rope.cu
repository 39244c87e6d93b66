// Rotary position embedding, rotate-half, in place: one block a position and some of its rows.

// grid (seq, splits): x is [batch * seq, heads, head_dim]. Shared memory: cosines and sines of the position.
template <class T>
__device__ void rope(T* x, u32 seq, u32 batch, u32 heads, u32 head_dim, double log2_theta, float sign) {
    extern __shared__ float turns[];
    constexpr u32 N = Pack<T>::N;
    u32 half = head_dim / 2, position = blockIdx.x, rows = batch * heads;
    float *cosines = turns, *sines = turns + half;
    for (u32 i = threadIdx.x; i < half; i += blockDim.x) {
        // As the reference computes it: frequency and angle in float. Whole turns are taken off in double, and
        // what is left of one, at most half a turn, has a float's precision.
        float frequency = (float)exp2(-(double)(2 * i) / (double)head_dim * log2_theta);
        double angle = (double)((float)position * frequency) * 0.15915494309189533577;
        float c, s;
        sincospif(2.0f * (float)(angle - rint(angle)), &s, &c);
        cosines[i] = c;
        sines[i] = sign * s;
    }
    __syncthreads();
    bool packs = half % N == 0 && aligned(x);
    u32 across = packs ? half / N : half, stride = gridDim.y * blockDim.x;
    for (u32 at = blockIdx.y * blockDim.x + threadIdx.x; at < rows * across; at += stride) {
        u32 r = at / across, i = at % across;
        T* row = x + (((u64)(r / heads) * seq + position) * heads + r % heads) * head_dim;
        if (packs) {
            Pack<T>*first = (Pack<T>*)row + i, *second = (Pack<T>*)(row + half) + i;
            Pack<T> a = *first, b = *second, p, q;
#pragma unroll
            for (u32 k = 0; k < N; k++) {
                float c = cosines[i * N + k], s = sines[i * N + k];
                put(p.v[k], get(a.v[k]) * c - get(b.v[k]) * s);
                put(q.v[k], get(b.v[k]) * c + get(a.v[k]) * s);
            }
            *first = p;
            *second = q;
        } else {
            float a = get(row[i]), b = get(row[i + half]), c = cosines[i], s = sines[i];
            put(row[i], a * c - b * s);
            put(row[i + half], b * c + a * s);
        }
    }
}

#define KERNELS(T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                       \
        rope_##T(T* x, u32 seq, u32 batch, u32 heads, u32 head_dim, double log2_theta, float sign) {        \
        rope(x, seq, batch, heads, head_dim, log2_theta, sign);                                             \
    }
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
