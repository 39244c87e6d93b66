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

// next[t]: the next token with the id of t, or `tokens`; first[t]: whether none came before it.
extern "C" __global__ void __launch_bounds__(256)
    embedding_chains(const u32* ids, u32* next, u32* first, u32 tokens, u32 vocabulary, u32* fault) {
    u32 t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= tokens) return;
    u32 id = ids[t], after = t + 1, before = 0;
    while (after < tokens && ids[after] != id) after++;
    while (before < t && ids[before] != id) before++;
    next[t] = after;
    first[t] = before == t && id < vocabulary;
    if (id >= vocabulary) *fault = 1 + t;
}

// dtable[id] += every dout of that id, token after token.
template <class T>
__device__ void embedding_backward(const u32* ids, const u32* next, const u32* first, const T* dout,
                                   float* dtable, u32 tokens, u32 cols) {
    u32 start = blockIdx.x;
    if (!first[start]) return;
    float* to = dtable + (u64)ids[start] * cols;
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
