/* Rows times activations: some lanes of a warp a row, a few tokens at a time. */

/* STREAMS records (of several rows, or the gate and up of one) times tokens [token, token + TOKENS),
 * those beyond the last taken as the last: what one lane adds up. */
template <int KIND, int STREAMS, int TOKENS>
__device__ __forceinline__ void code_dots(const Rows &rows, const Record (&records)[STREAMS],
                                          const Inputs &in, int token, int lane, int lanes,
                                          float (&out)[STREAMS][TOKENS])
{
    const float finer = KIND == 8 ? 0.0625f : 1.0f;
#pragma unroll 2
    for (int g = lane; g < rows.groups; g += lanes) {
        Words q[STREAMS], r[STREAMS];
        float scale[STREAMS];
        for (int s = 0; s < STREAMS; s++) {
            q[s] = words_at(records[s].q + 16 * g, rows.aligned);
            if (KIND == 8)
                r[s] = words_at(records[s].r + 16 * g, rows.aligned);
            scale[s] = half_value(*(const u16 *)(records[s].scales + 2 * g)) * finer;
        }
        for (int t = 0; t < TOKENS; t++) {
            i64 at = (i64)min(token + t, in.tokens - 1) * rows.groups + g;
            const Words *x = (const Words *)(in.codes + at * GROUP);
            Words low = x[0], high = x[1];
            float x_scale = in.scales[at];
            int bias = in.sums[at];
            for (int s = 0; s < STREAMS; s++) {
                int sum = 0;
                for (int i = 0; i < 4; i++) {
                    Pair w = KIND == 8 ? bytes8(q[s].at[i], r[s].at[i]) : bytes4(q[s].at[i]);
                    sum = dot4(w.low, low.at[i], sum);
                    sum = dot4(w.high, high.at[i], sum);
                }
                out[s][t] = fmaf((float)(sum - bias), scale[s] * x_scale, out[s][t]);
            }
        }
    }
}

template <int STREAMS, int TOKENS>
__device__ __forceinline__ void wide_dots(const Rows &rows, const u16 *const (&from)[STREAMS],
                                          const Inputs &in, int token, int lane, int lanes,
                                          float (&out)[STREAMS][TOKENS])
{
    const int many = 8;
#pragma unroll 2
    for (int j = lane * many; j < rows.length; j += lanes * many) {
        int count = min(many, rows.length - j);
        Words w[STREAMS];
        for (int s = 0; s < STREAMS; s++)
            w[s] = wides_at(from[s] + j, count, rows.aligned);
        for (int t = 0; t < TOKENS; t++) {
            const float *x = in.values + (i64)min(token + t, in.tokens - 1) * in.length + j;
            float values[many];
            if (rows.aligned) { /* then the activations are, too */
                for (int half = 0; half < 2; half++) {
                    Four four = ((const Four *)x)[half];
                    for (int i = 0; i < 4; i++)
                        values[4 * half + i] = four.at[i];
                }
            } else {
                for (int i = 0; i < many; i++)
                    values[i] = i < count ? x[i] : 0.0f;
            }
            for (int s = 0; s < STREAMS; s++)
                for (int i = 0; i < many; i++)
                    out[s][t] = fmaf(wide_value(wide_in(w[s], i), rows.is_bf16), values[i], out[s][t]);
        }
    }
}

/* VECTORS vectors of each of EACH rows; `last` is the last row there is. */
template <int KIND, int VECTORS, int EACH, int TOKENS>
__device__ __forceinline__ void dots(const Rows &rows, i64 row, i64 last, const Inputs &in, int token,
                                     int lane, int lanes, float (&out)[VECTORS * EACH][TOKENS])
{
    const int streams = VECTORS * EACH;
    for (int s = 0; s < streams; s++)
        for (int t = 0; t < TOKENS; t++)
            out[s][t] = 0;
    if (KIND == 16) {
        const u16 *from[streams];
        for (int s = 0; s < streams; s++)
            from[s] = wide_of(rows, min(row + s / VECTORS, last), s % VECTORS);
        wide_dots<streams, TOKENS>(rows, from, in, token, lane, lanes, out);
    } else {
        Record records[streams];
        for (int s = 0; s < streams; s++)
            records[s] = record_of(rows, min(row + s / VECTORS, last), s % VECTORS);
        code_dots<KIND, streams, TOKENS>(rows, records, in, token, lane, lanes, out);
    }
    for (int s = 0; s < streams; s++)
        for (int t = 0; t < TOKENS; t++)
            out[s][t] = warp_sum(out[s][t], lanes);
}

/* Where the threads of a block stand: tiles of tokens first, so that rows are read once from far. */
struct Place {
    i64 row;
    int token, lane;
};

