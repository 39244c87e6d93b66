// The kernels of `attention_mma.cuh` in f16.

#define KERNELS(D)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                      \
        attention_mma_f16_##D(const f16* q, const f16* k, const f16* v, f16* out, float* lse, Dims n) {           \
        forward<f16, D>(q, k, v, out, lse, n);                                                                    \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_mma_backward_q_f16_##D(                    \
        const f16* q, const f16* k, const f16* v, const f16* out, const float* lse, const f16* dout,              \
        float* delta, f16* dq, Dims n) {                                                                          \
        backward_q<f16, D>(q, k, v, out, lse, dout, delta, dq, n);                                                \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_mma_backward_kv_f16_##D(                   \
        const f16* q, const f16* k, const f16* v, const float* lse, const float* delta, const f16* dout,          \
        f16* dk, f16* dv, Dims n) {                                                                               \
        backward_kv<f16, D>(q, k, v, lse, delta, dout, dk, dv, n);                                                \
    }
KERNELS(32)
KERNELS(64)
KERNELS(96)
KERNELS(128)
