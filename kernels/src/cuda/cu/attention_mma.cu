// The kernels of `attention_mma.cuh` in bf16.

#define KERNELS(D)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                      \
        attention_mma_##D(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, Dims n) {           \
        forward<bf16, D>(q, k, v, out, lse, n);                                                                   \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_mma_backward_q_##D(                        \
        const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* lse, const bf16* dout,         \
        float* delta, bf16* dq, Dims n) {                                                                         \
        backward_q<bf16, D>(q, k, v, out, lse, dout, delta, dq, n);                                               \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_mma_backward_kv_##D(                       \
        const bf16* q, const bf16* k, const bf16* v, const float* lse, const float* delta, const bf16* dout,      \
        bf16* dk, bf16* dv, Dims n) {                                                                             \
        backward_kv<bf16, D>(q, k, v, lse, delta, dout, dk, dv, n);                                               \
    }
KERNELS(32)
KERNELS(64)
KERNELS(96)
KERNELS(128)
