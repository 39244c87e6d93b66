// Causal attention in T, bf16 or f16, on tensor cores (FlashAttention-2, arXiv 2307.08691): what `attention.cu`
// computes, in the same layouts, for heads of 32, 64, 96 and 128 elements and tensors aligned to 16 bytes.
//
// Products are mma.sync m16n8k16 with sums in float. The softmax is in float and base 2; its weights P, and
// dS in the gradients, are rounded to nearest even as they enter the next product, where they live in
// registers only. What is stored is rounded by `put`'s rule. No atomics: each sum has one owner and one order.
// The kernels of either type are in `attention_mma.cu` and `attention_mma_f16.cu`, with this in front.
//
// A block is 4 warps and two blocks share a multiprocessor. Tiles pass through shared memory in two stages
// (cp.async): the next comes while one is computed on. A warp always owns 32 rows of a product, for then a
// fragment read from shared memory feeds twice the products it would with 16, and reading is what limits.
//
// Backward is two kernels. The first makes dq, and delta = rowsum(out * dout) on the way; the second dk and
// dv, from transposed scores. That multiplies S and dP twice, and needs neither atomics nor float copies of dq.

// TILE (of `mma.cuh`, which is in front of this) is keys of a tile, and queries of one in the gradients.
constexpr u32 SWATH = 32;  // heads whose tiles are taken in turn, so that they meet in the cache
constexpr float LOG2E = 1.4426950408889634f;

struct Dims {
    u32 batch, seq, heads, kv_heads, d;
};

// Which head and which tile a block has, counting the heaviest tile of each head as 0. Within a swath of
// heads all heavy ones come first.
struct Place {
    u32 head, tile;
};
__device__ __forceinline__ Place place(u32 heads, u32 tiles) {
    u32 at = anew(blockIdx.x), first = at / (SWATH * tiles) * SWATH, rest = at % (SWATH * tiles);
    u32 wide = heads - first < SWATH ? heads - first : SWATH;
    return {first + rest % wide, rest / wide};
}
__device__ __forceinline__ u32 up(u32 a, u32 b) { return (a + b - 1) / b; }

// ---- forward

constexpr u32 QUERIES = 128;

