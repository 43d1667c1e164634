/* The primitives in plain C: for processors without AVX2, and to compare the others with. */

#include "primitives.h"

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

static int group_dot(const uint8_t *c, const int8_t *x)
{
    int sum = 0;
    for (int j = 0; j < 16; j++)
        sum += (c[j] & 15) * x[j] + (c[j] >> 4) * x[j + 16];
    return sum;
}

static float dot4(const uint8_t *q, const uint8_t *next, const float *ss,
                          const int8_t *xq, int groups)
{
    (void)next;
    float sum = 0;
    for (int g = 0; g < groups; g++)
        sum += ss[g] * (float)group_dot(q + 16 * g, xq + 32 * g);
    return sum;
}

static float dot8(const uint8_t *q, const uint8_t *r, const uint8_t *next,
                          const float *ss, const int8_t *xq, int groups)
{
    (void)next;
    float sum = 0;
    for (int g = 0; g < groups; g++) {
        const int8_t *x = xq + 32 * g;
        int both = 16 * group_dot(q + 16 * g, x) + group_dot(r + 16 * g, x);
        sum += ss[g] * (float)both;
    }
    return sum;
}

static float widen1(uint16_t w, int is_bf16)
{
    uint32_t bits = (uint32_t)w << 16;
    float value;
    if (!is_bf16)
        return half_value(w);
    memcpy(&value, &bits, 4);
    return value;
}

static float dot16(const uint16_t *w, const float *x, int length, int is_bf16)
{
    float sum = 0;
    for (int i = 0; i < length; i++)
        sum += widen1(w[i], is_bf16) * x[i];
    return sum;
}

static void axpy16(float *y, const uint16_t *w, float h, int length, int is_bf16)
{
    for (int i = 0; i < length; i++)
        y[i] += widen1(w[i], is_bf16) * h;
}

static void axpy_codes(float *y, const struct column *columns, int count, int groups)
{
    for (int n = 0; n < count; n++) {
        const struct column *c = columns + n;
        for (int i = 0; i < 32 * groups; i++) {
            int shift = (i & 31) < 16 ? 0 : 4, at = 16 * (i / 32) + (i & 15);
            int u = ((c->q[at] >> shift) & 15) - 8;
            if (c->r)
                u = 16 * u + ((c->r[at] >> shift) & 15) - 8;
            y[i] += c->scales[i / 32] * (float)u;
        }
    }
}

static void scaled(float *to, const uint8_t *scales, float h, int groups)
{
    for (int g = 0; g < groups; g++)
        to[g] = scale_at(scales, g) * h;
}

static void scale_products(float *ss, const uint8_t *scales, const float *xs, int groups)
{
    for (int g = 0; g < groups; g++)
        ss[g] = scale_at(scales, g) * xs[g];
}

static float dot_f32(const float *a, const float *b, int n)
{
    float sum = 0;
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

const struct primitives primitives_scalar = {
    dot4, dot8, dot16, axpy16,
    axpy_codes, scaled, scale_products, dot_f32,
};
