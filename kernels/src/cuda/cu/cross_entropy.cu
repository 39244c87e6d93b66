// The loss of a tile of logits, and its gradient in place of them.

// One block a row. loss[row] = logsumexp - the target's logit, 0 where it does not count;
// dlogits (may be the logits themselves where T is float) = scale * (softmax - onehot).
template <class T>
__device__ void cross_entropy(const float* logits, const u32* targets, float* loss, T* dlogits, u32 vocabulary,
                              u64 pitch, u64 dpitch, float scale, u32 grads, u32* fault) {
    __shared__ float room[32];
    u64 row = blockIdx.x;
    const float* z = logits + row * pitch;
    u32 target = targets[row];
    bool counts = target != 0xffffffffu;
    if (counts && target >= vocabulary) {
        if (threadIdx.x == 0) *fault = 1 + (u32)row;
        counts = false;
    }
    if (!counts) {
        if (threadIdx.x == 0) loss[row] = 0.0f;
        if (grads)
            for (u32 c = threadIdx.x; c < vocabulary; c += blockDim.x) put(dlogits[row * dpitch + c], 0.0f);
        return;
    }
    // Largest and sum together, each thread its own, combined at the end; 4 elements at a time, two such at once.
    constexpr u32 WIDE = 8;
    u32 whole = aligned(z) && ((u64)(dlogits + row * dpitch) & (4 * sizeof(T) - 1)) == 0 ? vocabulary / WIDE : 0;
    float most = -INFINITY_F, sum = 0.0f;
    for (u32 i = threadIdx.x; i < whole; i += blockDim.x) {
        Pack<float> a = ((const Pack<float>*)z)[2 * i], b = ((const Pack<float>*)z)[2 * i + 1];
        float now = most;
#pragma unroll
        for (int k = 0; k < 4; k++) now = fmaxf(now, fmaxf(a.v[k], b.v[k]));
        if (now > most) {
            sum *= expf(most - now);
            most = now;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) sum += expf(a.v[k] - most) + expf(b.v[k] - most);
    }
    for (u32 c = WIDE * whole + threadIdx.x; c < vocabulary; c += blockDim.x) {
        float v = z[c];
        if (v > most) {
            sum = sum * expf(most - v) + 1.0f;
            most = v;
        } else {
            sum += expf(v - most);
        }
    }
    float top = block_max(most, room);
    sum = block_sum(most == -INFINITY_F ? 0.0f : sum * expf(most - top), room);
    float lse = top + logf(sum), logit = z[target];
    // All have read the target's logit before it may be written over.
    __syncthreads();
    if (threadIdx.x == 0) loss[row] = lse - logit;
    if (!grads) return;
    T* to = dlogits + row * dpitch;
    struct alignas(4 * sizeof(T)) Four { T v[4]; };
    for (u32 i = threadIdx.x; i < whole; i += blockDim.x) {
        Pack<float> a[2] = {((const Pack<float>*)z)[2 * i], ((const Pack<float>*)z)[2 * i + 1]};
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            Four out;
#pragma unroll
            for (u32 k = 0; k < 4; k++) {
                float p = expf(a[h].v[k] - lse);
                put(out.v[k], scale * (WIDE * i + 4 * h + k == target ? p - 1.0f : p));
            }
            ((Four*)to)[2 * i + h] = out;
        }
    }
    for (u32 c = WIDE * whole + threadIdx.x; c < vocabulary; c += blockDim.x) {
        float p = expf(z[c] - lse);
        put(to[c], scale * (c == target ? p - 1.0f : p));
    }
}

#define KERNELS(T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(1024)                                                         \
        cross_entropy_##T(const float* logits, const u32* targets, float* loss, T* dlogits, u32 vocabulary,    \
                          u64 pitch, u64 dpitch, float scale, u32 grads, u32* fault) {                         \
        cross_entropy(logits, targets, loss, dlogits, vocabulary, pitch, dpitch, scale, grads, fault);         \
    }
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)

// out = scale * the sum of all values, in a fixed order: one block.
extern "C" __global__ void __launch_bounds__(1024) scaled_sum(const float* values, float* out, u32 n, float scale) {
    __shared__ float room[32];
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) sum += values[i];
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) *out = scale * sum;
}