// Shared memory: QUERIES rows of q, two stages of a tile of k and one of v, and each lane's part of the sums of
// its rows, for which there are no registers left.
template <class T, int D>
__device__ void forward(const T* q, const T* k, const T* v, T* out, float* lse, Dims n) {
    using R = Rows<D>;
    u32 tiles = up(n.seq, QUERIES), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Place here = place(n.batch * n.heads, tiles);
    u32 first = (tiles - 1 - here.tile) * QUERIES, own = first + 32 * warp;
    u32 batch = here.head / n.heads, head = here.head % n.heads, kv = head / (n.heads / n.kv_heads);
    u32 qp = n.heads * D, kp = n.kv_heads * D;
    u64 of_q = (u64)batch * n.seq * qp + head * D, of_k = (u64)batch * n.seq * kp + kv * D;
    float scale = 1.0f / sqrtf((float)D), scale2 = scale * LOG2E;
    u32 sq = shared_memory(), sk = sq + 2 * R::BYTES, sv = sk + R::BYTES, sums = sk + 4 * R::BYTES + 4 * threadIdx.x;
    Lane<D> lq = down<D>(sq + 32 * warp * R::PITCH), lk = across<D>(sk), lv = down<D>(sv);

    float acc[2][D / 8][4], most[2][2];
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int i = 0; i < D / 8; i++) acc[m][i][0] = acc[m][i][1] = acc[m][i][2] = acc[m][i][3] = 0.0f;
        most[m][0] = most[m][1] = -INFINITY_F;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) write4(sums + 4 * THREADS * i, 0);
    fetch<D, QUERIES>(sq, q + of_q, qp, first, n.seq);
    fetch<D, TILE>(sk, k + of_k, kp, 0, n.seq);
    fetch<D, TILE>(sv, v + of_k, kp, 0, n.seq);
    u32 count = up(min(first + QUERIES, n.seq), TILE);
    for (u32 j = 0; j < count; j++) {
        copied();
        __syncthreads();
        u32 key = j * TILE, stage = (j & 1) * 2 * R::BYTES, other = 2 * R::BYTES - stage;
        if (j + 1 < count) {
            fetch<D, TILE>(sk + other, k + of_k, kp, key + TILE, n.seq);
            fetch<D, TILE>(sv + other, v + of_k, kp, key + TILE, n.seq);
        }
        if (key > own + 31) continue;  // no query of this warp sees this tile
        float s[2][8][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 8; i++) s[m][i][0] = s[m][i][1] = s[m][i][2] = s[m][i][3] = 0.0f;
        Lane<D> keys = lk.moved(stage), values = lv.moved(stage);
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            u32 a[2][4], b[4];
            matrices(a[0], lq.at(0, 32 * c));
            matrices(a[1], lq.at(16, 32 * c));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                matrices(b, keys.at(16 * i, 32 * c));
#pragma unroll
                for (int m = 0; m < 2; m++)
                    mma<T>(s[m][2 * i], a[m], b[0], b[1]), mma<T>(s[m][2 * i + 1], a[m], b[2], b[3]);
            }
        }
        if (key + TILE - 1 > own) {
            int seen = (int)(own + lane / 4) - (int)(key + lane % 4 * 2);
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int i = 0; i < 8; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (8 * i + (e & 1) - 16 * m - 8 * (e >> 1) > seen) s[m][i][e] = -INFINITY_F;
        }
        u32 p[2][4][4];
        // Every row has seen key 0, so `now` is finite from the first tile on.
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float now = most[m][h];
#pragma unroll
                for (int i = 0; i < 8; i++) now = fmaxf(now, fmaxf(s[m][i][2 * h], s[m][i][2 * h + 1]));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
                float keep = power2((most[m][h] - now) * scale2), base = now * scale2, part = 0.0f;
                most[m][h] = now;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float low = power2(s[m][i][2 * h] * scale2 - base), high = power2(s[m][i][2 * h + 1] * scale2 - base);
                    part += low;
                    part += high;
                    p[m][i / 2][i % 2 * 2 + h] = fragment<T>(low, high);
                }
                u32 sum = sums + 4 * THREADS * (2 * m + h);
                write4(sum, __float_as_uint(read4(sum) * keep + part));
#pragma unroll
                for (int i = 0; i < D / 8; i++) acc[m][i][2 * h] *= keep, acc[m][i][2 * h + 1] *= keep;
            }
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                u32 b[4];
                transposed(b, values.at(16 * c, 32 * i));
#pragma unroll
                for (int m = 0; m < 2; m++)
                    mma<T>(acc[m][2 * i], p[m][c], b[0], b[1]), mma<T>(acc[m][2 * i + 1], p[m][c], b[2], b[3]);
            }
    }
    here = place(n.batch * n.heads, tiles);
    first = (tiles - 1 - here.tile) * QUERIES, own = first + 32 * warp;
    of_q = (u64)(here.head / n.heads) * n.seq * qp + here.head % n.heads * D;
    float factor[2][2];
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = read4(sums + 4 * THREADS * (2 * m + h));
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            factor[m][h] = 1.0f / total;
            u32 row = own + 16 * m + 8 * h + lane / 4;
            if (lane % 4 == 0 && row < n.seq) lse[(u64)here.head * n.seq + row] = most[m][h] * scale + logf(total);
        }
    // Its rows of q were read by this warp alone.
    store<D>(sq + 32 * warp * R::PITCH, acc, factor, out + of_q, qp, own, n.seq);
}

// ---- dq, and delta

