/* The primitives in plain C: for processors without AVX2, and to compare the others with. */

#include "primitives.h"

#include <math.h>
#include <string.h>

static float half_value(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t bits;
    float value;
    if (exponent == 0) {
        value = (float)mantissa * 5.9604644775390625e-08f; /* 2^-24 */
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    memcpy(&value, &bits, 4);
    return value;
}

static float scale_at(const uint8_t *scales, int g)
{
    uint16_t raw;
    memcpy(&raw, scales + 2 * g, 2);
    return half_value(raw);
}

static float widen(uint16_t w, int is_bf16)
{
    uint32_t bits = (uint32_t)w << 16;
    float value;
    if (!is_bf16)
        return half_value(w);
    memcpy(&value, &bits, 4);
    return value;
}

/* code i of a group, not biased: q at INT4, 16 q + r at INT8 */
static int code_at(const struct codes *w, int g, int i)
{
    int at = 16 * g + (i & 15), shift = i < 16 ? 0 : 4;
    int q = ((w->q[at] >> shift) & 15) - 8;
    return w->r ? 16 * q + ((w->r[at] >> shift) & 15) - 8 : q;
}

static float dot_codes1(const struct codes *w, const struct inputs *in, int t, int groups)
{
    int stripes = stripes_of(groups);
    const int8_t *values = in->values + (size_t)t * stripes * STRIPE_VALUES;
    const float *scales = in->scales + (size_t)t * batches_of(groups) * BATCH;
    float total = 0;
    for (int g = 0; g < groups; g++) {
        const int8_t *x = values + g / STRIPE * STRIPE_VALUES + g % STRIPE * 16;
        int sum = 0;
        for (int i = 0; i < GROUP; i++)
            sum += code_at(w, g, i) * x[(i & 15) + (i < 16 ? 0 : 64)];
        total += (float)sum * scales[g] * scale_at(w->scales, g);
    }
    return w->r ? total * 0.0625f : total;
}

static void dot_codes(const struct codes *rows, int count, const struct inputs *in, int groups,
                      float *out, int64_t row_stride)
{
    for (int i = 0; i < count; i++)
        for (int t = 0; t < in->tokens; t++)
            out[i * row_stride + t] = dot_codes1(rows + i, in, t, groups);
}

static void dot_wide(const uint16_t *const *rows, int count, const struct inputs *in, int length,
                     int is_bf16, const size_t *ahead, float *out, int64_t row_stride)
{
    (void)ahead;
    for (int i = 0; i < count; i++) {
        for (int t = 0; t < in->tokens; t++) {
            float sum = 0;
            for (int j = 0; j < length; j++)
                sum += widen(rows[i][j], is_bf16) * in->x[(size_t)t * length + j];
            out[i * row_stride + t] = sum;
        }
    }
}

static void add_codes(float *y, const struct codes *columns, const float *h, int count, int groups)
{
    for (int n = 0; n < count; n++) {
        for (int g = 0; g < groups; g++) {
            float scale = scale_at(columns[n].scales, g) * h[n] * (columns[n].r ? 0.0625f : 1.0f);
            for (int i = 0; i < GROUP; i++)
                y[g * GROUP + i] += scale * (float)code_at(columns + n, g, i);
        }
    }
}

static void add_wide(const struct sums_of *s, const uint16_t *const *columns, int length,
                     int is_bf16)
{
    for (int t = 0; t < s->tokens; t++)
        for (int n = 0; n < s->count; n++)
            for (int j = 0; j < length; j++)
                s->y[t * s->y_stride + j] += widen(columns[n][j], is_bf16)
                                             * s->h[n * s->h_stride + t];
}

static float cached_at(struct cached from, size_t i)
{
    return from.is_f16 ? half_value(((const uint16_t *)from.at)[i]) : ((const float *)from.at)[i];
}

static void scores(float *to, const float *q, struct cached keys, int positions, int dim)
{
    for (int p = 0; p < positions; p++) {
        float sum = 0;
        for (int j = 0; j < dim; j++)
            sum += cached_at(keys, (size_t)p * dim + j) * q[j];
        to[p] = sum;
    }
}

static void mixed(float *out, const float *weights, struct cached values, int positions, int dim)
{
    memset(out, 0, (size_t)dim * sizeof(float));
    for (int p = 0; p < positions; p++)
        for (int j = 0; j < dim; j++)
            out[j] += weights[p] * cached_at(values, (size_t)p * dim + j);
}

/* to the nearest, ties to even */
static uint16_t half_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x7f800000)
        return (uint16_t)(sign | 0x7c00 | (magnitude > 0x7f800000 ? 0x200 : 0));
    if (magnitude >= 0x477ff000)
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* subnormal: in units of 2^-24 */
        return (uint16_t)(sign | (uint32_t)lrintf(fabsf(value) * 16777216.0f));
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}

static void to_half(uint16_t *to, const float *from, int count)
{
    for (int i = 0; i < count; i++)
        to[i] = half_of(from[i]);
}

const struct primitives primitives_scalar = {
    dot_codes, dot_wide, add_codes, add_wide, scores, mixed, to_half,
    exact_unpack_scalar,
};
