/* The exact plane: weights from their codes and the bit-planes of their offsets. docs/FORMAT.md, "The
 * exact plane"; csrc/exact.h is the same for a CPU. All products are exact in f32. */

/* Frames of consecutive rows. Mirrored by kernels/gpu_structs.py. */
struct Frames {
    const u8 *data;
    const i64 *at; /* [frames + 1]: where each begins */
    const u32 *escapes; /* [frames] */
    i64 records; /* of a frame; the last may be short */
};

#define ESCAPE_NBYTES 6 /* u32 position in the frame, u16 the weight */
#define ABOVE 5 /* half steps that the intervals of r = 7 and r = -8 reach further, away from q */
#define BELOW 3

/* the largest F16 or BF16 not above v >= 0, finite */
__device__ __forceinline__ u32 bits_below(float v, int is_bf16)
{
    u32 bits = (u32)__float_as_int(v);
    if (is_bf16)
        return bits >> 16;
    if (bits >= 0x47800000u)
        return 0x7bff;
    return bits < 0x38800000u ? (u32)(v * 16777216.0f) : (bits - 0x38000000u) >> 13;
}

/* the smallest F16 or BF16 not below v >= 0 */
__device__ __forceinline__ u32 bits_above(float v, int is_bf16)
{
    u32 bits = (u32)__float_as_int(v);
    if (is_bf16)
        return (bits + 0xffffu) >> 16;
    if (bits > 0x477fe000u)
        return 0x7c00;
    if (bits >= 0x38800000u)
        return (bits - 0x38000000u + 0x1fffu) >> 13;
    float units = v * 16777216.0f;
    u32 whole = (u32)units;
    return whole + ((float)whole < units);
}

/* What one lane knows of its weight of a group. */
struct Coded {
    int code, width; /* 16 q + r; bits of the offset */
    u32 low;
    bool negative;
};

__device__ __forceinline__ Coded coded(const u8 *q, const u8 *r, u16 scale, int is_bf16, int lane,
                                       bool padding)
{
    int shift = lane < 16 ? 0 : 4, fine = r[lane & 15] >> shift & 15;
    int code = 16 * (q[lane & 15] >> shift & 15) + fine - 136;
    float unit = __int_as_float((int)(scale & 0x7fffu) << 13) * 1.6225927682921336e32f; /* 2^107 */
    int size = code < 0 ? -code : code, up = fine == 15 ? ABOVE : 0, down = fine ? 0 : BELOW;
    int from = size ? 2 * size - 1 - (code < 0 ? up : down) : 0;
    int to = 2 * size + 1 + (code < 0 ? down : up);
    u32 low = size ? bits_above(unit * (float)from, is_bf16) : 0;
    u32 high = bits_below(unit * (float)to, is_bf16);
    u32 last = size ? high > low ? high - low : 0 : 2 * high + 1;
    return { code, padding || !last ? 0 : 32 - __clz((int)last), low,
             (code < 0) != (scale > 0x7fff) };
}

__device__ __forceinline__ u16 weight_of(const Coded &c, u32 offset)
{
    if (!c.code)
        return (u16)(offset >> 1 | offset << 15);
    return (u16)((c.low + offset) & 0xffffu) | (u16)(c.negative << 15);
}

/* positions of bits in a frame fit an int: most frames have 2^14 weights, none 2^26 */
__device__ __forceinline__ u32 bit_at(const u8 *data, int bit, int end)
{
    return bit < end ? data[bit >> 3] >> (bit & 7) & 1 : 0;
}

/* Two groups of a row, the second of which may not be there: a lane's weight of each, and where in the
 * row it goes, or -1. */
struct CodedPair {
    Coded of[2];
    int place[2];
};

__device__ __forceinline__ CodedPair pair_of(const Rows &rows, i64 row, int g, int lane)
{
    CodedPair pair;
    Record record = record_of(rows, row, 0);
    int groups = rows.vectors * rows.groups;
    for (int h = 0; h < 2; h++) {
        int own = (g + h) % rows.groups * GROUP + lane;
        bool padding = g + h == groups || own >= rows.length;
        int at = g + h == groups ? g : g + h; /* the last may be alone */
        pair.of[h] = coded(record.q + 16 * at, record.r + 16 * at,
                           *(const u16 *)(record.scales + 2 * at), rows.is_bf16, lane, padding);
        pair.place[h] = padding ? -1 : (g + h) / rows.groups * rows.length + own;
    }
    return pair;
}

