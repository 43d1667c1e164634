/* Packed rows times activations: the kernels of m2c in C, chosen by instruction set at run time.
 *
 * Every function equals its torch reference (kernels/reference.py) up to the rounding of activations
 * to int8 per group of 32, and gives the same bits for any number of threads and of tokens: each
 * output is summed by one thread in one order. docs/DESIGN.md, section 6.
 *
 * Knows nothing about files, layers or which neurons a token wants.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define GROUP 32

/* One down column, or a part of it. */
struct column {
    const uint8_t *q, *r; /* r is NULL at INT4 */
    const float *scales; /* of its groups, times the neuron's activation */
    ptrdiff_t ahead; /* from q to the same place in the next column */
};

struct primitives {
    float (*dot4)(const uint8_t *, const uint8_t *, const float *, const int8_t *, int);
    float (*dot8)(const uint8_t *, const uint8_t *, const uint8_t *, const float *, const int8_t *,
                  int);
    float (*dot16)(const uint16_t *, const float *, int, int);
    void (*axpy16)(float *, const uint16_t *, float, int, int);
    void (*axpy_codes)(float *, const struct column *, int, int);
    void (*scaled)(float *, const uint8_t *, float, int);
    void (*scale_products)(float *, const uint8_t *, const float *, int);
    float (*dot_f32)(const float *, const float *, int);
};

#define M2C_ISA 0
#include "isa.inc.c"
#if defined(__x86_64__)
#define M2C_ISA 1
#include "isa.inc.c"
#define M2C_ISA 2
#include "isa.inc.c"
#endif

/* An instruction set and the threads that use it. */
struct kernels {
    const struct primitives *use;
    const char *name;
    struct pool *pool;
};

static int choose(struct kernels *k, const char *want)
{
    int any = !strcmp(want, "auto");
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
               && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (avx512 && (any || !strcmp(want, "avx512"))) {
        k->use = &primitives_avx512;
        k->name = "avx512";
        return 1;
    }
    if (avx2 && (any || !strcmp(want, "avx2"))) {
        k->use = &primitives_avx2;
        k->name = "avx2";
        return 1;
    }
#endif
    k->use = &primitives_scalar;
    k->name = "scalar";
    return any || !strcmp(want, "scalar");
}

/* want: "auto", "scalar", "avx2" or "avx512". NULL if this machine cannot run it or has no memory. */
struct kernels *m2c_open(const char *want, int threads)
{
    struct kernels *k = calloc(1, sizeof(*k));
    if (!k || !choose(k, want) || !(k->pool = m2c_pool_new(threads))) {
        free(k);
        return NULL;
    }
    return k;
}

const char *m2c_name(const struct kernels *k)
{
    return k->name;
}

void m2c_close(struct kernels *k)
{
    if (k)
        m2c_pool_free(k->pool);
    free(k);
}

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

/* Activations of `tokens` tokens: f32, and as int8 with a scale and a scaled sum per group. */
struct inputs {
    const float *x; /* [tokens, length] */
    const int8_t *xq; /* [tokens, groups * GROUP] */
    const float *xs; /* [tokens, groups] */
    const float *xsum; /* [tokens, groups]: sum of the int8 values */
    int32_t tokens;
};

static size_t code_nbytes(const struct rows *r)
{
    return (size_t)r->vectors * r->groups * (GROUP / 2);
}

static const uint8_t *record4(const struct rows *r, int64_t row)
{
    size_t at = (size_t)(r->index4 ? r->index4[row] : row);
    return r->int4 + at * (code_nbytes(r) + (size_t)r->vectors * r->groups * 2);
}

static const uint8_t *record8(const struct rows *r, int64_t row)
{
    return r->int8 + (size_t)(r->index8 ? r->index8[row] : row) * code_nbytes(r);
}

static inline void prefetch(const uint8_t *at, size_t nbytes)
{
    for (size_t i = 0; i < nbytes; i += 64)
        __builtin_prefetch(at + i);
}

