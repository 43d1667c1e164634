/* Sums over neurons: down columns alone, and the whole FFN in one pass over each record. */

#include "rows.h"

#include <stdlib.h>
#include <string.h>

/* A few neurons at a time, so that y is loaded and stored once for all of them. */
#define AT_ONCE 4

static void down_wide(const struct rows *r, const float *h, float *y, int first, int columns)
{
    for (int64_t i = 0; i < r->count; i++) {
        const uint16_t *w = r->wide + ((size_t)i * r->vectors + r->vectors - 1) * r->length;
        if (h[i] != 0)
            r->use->axpy16(y, w + first, h[i], columns, r->is_bf16);
    }
}

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

struct down_call {
    const struct rows *rows;
    const float *activations; /* [tokens, rows] */
    float *out; /* [tokens, length] */
    int tokens;
};

/* Columns are shared out, so that every output is summed over neurons in order by one thread. */
static void down_part(void *context, int part, int parts)
{
    const struct down_call *c = context;
    const struct rows *r = c->rows;
    int64_t first, last;
    share(r->groups, part, parts, &first, &last);
    int columns = (int)(last * GROUP < r->length ? last * GROUP : r->length) - (int)first * GROUP;
    if (columns <= 0)
        return;
    float y[(last - first) * GROUP];
    for (int t = 0; t < c->tokens; t++) {
        const float *h = c->activations + (size_t)t * r->count;
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

/* adds to what is in `out` */
void m2c_down(struct kernels *k, struct rows *rows, const float *activations, int32_t tokens,
              float *out)
{
    struct down_call c = { rows, activations, out, tokens };
    rows->use = k->use;
    pool_run(k->pool, down_part, &c);
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
