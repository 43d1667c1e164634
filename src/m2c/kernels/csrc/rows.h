/* Rows, activations, and what rows.c and ffn.c share. */
#ifndef M2C_ROWS_H
#define M2C_ROWS_H

#include <math.h>

#include "pool.h"
#include "primitives.h"

/* An instruction set and the threads that use it. */
struct kernels {
    const struct primitives *use;
    const char *name;
    struct pool *pool;
};

/* Rows in memory. kind: 4 or 8 (codes), or 16. Mirrored by kernels/native.py. */
struct rows {
    const uint8_t *int4; /* records: codes of all vectors, then their FP16 scales */
    const uint8_t *int8; /* records: second codes; NULL unless kind is 8 */
    const uint16_t *wide; /* records: 16-bit weights, kind 16 */
    const int32_t *index4, *index8; /* which records are the rows; NULL: all, as they lie */
    int64_t count;
    int32_t vectors, length, groups;
    int32_t kind, is_bf16;
    const struct primitives *use; /* set by the entry points */
};

/* Activations of `tokens` tokens: f32, and as int8 with a scale and a sum per group. */
struct inputs {
    const float *x; /* [tokens, length] */
    const int8_t *xq; /* [tokens, groups * GROUP] */
    const float *xs; /* [tokens, groups] */
    const float *xsum; /* [tokens, groups]: sum of the int8 values */
    int32_t tokens;
};

static inline size_t code_nbytes(const struct rows *r)
{
    return (size_t)r->vectors * r->groups * (GROUP / 2);
}

static inline const uint8_t *record4(const struct rows *r, int64_t row)
{
    size_t at = (size_t)(r->index4 ? r->index4[row] : row);
    return r->int4 + at * (code_nbytes(r) + (size_t)r->vectors * r->groups * 2);
}

static inline const uint8_t *record8(const struct rows *r, int64_t row)
{
    return r->int8 + (size_t)(r->index8 ? r->index8[row] : row) * code_nbytes(r);
}

static inline void prefetch(const uint8_t *at, size_t nbytes)
{
    for (size_t i = 0; i < nbytes; i += 64)
        __builtin_prefetch(at + i);
}

static inline float activate(float gate, float up, int relu)
{
    return (relu ? (gate > 0 ? gate : 0) : gate / (1.0f + expf(-gate))) * up;
}

static inline void share(int64_t count, int part, int parts, int64_t *start, int64_t *stop)
{
    *start = count * part / parts;
    *stop = count * (part + 1) / parts;
}

/* out[t] = row . x[t] for one vector of one row; ss: room for `groups` floats */
void dot_row(const struct rows *r, const struct inputs *in, int64_t row, int vector, float *ss,
             float *out, int64_t out_stride);

#endif