/* out[t] = row . x[t] for one vector of one row */
static void dot_row(const struct rows *r, const struct inputs *in, int64_t row, int vector,
                    float *ss, float *out, int64_t out_stride)
{
    if (r->kind == 16) {
        const uint16_t *w = r->wide + ((size_t)row * r->vectors + vector) * r->length;
        for (int t = 0; t < in->tokens; t++)
            out[t * out_stride] = r->use->dot16(w, in->x + (size_t)t * r->length, r->length,
                                                r->is_bf16);
        return;
    }
    size_t half = (size_t)r->groups * (GROUP / 2);
    const uint8_t *record = record4(r, row);
    const uint8_t *scales = record + code_nbytes(r) + (size_t)vector * r->groups * 2;
    const uint8_t *q = record + vector * half;
    /* what the hardware cannot guess: where the next chosen row starts */
    const uint8_t *later = record4(r, row + 1 < r->count ? row + 1 : row);
    const uint8_t *next = later + vector * half;
    prefetch(later + (scales - record), (size_t)r->groups * 2);
    for (int t = 0; t < in->tokens; t++) {
        const int8_t *xq = in->xq + (size_t)t * r->groups * GROUP;
        r->use->scale_products(ss, scales, in->xs + (size_t)t * r->groups, r->groups);
        float biased, offset = r->use->dot_f32(ss, in->xsum + (size_t)t * r->groups, r->groups);
        if (r->kind == 4) {
            biased = r->use->dot4(q, next, ss, xq, r->groups) - 8.0f * offset;
        } else {
            const uint8_t *r8 = record8(r, row) + vector * half;
            biased = 0.0625f * (r->use->dot8(q, r8, next, ss, xq, r->groups) - 136.0f * offset);
        }
        out[t * out_stride] = biased;
    }
}

struct call {
    const struct rows *rows;
    const struct inputs *in;
    float *out; /* [tokens, rows] or [tokens, hidden] */
    const float *weights; /* [tokens, rows]: activations for down */
    int relu;
};

static void share(int64_t count, int part, int parts, int64_t *start, int64_t *stop)
{
    *start = count * part / parts;
    *stop = count * (part + 1) / parts;
}

static void matmul_part(void *context, int part, int parts)
{
    const struct call *c = context;
    const struct rows *r = c->rows;
    float ss[r->groups + 1];
    int64_t start, stop;
    share(r->count, part, parts, &start, &stop);
    for (int64_t i = start; i < stop; i++) {
        dot_row(r, c->in, i, 0, ss, c->out + i, r->count);
    }
}

static float activate(float gate, float up, int relu)
{
    return (relu ? (gate > 0 ? gate : 0) : gate / (1.0f + expf(-gate))) * up;
}

static void gate_up_part(void *context, int part, int parts)
{
    const struct call *c = context;
    const struct rows *r = c->rows;
    int tokens = c->in->tokens;
    float ss[r->groups + 1], gate[tokens], up[tokens];
    int64_t start, stop;
    share(r->count, part, parts, &start, &stop);
    for (int64_t i = start; i < stop; i++) {
        dot_row(r, c->in, i, 0, ss, gate, 1);
        dot_row(r, c->in, i, 1, ss, up, 1);
        for (int t = 0; t < tokens; t++) {
            c->out[(size_t)t * r->count + i] = activate(gate[t], up[t], c->relu);
        }
    }
}

static void down_wide(const struct rows *r, const float *h, float *y, int first, int columns)
{
    for (int64_t i = 0; i < r->count; i++) {
        const uint16_t *w = r->wide + ((size_t)i * r->vectors + r->vectors - 1) * r->length;
        if (h[i] != 0)
            r->use->axpy16(y, w + first, h[i], columns, r->is_bf16);
    }
}

/* A few neurons at a time, so that y is loaded and stored once for all of them. */
#define AT_ONCE 4
static void down_codes(const struct rows *r, const float *h, float *y, int first, int groups)
{
    int vector = r->vectors - 1, held = 0;
    float scales[AT_ONCE][groups], step = r->kind == 8 ? 0.0625f : 1.0f;
    struct column columns[AT_ONCE];
    size_t at = (size_t)(vector * r->groups + first) * (GROUP / 2);
    for (int64_t i = 0; i < r->count; i++) {
        if (h[i] == 0)
            continue;
        const uint8_t *record = record4(r, i);
        r->use->scaled(scales[held], record + code_nbytes(r) + (vector * r->groups + first) * 2,
                       h[i] * step, groups);
        int64_t later = i + AT_ONCE < r->count ? i + AT_ONCE : i;
        prefetch(record4(r, later) + code_nbytes(r) + (vector * r->groups + first) * 2,
                 (size_t)groups * 2);
        columns[held] = (struct column){ record + at, r->kind == 8 ? record8(r, i) + at : NULL,
                                         scales[held], record4(r, later) - record };
        if (++held == AT_ONCE) {
            r->use->axpy_codes(y, columns, held, groups);
            held = 0;
        }
    }
    r->use->axpy_codes(y, columns, held, groups);
}

