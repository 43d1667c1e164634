/* Activations made ready for rows: norm, rounding to int8, and the memory for it. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "rows.h"

void *scratch_take(struct kernels *k, size_t nbytes)
{
    struct scratch *s = &k->scratch;
    nbytes = (nbytes + 63) & ~(size_t)63;
    if (s->size - s->used < nbytes) {
        size_t size = 2 * s->size > nbytes ? 2 * s->size : nbytes;
        struct scratch *full = malloc(sizeof(*full));
        char *at = aligned_alloc(64, size);
        if (!full || !at) {
            free(full);
            free(at);
            return NULL;
        }
        *full = *s;
        *s = (struct scratch){ at, size, 0, full };
    }
    s->used += nbytes;
    return s->at + s->used - nbytes;
}

void scratch_reset(struct kernels *k)
{
    for (struct scratch *full = k->scratch.full; full;) {
        struct scratch *before = full->full;
        free(full->at);
        free(full);
        full = before;
    }
    k->scratch.full = NULL;
    k->scratch.used = 0;
}

int finish(struct kernels *k, int failed)
{
    int damaged = atomic_exchange(&k->damaged, 0);
    scratch_reset(k);
    k->room = NULL;
    return failed ? failed : 2 * damaged;
}

/* 1 / root mean square of x - mean */
static inline float scale_around(const float *x, float mean, float eps, int length)
{
    float sums[16] = { 0 };
    int j = 0;
    for (; j + 16 <= length; j += 16)
        for (int i = 0; i < 16; i++)
            sums[i] += (x[j + i] - mean) * (x[j + i] - mean);
    for (; j < length; j++)
        sums[j & 15] += (x[j] - mean) * (x[j] - mean);
    float total = 0;
    for (int i = 0; i < 16; i++)
        total += sums[i];
    return 1.0f / sqrtf(total / (float)length + eps);
}

static float rms_scale(const float *x, float eps, int length)
{
    return scale_around(x, 0, eps, length);
}

void rms_norm(const float *x, const float *weights, float eps, int length, float *to)
{
    float scale = rms_scale(x, eps, length);
    for (int j = 0; j < length; j++)
        to[j] = x[j] * scale * weights[j];
}

/* to[j] = (x[j] - mean) / standard deviation * weights[j] + bias[j] */
static void layer_norm(const struct given *g, const float *x, float *to)
{
    float sums[16] = { 0 }, total = 0;
    for (int j = 0; j < g->length; j++)
        sums[j & 15] += x[j];
    for (int i = 0; i < 16; i++)
        total += sums[i];
    float mean = total / (float)g->length, scale = scale_around(x, mean, g->eps, g->length);
    for (int j = 0; j < g->length; j++)
        to[j] = (x[j] - mean) * scale * g->norm[j] + g->norm_bias[j];
}

struct normed_call {
    const struct given *given;
    float *out;
    struct pieces pieces;
};

static void normed_part(void *context, int part, int parts)
{
    struct normed_call *c = context;
    const struct given *g = c->given;
    (void)part, (void)parts;
    for (int64_t t; next_piece(&c->pieces, &t);) {
        const float *x = g->x + (size_t)t * g->length;
        float *to = c->out + (size_t)t * g->length, scale = rms_scale(x, g->eps, g->length);
        for (int j = 0; j < g->length; j++)
            to[j] += x[j] * scale * g->norm[j];
    }
}

void add_normed(struct kernels *k, const struct given *given, float *out)
{
    struct normed_call c = { given, out, { 0, given->tokens, 1 } };
    if (given->tokens == 1)
        normed_part(&c, 0, 1);
    else
        pool_run(k->pool, normed_part, &c);
}

/* out [tokens, length] += norm(x); 0 */
int m2c_add_normed(struct kernels *k, const struct given *given, float *out)
{
    add_normed(k, given, out);
    return 0;
}

/* to the nearest, ties to even, for |v| < 2^22 */
static inline int32_t nearest(float v)
{
    int32_t bits;
    v += 12582912.0f;
    memcpy(&bits, &v, 4);
    return bits - 0x4B400000;
}

