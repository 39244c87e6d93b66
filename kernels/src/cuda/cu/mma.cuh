// Tensor cores in bf16 and f16, by mma.sync (compute capability 8.0 and later): the instructions, and tiles of rows
// in shared memory for them. Put in front of `attention_mma.cuh`.
//
// A block is THREADS threads; a tile is TILE rows.

constexpr u32 THREADS = 128;
constexpr u32 TILE = 64;

// ---- instructions

__device__ __forceinline__ u32 shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 address;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"(memory));
    return address;
}
// The same value, but new to the compiler: what follows from it in a loop is computed there, and takes no
// registers across the loop.
__device__ __forceinline__ u32 anew(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
// 16 bytes into shared memory, or zeros.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Four 8 x 8 matrices, one from each 8 lanes' addresses; lane l gets row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ void matrices(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void transposed(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
// c += a b: a 16 x 16, b 16 x 8
template <class T> __device__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> __device__ __forceinline__ void mma<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Two floats for a fragment, nearest even, the first in the low half; and each of them back.
template <class T> __device__ u32 fragment(float low, float high);
template <> __device__ __forceinline__ u32 fragment<bf16>(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <> __device__ __forceinline__ u32 fragment<f16>(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <class T> __device__ __forceinline__ float low_of(u32 both) { return get(T{(u16)both}); }
template <class T> __device__ __forceinline__ float high_of(u32 both) { return get(T{(u16)(both >> 16)}); }
__device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void write4(u32 to, u32 x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void write16(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ float read4(u32 from) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
    return x;
}
__device__ __forceinline__ void read8(float (&x)[2], u32 from) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(from) : "memory");
}
__device__ __forceinline__ void read16(u32 (&x)[4], u32 from) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from)
                 : "memory");
}
// What one of two warps wrote before, the other reads behind it. Both wait: a barrier at which the first only
// arrives is no faster here, and tools that look for races do not follow it.
__device__ __forceinline__ void meet(u32 barrier) { asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory"); }

// ---- tiles

// Rows of D elements in shared memory. 16 bytes at byte b of row r lie at b ^ turn(r), so that the same
// columns of 8 rows that follow each other lie in different banks.
template <int D> struct Rows {
    static_assert(D % 32 == 0 && D <= 128);
    static constexpr u32 PITCH = 2 * D, CHUNKS = D / 8, BYTES = TILE * PITCH;
    static constexpr bool WIDE = D % 64 == 0;
    static __device__ __forceinline__ u32 turn(u32 row) { return WIDE ? (row & 7) << 4 : (row >> 1 & 3) << 4; }
    static __device__ __forceinline__ u32 at(u32 row, u32 byte) { return row * PITCH + (byte ^ turn(row)); }
};

// A lane's part in reading 16 x 16 pieces of a tile: its row of a piece, and which 8 columns.
template <int D> struct Lane {
    u32 row, turned;

    __device__ __forceinline__ Lane(u32 tile, u32 r, u32 half) {
        row = tile + r * Rows<D>::PITCH;
        turned = half << 4 ^ Rows<D>::turn(r);
    }
    // The piece at row r and byte c of its rows: multiples of 16 and 32.
    __device__ __forceinline__ u32 at(u32 r, u32 c) const {
        if (Rows<D>::WIDE) return ((row + turned) ^ c) + r * Rows<D>::PITCH;
        return row + r * Rows<D>::PITCH + ((c & 0x30) ^ turned) + (c & ~0x3fu);
    }
    __device__ __forceinline__ Lane moved(u32 bytes) const {
        Lane to = *this;
        to.row += bytes;
        return to;
    }
};
// For the left factor as it lies, and for the right one, [k][n], transposed.
template <int D> __device__ __forceinline__ Lane<D> down(u32 tile) {
    u32 lane = threadIdx.x % 32;
    return Lane<D>(tile, lane & 15, lane >> 4);
}
// For the right factor, [n][k], as it lies.
template <int D> __device__ __forceinline__ Lane<D> across(u32 tile) {
    u32 lane = threadIdx.x % 32;
    return Lane<D>(tile, (lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
}

// Starts copying rows [first, first + ROWS) of a head into a tile; zeros beyond `seq`.
template <int D, u32 ROWS, class T>
__device__ __forceinline__ void fetch(u32 tile, const T* from, u32 pitch, u32 first, u32 seq) {
    // So that a thread's columns are turned alike in each of its rows.
    constexpr u32 WIDTH = Rows<D>::WIDE ? Rows<D>::CHUNKS : 4, STEP = THREADS / WIDTH;
    u32 row = threadIdx.x / WIDTH, c = threadIdx.x % WIDTH, to = tile + Rows<D>::at(row, c * 16);
#pragma unroll
    for (u32 r = 0; r < ROWS; r += STEP) {
        bool there = first + row + r < seq;
        const T* source = from + (u64)(there ? first + row + r : 0) * pitch + c * 8;
#pragma unroll
        for (u32 i = 0; i < Rows<D>::CHUNKS; i += WIDTH)
            copy16(to + r * Rows<D>::PITCH + i * 16, source + i * 8, there);
    }
}

// Two floats by `put`'s rule, for memory.
template <class T> __device__ __forceinline__ u32 stored(float low, float high) {
    T a, b;
    put(a, low);
    put(b, high);
    return (u32)a.bits | (u32)b.bits << 16;
}

// Stores a warp's 32 rows, times `factor` of each, by way of 32 rows of shared memory that are its own.
template <int D, class T>
__device__ __forceinline__ void store(u32 own, const float (&acc)[2][D / 8][4], const float (&factor)[2][2], T* to,
                                      u32 pitch, u32 first, u32 seq) {
    u32 lane = threadIdx.x % 32;
    // Other lanes of the warp may have read these rows last.
    __syncwarp();
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 row = 16 * m + 8 * h + lane / 4;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const float* x = acc[m][n] + 2 * h;
                u32 at = own + Rows<D>::at(row, 16 * n) + lane % 4 * 4;
                write4(at, stored<T>(x[0] * factor[m][h], x[1] * factor[m][h]));
            }
        }
    __syncwarp();
#pragma unroll
    for (u32 i = 0; i < Rows<D>::CHUNKS; i++) {
        u32 at = i * 32 + lane, row = at / Rows<D>::CHUNKS, c = at % Rows<D>::CHUNKS;
        struct alignas(16) Chunk { u32 v[4]; } chunk;
        read16(chunk.v, own + Rows<D>::at(row, c * 16));
        if (first + row < seq) *(Chunk*)(to + (u64)(first + row) * pitch + c * 8) = chunk;
    }
}
