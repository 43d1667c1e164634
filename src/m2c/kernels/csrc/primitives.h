/* What one thread computes, once for every instruction set. */
#ifndef M2C_PRIMITIVES_H
#define M2C_PRIMITIVES_H

#include <stddef.h>
#include <stdint.h>

#define GROUP 32 /* weights that share a scale: 16 bytes of codes */
#define STRIPE 4 /* groups taken at a time: 64 bytes of codes */
#define STRIPE_VALUES (STRIPE * GROUP)
#define BATCH 16 /* groups whose scales are taken at a time */
#define ROWS_AT_ONCE 4
#define TILE 16 /* columns added at a time */

/* One vector of one row. Values are scale * (q - 8), at INT8 scale * (16 q + r - 136) / 16. */
struct codes {
    const uint8_t *q, *r; /* r is NULL at INT4 */
    const uint8_t *scales; /* F16, one a group */
    const struct codes *next; /* wanted soon: fetched into the second-level cache; or NULL */
};

/* Activations of `tokens` tokens, as f32 and as int8 with a scale per group.
 *
 * A stripe of int8 values is laid out as the codes are: the first 16 values of its four groups, then
 * the second 16. Scales and sums are padded with zeros to whole batches of groups. */
struct inputs {
    const float *x; /* [tokens, length] */
    const int8_t *values; /* [tokens, stripes * STRIPE_VALUES] */
    const float *scales; /* [tokens, batches * BATCH] */
    const float *sums; /* [tokens, batches * BATCH]: of the int8 values of a group */
    int32_t tokens;
};

/* y[t * y_stride + j] += sum over n of h[n * h_stride + t] * column n[j] */
struct sums_of {
    float *y;
    size_t y_stride;
    const float *h;
    size_t h_stride;
    int count, tokens; /* columns, up to TILE; tokens, any number */
    size_t ahead; /* AVX-512 fetches what lies so many bytes after a 16-bit column as well */
};

struct exact_record;
struct bits;
/* The weights of a record, [vectors * length] 16-bit patterns, escapes not yet put right. */
typedef void (*exact_unpack)(const struct exact_record *record, struct bits *bits, uint16_t *to);
void exact_unpack_scalar(const struct exact_record *record, struct bits *bits, uint16_t *to);
void exact_unpack_avx2(const struct exact_record *record, struct bits *bits, uint16_t *to);
void exact_unpack_avx512(const struct exact_record *record, struct bits *bits, uint16_t *to);

/* Keys or values of one head: [positions, dim] f16 or f32. */
struct cached {
    const void *at;
    int is_f16;
};

struct primitives {
    /* out[i * row_stride + t] = rows[i] . x[t], up to ROWS_AT_ONCE rows, any number of tokens */
    void (*dot_codes)(const struct codes *rows, int count, const struct inputs *in, int groups,
                      float *out, int64_t row_stride);
    /* the same for 16-bit rows; what lies ahead[0] and ahead[1] bytes further (0: nothing) is fetched
     * as well */
    void (*dot_wide)(const uint16_t *const *rows, int count, const struct inputs *in, int length,
                     int is_bf16, const size_t *ahead, float *out, int64_t row_stride);
    /* y += sum of h[n] * columns[n], up to TILE columns; y has whole stripes */
    void (*add_codes)(float *y, const struct codes *columns, const float *h, int count, int groups);
    void (*add_wide)(const struct sums_of *sums, const uint16_t *const *columns, int length,
                     int is_bf16);
    /* scores[p] = q . keys[p]; out = sum of weights[p] * values[p] */
    void (*scores)(float *scores, const float *q, struct cached keys, int positions, int dim);
    void (*mixed)(float *out, const float *weights, struct cached values, int positions, int dim);
    void (*to_half)(uint16_t *to, const float *from, int count);
    exact_unpack unpack;
};

extern const struct primitives primitives_scalar;
#if defined(__x86_64__)
extern const struct primitives primitives_avx2, primitives_avx512;
#endif

/* want: "auto", "scalar", "avx2" or "avx512"; sets the name of what was taken. NULL if this machine
 * cannot run it. */
const struct primitives *primitives_for(const char *want, const char **name);

/* The hardware reads ahead along one stream only, and not far enough; a few kilobytes ahead into the
 * second-level cache is what reaches the bandwidth of memory (BENCHMARKS.md, "Kernels"). */
static inline void fetch_line(const uint8_t *at)
{
    __builtin_prefetch(at, 0, 2);
}

static inline void fetch_wanted(const uint8_t *at, const size_t *ahead)
{
    fetch_line(at + ahead[0]);
    if (ahead[1])
        fetch_line(at + ahead[1]);
}

static inline void fetch_stripe(const struct codes *next, size_t stripe)
{
    if (!next)
        return;
    fetch_line(next->q + 64 * stripe);
    if (next->r)
        fetch_line(next->r + 64 * stripe);
}

static inline void fetch_scales(const struct codes *next, int groups)
{
    for (int at = 0; next && at < 2 * groups; at += 64)
        fetch_line(next->scales + at);
}

static inline int stripes_of(int groups)
{
    return (groups + STRIPE - 1) / STRIPE;
}

static inline int batches_of(int groups)
{
    return (groups + BATCH - 1) / BATCH;
}

#endif