/* One group to int8; `to` holds values 0 to 15, `to + 64` the others. Returns the scale. */
static float round_group(const float *from, int count, int8_t *to, float *sum)
{
    float values[GROUP] = { 0 }, largest = 0, total = 0;
    int32_t codes[GROUP], whole = 0;
    memcpy(values, from, (size_t)count * sizeof(float));
    for (int j = 0; j < GROUP; j++) {
        float size = fabsf(values[j]);
        largest = size > largest ? size : largest;
        total += size;
    }
    /* a sum is finite only if all its terms are; NaN must not be rounded away */
    int finite = isfinite(total);
    float inverse = finite && largest > 1e-30f ? 127.0f / largest : 0;
    for (int j = 0; j < GROUP; j++) {
        codes[j] = finite ? nearest(values[j] * inverse) : 0;
        whole += codes[j];
    }
    for (int j = 0; j < 16; j++) {
        to[j] = (int8_t)codes[j];
        to[j + 64] = (int8_t)codes[j + 16];
    }
    *sum = (float)whole;
    return finite ? largest / 127.0f : NAN;
}

static void round_token(const float *x, int length, int8_t *values, float *scales, float *sums)
{
    int groups = (length + GROUP - 1) / GROUP;
    memset(values, 0, padded_length(length));
    memset(scales, 0, (size_t)batches_of(groups) * BATCH * sizeof(float));
    memset(sums, 0, (size_t)batches_of(groups) * BATCH * sizeof(float));
    for (int g = 0; g < groups; g++) {
        int rest = length - g * GROUP;
        int8_t *to = values + g / STRIPE * STRIPE_VALUES + g % STRIPE * 16;
        scales[g] = round_group(x + g * GROUP, rest < GROUP ? rest : GROUP, to, sums + g);
    }
}

struct prepare_call {
    const struct given *given;
    float *normed;
    int8_t *values; /* NULL for 16-bit rows */
    float *scales, *sums;
    struct pieces pieces;
};

static void prepare_part(void *context, int part, int parts)
{
    struct prepare_call *c = context;
    const struct given *g = c->given;
    size_t padded = padded_length(g->length), scales = padded_groups(g->length);
    (void)part, (void)parts;
    for (int64_t t; next_piece(&c->pieces, &t);) {
        const float *x = g->x + (size_t)t * g->length;
        if (g->norm) {
            float *to = c->normed + (size_t)t * g->length;
            if (g->norm_bias)
                layer_norm(g, x, to);
            else
                rms_norm(x, g->norm, g->eps, g->length, to);
            x = to;
        }
        if (c->values)
            round_token(x, g->length, c->values + t * padded, c->scales + t * scales,
                        c->sums + t * scales);
    }
}

int prepare(struct kernels *k, const struct given *given, int kind, struct inputs *in)
{
    size_t tokens = (size_t)given->tokens, scales = padded_groups(given->length);
    struct prepare_call c = { given, NULL, NULL, NULL, NULL, { 0, given->tokens, 1 } };
    if (given->norm && !(c.normed = scratch_take(k, tokens * given->length * sizeof(float))))
        return 1;
    if (kind != 16) {
        c.values = scratch_take(k, tokens * padded_length(given->length));
        c.scales = scratch_take(k, tokens * scales * sizeof(float));
        c.sums = scratch_take(k, tokens * scales * sizeof(float));
        if (!c.values || !c.scales || !c.sums)
            return 1;
    }
    if (tokens == 1)
        prepare_part(&c, 0, 1);
    else
        pool_run(k->pool, prepare_part, &c);
    *in = (struct inputs){ given->norm ? c.normed : given->x, c.values, c.scales, c.sums,
                           given->tokens };
    return 0;
}

struct inputs tokens_from(const struct inputs *in, int t, int tokens, int length)
{
    size_t scales = (size_t)t * padded_groups(length);
    if (!in->values)
        return (struct inputs){ in->x + (size_t)t * length, NULL, NULL, NULL, tokens };
    return (struct inputs){ in->x + (size_t)t * length, in->values + t * padded_length(length),
                            in->scales + scales, in->sums + scales, tokens };
}
