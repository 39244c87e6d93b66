// AdamW with the bits of the CPU's: fused multiply-adds where they are written and nowhere else
// (compiled with --fmad=false), correctly rounded roots and quotients, no flush to zero.

struct Scalars {
    float grad_scale, keep, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, minus_rate, root_correction;
};

// (master, m, v) after the step; the parameter is the master, cast.
__device__ __forceinline__ void element(const Scalars& s, float grad, float& p, float& m, float& v) {
    float g = grad * s.grad_scale;
    m = __fmaf_rn(s.beta1, m, s.one_minus_beta1 * g);
    v = __fmaf_rn(s.beta2, v, (s.one_minus_beta2 * g) * g);
    float denominator = __fmaf_rn(__fsqrt_rn(v), s.root_correction, s.eps);
    p = __fmaf_rn(s.minus_rate, __fdiv_rn(m, denominator), p * s.keep);
}

// `unchanged` only casts the master into the parameter.
template <class G, class P>
__device__ void adamw(Scalars s, u32 unchanged, const G* grad, float* master, float* m, float* v, P* param, u64 n) {
    u64 stride = (u64)gridDim.x * blockDim.x, at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    bool packs = aligned(master) && aligned(m) && aligned(v) && ((u64)grad % (4 * sizeof(G))) == 0 &&
                 ((u64)param % (4 * sizeof(P))) == 0;
    struct alignas(4 * sizeof(G)) Grads { G v[4]; };
    struct alignas(4 * sizeof(P)) Params { P v[4]; };
    u64 full = packs ? n / 4 : 0;
    for (u64 i = at; i < full; i += stride) {
        Pack<float> p = ((Pack<float>*)master)[i];
        Params out;
        if (!unchanged) {
            Pack<float> mm = ((Pack<float>*)m)[i], vv = ((Pack<float>*)v)[i];
            Grads g = ((const Grads*)grad)[i];
#pragma unroll
            for (int k = 0; k < 4; k++) element(s, get(g.v[k]), p.v[k], mm.v[k], vv.v[k]);
            ((Pack<float>*)master)[i] = p;
            ((Pack<float>*)m)[i] = mm;
            ((Pack<float>*)v)[i] = vv;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) put(out.v[k], p.v[k]);
        ((Params*)param)[i] = out;
    }
    for (u64 i = 4 * full + at; i < n; i += stride) {
        if (!unchanged) element(s, get(grad[i]), master[i], m[i], v[i]);
        put(param[i], master[i]);
    }
}

#define KERNELS(G, P)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                        \
        adamw_##G##_##P(Scalars s, u32 unchanged, const G* grad, float* master, float* m, float* v, P* param, \
                        u64 n) {                                                                             \
        adamw(s, unchanged, grad, master, m, v, param, n);                                                   \
    }
KERNELS(float, float)
KERNELS(float, bf16)
KERNELS(bf16, bf16)
KERNELS(bf16, float)
KERNELS(float, f16)
KERNELS(f16, f16)
KERNELS(f16, float)

// The square sum of a gradient, with the bits of the CPU's: a block is a piece of 16 strands of 16 lanes each.
// Lane l of a strand sums elements l, l + 16, ... in order; then lanes in order, then strands.
constexpr u32 STRANDS = 16, LANES = 16;

template <class T> __device__ void square_sum(const T* values, u64 n, u64 strand, double* sums) {
    u32 lane = threadIdx.x % LANES;
    u64 first = ((u64)blockIdx.x * STRANDS + threadIdx.x / LANES) * strand;
    u64 last = first + strand < n ? first + strand : n;
    double sum = 0.0;
    u64 i = first + lane;
    // Loads in front, for the sum itself is one after the other.
    for (; i + 15 * LANES < last; i += 16 * LANES) {
        T x[16];
#pragma unroll
        for (u32 k = 0; k < 16; k++) x[k] = values[i + k * LANES];
#pragma unroll
        for (u32 k = 0; k < 16; k++) {
            double y = (double)get(x[k]);
            sum += y * y;
        }
    }
    for (; i < last; i += LANES) {
        double y = (double)get(values[i]);
        sum += y * y;
    }
    __shared__ double lanes[STRANDS * LANES], strands[STRANDS];
    lanes[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < STRANDS) {
        double total = 0.0;
        for (u32 k = 0; k < LANES; k++) total += lanes[threadIdx.x * LANES + k];
        strands[threadIdx.x] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (u32 k = 0; k < STRANDS; k++) total += strands[k];
        sums[blockIdx.x] = total;
    }
}
#define SUMS(T)                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                              \
        square_sum_##T(const T* x, u64 n, u64 strand, double* sums) {              \
        square_sum(x, n, strand, sums);                                            \
    }
SUMS(float)
SUMS(bf16)
SUMS(f16)
