/* Softmax attention over the KV cache. Positions are cut into spans at multiples of SPAN, whatever
 * the tokens of the call; the spans of a head are put together in order. */

/* Mirrored by kernels/gpu_structs.py. */
struct Attention {
    void *keys, *values; /* [kv_heads, positions, dim] */
    const float *cosines, *sines; /* [positions, rotary / 2], or null: nothing is turned */
    const float *head_norms[2]; /* [dim]: RMS norms of every head of q and of k, or null */
    const i64 *start; /* position of the first token: in memory, so that launches can be replayed */
    i64 positions; /* that the cache has room for */
    i64 window; /* how many positions a token sees, its own included */
    int heads, kv_heads, dim;
    int rotary; /* how many values of a head are turned, the first ones; 0 without cosines */
    int is_f16;
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
    int turning = a.rotary / 2;
    for (int i = threadIdx.x; i < a.dim / 2; i += blockDim.x) {
        /* pairs that are turned, then neighbours that are not */
        int one = i < turning ? i : 2 * i, two = i < turning ? i + turning : 2 * i + 1;
        float low = from[one], high = from[two];
        if (norm) {
            low = low * scale * norm[one];
            high = high * scale * norm[two];
        }
        if (which < 2 && i < turning) {
            float c = a.cosines[position * turning + i], s = a.sines[position * turning + i];
            float turned = low * c - high * s;
            high = high * c + low * s;
            low = turned;
        }
        if (which == 0) {
            float *to = q + (token * a.heads + own) * a.dim;
            to[one] = low;
            to[two] = high;
        } else {
            keep(which == 1 ? a.keys : a.values, at + one, a.is_f16, low);
            keep(which == 1 ? a.keys : a.values, at + two, a.is_f16, high);
        }
    }
}

#define SPAN 64 /* positions whose softmax is taken by itself */
#define LANES 8 /* of a position, in scores */
#define MOST_DIM 1024
#define THREADS 128 /* of m2c_attend */

/* 8 numbers of a key, as f32; of a length that is no multiple of 8 the `count` that are left */
__device__ __forceinline__ void eight(const void *at, i64 i, int is_f16, int count, bool whole,
                                      float (&to)[8])
{
    if (is_f16 && whole) {
        Words words = *(const Words *)((const u16 *)at + i);
        for (int j = 0; j < 8; j++)
            to[j] = half_value(wide_in(words, j));
    } else {
        for (int j = 0; j < 8; j++)
            to[j] = j < count ? cached(at, i + j, is_f16) : 0.0f;
    }
}

/* A query: a head of a token, and the positions [seen, stop) that it sees. */
struct Query {
    int token, head;
    i64 seen, stop;
};

/* The n-th of those that share keys: heads of a token follow each other. */
__device__ __forceinline__ Query query_of(const Attention &a, int group, int n, int first)
{
    int shared = a.heads / a.kv_heads, token = n / shared;
    i64 stop = *a.start + first + token + 1;
    return { token, group * shared + n % shared, max((i64)0, stop - a.window), stop };
}

/* Scores of QUERIES queries with the SPAN keys from `begin` on; minus infinity where one is not seen. */
template <int QUERIES>
__device__ __forceinline__ void scores_of(const Attention &a, const Query (&queries)[QUERIES],
                                          const float (*q)[MOST_DIM], i64 base, i64 begin,
                                          float (*scores)[SPAN])
{
    i64 last = queries[QUERIES - 1].stop - 1; /* positions after it were not written yet */
    int lane = threadIdx.x % LANES;
    for (int p = threadIdx.x / LANES; p < SPAN; p += THREADS / LANES) {
        i64 key = base + min(begin + p, last) * a.dim;
        float sums[QUERIES];
        for (int i = 0; i < QUERIES; i++)
            sums[i] = 0;
        for (int j = lane * 8; j < a.dim; j += LANES * 8) {
            float k[8];
            eight(a.keys, key + j, a.is_f16, min(8, a.dim - j), a.dim % 8 == 0, k);
            for (int i = 0; i < QUERIES; i++)
                for (int e = 0; e < 8; e++)
                    sums[i] = fmaf(q[i][j + e], k[e], sums[i]);
        }
        for (int i = 0; i < QUERIES; i++) {
            float score = warp_sum(sums[i], LANES) * a.scale;
            if (a.softcap != 0) /* NaN of an infinite score, of which the cap would make a number */
                score = tanhf(score / a.softcap) * a.softcap + (score - score);
            bool visible = begin + p < queries[i].stop && begin + p >= queries[i].seen;
            if (lane == 0)
                scores[i][p] = visible ? score : MINUS_INFINITY;
        }
    }
}

