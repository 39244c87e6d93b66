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
    // Largest and sum together, each thread its own, combined at the end.
    float most = -INFINITY_F, sum = 0.0f;
    for (u32 c = threadIdx.x; c < vocabulary; c += blockDim.x) {
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
    for (u32 c = threadIdx.x; c < vocabulary; c += blockDim.x) {
        float p = expf(z[c] - lse);
        put(dlogits[row * dpitch + c], scale * (c == target ? p - 1.0f : p));
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

// out = scale * the sum of all values, in a fixed order: one block.
extern "C" __global__ void __launch_bounds__(1024) scaled_sum(const float* values, float* out, u32 n, float scale) {
    __shared__ float room[32];
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) sum += values[i];
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) *out = scale * sum;
}
