/* Down columns: the sum over neurons of activation times column. A block adds up PART neurons for
 * TILE outputs, a warp a share of them; then the parts are added in order. */

#define TILE 256 /* outputs of a block: 8 of each lane */
#define WARPS 8 /* of a block */
#define SHARE 16 /* neurons of a warp */
#define PART (WARPS * SHARE)

/* Code bytes biased by `bias` to their f32 values: the mantissa of 2^23 holds a byte. */
__device__ __forceinline__ float byte_value(u32 bytes, int i, float bias)
{
    return __int_as_float((int)(0x4b000000u | (bytes >> 8 * i & 0xffu))) - bias;
}

/* What a lane reads of a neuron: 8 weights of its column, 4 + 4 of a group or 8 in a row. */
struct Piece {
    Words words; /* codes q and r, or 16-bit weights */
    u16 scale;
};

template <int KIND>
__device__ __forceinline__ Piece piece_of(const Rows &rows, i64 row, int column)
{
    Piece piece;
    if (KIND == 16) {
        const u16 *from = wide_of(rows, row, rows.vectors - 1) + column;
        piece.words = wides_at(from, rows.length - column, rows.aligned);
    } else {
        Record record = record_of(rows, row, rows.vectors - 1);
        int at = column / GROUP * (GROUP / 2) + column % GROUP;
        piece.words.at[0] = word_at(record.q + at, rows.aligned);
        if (KIND == 8)
            piece.words.at[1] = word_at(record.r + at, rows.aligned);
        piece.scale = *(const u16 *)(record.scales + 2 * (column / GROUP));
    }
    return piece;
}

/* Its weights, to be multiplied with the scale that is returned. */
template <int KIND>
__device__ __forceinline__ float weights_in(const Piece &piece, int is_bf16, float (&w)[8])
{
    if (KIND == 16) {
        for (int i = 0; i < 8; i++)
            w[i] = wide_value(wide_in(piece.words, i), is_bf16);
        return 1.0f;
    }
    Pair bytes = bytes4(piece.words.at[0]);
    if (KIND == 8) {
        bytes = bytes8(piece.words.at[0], piece.words.at[1]);
        bytes.low ^= 0x80808080u;
        bytes.high ^= 0x80808080u;
    }
    const float bias = KIND == 8 ? 8388608.0f + 136.0f : 8388608.0f + 8.0f;
    for (int i = 0; i < 4; i++) {
        w[i] = byte_value(bytes.low, i, bias);
        w[4 + i] = byte_value(bytes.high, i, bias);
    }
    return half_value(piece.scale) * (KIND == 8 ? 0.0625f : 1.0f);
}

/* partial[part, t, column] of activations [tokens, rows.count], tokens [first, first + tokens) */
template <int KIND, int TOKENS>
__device__ __forceinline__ void columns(const Rows &rows, const float *activations, int first,
                                        int tokens, int tiles, float *partial)
{
    const int held = TOKENS < 4 ? TOKENS : 4; /* tokens that have room at a time */
    const int batch = TOKENS == 1 ? 8 : 4; /* neurons that are read together */
    __shared__ float shares[WARPS][held][TILE], factors[TOKENS][PART];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int token_tiles = (tokens + TOKENS - 1) / TOKENS;
    int token = blockIdx.x % token_tiles * TOKENS, tile = blockIdx.x / token_tiles % tiles;
    i64 chunk = blockIdx.x / token_tiles / tiles, begin = chunk * PART;
    for (int i = threadIdx.x; i < TOKENS * PART; i += blockDim.x) {
        i64 row = begin + i % PART, at = first + min(token + i / PART, tokens - 1);
        factors[i / PART][i % PART] = row < rows.count ? activations[at * rows.count + row] : 0.0f;
    }
    __syncthreads();
    int column = KIND == 16 ? tile * TILE + lane * 8 : (tile * 8 + lane / 4) * GROUP + lane % 4 * 4;
    int limit = KIND == 16 ? rows.length : rows.groups * GROUP;
    int there = column < limit ? column : KIND == 16 ? 0 : lane % 4 * 4; /* what others write */
    float sums[TOKENS][8];
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < 8; i++)
            sums[t][i] = 0;
    begin += warp * SHARE;
    for (int n = 0; n < SHARE && begin + n < rows.count; n += batch) {
        Piece pieces[batch];
        for (int b = 0; b < batch; b++)
            pieces[b] = piece_of<KIND>(rows, min(begin + n + b, rows.count - 1), there);
        for (int b = 0; b < batch; b++) {
            float w[8], scale = weights_in<KIND>(pieces[b], rows.is_bf16, w);
            for (int t = 0; t < TOKENS; t++) {
                float a = factors[t][warp * SHARE + n + b] * scale;
                for (int i = 0; i < 8; i++)
                    sums[t][i] = fmaf(w[i], a, sums[t][i]);
            }
        }
    }
    int within = column - tile * TILE;
    column = tile * TILE + threadIdx.x;
    for (int from = 0; from < TOKENS; from += held) {
        for (int t = 0; t < held; t++)
            for (int i = 0; i < 8; i++) {
                int apart = KIND == 16 || i < 4 ? i : i - 4 + GROUP / 2;
                shares[warp][t][within + apart] = sums[from + t][i];
            }
        __syncthreads();
        for (int t = 0; t < held && token + from + t < tokens && column < rows.length; t++) {
            float sum = 0;
            for (int i = 0; i < WARPS; i++)
                sum += shares[i][t][threadIdx.x];
            partial[(chunk * tokens + token + from + t) * rows.length + column] = sum;
        }
        __syncthreads();
    }
}

#define COLUMN_KERNEL(KIND, TOKENS)                                                                \
    extern "C" __global__ void m2c_columns_##KIND##_##TOKENS(                                      \
        Rows rows, const float *activations, int first, int tokens, int tiles, float *partial)     \
    {                                                                                              \
        columns<KIND, TOKENS>(rows, activations, first, tokens, tiles, partial);                   \
    }
#define COLUMN_KERNELS_OF(KIND)                                                                    \
    COLUMN_KERNEL(KIND, 1)                                                                         \
    COLUMN_KERNEL(KIND, 4)                                                                         \
    COLUMN_KERNEL(KIND, 8)
COLUMN_KERNELS_OF(4)
COLUMN_KERNELS_OF(8)
COLUMN_KERNELS_OF(16)

/* into[i] += partial[0, i], += partial[1, i], ...: `size` outputs of all tokens */
extern "C" __global__ void m2c_add_chunks(const float *partial, int chunks, i64 size, float *into)
{
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size)
        return;
    float sum = into[i];
    for (int chunk = 0; chunk < chunks; chunk++)
        sum += partial[chunk * size + i];
    into[i] = sum;
}