/* Values weighted by `weights`: out[i] [dim] for each query. Threads take two columns of a share of the
 * positions each. */
template <int QUERIES>
__device__ __forceinline__ void values_of(const Attention &a, const Query (&queries)[QUERIES],
                                          const float (*weights)[SPAN], i64 base, i64 begin,
                                          float *const (&out)[QUERIES])
{
    __shared__ float sums[QUERIES][THREADS][2];
    int pairs = a.dim / 2, width = min(pairs, THREADS), shares = THREADS / width;
    int share = threadIdx.x / width, each = (SPAN + shares - 1) / shares;
    int stop = (int)min((i64)min((share + 1) * each, SPAN), queries[QUERIES - 1].stop - begin);
    int from = max(share * each, (int)max((i64)0, queries[0].seen - begin));
    for (int pair = threadIdx.x % width; pair < (pairs + width - 1) / width * width; pair += width) {
        float low[QUERIES], high[QUERIES];
        for (int i = 0; i < QUERIES; i++)
            low[i] = high[i] = 0;
        if (share < shares && pair < pairs) {
#pragma unroll 4
            for (int p = from; p < stop; p++) {
                i64 at = base + (begin + p) * a.dim + 2 * pair;
                float v[2];
                if (a.is_f16) {
                    u32 both = *(const u32 *)((const u16 *)a.values + at);
                    v[0] = half_value((u16)(both & 0xffff));
                    v[1] = half_value((u16)(both >> 16));
                } else {
                    v[0] = ((const float *)a.values)[at];
                    v[1] = ((const float *)a.values)[at + 1];
                }
                for (int i = 0; i < QUERIES; i++) {
                    bool visible = begin + p < queries[i].stop && begin + p >= queries[i].seen;
                    low[i] = visible ? fmaf(weights[i][p], v[0], low[i]) : low[i];
                    high[i] = visible ? fmaf(weights[i][p], v[1], high[i]) : high[i];
                }
            }
        }
        for (int i = 0; i < QUERIES; i++) {
            sums[i][threadIdx.x][0] = low[i];
            sums[i][threadIdx.x][1] = high[i];
        }
        __syncthreads();
        if (share == 0 && pair < pairs)
            for (int i = 0; i < QUERIES; i++) {
                float total[2] = { 0, 0 };
                for (int other = 0; other < shares; other++)
                    for (int k = 0; k < 2; k++)
                        total[k] += sums[i][other * width + pair % width][k];
                if (out[i]) {
                    out[i][2 * pair] = total[0];
                    out[i][2 * pair + 1] = total[1];
                }
            }
        __syncthreads();
    }
}

/* A block: one span, QUERIES queries that share keys. parts [tokens, heads, spans, dim + 2] receives
 * the values weighted by exp(score - largest), the largest score and the sum of weights. The first
 * token is `first` after the call's start. */
