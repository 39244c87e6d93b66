// Sums, casts and gated activations, 16 bytes a thread at a time.

template <class T> __device__ void add(const T* a, const T* b, T* out, u64 n) {
    const Pack<T>* pa = (const Pack<T>*)a;
    const Pack<T>* pb = (const Pack<T>*)b;
    Pack<T>* po = (Pack<T>*)out;
    each<T>(
        n, aligned(a) && aligned(b) && aligned(out),
        [&](u64 i) {
            Pack<T> x = pa[i], y = pb[i], z;
#pragma unroll
            for (int k = 0; k < Pack<T>::N; k++) put(z.v[k], get(x.v[k]) + get(y.v[k]));
            po[i] = z;
        },
        [&](u64 i) { put(out[i], get(a[i]) + get(b[i])); });
}

// act = silu(gate) * up. For bf16 and f16 by the fast exponential and quotient: their error (about 1e-6) is far
// below the rounding, and the full ones would cost more than the memory does.
template <class T> __device__ __forceinline__ float sigmoid(float x) {
    if (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
    return 1.0f / (1.0f + expf(-x));
}

template <class T> __device__ void swiglu(const T* gate, const T* up, T* out, u64 n) {
    const Pack<T>* pg = (const Pack<T>*)gate;
    const Pack<T>* pu = (const Pack<T>*)up;
    Pack<T>* po = (Pack<T>*)out;
    auto f = [](float g, float u) { return g * sigmoid<T>(g) * u; };
    each<T>(
        n, aligned(gate) && aligned(up) && aligned(out),
        [&](u64 i) {
            Pack<T> g = pg[i], u = pu[i], z;
#pragma unroll
            for (int k = 0; k < Pack<T>::N; k++) put(z.v[k], f(get(g.v[k]), get(u.v[k])));
            po[i] = z;
        },
        [&](u64 i) { put(out[i], f(get(gate[i]), get(up[i]))); });
}

template <class T>
__device__ void swiglu_backward(const T* gate, const T* up, const T* dout, T* dgate, T* dup, u64 n) {
    auto f = [](float g, float u, float d, T& dg, T& du) {
        float s = sigmoid<T>(g), silu = g * s;
        put(dg, d * u * (s + silu * (1.0f - s)));
        put(du, d * silu);
    };
    bool packs = aligned(gate) && aligned(up) && aligned(dout) && aligned(dgate) && aligned(dup);
    each<T>(
        n, packs,
        [&](u64 i) {
            Pack<T> g = ((const Pack<T>*)gate)[i], u = ((const Pack<T>*)up)[i];
            Pack<T> d = ((const Pack<T>*)dout)[i], dg, du;
#pragma unroll
            for (int k = 0; k < Pack<T>::N; k++)
                f(get(g.v[k]), get(u.v[k]), get(d.v[k]), dg.v[k], du.v[k]);
            ((Pack<T>*)dgate)[i] = dg;
            ((Pack<T>*)dup)[i] = du;
        },
        [&](u64 i) { f(get(gate[i]), get(up[i]), get(dout[i]), dgate[i], dup[i]); });
}

#define KERNELS(T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) add_##T(const T* a, const T* b, T* out, u64 n) { \
        add(a, b, out, n);                                                                             \
    }                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                  \
        swiglu_##T(const T* gate, const T* up, T* out, u64 n) {                                        \
        swiglu(gate, up, out, n);                                                                      \
    }                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) swiglu_backward_##T(                             \
        const T* gate, const T* up, const T* dout, T* dgate, T* dup, u64 n) {                          \
        swiglu_backward(gate, up, dout, dgate, dup, n);                                                \
    }
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)

// 8 elements a thread at a time.
template <class From, class To> __device__ void cast(const From* from, To* to, u64 n) {
    struct alignas(16) In { From v[8]; };
    struct alignas(16) Out { To v[8]; };
    u64 stride = (u64)gridDim.x * blockDim.x, at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u64 full = aligned(from) && aligned(to) ? n / 8 : 0;
    for (u64 i = at; i < full; i += stride) {
        In x = ((const In*)from)[i];
        Out y;
#pragma unroll
        for (int k = 0; k < 8; k++) put(y.v[k], get(x.v[k]));
        ((Out*)to)[i] = y;
    }
    for (u64 i = 8 * full + at; i < n; i += stride) put(to[i], get(from[i]));
}
extern "C" __global__ void __launch_bounds__(256) cast_to_bf16(const float* from, bf16* to, u64 n) {
    cast(from, to, n);
}
extern "C" __global__ void __launch_bounds__(256) cast_to_float(const bf16* from, float* to, u64 n) {
    cast(from, to, n);
}
extern "C" __global__ void __launch_bounds__(256) cast_to_f16(const float* from, f16* to, u64 n) {
    cast(from, to, n);
}
extern "C" __global__ void __launch_bounds__(256) cast_f16_to_float(const f16* from, float* to, u64 n) {
    cast(from, to, n);
}
