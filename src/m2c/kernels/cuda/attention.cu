/* Softmax attention over the KV cache. Positions are cut into chunks at multiples of CHUNK, whatever
 * the tokens of the call; the chunks of a head are put together in order. */

/* Mirrored by kernels/gpu.py. */
struct Attention {
    void *keys, *values; /* [kv_heads, positions, dim] */
    const float *cosines, *sines; /* [positions, dim / 2], or null: nothing is turned */
    const float *head_norms[2]; /* [dim]: RMS norms of every head of q and of k, or null */
    const i64 *start; /* position of the first token: in memory, so that launches can be replayed */
    i64 positions; /* that the cache has room for */
    i64 window; /* how many positions a token sees, its own included */
    int heads, kv_heads, dim, is_f16;
    float scale, eps, softcap; /* softcap 0: none */
};

__device__ __forceinline__ float cached(const void *at, i64 i, int is_f16)
{
    return is_f16 ? half_value(((const u16 *)at)[i]) : ((const float *)at)[i];
}

__device__ __forceinline__ void keep(void *at, i64 i, int is_f16, float value)
{
    if (is_f16)
        ((u16 *)at)[i] = half_bits(value);
    else
        ((float *)at)[i] = value;
}

/* One block a head of q, k or v of a token: q is normed and turned where it is, k on its way to the
 * cache, v goes there. q [tokens, heads, dim]; k, v [tokens, kv_heads, dim]. */
extern "C" __global__ void m2c_place(Attention a, float *q, const float *k, const float *v)
{
    int all = a.heads + 2 * a.kv_heads, head = blockIdx.x % all;
    i64 token = blockIdx.x / all, position = *a.start + token;
    int which = head < a.heads ? 0 : head < a.heads + a.kv_heads ? 1 : 2;
    int own = head - (which > 0) * a.heads - (which > 1) * a.kv_heads;
    const float *from = which == 0 ? q : which == 1 ? k : v;
    from += (token * (which ? a.kv_heads : a.heads) + own) * a.dim;
    i64 at = ((i64)own * a.positions + position) * a.dim;
    const float *norm = which < 2 ? a.head_norms[which] : 0;
    float scale = 1;
    if (norm) {
        float sum = 0;
        for (int i = threadIdx.x; i < a.dim; i += blockDim.x)
            sum = fmaf(from[i], from[i], sum);
        scale = 1.0f / sqrtf(block_sum(sum) / (float)a.dim + a.eps);
    }
    int half = a.dim / 2;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float low = from[i], high = from[i + half];
        if (norm) {
            low = low * scale * norm[i];
            high = high * scale * norm[i + half];
        }
        if (which < 2 && a.cosines) {
            float c = a.cosines[position * half + i], s = a.sines[position * half + i];
            float turned = low * c - high * s;
            high = high * c + low * s;
            low = turned;
        }
        if (which == 0) {
            float *to = q + (token * a.heads + own) * a.dim;
            to[i] = low;
            to[i + half] = high;
        } else {
            keep(which == 1 ? a.keys : a.values, at + i, a.is_f16, low);
            keep(which == 1 ? a.keys : a.values, at + i + half, a.is_f16, high);
        }
    }
}

/* 8 numbers of a key, as f32 */
__device__ __forceinline__ void eight(const void *at, i64 i, int is_f16, float (&to)[8])
{
    if (is_f16) {
        Words words = *(const Words *)((const u16 *)at + i);
        for (int j = 0; j < 8; j++)
            to[j] = half_value(wide_in(words, j));
    } else {
        for (int j = 0; j < 8; j++)
            to[j] = ((const float *)at)[i + j];
    }
}

#define LANES 8 /* of a position */

/* q [dim] times a key, for all lanes of a position */
__device__ __forceinline__ float score_of(const Attention &a, const float *q, i64 key, int lane)
{
    float sum = 0;
    if (a.dim % 8 == 0) {
        for (int j = lane * 8; j < a.dim; j += LANES * 8) {
            float k[8];
            eight(a.keys, key + j, a.is_f16, k);
            for (int i = 0; i < 8; i++)
                sum = fmaf(q[j + i], k[i], sum);
        }
    } else {
        for (int j = lane; j < a.dim; j += LANES)
            sum = fmaf(q[j], cached(a.keys, key + j, a.is_f16), sum);
    }
    return warp_sum(sum, LANES);
}

#define MOST_DIM 1024