__device__ __forceinline__ Place place_of(int tokens, int lanes, int each, int at_once)
{
    int tiles = (tokens + at_once - 1) / at_once;
    i64 rows = blockDim.x / lanes;
    return { (blockIdx.x / tiles * rows + threadIdx.x / lanes) * each,
             (int)(blockIdx.x % tiles) * at_once, (int)threadIdx.x % lanes };
}

/* Up to three matrices of one kind with the same inputs: q, k and v, say. Their rows are counted in
 * units of EACH, so that none is shared by two. Mirrored by kernels/gpu_structs.py. */
struct Matrices {
    Rows rows[3];
    const float *bias[3]; /* [rows] or null */
    float *out[3]; /* [tokens, stride] */
    i64 stride[3];
    i64 units; /* of all matrices */
    int add; /* to what is there */
};

/* out[t, row] = x[t] . row + bias */
template <int KIND, int EACH, int TOKENS>
__device__ __forceinline__ void product(const Matrices &m, const Inputs &in, int lanes)
{
    Place at = place_of(in.tokens, lanes, 1, TOKENS);
    bool there = at.row < m.units;
    i64 unit = there ? at.row : m.units - 1; /* whole warps go on: they add up together */
    int which = 0;
    for (i64 own; unit >= (own = (m.rows[which].count + EACH - 1) / EACH); which++)
        unit -= own;
    const Rows &rows = m.rows[which];
    i64 row = unit * EACH;
    float sums[EACH][TOKENS];
    dots<KIND, 1, EACH, TOKENS>(rows, row, rows.count - 1, in, at.token, at.lane, lanes, sums);
    if (!there || at.lane)
        return;
    for (int i = 0; i < EACH && row + i < rows.count; i++)
        for (int t = 0; t < TOKENS && at.token + t < in.tokens; t++) {
            float *out = m.out[which] + (at.token + t) * m.stride[which] + row + i;
            float value = m.bias[which] ? sums[i][t] + m.bias[which][row + i] : sums[i][t];
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
template <int KIND, int EACH, int TOKENS>
__device__ __forceinline__ void gate_up(const Rows &rows, const Inputs &in, const Activation &act,
                                        const float *mask, float *out, int lanes)
{
    Place at = place_of(in.tokens, lanes, EACH, TOKENS);
    i64 last = rows.count - 1, row = min(at.row, last); /* whole warps go on: they add up together */
    float found[EACH][TOKENS];
    if (rows.vectors == 3) {
        float sums[2 * EACH][TOKENS];
        dots<KIND, 2, EACH, TOKENS>(rows, row, last, in, at.token, at.lane, lanes, sums);
        for (int i = 0; i < EACH; i++)
            for (int t = 0; t < TOKENS; t++)
                found[i][t] = activated(sums[2 * i][t], act) * sums[2 * i + 1][t];
    } else {
        dots<KIND, 1, EACH, TOKENS>(rows, row, last, in, at.token, at.lane, lanes, found);
        for (int i = 0; i < EACH; i++) {
            float bias = act.bias ? act.bias[min(row + i, last)] : 0.0f;
            for (int t = 0; t < TOKENS; t++)
                found[i][t] = activated(act.bias ? found[i][t] + bias : found[i][t], act);
        }
    }
    if (at.lane)
        return;
    for (int i = 0; i < EACH && at.row + i < rows.count; i++)
        for (int t = 0; t < TOKENS && at.token + t < in.tokens; t++) {
            i64 to = (at.token + t) * rows.count + at.row + i;
            out[to] = mask ? found[i][t] * mask[to] : found[i][t];
        }
}

/* EACH: rows of a warp in `product`, of which gate_up with its two vectors takes half. With many tokens
 * they share what is read of activations. kernels/gpu_products.py knows these numbers. */
#define ROW_KERNELS(KIND, TOKENS, EACH, NEURONS)                                                   \
    extern "C" __global__ void m2c_product_##KIND##_##TOKENS(Matrices m, Inputs in, int lanes)     \
    {                                                                                              \
        product<KIND, EACH, TOKENS>(m, in, lanes);                                                 \
    }                                                                                              \
    extern "C" __global__ void m2c_gate_up_##KIND##_##TOKENS(                                      \
        Rows rows, Inputs in, Activation act, const float *mask, float *out, int lanes)            \
    {                                                                                              \
        gate_up<KIND, NEURONS, TOKENS>(rows, in, act, mask, out, lanes);                           \
    }
#define ROW_KERNELS_OF(KIND)                                                                       \
    ROW_KERNELS(KIND, 1, 1, 1)                                                                     \
    ROW_KERNELS(KIND, 4, 2, 1)                                                                     \
    ROW_KERNELS(KIND, 8, 4, 2)
ROW_KERNELS_OF(4)
ROW_KERNELS_OF(8)
ROW_KERNELS_OF(16)
