// Rows of a table by token id, and their gradients, in a fixed order.

template <class T>
__device__ void embedding(const u32* ids, const T* table, T* out, u32 vocabulary, u32 cols, u32* fault) {
    u64 token = blockIdx.x;
    u32 id = ids[token];
    if (id >= vocabulary) {
        if (threadIdx.x == 0) *fault = 1 + (u32)token;
        return;
    }
    const T* from = table + (u64)id * cols;
    T* to = out + token * cols;
    if (cols % Pack<T>::N == 0 && aligned(table) && aligned(out)) {
        for (u32 c = threadIdx.x; c < cols / Pack<T>::N; c += blockDim.x)
            ((Pack<T>*)to)[c] = ((const Pack<T>*)from)[c];
    } else {
        for (u32 c = threadIdx.x; c < cols; c += blockDim.x) to[c] = from[c];
    }
}

// next[t]: the next token with the id of t, or `tokens`; first[t]: whether none came before it. A warp a token,
// 128 ids at a time.
extern "C" __global__ void __launch_bounds__(256)
    embedding_chains(const u32* ids, u32* next, u32* first, u32 tokens, u32 vocabulary, u32* fault) {
    u32 t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (t >= tokens) return;
    u32 id = ids[t], after = tokens;
    for (u32 base = t + 1; base < tokens && after == tokens; base += 128) {
        u32 found = tokens;
#pragma unroll
        for (u32 k = 4; k-- > 0;) {
            u32 at = base + 32 * k + lane;
            if (at < tokens && ids[at] == id) found = at;
        }
        // A lane's first is its lowest; the lowest of all lanes is the next.
#pragma unroll
        for (u32 d = 16; d > 0; d /= 2) found = min(found, __shfl_xor_sync(0xffffffffu, found, d));
        after = found;
    }
    bool before = false;
    for (u32 base = 0; base < t && !before; base += 128) {
        bool found = false;
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            u32 at = base + 32 * k + lane;
            found |= at < t && ids[at] == id;
        }
        before = __any_sync(0xffffffffu, found);
    }
    if (lane == 0) {
        next[t] = after;
        first[t] = !before && id < vocabulary;
        if (id >= vocabulary) *fault = 1 + t;
    }
}

// dtable[id] += every dout of that id, token after token.
template <class T>
__device__ void embedding_backward(const u32* ids, const u32* next, const u32* first, const T* dout,
                                   float* dtable, u32 tokens, u32 cols) {
    constexpr u32 N = Pack<T>::N;
    u32 start = blockIdx.x;
    if (!first[start]) return;
    float* to = dtable + (u64)ids[start] * cols;
    if (cols % N == 0 && aligned(dout) && aligned(dtable)) {
        for (u32 c = threadIdx.x; c < cols / N; c += blockDim.x) {
            float sum[N];
#pragma unroll
            for (u32 k = 0; k < N; k++) sum[k] = 0.0f;
            for (u32 t = start; t < tokens; t = next[t]) {
                Pack<T> x = ((const Pack<T>*)(dout + (u64)t * cols))[c];
#pragma unroll
                for (u32 k = 0; k < N; k++) sum[k] += get(x.v[k]);
            }
#pragma unroll
            for (u32 k = 0; k < N; k += 4) {
                Pack<float>* at = (Pack<float>*)(to + (u64)c * N + k);
                Pack<float> x = *at;
#pragma unroll
                for (u32 e = 0; e < 4; e++) x.v[e] += sum[k + e];
                *at = x;
            }
        }
        return;
    }
    for (u32 c = threadIdx.x; c < cols; c += blockDim.x) {
        float sum = 0.0f;
        for (u32 t = start; t < tokens; t = next[t]) sum += get(dout[(u64)t * cols + c]);
        to[c] += sum;
    }
}

#define KERNELS(T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) embedding_##T(                                        \
        const u32* ids, const T* table, T* out, u32 vocabulary, u32 cols, u32* fault) {                     \
        embedding(ids, table, out, vocabulary, cols, fault);                                                \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                       \
        embedding_backward_##T(const u32* ids, const u32* next, const u32* first, const T* dout,            \
                               float* dtable, u32 tokens, u32 cols) {                                       \
        embedding_backward(ids, next, first, dout, dtable, tokens, cols);                                   \
    }
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
