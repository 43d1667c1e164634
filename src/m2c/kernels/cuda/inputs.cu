/* Activations made ready for rows: a norm, and rounding to int8 with a scale per group. */

/* Mirrored by kernels/gpu_structs.py. */
struct Given {
    const float *x; /* [tokens, length] */
    const float *norm; /* [length] weights of a norm applied first, or null */
    const float *norm_bias; /* [length]: then it is a layer norm; null: an RMS norm */
    float eps;
    int tokens, length;
};

#define PIECES 4 /* of 4 values each that a thread of m2c_prepare holds */

/* 4 values from j on; beyond `length` zeros */
struct __align__(16) Four {
    float at[4];
};

__device__ __forceinline__ Four four_at(const float *x, int j, int length)
{
    Four found;
    if (length % 4 == 0 && j + 4 <= length)
        return *(const Four *)(x + j);
    for (int i = 0; i < 4; i++)
        found.at[i] = j + i < length ? x[j + i] : 0.0f;
    return found;
}

/* Where codes of a token's groups go. Mirrored by kernels/gpu_structs.py. */
struct Coded8 {
    i8 *codes; /* as in Inputs, or null */
    Scale *scales;
};

/* 4 values of a group of which 8 neighbouring lanes have the rest. One that is not finite makes the
 * scale NaN: it must not be rounded away. */
__device__ __forceinline__ void round_four(const float (&v)[4], i64 token, int group, int groups,
                                           const Coded8 &to)
{
    float largest = 0, bad = 0;
    for (int i = 0; i < 4; i++) {
        largest = fmaxf(largest, fabsf(v[i]));
        bad += v[i] - v[i];
    }
    largest = warp_max(largest, 8);
    bool finite = warp_sum(bad, 8) == 0;
    float inverse = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
    int sum = 0;
    u32 packed = 0;
    for (int i = 0; i < 4; i++) {
        int code = finite ? __float2int_rn(v[i] * inverse) : 0;
        sum += code;
        packed |= ((u32)code & 0xffu) << 8 * i;
    }
    for (int other = 4; other; other /= 2)
        sum += __shfl_xor_sync(ALL, sum, other, WARP);
    int part = threadIdx.x % 8, words = GROUP / 8; /* of half a group */
    if (group >= groups)
        return;
    u32 *codes = (u32 *)(to.codes + token * groups * GROUP);
    codes[(part / words * groups + group) * words + part % words] = packed;
    if (part == 0)
        to.scales[token * groups + group] = { finite ? largest / 127.0f : NOT_A_NUMBER, 8 * sum };
}

/* One block a token. values [tokens, length] or null; a thread holds what it loads once if a block's
 * PIECES are enough for a token. */
extern "C" __global__ void m2c_prepare(Given g, float *values, Coded8 to)
{
    i64 token = blockIdx.x;
    const float *x = g.x + token * g.length;
    int groups = (g.length + GROUP - 1) / GROUP, step = 4 * blockDim.x;
    bool holds = g.length <= PIECES * step;
    Four held[PIECES];
    if (holds)
        for (int i = 0; i < PIECES; i++)
            held[i] = four_at(x, 4 * threadIdx.x + i * step, g.length);
    float mean = 0, scale = 1;
    for (int second = !g.norm_bias; g.norm && second < 2; second++) { /* the mean, the deviation */
        float sum = 0;
        for (int i = 0; i * step < g.length; i++) {
            int j = 4 * threadIdx.x + i * step;
            Four four = holds && i < PIECES ? held[i] : four_at(x, j, g.length);
            for (int k = 0; k < 4; k++) {
                float v = j + k < g.length ? four.at[k] - mean : 0.0f;
                sum = second ? fmaf(v, v, sum) : sum + v;
            }
        }
        sum = block_sum(sum) / (float)g.length;
        if (second)
            scale = 1.0f / sqrtf(sum + g.eps);
        else
            mean = sum;
    }
    for (int i = 0; i * step < groups * GROUP; i++) { /* as often for all lanes of a warp */
        int j = 4 * threadIdx.x + i * step;
        Four four = holds && i < PIECES ? held[i] : four_at(x, j, g.length);
        if (g.norm) {
            Four weight = four_at(g.norm, j, g.length);
            for (int k = 0; k < 4; k++) {
                float v = (four.at[k] - mean) * scale * weight.at[k];
                bool inside = j + k < g.length;
                four.at[k] = inside ? g.norm_bias ? v + g.norm_bias[j + k] : v : 0.0f;
            }
        }
        if (values)
            for (int k = 0; k < 4; k++)
                if (j + k < g.length)
                    values[token * g.length + j + k] = four.at[k];
        if (to.codes)
            round_four(four.at, token, j / GROUP, groups, to);
    }
}

/* out [tokens, length] += norm(x) (a norm without a bias), one block a token */
extern "C" __global__ void m2c_add_normed(Given g, float *out)
{
    const float *x = g.x + (i64)blockIdx.x * g.length;
    float sum = 0;
    for (int j = threadIdx.x; j < g.length; j += blockDim.x)
        sum = fmaf(x[j], x[j], sum);
    float scale = 1.0f / sqrtf(block_sum(sum) / (float)g.length + g.eps);
    for (int j = threadIdx.x; j < g.length; j += blockDim.x)
        out[(i64)blockIdx.x * g.length + j] += x[j] * scale * g.norm[j];
}
