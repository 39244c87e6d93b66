// The optimizers that the CPU has on its frame (kernels/src/cpu/optim), with its bits: states in whatever they are
// kept. Compiled with --fmad=false; AdamW on f32 states has a kernel of its own (adam.cu).

// A rule and its numbers, in the order in which the CPU declares them.
struct Optimizer {
    u32 rule;
    float a, b, c, d, e, f, g, h, i, j;
};
// The states of a run: of a split master `rest`, else `master`; moments that are not kept are null, and of the others
// those in bf16 are the ones that end so.
struct States {
    float* master;
    u16* rest;
    float* m;
    bf16* m_half;
    float* v;
    bf16* v_half;
};
constexpr u32 UNCHANGED = 0, ADAMW = 1, SGD = 2, LION = 3, ADAGRAD = 4;

__device__ __forceinline__ float moment(const float* x, const bf16* half, u64 i) {
    return x ? x[i] : half ? get(half[i]) : 0.0f;
}
// As it is stored, for who goes on with it.
__device__ __forceinline__ float keep(float* x, bf16* half, u64 i, float value) {
    if (x) x[i] = value;
    if (!half) return value;
    put(half[i], value);
    return get(half[i]);
}
// A split master is of bf16 parameters only.
__device__ __forceinline__ float joined(const bf16* param, u16 rest) {
    return __uint_as_float(((u32)param->bits << 16) + (u32)(int)(short)rest);
}
template <class P> __device__ __forceinline__ float joined(const P*, u16) { return 0.0f; }
template <class P> __device__ __forceinline__ float master_of(const States& s, const P* param, u64 i) {
    return s.rest ? joined(param + i, s.rest[i]) : s.master[i];
}
__device__ __forceinline__ void part(bf16* param, u16* rest, float p) {
    put(*param, p);
    *rest = (u16)(__float_as_uint(p) - ((u32)param->bits << 16));
}
template <class P> __device__ __forceinline__ void part(P*, u16*, float) {}
template <class P> __device__ __forceinline__ void set_master(const States& s, P* param, u64 i, float p) {
    if (s.rest) {
        part(param + i, s.rest + i, p);
        return;
    }
    s.master[i] = p;
    put(param[i], p);
}

// (master, moment, moment) after the step.
__device__ __forceinline__ void rule(const Optimizer& o, float grad, float& p, float& m, float& v) {
    if (o.rule == ADAMW) {
        float g = grad * o.a;
        m = __fmaf_rn(o.c, m, o.d * g);
        v = __fmaf_rn(o.e, v, (o.f * g) * g);
        float denominator = __fmaf_rn(__fsqrt_rn(v), o.i, o.g);
        p = __fmaf_rn(o.h, __fdiv_rn(m, denominator), p * o.b);
    } else if (o.rule == SGD) {
        float g = __fmaf_rn(o.b, p, grad * o.a);
        m = __fmaf_rn(o.c, m, g);
        p = __fmaf_rn(o.e, o.d == 0.0f ? m : __fmaf_rn(o.c, m, g), p);
    } else if (o.rule == LION) {
        float g = grad * o.a, blend = __fmaf_rn(o.c, m, o.d * g);
        float sign = blend < 0.0f ? -1.0f : blend > 0.0f ? 1.0f : 0.0f;
        p = __fmaf_rn(o.g, sign, p * o.b);
        m = __fmaf_rn(o.e, m, o.f * g);
    } else if (o.rule == ADAGRAD) {
        float g = __fmaf_rn(o.b, p, grad * o.a);
        m = __fmaf_rn(g, g, m);
        p = __fmaf_rn(o.d, __fdiv_rn(g, __fsqrt_rn(m) + o.c), p);
    }
}

template <class G, class P>
__device__ void update(const Optimizer& o, const G* grad, const States& s, P* param, u64 n) {
    u64 stride = (u64)gridDim.x * blockDim.x, at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (u64 i = at; i < n; i += stride) {
        float p = master_of(s, param, i);
        if (o.rule != UNCHANGED) {
            float m = moment(s.m, s.m_half, i), v = moment(s.v, s.v_half, i);
            rule(o, get(grad[i]), p, m, v);
            keep(s.m, s.m_half, i, m);
            keep(s.v, s.v_half, i, v);
        }
        set_master(s, param, i, p);
    }
}

// LAMB's direction, from the moments after the step.
__device__ __forceinline__ float direction(const Optimizer& o, float p, float m, float v) {
    float denominator = __fmaf_rn(__fsqrt_rn(v), o.i, o.g);
    return __fmaf_rn(o.b, p, __fdiv_rn(m * o.h, denominator));
}

