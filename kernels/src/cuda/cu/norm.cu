// RMSNorm: y = weight * x / sqrt(mean(x^2) + eps), a row a block (or a warp, for the short rows of
// QK-norm), and its gradients.

// blockDim = (32 * warps a row, rows a block)
template <class T>
__device__ void rms_norm(const T* x, const T* weight, T* y, u64 rows, u32 cols, float eps) {
    __shared__ float room[32][33];
    u32 lane = threadIdx.x, width = blockDim.x, slot = threadIdx.y;
    u64 row = (u64)blockIdx.x * blockDim.y + slot;
    bool here = row < rows;
    const T* from = x + row * cols;
    float sum = 0.0f;
    if (here)
        for (u32 c = lane; c < cols; c += width) {
            float v = get(from[c]);
            sum += v * v;
        }
    sum = warp_sum(sum);
    if (width > 32) {
        if (lane % 32 == 0) room[slot][lane / 32] = sum;
        __syncthreads();
        sum = warp_sum(lane % 32 < width / 32 ? room[slot][lane % 32] : 0.0f);
    }
    if (!here) return;
    float scale = 1.0f / sqrtf(sum / (float)cols + eps);
    for (u32 c = lane; c < cols; c += width) put(y[row * cols + c], get(weight[c]) * (get(from[c]) * scale));
}

// dx = scale * (w*dy - x * scale^2 * mean(w*dy*x)); the weight's part of each block of rows goes
// to `partial`, [gridDim.x, cols], summed in a fixed order by `column_sums`.
template <class T>
__device__ void rms_norm_backward(const T* x, const T* weight, const T* dy, T* dx, float* partial, u64 rows,
                                  u32 cols, float eps, u32 assign) {
    extern __shared__ float dweight[];  // [blockDim.y][cols]
    __shared__ float room[2][32][33];
    u32 lane = threadIdx.x, width = blockDim.x, slot = threadIdx.y;
    for (u32 c = lane; c < cols; c += width) dweight[slot * cols + c] = 0.0f;
    u64 each_rows = (rows + gridDim.x - 1) / gridDim.x;
    u64 first = blockIdx.x * each_rows, last = first + each_rows < rows ? first + each_rows : rows;
    for (u64 base = first; base < last; base += blockDim.y) {
        u64 row = base + slot;
        bool here = row < last;
        float squares = 0.0f, dot = 0.0f;
        if (here)
            for (u32 c = lane; c < cols; c += width) {
                float v = get(x[row * cols + c]);
                squares += v * v;
                dot += v * get(weight[c]) * get(dy[row * cols + c]);
            }
        squares = warp_sum(squares);
        dot = warp_sum(dot);
        if (width > 32) {
            __syncthreads();
            if (lane % 32 == 0) room[0][slot][lane / 32] = squares, room[1][slot][lane / 32] = dot;
            __syncthreads();
            squares = warp_sum(lane % 32 < width / 32 ? room[0][slot][lane % 32] : 0.0f);
            dot = warp_sum(lane % 32 < width / 32 ? room[1][slot][lane % 32] : 0.0f);
        }
        if (!here) continue;
        float scale = 1.0f / sqrtf(squares / (float)cols + eps);
        float back = dot * scale * scale / (float)cols;
        for (u32 c = lane; c < cols; c += width) {
            float v = get(x[row * cols + c]), d = get(dy[row * cols + c]);
            float g = scale * (get(weight[c]) * d - v * back);
            if (assign) g += get(dx[row * cols + c]);
            put(dx[row * cols + c], g);
            dweight[slot * cols + c] += d * v * scale;
        }
    }
    __syncthreads();
    u32 thread = slot * width + lane, threads = width * blockDim.y;
    for (u32 c = thread; c < cols; c += threads) {
        float sum = 0.0f;
        for (u32 s = 0; s < blockDim.y; s++) sum += dweight[s * cols + c];
        partial[(u64)blockIdx.x * cols + c] = sum;
    }
}

// total[c] += sum over rows of partial[row][c]; 32 columns a block of 32 x 8 threads.
extern "C" __global__ void __launch_bounds__(256)
    column_sums(const float* partial, float* total, u32 rows, u32 cols) {
    __shared__ float room[8][33];
    u32 c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (c < cols)
        for (u32 row = threadIdx.y; row < rows; row += 8) sum += partial[(u64)row * cols + c];
    room[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < cols) {
        for (int k = 1; k < 8; k++) sum += room[k][threadIdx.x];
        total[c] += sum;
    }
}

#define KERNELS(T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(1024)                                                         \
        rms_norm_##T(const T* x, const T* weight, T* y, u64 rows, u32 cols, float eps) {                       \
        rms_norm(x, weight, y, rows, cols, eps);                                                               \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(1024)                                                         \
        rms_norm_backward_##T(const T* x, const T* weight, const T* dy, T* dx, float* partial, u64 rows,       \
                              u32 cols, float eps, u32 assign) {                                               \
        rms_norm_backward(x, weight, dy, dx, partial, rows, cols, eps, assign);                                \
    }
KERNELS(float)
KERNELS(bf16)
