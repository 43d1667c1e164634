/* Packed rows times activations: the kernels of m2c in C, chosen by instruction set at run time.
 *
 * Every function equals its torch reference (kernels/reference.py) up to the rounding of activations
 * to int8 per group of 32, and gives the same bits for any number of threads and of tokens: the
 * order of every sum is fixed. docs/DESIGN.md, sections 5 and 6.
 *
 * Knows nothing about files, layers or which neurons a token wants.
 */

#include "rows.h"

#include <stdlib.h>

/* want: "auto", "scalar", "avx2" or "avx512". NULL if this machine cannot run it or has no memory. */
struct kernels *m2c_open(const char *want, int threads)
{
    struct kernels *k = calloc(1, sizeof(*k));
    if (!k || !(k->use = primitives_for(want, &k->name)) || !(k->pool = m2c_pool_new(threads))) {
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

void dot_row(const struct rows *r, const struct inputs *in, int64_t row, int vector, float *ss,
             float *out, int64_t out_stride)
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
    float *out; /* [tokens, rows] */
    int relu;
};

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
    struct call c = { rows, in, out, 0 };
    rows->use = k->use;
    pool_run(k->pool, matmul_part, &c);
}

void m2c_gate_up(struct kernels *k, struct rows *rows, const struct inputs *in, int relu,
                 float *out)
{
    struct call c = { rows, in, out, relu };
    rows->use = k->use;
    pool_run(k->pool, gate_up_part, &c);
}
