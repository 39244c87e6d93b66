// Rotary position embedding, rotate-half, in place: one block a position and some of its rows.

// grid (seq, splits), block (pairs, rows): x is [batch * seq, heads, head_dim]
template <class T>
__device__ void rope(T* x, u32 seq, u32 batch, u32 heads, u32 head_dim, double theta, float sign) {
    u32 half = head_dim / 2, position = blockIdx.x, all = batch * heads;
    for (u32 i = threadIdx.x; i < half; i += blockDim.x) {
        // As the reference computes it: frequency and angle in float.
        float frequency = (float)pow(theta, -(double)(2 * i) / (double)head_dim);
        double angle = (double)((float)position * frequency);
        float c = (float)cos(angle), s = sign * (float)sin(angle);
        for (u32 r = blockIdx.y * blockDim.y + threadIdx.y; r < all; r += gridDim.y * blockDim.y) {
            u64 at = (((u64)(r / heads) * seq + position) * heads + r % heads) * head_dim + i;
            float a = get(x[at]), b = get(x[at + half]);
            put(x[at], a * c - b * s);
            put(x[at + half], b * c + a * s);
        }
    }
}

#define KERNELS(T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                       \
        rope_##T(T* x, u32 seq, u32 batch, u32 heads, u32 head_dim, double theta, float sign) {             \
        rope(x, seq, batch, heads, head_dim, theta, sign);                                                  \
    }
KERNELS(float)
KERNELS(bf16)
