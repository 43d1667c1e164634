/* Rows times activations: some lanes of a warp a row, a few tokens at a time. */

/* Vectors [first, first + VECTORS) of a row times tokens [token, token + TOKENS), those beyond the last
 * taken as the last: sums of one lane's share. */
template <int KIND, int VECTORS, int TOKENS>
__device__ __forceinline__ void code_dots(const Rows &rows, i64 row, const Inputs &in, int token,
                                          int lane, int lanes, float (&out)[VECTORS][TOKENS])
{
    Record records[VECTORS];
    for (int v = 0; v < VECTORS; v++)
        records[v] = record_of(rows, row, v);
    const float finer = KIND == 8 ? 0.0625f : 1.0f;
#pragma unroll 2
    for (int g = lane; g < rows.groups; g += lanes) {
        Words q[VECTORS], r[VECTORS];
        float scale[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            q[v] = words_at(records[v].q + 16 * g, rows.aligned);
            if (KIND == 8)
                r[v] = words_at(records[v].r + 16 * g, rows.aligned);
            scale[v] = half_value(*(const u16 *)(records[v].scales + 2 * g)) * finer;
        }
        for (int t = 0; t < TOKENS; t++) {
            i64 at = (i64)min(token + t, in.tokens - 1) * rows.groups + g;
            const Words *x = (const Words *)(in.codes + at * GROUP);
            Words low = x[0], high = x[1];
            float x_scale = in.scales[at];
            int bias = in.sums[at];
            for (int v = 0; v < VECTORS; v++) {
                int sum = 0;
                for (int i = 0; i < 4; i++) {
                    Pair w = KIND == 8 ? bytes8(q[v].at[i], r[v].at[i]) : bytes4(q[v].at[i]);
                    sum = dot4(w.low, low.at[i], sum);
                    sum = dot4(w.high, high.at[i], sum);
                }
                out[v][t] = fmaf((float)(sum - bias), scale[v] * x_scale, out[v][t]);
            }
        }
    }
}

template <int VECTORS, int TOKENS>
__device__ __forceinline__ void wide_dots(const Rows &rows, i64 row, const Inputs &in, int token,
                                          int lane, int lanes, float (&out)[VECTORS][TOKENS])
{
    const int many = 8;
    for (int j = lane * many; j < rows.length; j += lanes * many) {
        int count = min(many, rows.length - j);
        Words w[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            w[v] = wides_at(wide_of(rows, row, v) + j, count, rows.aligned);
        for (int t = 0; t < TOKENS; t++) {
            const float *x = in.values + (i64)min(token + t, in.tokens - 1) * in.length + j;
            for (int i = 0; i < many; i++) {
                float value = i < count ? x[i] : 0.0f;
                for (int v = 0; v < VECTORS; v++)
                    out[v][t] = fmaf(wide_value(wide_in(w[v], i), rows.is_bf16), value, out[v][t]);
            }
        }
    }
}

template <int KIND, int VECTORS, int TOKENS>
__device__ __forceinline__ void dots(const Rows &rows, i64 row, const Inputs &in, int token, int lane,
                                     int lanes, float (&out)[VECTORS][TOKENS])
{
    for (int v = 0; v < VECTORS; v++)
        for (int t = 0; t < TOKENS; t++)
            out[v][t] = 0;
    if (KIND == 16)
        wide_dots<VECTORS, TOKENS>(rows, row, in, token, lane, lanes, out);
    else
        code_dots<KIND, VECTORS, TOKENS>(rows, row, in, token, lane, lanes, out);
    for (int v = 0; v < VECTORS; v++)
        for (int t = 0; t < TOKENS; t++)
            out[v][t] = warp_sum(out[v][t], lanes);
}

/* Where the threads of a block stand: tiles of tokens first, so that rows are read once from far. */
struct Place {
    i64 row;
    int token, lane;
};

__device__ __forceinline__ Place place_of(int tokens, int lanes, int at_once)
{
    int tiles = (tokens + at_once - 1) / at_once;
    i64 rows = blockDim.x / lanes;
    return { blockIdx.x / tiles * rows + threadIdx.x / lanes,
             (int)(blockIdx.x % tiles) * at_once, (int)threadIdx.x % lanes };
}

/* Up to three matrices of one kind with the same inputs: q, k and v, say. Mirrored by kernels/gpu.py. */
struct Matrices {
    Rows rows[3];
    const float *bias[3]; /* [rows] or null */
    float *out[3]; /* [tokens, stride] */
    i64 stride[3];
    i64 total; /* rows of all */
    int add; /* to what is there */
};

/* out[t, row] = x[t] . row + bias */
template <int KIND, int TOKENS>
__device__ __forceinline__ void product(const Matrices &m, const Inputs &in, int lanes)
{
    Place at = place_of(in.tokens, lanes, TOKENS);
    bool there = at.row < m.total;
    i64 row = there ? at.row : m.total - 1; /* whole warps go on: they add up together */
    int which = 0;
    while (row >= m.rows[which].count)
        row -= m.rows[which++].count;
    float sums[1][TOKENS];
    dots<KIND, 1, TOKENS>(m.rows[which], row, in, at.token, at.lane, lanes, sums);
    if (!there || at.lane)
        return;
    float bias = m.bias[which] ? m.bias[which][row] : 0.0f;
    for (int t = 0; t < TOKENS && at.token + t < in.tokens; t++) {
        float *out = m.out[which] + (at.token + t) * m.stride[which] + row;
        float value = m.bias[which] ? sums[0][t] + bias : sums[0][t];
        *out = m.add ? *out + value : value;
    }
}

__device__ __forceinline__ float activated(float v, const Activation &act)
{
    if (act.kind == ACT_SILU)
        return v / (1.0f + expf(-v));
    if (act.kind == ACT_RELU)
        return v > act.threshold || v != v ? v : 0.0f;
    if (act.kind == ACT_GELU_TANH)
        return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * fmaf(0.044715f * v * v, v, v)));
    return 0.5f * v * (1.0f + erff(v * 0.7071067811865476f));
}

