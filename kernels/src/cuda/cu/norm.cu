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

// Rows of whole packs, PER of them a thread: read once, and held in registers between the passes.
template <class T, int PER> struct Held {
    Pack<T> p[PER];

    __device__ __forceinline__ void read(const T* row, u32 packs, bool here) {
#pragma unroll
        for (int k = 0; k < PER; k++) {
            u32 at = threadIdx.x + k * blockDim.x;
            if (here && at < packs) p[k] = ((const Pack<T>*)row)[at];
            else p[k] = Pack<T>{};
        }
    }
};

// The sum over the threads of a row, in a fixed order; all threads of a block come here. `room` is [rows][32].
__device__ __forceinline__ float row_sum(float x, float (*room)[32]) {
    x = warp_sum(x);
    u32 warps = blockDim.x / 32, lane = threadIdx.x % 32;
    if (warps == 1) return x;
    if (lane == 0) room[threadIdx.y][threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(lane < warps ? room[threadIdx.y][lane] : 0.0f);
}

template <class T, int PER>
__device__ void rms_norm_packs(const T* x, const T* weight, T* y, u64 rows, u32 cols, float eps) {
    __shared__ float room[8][32];
    u64 row = (u64)blockIdx.x * blockDim.y + threadIdx.y;
    bool here = row < rows;
    u32 packs = cols / Pack<T>::N;
    Held<T, PER> v, w;
    v.read(x + row * cols, packs, here);
    w.read(weight, packs, here);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < PER; k++)
#pragma unroll
        for (int e = 0; e < Pack<T>::N; e++) sum += get(v.p[k].v[e]) * get(v.p[k].v[e]);
    sum = row_sum(sum, room);
    float scale = 1.0f / sqrtf(sum / (float)cols + eps);
#pragma unroll
    for (int k = 0; k < PER; k++) {
        u32 at = threadIdx.x + k * blockDim.x;
#pragma unroll
        for (int e = 0; e < Pack<T>::N; e++) put(v.p[k].v[e], get(w.p[k].v[e]) * (get(v.p[k].v[e]) * scale));
        if (here && at < packs) ((Pack<T>*)(y + row * cols))[at] = v.p[k];
    }
}

// As `rms_norm_backward`; the next rows are on their way while these are worked on, and the weight's part stays
// in registers.
template <class T, int PER>
__device__ void rms_norm_backward_packs(const T* x, const T* weight, const T* dy, T* dx, float* partial, u64 rows,
                                        u32 cols, float eps, u32 assign) {
    constexpr int N = Pack<T>::N;
    extern __shared__ float dweight[];  // [blockDim.y][cols]
    __shared__ float room[2][2][8][32]; // two turns, so that one barrier a turn is enough
    u32 packs = cols / N, turn = 0;
    float acc[PER][N];
#pragma unroll
    for (int k = 0; k < PER; k++)
#pragma unroll
        for (int e = 0; e < N; e++) acc[k][e] = 0.0f;
    Held<T, PER> v, d, w, v_next, d_next;
    w.read(weight, packs, true);
    u64 step = (u64)gridDim.x * blockDim.y, row = (u64)blockIdx.x * blockDim.y + threadIdx.y;
    v.read(x + row * cols, packs, row < rows);
    d.read(dy + row * cols, packs, row < rows);
    // All threads of a block take as many turns.
    for (u64 base = (u64)blockIdx.x * blockDim.y; base < rows; base += step, row += step, turn ^= 1) {
        bool here = row < rows, more = row + step < rows;
        v_next.read(x + (row + step) * cols, packs, more);
        d_next.read(dy + (row + step) * cols, packs, more);
        float squares = 0.0f, dot = 0.0f;
#pragma unroll
        for (int k = 0; k < PER; k++)
#pragma unroll
            for (int e = 0; e < N; e++) {
                float a = get(v.p[k].v[e]);
                squares += a * a;
                dot += a * get(w.p[k].v[e]) * get(d.p[k].v[e]);
            }
        squares = warp_sum(squares), dot = warp_sum(dot);
        u32 warps = blockDim.x / 32, lane = threadIdx.x % 32;
        if (warps > 1) {
            float(*to)[8][32] = room[turn];
            if (lane == 0) {
                to[0][threadIdx.y][threadIdx.x / 32] = squares;
                to[1][threadIdx.y][threadIdx.x / 32] = dot;
            }
            __syncthreads();
            squares = warp_sum(lane < warps ? to[0][threadIdx.y][lane] : 0.0f);
            dot = warp_sum(lane < warps ? to[1][threadIdx.y][lane] : 0.0f);
        }
        float scale = 1.0f / sqrtf(squares / (float)cols + eps);
        float back = dot * scale * scale / (float)cols;
#pragma unroll
        for (int k = 0; k < PER; k++) {
            u32 at = threadIdx.x + k * blockDim.x;
            if (here && at < packs) {
                Pack<T>* to = (Pack<T>*)(dx + row * cols) + at;
                Pack<T> out = {};
                if (assign) out = *to;
#pragma unroll
                for (int e = 0; e < N; e++) {
                    float a = get(v.p[k].v[e]), b = get(d.p[k].v[e]);
                    float g = scale * (get(w.p[k].v[e]) * b - a * back);
                    put(out.v[e], assign ? g + get(out.v[e]) : g);
                    acc[k][e] += b * a * scale;
                }
                *to = out;
            }
        }
        v = v_next, d = d_next;
    }
#pragma unroll
    for (int k = 0; k < PER; k++) {
        u32 at = threadIdx.x + k * blockDim.x;
        if (at < packs) {
#pragma unroll
            for (int e = 0; e < N; e++) dweight[threadIdx.y * cols + at * N + e] = acc[k][e];
        }
    }
    __syncthreads();
    u32 thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    for (u32 c = thread; c < cols; c += threads) {
        float sum = 0.0f;
        for (u32 s = 0; s < blockDim.y; s++) sum += dweight[s * cols + c];
        partial[(u64)blockIdx.x * cols + c] = sum;
    }
}

// total[c] += sum over rows of partial[row][c]; 32 columns a block of 32 x 32 threads.
extern "C" __global__ void __launch_bounds__(1024)
    column_sums(const float* partial, float* total, u32 rows, u32 cols) {
    __shared__ float room[32][33];
    u32 c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (c < cols) {
#pragma unroll 8
        for (u32 row = threadIdx.y; row < rows; row += 32) sum += partial[(u64)row * cols + c];
    }
    room[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < cols) {
        for (int k = 1; k < 32; k++) sum += room[k][threadIdx.x];
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
KERNELS(f16)

#define PACKS(T, PER)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                          \
        rms_norm_##PER##_##T(const T* x, const T* weight, T* y, u64 rows, u32 cols, float eps) {               \
        rms_norm_packs<T, PER>(x, weight, y, rows, cols, eps);                                                 \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                          \
        rms_norm_backward_##PER##_##T(const T* x, const T* weight, const T* dy, T* dx, float* partial,         \
                                      u64 rows, u32 cols, float eps, u32 assign) {                             \
        rms_norm_backward_packs<T, PER>(x, weight, dy, dx, partial, rows, cols, eps, assign);                  \
    }
PACKS(float, 1)
PACKS(float, 2)
PACKS(float, 4)
PACKS(bf16, 1)
PACKS(bf16, 2)
PACKS(bf16, 4)
PACKS(f16, 1)
PACKS(f16, 2)
PACKS(f16, 4)