/* Columns are shared out, so that every output is summed over neurons in order by one thread. */
static void down_part(void *context, int part, int parts)
{
    const struct call *c = context;
    const struct rows *r = c->rows;
    int64_t first, last;
    share(r->groups, part, parts, &first, &last);
    int columns = (int)(last * GROUP < r->length ? last * GROUP : r->length) - (int)first * GROUP;
    if (columns <= 0)
        return;
    float y[(last - first) * GROUP];
    for (int t = 0; t < c->in->tokens; t++) {
        const float *h = c->weights + (size_t)t * r->count;
        float *out = c->out + (size_t)t * r->length + first * GROUP;
        memset(y, 0, sizeof(y));
        memcpy(y, out, (size_t)columns * sizeof(float));
        if (r->kind == 16)
            down_wide(r, h, y, (int)first * GROUP, columns);
        else
            down_codes(r, h, y, (int)first, (int)(last - first));
        memcpy(out, y, (size_t)columns * sizeof(float));
    }
}

/* The whole FFN of some neurons: one pass over each record, gate and up, then its down column.
 *
 * Neurons are summed in chunks of CHUNK and the chunks in order, whoever computed them. A wave of
 * chunks is computed at a time, so that partial sums stay small. */
#define CHUNK 256
#define CHUNKS_PER_THREAD 4

struct ffn_call {
    const struct rows *rows;
    const struct inputs *in;
    const float *mask; /* [tokens, rows] or NULL */
    int relu;
    int64_t first, chunks; /* of this wave */
    float *partial; /* [chunks, tokens, groups * GROUP] */
};

/* y[t] += h[k][t] * down column of neuron i + k, for `held` neurons */
static void flush_columns(const struct rows *r, int64_t i, int held, int tokens, const float *h,
                          float *y, float *scales)
{
    int vector = r->vectors - 1;
    size_t at = (size_t)vector * r->groups * (GROUP / 2);
    float step = r->kind == 8 ? 0.0625f : 1.0f;
    for (int t = 0; t < tokens; t++, y += (size_t)r->groups * GROUP) {
        struct column columns[AT_ONCE];
        int count = 0;
        for (int k = 0; k < held; k++) {
            float value = h[k * tokens + t];
            if (value == 0)
                continue;
            if (r->kind == 16) {
                const uint16_t *w = r->wide + ((size_t)(i + k) * r->vectors + vector) * r->length;
                r->use->axpy16(y, w, value, r->length, r->is_bf16);
                continue;
            }
            const uint8_t *record = record4(r, i + k);
            float *own = scales + (size_t)count * r->groups;
            r->use->scaled(own, record + code_nbytes(r) + (size_t)vector * r->groups * 2,
                           value * step, r->groups);
            columns[count++] = (struct column){
                record + at, r->kind == 8 ? record8(r, i + k) + at : NULL, own, 0
            };
        }
        if (count)
            r->use->axpy_codes(y, columns, count, r->groups);
    }
}