/* One block of 128 threads a head, a token and a chunk of positions: parts [tokens, heads, chunks,
 * dim + 2] receives the values weighted by exp(score - largest), the largest score and the sum of
 * weights. q [tokens, heads, dim]; the first token is `first` after the call's start. */
extern "C" __global__ void m2c_attend(Attention a, const float *q, int first, int chunks, float *parts)
{
    __shared__ float query[MOST_DIM], weights[CHUNK], shares[128];
    i64 of_head = blockIdx.x / chunks;
    int chunk = blockIdx.x % chunks, head = (int)(of_head % a.heads), token = (int)(of_head / a.heads);
    i64 position = *a.start + first + token;
    i64 begin = (i64)chunk * CHUNK, seen = max((i64)0, position + 1 - a.window);
    if (begin > position || begin + CHUNK <= seen)
        return; /* nobody reads what this block would write */
    int group = head / (a.heads / a.kv_heads);
    i64 base = (i64)group * a.positions * a.dim;
    for (int i = threadIdx.x; i < a.dim; i += blockDim.x)
        query[i] = q[((i64)token * a.heads + head) * a.dim + i];
    __syncthreads();
    for (int p = threadIdx.x / LANES; p < CHUNK; p += blockDim.x / LANES) {
        i64 at = begin + p;
        bool visible = at <= position && at >= seen;
        float score = score_of(a, query, base + (visible ? at : position) * a.dim,
                               threadIdx.x % LANES) * a.scale;
        if (a.softcap != 0) /* and NaN of an infinite score, of which the cap would make a number */
            score = tanhf(score / a.softcap) * a.softcap + (score - score);
        if (threadIdx.x % LANES == 0)
            weights[p] = visible ? score : MINUS_INFINITY;
    }
    __syncthreads();
    float largest = MINUS_INFINITY, sum = 0;
    for (int p = threadIdx.x; p < CHUNK; p += blockDim.x)
        largest = fmaxf(largest, weights[p]);
    largest = block_max(largest);
    for (int p = threadIdx.x; p < CHUNK; p += blockDim.x) {
        bool visible = begin + p <= position && begin + p >= seen;
        weights[p] = visible ? expf(weights[p] - largest) : 0.0f;
        sum += weights[p];
    }
    sum = block_sum(sum); /* and all weights are there */
    float *out = parts + blockIdx.x * (i64)(a.dim + 2);
    int width = min(a.dim, (int)blockDim.x), shared = blockDim.x / width;
    int column = threadIdx.x % width, share = threadIdx.x / width, each = CHUNK / shared;
    int last = (int)min((i64)CHUNK, position + 1 - begin);
    for (int d = column; d < a.dim; d += width) { /* as often for every thread: dim > 128 has one share */
        float value = 0;
        if (share < shared)
            for (int p = share * each; p < (share + 1 == shared ? CHUNK : (share + 1) * each); p++)
                if (p < last && begin + p >= seen)
                    value = fmaf(weights[p], cached(a.values, base + (begin + p) * a.dim + d, a.is_f16),
                                 value);
        if (shared == 1) {
            if (share == 0)
                out[d] = value;
            continue;
        }
        shares[threadIdx.x] = value;
        __syncthreads();
        if (share == 0) {
            for (int i = 1; i < shared; i++)
                value += shares[i * width + column];
            out[d] = value;
        }
    }
    if (threadIdx.x == 0) {
        out[a.dim] = largest;
        out[a.dim + 1] = sum;
    }
}

/* One block a head and a token: what its chunks give together. mixed [tokens, heads, dim] */
extern "C" __global__ void m2c_mix(Attention a, const float *parts, int first, int chunks, float *mixed)
{
    int token = blockIdx.x / a.heads;
    i64 position = *a.start + first + token, seen = max((i64)0, position + 1 - a.window);
    int from = (int)(seen / CHUNK), last = (int)(position / CHUNK);
    parts += (i64)blockIdx.x * chunks * (a.dim + 2);
    float largest = MINUS_INFINITY;
    for (int chunk = from; chunk <= last; chunk++)
        largest = fmaxf(largest, parts[chunk * (i64)(a.dim + 2) + a.dim]);
    for (int d = threadIdx.x; d < a.dim; d += blockDim.x) {
        float total = 0, value = 0;
        for (int chunk = from; chunk <= last; chunk++) {
            const float *part = parts + chunk * (i64)(a.dim + 2);
            float weight = expf(part[a.dim] - largest);
            total = fmaf(weight, part[a.dim + 1], total);
            value = fmaf(weight, part[d], value);
        }
        mixed[(i64)blockIdx.x * a.dim + d] = value / total;
    }
}
