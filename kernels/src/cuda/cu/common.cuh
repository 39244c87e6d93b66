// What every kernel uses. Compiled by NVRTC with no header of CUDA's: nothing but the language.
//
// T is the type of activations and parameters, float, bf16 or f16; sums are float. Lengths come in
// 64 bits. A kernel that meets bad input sets `fault` (a word of host memory) and goes on without
// touching what it must not.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define INFINITY_F __int_as_float(0x7f800000)

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

__device__ __forceinline__ float get(float x) { return x; }
__device__ __forceinline__ float get(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float get(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// The one rounding rule of each type. bf16: halves away from zero in magnitude, NaN stays quiet. f16: nearest even,
// subnormals kept, too large infinite, NaN quiet with the upper bits of what it carried.
__device__ __forceinline__ void put(float& to, float x) { to = x; }
__device__ __forceinline__ void put(bf16& to, float x) {
    u32 bits = __float_as_uint(x);
    u32 rounded = (bits + 0x8000u) >> 16;
    to.bits = (u16)(x != x ? (bits >> 16) | 0x40u : rounded);
}
__device__ __forceinline__ void put(f16& to, float x) {
    u32 bits = __float_as_uint(x);
    u16 rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    to.bits = x != x ? (u16)((bits >> 16 & 0x8000u) | 0x7e00u | (bits >> 13 & 0x3ffu)) : rounded;
}

// 16 bytes at once, where the address allows it.
template <class T> struct alignas(16) Pack {
    static constexpr int N = 16 / sizeof(T);
    T v[N];
};
template <class T> __device__ __forceinline__ bool aligned(const T* p) { return ((u64)p & 15) == 0; }

// Walks i over [0, n) in packs with a grid of any size, and over the tail one by one.
template <class T, class Whole, class One>
__device__ __forceinline__ void each(u64 n, bool packs, Whole whole, One one) {
    u64 stride = (u64)gridDim.x * blockDim.x, at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u64 full = packs ? n / Pack<T>::N : 0;
    for (u64 i = at; i < full; i += stride) whole(i);
    for (u64 i = full * Pack<T>::N + at; i < n; i += stride) one(i);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

// The sum over a block, to all of its threads; `room` holds 32 floats. In a fixed order.
__device__ __forceinline__ float block_sum(float x, float* room) {
    x = warp_sum(x);
    int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[warp] = x;
    __syncthreads();
    return warp_sum((threadIdx.x % 32) < warps ? room[threadIdx.x % 32] : 0.0f);
}
__device__ __forceinline__ float block_max(float x, float* room) {
    x = warp_max(x);
    int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[warp] = x;
    __syncthreads();
    return warp_max((threadIdx.x % 32) < warps ? room[threadIdx.x % 32] : -INFINITY_F);
}