static void ffn_part(void *context, int part, int parts)
{
    const struct ffn_call *c = context;
    const struct rows *r = c->rows;
    int tokens = c->in->tokens;
    size_t padded = (size_t)r->groups * GROUP;
    float ss[r->groups + 1], scales[AT_ONCE * r->groups], gate[tokens], up[tokens];
    float h[AT_ONCE * tokens];
    for (int64_t k = part; k < c->chunks; k += parts) {
        float *y = c->partial + (size_t)k * tokens * padded;
        int64_t start = (c->first + k) * CHUNK;
        int64_t stop = start + CHUNK < r->count ? start + CHUNK : r->count;
        memset(y, 0, tokens * padded * sizeof(float));
        for (int64_t i = start; i < stop; i += AT_ONCE) {
            int held = (int)(stop - i < AT_ONCE ? stop - i : AT_ONCE);
            for (int n = 0; n < held; n++) {
                dot_row(r, c->in, i + n, 0, ss, gate, 1);
                dot_row(r, c->in, i + n, 1, ss, up, 1);
                for (int t = 0; t < tokens; t++) {
                    float value = activate(gate[t], up[t], c->relu);
                    if (c->mask)
                        value *= c->mask[(size_t)t * r->count + i + n];
                    h[n * tokens + t] = value;
                }
            }
            flush_columns(r, i, held, tokens, h, y, scales);
        }
    }
}

/* int8 activations: x = xs * xq to within half a step of the largest in each group */
void m2c_quantize(const float *x, int32_t tokens, int32_t length, int32_t groups, int8_t *xq,
                  float *xs, float *xsum)
{
    for (int32_t t = 0; t < tokens; t++) {
        for (int32_t g = 0; g < groups; g++) {
            float largest = 0, total = 0;
            int sum = 0, stop = length - g * GROUP < GROUP ? length - g * GROUP : GROUP;
            const float *from = x + (size_t)t * length + g * GROUP;
            int8_t *to = xq + ((size_t)t * groups + g) * GROUP;
            for (int j = 0; j < stop; j++)
                largest = fmaxf(largest, fabsf(from[j])), total += fabsf(from[j]);
            /* a sum is finite only if all its terms are; NaN must not be rounded away */
            int finite = isfinite(total), usable = finite && largest > 1e-30f;
            float inverse = usable ? 127.0f / largest : 0;
            for (int j = 0; j < GROUP; j++) {
                int value = j < stop && usable ? (int)lrintf(from[j] * inverse) : 0;
                to[j] = (int8_t)value;
                sum += value;
            }
            xs[(size_t)t * groups + g] = finite ? largest / 127.0f : NAN;
            xsum[(size_t)t * groups + g] = (float)sum;
        }
    }
}

void m2c_matmul(struct kernels *k, struct rows *rows, const struct inputs *in, float *out)
{
    struct call c = { rows, in, out, NULL, 0 };
    rows->use = k->use;
    pool_run(k->pool, matmul_part, &c);
}

void m2c_gate_up(struct kernels *k, struct rows *rows, const struct inputs *in, int relu,
                 float *out)
{
    struct call c = { rows, in, out, NULL, relu };
    rows->use = k->use;
    pool_run(k->pool, gate_up_part, &c);
}

/* adds to what is in `out` */
void m2c_down(struct kernels *k, struct rows *rows, const float *activations, int32_t tokens,
              float *out)
{
    struct inputs in = { NULL, NULL, NULL, NULL, tokens };
    struct call c = { rows, &in, out, activations, 0 };
    rows->use = k->use;
    pool_run(k->pool, down_part, &c);
}

/* adds to what is in `out`; returns 0, or 1 when there is no memory for partial sums */
int m2c_ffn(struct kernels *k, struct rows *rows, const struct inputs *in, int relu,
            const float *mask, float *out)
{
    int64_t chunks = (rows->count + CHUNK - 1) / CHUNK;
    int64_t wave = (int64_t)pool_threads(k->pool) * CHUNKS_PER_THREAD;
    size_t padded = (size_t)rows->groups * GROUP;
    wave = wave < chunks ? wave : chunks;
    rows->use = k->use;
    float *partial = malloc((size_t)wave * in->tokens * padded * sizeof(float));
    if (!partial)
        return 1;
    for (int64_t first = 0; first < chunks; first += wave) {
        int64_t count = chunks - first < wave ? chunks - first : wave;
        struct ffn_call c = { rows, in, mask, relu, first, count, partial };
        pool_run(k->pool, ffn_part, &c);
        for (int64_t n = 0; n < count; n++) {
            for (int t = 0; t < in->tokens; t++) {
                const float *from = partial + ((size_t)n * in->tokens + t) * padded;
                float *to = out + (size_t)t * rows->length;
                for (int j = 0; j < rows->length; j++)
                    to[j] += from[j];
            }
        }
    }
    free(partial);
    return 0;
}
