/* Activations made ready for rows: a norm, and rounding to int8 with a scale per group. */

/* Mirrored by kernels/gpu.py. */
struct Given {
    const float *x; /* [tokens, length] */
    const float *norm; /* [length] weights of a norm applied first, or null */
    const float *norm_bias; /* [length]: then it is a layer norm; null: an RMS norm */
    float eps;
    int tokens, length;
};

/* what x is moved by, and then multiplied with */
struct Norming {
    float mean, scale;
};

__device__ Norming norming_of(const float *x, const float *norm_bias, float eps, int length)
{
    Norming n = { 0, 0 };
    float sum = 0;
    if (norm_bias) {
        for (int j = threadIdx.x; j < length; j += blockDim.x)
            sum += x[j];
        n.mean = block_sum(sum) / (float)length;
        sum = 0;
    }
    for (int j = threadIdx.x; j < length; j += blockDim.x)
        sum = fmaf(x[j] - n.mean, x[j] - n.mean, sum);
    n.scale = 1.0f / sqrtf(block_sum(sum) / (float)length + eps);
    return n;
}

__device__ __forceinline__ float normed(const Given &g, const float *x, int j, Norming n)
{
    float value = (x[j] - n.mean) * n.scale * g.norm[j];
    return g.norm_bias ? value + g.norm_bias[j] : value;
}

/* One block a token, one warp a group. values, or codes with scales and sums, may be null. A group
 * that is not finite has NaN for its scale: it must not be rounded away. */
extern "C" __global__ void m2c_prepare(Given g, float *values, i8 *codes, float *scales, int *sums)
{
    i64 token = blockIdx.x;
    const float *x = g.x + token * g.length;
    int groups = (g.length + GROUP - 1) / GROUP;
    Norming n = { 0, 1 };
    if (g.norm)
        n = norming_of(x, g.norm_bias, g.eps, g.length);
    for (int first = threadIdx.x / WARP; first < groups; first += blockDim.x / WARP) {
        int j = first * GROUP + threadIdx.x % WARP;
        float value = j >= g.length ? 0.0f : g.norm ? normed(g, x, j, n) : x[j];
        if (values && j < g.length)
            values[token * g.length + j] = value;
        if (!codes)
            continue;
        float largest = warp_max(fabsf(value), WARP), bad = warp_sum(value - value, WARP);
        bool finite = bad == 0;
        float inverse = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
        int code = finite ? __float2int_rn(value * inverse) : 0, sum = code;
        for (int other = WARP / 2; other; other /= 2)
            sum += __shfl_xor_sync(ALL, sum, other, WARP);
        codes[(token * groups + first) * GROUP + threadIdx.x % WARP] = (i8)code;
        if (threadIdx.x % WARP == 0) {
            scales[token * groups + first] = finite ? largest / 127.0f : NOT_A_NUMBER;
            sums[token * groups + first] = 8 * sum;
        }
    }
}

/* out [tokens, length] += norm(x) (a norm without a bias), one block a token */
extern "C" __global__ void m2c_add_normed(Given g, float *out)
{
    i64 token = blockIdx.x;
    const float *x = g.x + token * g.length;
    Norming n = norming_of(x, g.norm_bias, g.eps, g.length);
    for (int j = threadIdx.x; j < g.length; j += blockDim.x)
        out[token * g.length + j] += normed(g, x, j, n);
}