/* out[t, row] = act(x[t] . gate) * (x[t] . up), or act(x[t] . up + bias); times mask[t, row] */
template <int KIND, int TOKENS>
__device__ __forceinline__ void gate_up(const Rows &rows, const Inputs &in, const Activation &act,
                                        const float *mask, float *out, int lanes)
{
    Place at = place_of(in.tokens, lanes, TOKENS);
    bool there = at.row < rows.count;
    i64 row = there ? at.row : rows.count - 1;
    float found[TOKENS];
    if (rows.vectors == 3) {
        float sums[2][TOKENS];
        dots<KIND, 2, TOKENS>(rows, row, in, at.token, at.lane, lanes, sums);
        for (int t = 0; t < TOKENS; t++)
            found[t] = activated(sums[0][t], act) * sums[1][t];
    } else {
        float sums[1][TOKENS];
        dots<KIND, 1, TOKENS>(rows, row, in, at.token, at.lane, lanes, sums);
        for (int t = 0; t < TOKENS; t++)
            found[t] = activated(act.bias ? sums[0][t] + act.bias[row] : sums[0][t], act);
    }
    if (!there || at.lane)
        return;
    for (int t = 0; t < TOKENS && at.token + t < in.tokens; t++) {
        i64 to = (at.token + t) * rows.count + row;
        out[to] = mask ? found[t] * mask[to] : found[t];
    }
}

#define ROW_KERNELS(KIND, TOKENS)                                                                  \
    extern "C" __global__ void m2c_product_##KIND##_##TOKENS(Matrices m, Inputs in, int lanes)     \
    {                                                                                              \
        product<KIND, TOKENS>(m, in, lanes);                                                       \
    }                                                                                              \
    extern "C" __global__ void m2c_gate_up_##KIND##_##TOKENS(                                      \
        Rows rows, Inputs in, Activation act, const float *mask, float *out, int lanes)            \
    {                                                                                              \
        gate_up<KIND, TOKENS>(rows, in, act, mask, out, lanes);                                    \
    }
ROW_KERNELS(4, 1)
ROW_KERNELS(4, 4)
ROW_KERNELS(8, 1)
ROW_KERNELS(8, 4)
ROW_KERNELS(16, 1)
ROW_KERNELS(16, 4)
