/* What all kernels share. Compiled at run time for the GPU that is there (kernels/nvrtc.py), as one
 * source: this file first. No headers of CUDA: they need not be installed.
 *
 * Every sum has one order, which depends on shapes alone: not on how many tokens share a call. So no
 * contraction (fmaf is written where it is meant) and no atomics.
 */

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define GROUP 32
#define WARP 32
#define ALL 0xffffffffu
#define NOT_A_NUMBER __int_as_float(0x7fc00000)
#define MINUS_INFINITY __int_as_float(0xff800000)

/* Rows in memory. kind: 4 or 8 (codes) or 16: `wide`. Mirrored by kernels/gpu_structs.py. */
struct Rows {
    const u8 *int4; /* records: codes of all vectors, then their FP16 scales */
    const u8 *int8; /* records: second codes */
    const u16 *wide; /* records: 16-bit weights */
    const int *index4, *index8; /* which records are the rows; null: all, as they lie */
    i64 count;
    int vectors, length, groups, kind, is_bf16;
    int aligned; /* groups of codes, or 8 wide weights, can be read at once */
};

/* Of a group of int8 activations. */
struct __align__(8) Scale {
    float step;
    int bias; /* the sum of the codes times what is added to stored codes */
};

/* Activations made ready for rows. Mirrored by kernels/gpu_structs.py. */
struct Inputs {
    const float *values; /* [tokens, length] */
    const i8 *codes; /* [tokens, 2, groups, GROUP / 2]: the first halves of groups, then the others */
    const Scale *scales; /* [tokens, groups] */
    int tokens, length;
};

/* Mirrored by kernels/gpu_structs.py. */
struct Activation {
    int kind;
    float threshold; /* of ACT_RELU: what is not above it gives zero */
    const float *bias; /* [rows], added where neurons have no gate; or null */
};
enum { ACT_SILU, ACT_RELU, ACT_GELU_TANH, ACT_GELU };

/* ---- numbers ---------------------------------------------------------------------------------- */

#ifdef __CUDACC__
__device__ __forceinline__ float half_value(u16 bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 half_bits(float value)
{
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

/* four signed bytes times four */
__device__ __forceinline__ int dot4(u32 a, u32 b, int sum)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 610
    return __dp4a((int)a, (int)b, sum);
#else
    for (int i = 0; i < 32; i += 8)
        sum += (int)(i8)(a >> i) * (int)(i8)(b >> i);
    return sum;
#endif
}

__device__ __forceinline__ float wide_value(u16 bits, int is_bf16)
{
    return is_bf16 ? __int_as_float((int)((u32)bits << 16)) : half_value(bits);
}

/* ---- memory ----------------------------------------------------------------------------------- */

struct __align__(16) Words {
    u32 at[4];
};

/* 16 bytes, or, where nothing is ALIGNED, as many at a multiple of 2. What is known when a loop is
 * compiled costs nothing in it. */
template <bool ALIGNED> __device__ __forceinline__ Words words_at(const u8 *at)
{
    if (ALIGNED)
        return *(const Words *)at;
    Words words;
    for (int i = 0; i < 4; i++) {
        const u16 *half = (const u16 *)at + 2 * i;
        words.at[i] = half[0] | (u32)half[1] << 16;
    }
    return words;
}

/* 8 wide weights, of which only `count` are there unless they can be read at once */
template <bool ALIGNED> __device__ __forceinline__ Words wides_at(const u16 *from, int count)
{
    if (ALIGNED)
        return *(const Words *)from;
    Words words = { { 0, 0, 0, 0 } };
    for (int i = 0; i < 8; i++)
        words.at[i / 2] |= (i < count ? (u32)from[i] : 0u) << 16 * (i % 2);
    return words;
}

__device__ __forceinline__ u16 wide_in(const Words &words, int i)
{
    return (u16)(words.at[i / 2] >> 16 * (i % 2));
}

template <bool ALIGNED> __device__ __forceinline__ u32 word_at(const u8 *at)
{
    if (ALIGNED)
        return *(const u32 *)at;
    const u16 *half = (const u16 *)at;
    return half[0] | (u32)half[1] << 16;
}

/* Codes of a group, or of 4 + 4 of its weights, as bytes: low nibbles, then high ones. 16 q + r with
 * INT8, as signed bytes; biased by 8 in either case. */
struct Pair {
    u32 low, high;
};

__device__ __forceinline__ Pair bytes4(u32 q)
{
    return { q & 0x0f0f0f0fu, q >> 4 & 0x0f0f0f0fu };
}

__device__ __forceinline__ Pair bytes8(u32 q, u32 r)
{
    return { ((q & 0x0f0f0f0fu) << 4 | (r & 0x0f0f0f0fu)) ^ 0x80808080u,
             ((q & 0xf0f0f0f0u) | (r >> 4 & 0x0f0f0f0fu)) ^ 0x80808080u };
}

__device__ __forceinline__ i64 code_nbytes(const Rows &r)
{
    return (i64)r.vectors * r.groups * (GROUP / 2);
}

struct Record {
    const u8 *q, *r; /* codes of a vector; r null at INT4 */
    const u8 *scales;
};

__device__ __forceinline__ Record record_of(const Rows &rows, i64 row, int vector)
{
    i64 nbytes = code_nbytes(rows), half = (i64)rows.groups * (GROUP / 2);
    i64 at4 = rows.index4 ? rows.index4[row] : row, at8 = rows.index8 ? rows.index8[row] : row;
    const u8 *q = rows.int4 + at4 * (nbytes + (i64)rows.vectors * rows.groups * 2);
    const u8 *r = rows.int8 ? rows.int8 + at8 * nbytes + vector * half : 0;
    return { q + vector * half, r, q + nbytes + (i64)vector * rows.groups * 2 };
}

__device__ __forceinline__ const u16 *wide_of(const Rows &rows, i64 row, int vector)
{
    return rows.wide + (row * rows.vectors + vector) * rows.length;
}

/* ---- sums over threads, in one order ------------------------------------------------------------ */

__device__ __forceinline__ float warp_sum(float value, int lanes)
{
    for (int other = lanes / 2; other; other /= 2)
        value += __shfl_xor_sync(ALL, value, other, WARP);
    return value;
}

__device__ __forceinline__ float warp_max(float value, int lanes)
{
    for (int other = lanes / 2; other; other /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL, value, other, WARP));
    return value;
}

/* of a block of whole warps, at most 32; for every thread */
__device__ __forceinline__ float block_sum(float value)
{
    __shared__ float of_warp[WARP];
    int warps = blockDim.x / WARP;
    value = warp_sum(value, WARP);
    __syncthreads();
    if (threadIdx.x % WARP == 0)
        of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < warps; i++)
        value += of_warp[i];
    return value;
}