// Warps 0 and 2 have the first 32 queries, 1 and 3 the others; 0 and 1 the first 32 keys of each tile, 2 and
// 3 the others. What two warps have for the same queries is added at the end.
// Shared memory: a tile of q and one of dout, two stages of k and v, lse and delta.
template <class T, int D>
__device__ void backward_q(const T* q, const T* k, const T* v, const T* out, const float* lse,
                           const T* dout, float* delta, T* dq, Dims n) {
    using R = Rows<D>;
    u32 tiles = up(n.seq, TILE), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Place here = place(n.batch * n.heads, tiles);
    u32 tile = tiles - 1 - here.tile, first = tile * TILE, query = warp % 2 * 32, key = warp / 2 * 32;
    u32 batch = here.head / n.heads, head = here.head % n.heads, kv = head / (n.heads / n.kv_heads);
    u32 qp = n.heads * D, kp = n.kv_heads * D;
    u64 to = (u64)batch * n.seq * qp + head * D;
    q += to, out += to, dout += to, dq += to;
    k += (u64)batch * n.seq * kp + kv * D;
    v += (u64)batch * n.seq * kp + kv * D;
    lse += (u64)here.head * n.seq, delta += (u64)here.head * n.seq;
    float scale = 1.0f / sqrtf((float)D), scale2 = scale * LOG2E;
    u32 sq = shared_memory(), so = sq + R::BYTES, sk = so + R::BYTES, sv = sk + R::BYTES, rows = sk + 4 * R::BYTES;
    Lane<D> lq = down<D>(sq + query * R::PITCH), lo = down<D>(so + query * R::PITCH);
    Lane<D> lk = across<D>(sk + key * R::PITCH), lv = across<D>(sv + key * R::PITCH);
    Lane<D> lt = down<D>(sk + key * R::PITCH);

    fetch<D, TILE>(sq, q, qp, first, n.seq);
    fetch<D, TILE>(so, dout, qp, first, n.seq);
    fetch<D, TILE>(sk, k, kp, 0, n.seq);
    fetch<D, TILE>(sv, v, kp, 0, n.seq);
    constexpr u32 LANES = D == 32 ? 4 : D == 64 ? 8 : 16;  // a row
#pragma unroll
    for (u32 i = 0; i < TILE * LANES / THREADS; i++) {
        u32 row = i * (THREADS / LANES) + threadIdx.x / LANES, c = threadIdx.x % LANES;
        float part = 0.0f;
        if (first + row < n.seq && c < R::CHUNKS) {
            u64 at = (u64)(first + row) * qp + c * 8;
            Pack<T> x = *(const Pack<T>*)(out + at), y = *(const Pack<T>*)(dout + at);
#pragma unroll
            for (int e = 0; e < 8; e++) part += get(x.v[e]) * get(y.v[e]);
        }
#pragma unroll
        for (u32 step = LANES / 2; step > 0; step /= 2) part += __shfl_xor_sync(0xffffffffu, part, step);
        if (c == 0) {
            bool there = first + row < n.seq;
            write4(rows + 4 * row, __float_as_uint(there ? lse[first + row] * LOG2E : 0.0f));
            write4(rows + 4 * (TILE + row), __float_as_uint(part));
            if (there) delta[first + row] = part;
        }
    }
    __syncthreads();
    float least[2][2], mean[2][2], acc[2][D / 8][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 row = query + 16 * m + 8 * h + lane / 4;
            least[m][h] = read4(rows + 4 * row), mean[m][h] = read4(rows + 4 * (TILE + row));
        }
#pragma unroll
        for (int i = 0; i < D / 8; i++) acc[m][i][0] = acc[m][i][1] = acc[m][i][2] = acc[m][i][3] = 0.0f;
    }
    for (u32 j = 0; j <= tile; j++) {
        copied();
        __syncthreads();
        u32 stage = (j & 1) * 2 * R::BYTES, other = 2 * R::BYTES - stage;
        if (j < tile) {
            fetch<D, TILE>(sk + other, k, kp, (j + 1) * TILE, n.seq);
            fetch<D, TILE>(sv + other, v, kp, (j + 1) * TILE, n.seq);
        }
        if (j == tile && key > query) continue;  // no query of this warp sees its keys
        float s[2][4][4], t[2][4][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][i][e] = t[m][i][e] = 0.0f;
        Lane<D> keys = lk.moved(stage), values = lv.moved(stage), turned = lt.moved(stage);
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            u32 a[2][4], b[4];
            matrices(a[0], lq.at(0, 32 * c));
            matrices(a[1], lq.at(16, 32 * c));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                matrices(b, keys.at(16 * i, 32 * c));
#pragma unroll
                for (int m = 0; m < 2; m++)
                    mma<T>(s[m][2 * i], a[m], b[0], b[1]), mma<T>(s[m][2 * i + 1], a[m], b[2], b[3]);
            }
            matrices(a[0], lo.at(0, 32 * c));
            matrices(a[1], lo.at(16, 32 * c));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                matrices(b, values.at(16 * i, 32 * c));