template <int QUERIES>
__device__ __forceinline__ void attend(const Attention &a, const float *q, int first, int tokens,
                                       int spans, float *parts)
{
    __shared__ float query[QUERIES][MOST_DIM], weights[QUERIES][SPAN];
    int span = blockIdx.x % spans, group = blockIdx.x / spans % a.kv_heads;
    int tile = blockIdx.x / spans / a.kv_heads, all = tokens * (a.heads / a.kv_heads);
    i64 begin = (i64)span * SPAN, base = (i64)group * a.positions * a.dim;
    Query queries[QUERIES];
    float *out[QUERIES];
    for (int i = 0; i < QUERIES; i++) {
        int n = tile * QUERIES + i;
        queries[i] = query_of(a, group, min(n, all - 1), first);
        i64 part = ((i64)queries[i].token * a.heads + queries[i].head) * spans + span;
        bool sees = begin < queries[i].stop && begin + SPAN > queries[i].seen;
        out[i] = n < all && sees ? parts + part * (a.dim + 2) : 0; /* else nobody reads it */
    }
    if (begin >= queries[QUERIES - 1].stop || begin + SPAN <= queries[0].seen)
        return;
    for (int i = 0; i < QUERIES; i++) {
        const float *from = q + ((i64)queries[i].token * a.heads + queries[i].head) * a.dim;
        for (int j = threadIdx.x; j < a.dim + 7; j += THREADS)
            if (j < MOST_DIM)
                query[i][j] = j < a.dim ? from[j] : 0.0f;
    }
    __syncthreads();
    scores_of<QUERIES>(a, queries, query, base, begin, weights);
    __syncthreads();
    for (int i = threadIdx.x / WARP; i < QUERIES; i += THREADS / WARP) {
        int lane = threadIdx.x % WARP;
        float one = weights[i][lane], other = weights[i][lane + WARP];
        float largest = warp_max(fmaxf(one, other), WARP);
        i64 at = begin + lane;
        one = at < queries[i].stop && at >= queries[i].seen ? expf(one - largest) : 0.0f;
        at += WARP;
        other = at < queries[i].stop && at >= queries[i].seen ? expf(other - largest) : 0.0f;
        weights[i][lane] = one;
        weights[i][lane + WARP] = other;
        float sum = warp_sum(one + other, WARP);
        if (lane == 0 && out[i]) {
            out[i][a.dim] = largest;
            out[i][a.dim + 1] = sum;
        }
    }
    __syncthreads();
    values_of<QUERIES>(a, queries, weights, base, begin, out);
}

/* q [tokens, heads, dim] */
extern "C" __global__ void m2c_attend_1(Attention a, const float *q, int first, int tokens, int spans,
                                        float *parts)
{
    attend<1>(a, q, first, tokens, spans, parts);
}

extern "C" __global__ void m2c_attend_4(Attention a, const float *q, int first, int tokens, int spans,
                                        float *parts)
{
    attend<4>(a, q, first, tokens, spans, parts);
}

/* One block a head and a token: what its spans give together. mixed [tokens, heads, dim], or, where
 * heads are whole groups, its codes. */
extern "C" __global__ void m2c_mix(Attention a, const float *parts, int first, int spans, float *mixed,
                                   Coded8 to)
{
    i64 stop = *a.start + first + blockIdx.x / a.heads + 1, seen = max((i64)0, stop - a.window);
    int from = (int)(seen / SPAN), last = (int)((stop - 1) / SPAN);
    int groups = a.heads * a.dim / GROUP;
    parts += (i64)blockIdx.x * spans * (a.dim + 2);
    float largest = MINUS_INFINITY;
    for (int span = from; span <= last; span++)
        largest = fmaxf(largest, parts[span * (i64)(a.dim + 2) + a.dim]);
    for (int at = 0; at < a.dim; at += 4 * blockDim.x) { /* as often for all lanes of a warp */
        int d = at + 4 * threadIdx.x;
        float total = 0, value[4] = { 0, 0, 0, 0 };
#pragma unroll 4
        for (int span = from; span <= last; span++) {
            const float *part = parts + span * (i64)(a.dim + 2);
            float weight = expf(part[a.dim] - largest);
            total = fmaf(weight, part[a.dim + 1], total);
            for (int i = 0; i < 4; i++)
                value[i] = fmaf(weight, d + i < a.dim ? part[d + i] : 0.0f, value[i]);
        }
        for (int i = 0; i < 4; i++)
            value[i] /= total;
        for (int i = 0; i < 4 && mixed; i++)
            if (d + i < a.dim)
                mixed[(i64)blockIdx.x * a.dim + d + i] = value[i];
        if (to.codes)
            round_four(value, blockIdx.x / a.heads,
                       d < a.dim ? (int)(blockIdx.x % a.heads * a.dim + d) / GROUP : groups, groups, to);
    }
}