/* The weights of a pair, whose offsets begin at bit `next`; where the pair after it begins. */
__device__ __forceinline__ int decode_pair(const CodedPair &pair, const u8 *data, int next, int end,
                                           int lane, u16 *to)
{
    const Coded *c = pair.of;
    u32 before = (1u << lane) - 1, offset[2] = { 0, 0 };
    int widest = max(c[0].width, c[1].width);
    for (int other = WARP / 2; other; other /= 2)
        widest = max(widest, __shfl_xor_sync(ALL, widest, other, WARP));
#pragma unroll 4 /* loads of several planes under way */
    for (int k = 0; k < widest; k++) {
        u32 low = __ballot_sync(ALL, c[0].width > k), high = __ballot_sync(ALL, c[1].width > k);
        if (c[0].width > k)
            offset[0] |= bit_at(data, next + __popc(low & before), end) << k;
        next += __popc(low);
        if (c[1].width > k)
            offset[1] |= bit_at(data, next + __popc(high & before), end) << k;
        next += __popc(high);
    }
    for (int h = 0; h < 2; h++)
        if (pair.place[h] >= 0)
            to[pair.place[h]] = weight_of(c[h], offset[h]);
    return next;
}

/* Puts the listed weights in their places; whether one of them is out of place. */
__device__ __forceinline__ bool escapes_are_bad(const u8 *list, int listed, i64 weights, int lane,
                                                u16 *to)
{
    bool bad = false;
    for (int i = lane; i < listed; i += WARP) {
        const u8 *at = list + (i64)ESCAPE_NBYTES * i, *earlier = at - ESCAPE_NBYTES;
        u32 position = at[0] | at[1] << 8 | at[2] << 16 | (u32)at[3] << 24;
        bool rises = !i || position > (earlier[0] | earlier[1] << 8 | earlier[2] << 16
                                       | (u32)earlier[3] << 24);
        if (position < weights && rises)
            to[position] = (u16)(at[4] | at[5] << 8);
        else
            bad = true;
    }
    return bad;
}

/* `share` warps of a block a frame: each takes some of its pairs, and counts the bits of those first,
 * so that the others know where theirs begin. wide [rows, vectors * length]; `damaged` is set where a
 * frame is not as long as its codes and escapes give, or an escape is out of place. */
extern "C" __global__ void m2c_decode(Rows rows, Frames frames, int share, u16 *wide, int *damaged)
{
    __shared__ int bits[WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rank = warp % share;
    i64 frame = ((i64)blockIdx.x * (blockDim.x / WARP) + warp) / share, first = frame * frames.records;
    i64 count = max((i64)0, min(frames.records, rows.count - first));
    int pairs = (rows.vectors * rows.groups + 1) / 2;
    int from = (int)(count * pairs * rank / share), stop = (int)(count * pairs * (rank + 1) / share);
    i64 each = (i64)rows.vectors * rows.length;
    int next = 0;
    if (share > 1) {
        int mine = 0;
        for (int i = from; i < stop; i++) {
            CodedPair pair = pair_of(rows, first + i / pairs, i % pairs * 2, lane);
            mine += pair.of[0].width + pair.of[1].width;
        }
        for (int other = WARP / 2; other; other /= 2)
            mine += __shfl_xor_sync(ALL, mine, other, WARP);
        if (!lane)
            bits[warp] = mine;
        __syncthreads();
        for (int i = warp - rank; i < warp; i++)
            next += bits[i];
    }
    u16 *to = wide + first * each;
    const u8 *data = 0, *list = 0;
    int nbytes = 0, listed = 0;
    if (count) {
        data = frames.data + frames.at[frame];
        nbytes = (int)(frames.at[frame + 1] - frames.at[frame]);
        listed = (int)frames.escapes[frame];
        list = data + nbytes - (i64)ESCAPE_NBYTES * listed;
        for (int i = from; i < stop; i++) {
            int row = i / pairs;
            CodedPair pair = pair_of(rows, first + row, i % pairs * 2, lane);
            next = decode_pair(pair, data, next, 8 * (nbytes - ESCAPE_NBYTES * listed), lane,
                               to + row * each);
        }
    }
    if (share > 1)
        __syncthreads(); /* escapes come after what they replace */
    __syncwarp(ALL);
    if (!count || rank != share - 1) /* the last knows how many bits there are */
        return;
    bool bad = (next + 7) / 8 + ESCAPE_NBYTES * listed != nbytes;
    if (bad || escapes_are_bad(list, listed, count * each, lane, to))
        *damaged = 1;
}
