/* Down columns: the sum over neurons of activation times column. A block adds up CHUNK neurons for
 * 256 outputs, a warp a part of them; then the chunks are added in order. */

#define TILE 256 /* outputs of a block: 8 of each lane */
#define WARPS 8 /* of a block, CHUNK / WARPS neurons each */
#define SHARE (CHUNK / WARPS)

/* Code bytes biased by `bias` to their f32 values: the mantissa of 2^23 holds a byte. */
__device__ __forceinline__ float byte_value(u32 bytes, int i, float bias)
{
    return __int_as_float((int)(0x4b000000u | (bytes >> 8 * i & 0xffu))) - bias;
}

/* 8 weights of a column: 4 + 4 of a group. */
template <int KIND>
__device__ __forceinline__ void column_codes(const Rows &rows, i64 row, int group, int word,
                                             float (&w)[8], float &scale)
{
    Record record = record_of(rows, row, rows.vectors - 1);
    u32 q = word_at(record.q + 16 * group + 4 * word, rows.aligned);
    Pair bytes;
    if (KIND == 8) {
        bytes = bytes8(q, word_at(record.r + 16 * group + 4 * word, rows.aligned));
        bytes.low ^= 0x80808080u;
        bytes.high ^= 0x80808080u;
    } else {
        bytes = bytes4(q);
    }
    const float bias = KIND == 8 ? 8388608.0f + 136.0f : 8388608.0f + 8.0f;
    for (int i = 0; i < 4; i++) {
        w[i] = byte_value(bytes.low, i, bias);
        w[4 + i] = byte_value(bytes.high, i, bias);
    }
    scale = half_value(*(const u16 *)(record.scales + 2 * group)) * (KIND == 8 ? 0.0625f : 1.0f);
}

__device__ __forceinline__ void column_wide(const Rows &rows, i64 row, int column, float (&w)[8])
{
    const u16 *from = wide_of(rows, row, rows.vectors - 1) + column;
    Words bits = wides_at(from, rows.length - column, rows.aligned);
    for (int i = 0; i < 8; i++)
        w[i] = wide_value(wide_in(bits, i), rows.is_bf16);
}

/* partial[chunk, t, column] of activations [tokens, rows.count], tokens [first, first + tokens) */
template <int KIND, int TOKENS>
__device__ __forceinline__ void columns(const Rows &rows, const float *activations, int first,
                                        int tokens, int tiles, float *partial)
{
    __shared__ float shares[WARPS][TOKENS][TILE];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int token_tiles = (tokens + TOKENS - 1) / TOKENS;
    int token = blockIdx.x % token_tiles * TOKENS, tile = blockIdx.x / token_tiles % tiles;
    i64 chunk = blockIdx.x / token_tiles / tiles;
    int column = KIND == 16 ? tile * TILE + lane * 8 : (tile * 8 + lane / 4) * GROUP + lane % 4 * 4;
    bool there = column < rows.groups * GROUP && (KIND != 16 || column < rows.length);
    float sums[TOKENS][8];
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < 8; i++)
            sums[t][i] = 0;
    i64 begin = chunk * CHUNK + warp * SHARE;
    int count = (int)min((i64)SHARE, rows.count - begin);
#pragma unroll 4
    for (int n = 0; n < count; n++) {
        if (!there)
            continue;
        float w[8], scale = 1;
        if (KIND == 16)
            column_wide(rows, begin + n, column, w);
        else
            column_codes<KIND == 16 ? 4 : KIND>(rows, begin + n, column / GROUP, lane % 4, w, scale);
        for (int t = 0; t < TOKENS; t++) {
            i64 at = first + min(token + t, tokens - 1);
            float a = activations[at * rows.count + begin + n] * scale;
            for (int i = 0; i < 8; i++)
                sums[t][i] = fmaf(w[i], a, sums[t][i]);
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < 8; i++) {
            int apart = KIND == 16 || i < 4 ? i : i - 4 + GROUP / 2;
            shares[warp][t][column - tile * TILE + apart] = sums[t][i];
        }
    __syncthreads();
    column = tile * TILE + threadIdx.x;
    if (column >= rows.length)
        return;
    for (int t = 0; t < TOKENS && token + t < tokens; t++) {
        float sum = 0;
        for (int i = 0; i < WARPS; i++)
            sum += shares[i][t][threadIdx.x];
        partial[(chunk * tokens + token + t) * rows.length + column] = sum;
    }
}

#define COLUMN_KERNEL(KIND, TOKENS)                                                                \
    extern "C" __global__ void m2c_columns_##KIND##_##TOKENS(                                      \
        Rows rows, const float *activations, int first, int tokens, int tiles, float *partial)     \
    {                                                                                              \
        columns<KIND, TOKENS>(rows, activations, first, tokens, tiles, partial);                   \
    }
COLUMN_KERNEL(4, 1)
COLUMN_KERNEL(4, 4)
COLUMN_KERNEL(8, 1)
COLUMN_KERNEL(8, 4)
COLUMN_KERNEL(16, 1)
COLUMN_KERNEL(16, 4)

/* into[i] += partial[0, i], += partial[1, i], ...: `size` outputs of all tokens. bias [length] or null
 * is added last. */
extern "C" __global__ void m2c_add_chunks(const float *partial, int chunks, i64 size, float *into,
                                          const float *bias, int length)
{
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size)
        return;
    float sum = into[i];
    for (int chunk = 0; chunk < chunks; chunk++)
        sum += partial[chunk * size + i];
    into[i] = bias ? sum + bias[i % length] : sum;
}