#pragma unroll
                for (int m = 0; m < 2; m++)
                    mma<T>(t[m][2 * i], a[m], b[0], b[1]), mma<T>(t[m][2 * i + 1], a[m], b[2], b[3]);
            }
        }
        // Of its keys a query sees those up to its own row: all but on the diagonal.
        int seen = j == tile && key == query ? (int)(lane / 4) - (int)(lane % 4 * 2) : (int)TILE;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float p = power2(s[m][i][e] * scale2 - least[m][e >> 1]);
                    p *= t[m][i][e] - mean[m][e >> 1];
                    s[m][i][e] = 8 * i + (e & 1) - 16 * m - 8 * (e >> 1) > seen ? 0.0f : p;
                }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            u32 a[2][4], b[4];
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float* p = s[m][2 * c + (e >> 1)] + 2 * (e & 1);
                    a[m][e] = fragment<T>(p[0], p[1]);
                }
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                transposed(b, turned.at(16 * c, 32 * i));
#pragma unroll
                for (int m = 0; m < 2; m++)
                    mma<T>(acc[m][2 * i], a[m], b[0], b[1]), mma<T>(acc[m][2 * i + 1], a[m], b[2], b[3]);
            }
        }
    }
    __syncthreads();
    // Lane by lane, in place of k and v.
    u32 room = sk + warp % 2 * (32 * 4 * D) + 16 * lane;
    if (warp >= 2) {
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                write16(room + 512 * (m * (D / 8) + i), __float_as_uint(acc[m][i][0]), __float_as_uint(acc[m][i][1]),
                        __float_as_uint(acc[m][i][2]), __float_as_uint(acc[m][i][3]));
    }
    __syncthreads();
    if (warp >= 2) return;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            u32 x[4];
            read16(x, room + 512 * (m * (D / 8) + i));
#pragma unroll
            for (int e = 0; e < 4; e++) acc[m][i][e] += __uint_as_float(x[e]);
        }
    float factor[2][2] = {{scale, scale}, {scale, scale}};
    store<D>(sq + query * R::PITCH, acc, factor, dq, qp, first + query, n.seq);
}

// ---- dk and dv