// LAMB's first pass: the moments, and the squares of masters and directions, summed in the order of `square_sum`:
// those of all blocks for masters first, then for directions.
constexpr u32 STRANDS = 16, LANES = 16;
template <class G, class P>
__device__ void lamb_moments(const Optimizer& o, const G* grad, const States& s, const P* param, u64 n, u64 strand,
                             double* sums) {
    u64 first = ((u64)blockIdx.x * STRANDS + threadIdx.x / LANES) * strand;
    u64 last = first + strand < n ? first + strand : n;
    double of_p = 0.0, of_u = 0.0;
    for (u64 i = first + threadIdx.x % LANES; i < last; i += LANES) {
        float p = master_of(s, param, i), g = get(grad[i]) * o.a;
        float m = __fmaf_rn(o.c, moment(s.m, s.m_half, i), o.d * g);
        float v = __fmaf_rn(o.e, moment(s.v, s.v_half, i), (o.f * g) * g);
        m = keep(s.m, s.m_half, i, m), v = keep(s.v, s.v_half, i, v);
        double x = (double)p, u = (double)direction(o, p, m, v);
        of_p += x * x;
        of_u += u * u;
    }
    __shared__ double lanes[2][STRANDS * LANES], strands[2][STRANDS];
    lanes[0][threadIdx.x] = of_p, lanes[1][threadIdx.x] = of_u;
    __syncthreads();
    u32 which = threadIdx.x / STRANDS, at = threadIdx.x % STRANDS;
    if (which < 2) {
        double total = 0.0;
        for (u32 k = 0; k < LANES; k++) total += lanes[which][at * LANES + k];
        strands[which][at] = total;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        double total = 0.0;
        for (u32 k = 0; k < STRANDS; k++) total += strands[threadIdx.x][k];
        sums[threadIdx.x * gridDim.x + blockIdx.x] = total;
    }
}

// By what the direction is multiplied, in the place of the first sum. One block.
extern "C" __global__ void __launch_bounds__(256) lamb_factor(Optimizer o, double* sums, u32 pieces) {
    extern __shared__ double there[];
    for (u32 i = threadIdx.x; i < 2 * pieces; i += blockDim.x) there[i] = sums[i];
    __syncthreads();
    if (threadIdx.x != 0) return;
    double p = 0.0, u = 0.0;
    for (u32 i = 0; i < pieces; i++) p += there[i], u += there[pieces + i];
    p = __dsqrt_rn(p), u = __dsqrt_rn(u);
    double ratio = p > 0.0 && u > 0.0 ? __ddiv_rn(p, u) : 1.0;
    sums[0] = (double)(float)((double)o.j * ratio);
}

// LAMB's second pass.
template <class P>
__device__ void lamb_move(const Optimizer& o, const States& s, P* param, u64 n, const double* sums) {
    __shared__ float factor;
    if (threadIdx.x == 0) factor = (float)*(const volatile double*)sums;
    __syncthreads();
    u64 stride = (u64)gridDim.x * blockDim.x, at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (u64 i = at; i < n; i += stride) {
        float p = master_of(s, param, i);
        float u = direction(o, p, moment(s.m, s.m_half, i), moment(s.v, s.v_half, i));
        set_master(s, param, i, __fmaf_rn(factor, u, p));
    }
}

#define KERNELS(G, P)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                               \
        update_##G##_##P(Optimizer o, const G* grad, float* master, u16* rest, float* m, bf16* m_half, float* v,    \
                         bf16* v_half, P* param, u64 n) {                                                           \
        update(o, grad, States{master, rest, m, m_half, v, v_half}, param, n);                                      \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                               \
        lamb_moments_##G##_##P(Optimizer o, const G* grad, float* master, u16* rest, float* m, bf16* m_half,        \
                               float* v, bf16* v_half, const P* param, u64 n, u64 strand, double* sums) {           \
        lamb_moments(o, grad, States{master, rest, m, m_half, v, v_half}, param, n, strand, sums);                  \
    }
#define MOVES(P)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                               \
        lamb_move_##P(Optimizer o, float* master, u16* rest, float* m, bf16* m_half, float* v, bf16* v_half,        \
                      P* param, u64 n, const double* sums) {                                                        \
        lamb_move(o, States{master, rest, m, m_half, v, v_half}, param, n, sums);                                   \
    }
KERNELS(float, float)
KERNELS(float, bf16)
KERNELS(bf16, bf16)
KERNELS(bf16, float)
KERNELS(float, f16)
KERNELS(f16, f16)
KERNELS(f16, float)
MOVES(float)
MOVES(bf16)
MOVES(f16)