// A block has a tile of keys, and goes over the queries that see it and the heads of the group, in order.
// Warps 0 and 1 have 32 keys each and make P and dv; 2 and 3 have the same keys and make dP, dS and dk, with
// the P that 0 and 1 hand them, lane by lane, as the fragments they multiply with themselves.
// Shared memory: a tile of k and one of v, two stages of q and dout with their lse and delta, and room for P.
template <class T, int D>
__device__ void backward_kv(const T* q, const T* k, const T* v, const float* lse, const float* delta,
                            const T* dout, T* dk, T* dv, Dims n) {
    using R = Rows<D>;
    constexpr u32 STAGE = 2 * R::BYTES + 8 * TILE;
    u32 tiles = up(n.seq, TILE), warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = n.heads / n.kv_heads;
    Place here = place(n.batch * n.kv_heads, tiles);
    u32 tile = here.tile, first = tile * TILE, key = warp % 2 * 32;
    u32 batch = here.head / n.kv_heads, kv = here.head % n.kv_heads;
    u32 qp = n.heads * D, kp = n.kv_heads * D;
    u64 to = (u64)batch * n.seq * kp + kv * D;
    q += (u64)batch * n.seq * qp + kv * group * D;
    dout += (u64)batch * n.seq * qp + kv * group * D;
    lse += ((u64)batch * n.heads + kv * group) * n.seq;
    delta += ((u64)batch * n.heads + kv * group) * n.seq;
    float scale = 1.0f / sqrtf((float)D), scale2 = scale * LOG2E;
    u32 sk = shared_memory(), sv = sk + R::BYTES, sq = sv + R::BYTES, so = sq + R::BYTES, rows = so + R::BYTES;
    u32 room = sq + 2 * STAGE + warp % 2 * 4096 + 16 * lane;
    bool second = warp >= 2;  // of the two that share keys
    // The first multiplies k with q and P with dout, the second v with dout and dS with q.
    Lane<D> left = down<D>((second ? sv : sk) + key * R::PITCH);
    Lane<D> right = across<D>(second ? so : sq), next = down<D>(second ? sq : so);

    auto start = [&](u32 stage, u32 head, u32 query) {
        fetch<D, TILE>(sq + stage, q + head * D, qp, query, n.seq);
        fetch<D, TILE>(so + stage, dout + head * D, qp, query, n.seq);
        u32 row = query + threadIdx.x % TILE;
        const float* from = (threadIdx.x < TILE ? lse : delta) + (u64)head * n.seq;
        copy4(rows + stage + 4 * threadIdx.x, from + (row < n.seq ? row : 0), row < n.seq);
    };
    float acc[2][D / 8][4];
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < D / 8; i++) acc[m][i][0] = acc[m][i][1] = acc[m][i][2] = acc[m][i][3] = 0.0f;
    fetch<D, TILE>(sk, k + to, kp, first, n.seq);
    fetch<D, TILE>(sv, v + to, kp, first, n.seq);
    start(0, 0, first);
    u32 head = 0, query = first, stage = 0;
    while (head < group) {
        copied();
        __syncthreads();
        bool diagonal = query == first;
        u32 at = stage;
        query += TILE, stage = STAGE - stage;
        if (query >= n.seq) query = first, head++;
        if (head < group) start(stage, head, query);

        float s[2][8][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 8; i++) s[m][i][0] = s[m][i][1] = s[m][i][2] = s[m][i][3] = 0.0f;
        Lane<D> factor = right.moved(at), after = next.moved(at);
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            u32 a[2][4], b[4];
            matrices(a[0], left.at(0, 32 * c));
            matrices(a[1], left.at(16, 32 * c));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                matrices(b, factor.at(16 * i, 32 * c));
#pragma unroll
                for (int m = 0; m < 2; m++)
                    mma<T>(s[m][2 * i], a[m], b[0], b[1]), mma<T>(s[m][2 * i + 1], a[m], b[2], b[3]);
            }
        }
        // Rows are keys and columns queries: of P first, of dS then, ready for the next product.
        u32 p[2][4][4];
        if (!second) {
            int seen = diagonal ? (int)(lane % 4 * 2) - (int)(key + lane / 4) : (int)TILE;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float least[2];
                read8(least, rows + at + 32 * i + 8 * (lane % 4));
                least[0] *= LOG2E, least[1] *= LOG2E;
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float x = power2(s[m][i][e] * scale2 - least[e & 1]);
                        s[m][i][e] = 16 * m + 8 * (e >> 1) - 8 * i - (e & 1) > seen ? 0.0f : x;
                    }
            }
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float* x = s[m][2 * c + (e >> 1)] + 2 * (e & 1);
                        p[m][c][e] = fragment<T>(x[0], x[1]);
                    }
                    write16(room + 512 * (4 * m + c), p[m][c][0], p[m][c][1], p[m][c][2], p[m][c][3]);
                }
            meet(1 + warp % 2);
        } else {
            meet(1 + warp % 2);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                float mean[2][2];
                read8(mean[0], rows + at + 4 * TILE + 64 * c + 8 * (lane % 4));
                read8(mean[1], rows + at + 4 * TILE + 64 * c + 32 + 8 * (lane % 4));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    u32 x[4];
                    read16(x, room + 512 * (4 * m + c));
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float* d = s[m][2 * c + (e >> 1)] + 2 * (e & 1);
                        p[m][c][e] = fragment<T>(low_of<T>(x[e]) * (d[0] - mean[e >> 1][0]),
                                                 high_of<T>(x[e]) * (d[1] - mean[e >> 1][1]));
                    }
                }
            }
        }
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                u32 b[4];
                transposed(b, after.at(16 * c, 32 * i));
#pragma unroll
                for (int m = 0; m < 2; m++)
                    mma<T>(acc[m][2 * i], p[m][c], b[0], b[1]), mma<T>(acc[m][2 * i + 1], p[m][c], b[2], b[3]);
            }
    }
    here = place(n.batch * n.kv_heads, tiles), first = here.tile * TILE;
    to = (u64)(here.head / n.kv_heads) * n.seq * kp + here.head % n.kv_heads * D;
    // The rows of k and v that a warp stores by way of were read by itself alone.
    float one = second ? scale : 1.0f;
    float factor[2][2] = {{one, one}, {one, one}};
    store<D>((second ? sv : sk) + key * R::PITCH, acc, factor, (second ? dk : dv) + to, kp, first + key, n.seq);
}
