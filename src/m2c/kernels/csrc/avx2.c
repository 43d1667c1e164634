/* The primitives with AVX2, FMA and F16C. Every sum runs in one order, whatever shares the call. */

#include "primitives.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET static inline __attribute__((always_inline))

INLINE float sum_of(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* codes of two groups, of one at the end of an odd number */
INLINE __m256i two_groups(const uint8_t *codes, int rest)
{
    if (rest > 1)
        return _mm256_loadu_si256((const __m256i *)codes);
    return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)codes));
}

/* eight sums of four products of 4-bit codes u, both halves of two groups, and x */
INLINE __m256i dot15(__m256i u, __m256i x0, __m256i x1)
{
    const __m256i low = _mm256_set1_epi8(15);
    __m256i first = _mm256_and_si256(u, low);
    __m256i second = _mm256_and_si256(_mm256_srli_epi16(u, 4), low);
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(first, x0),
                                     _mm256_maddubs_epi16(second, x1));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

/* scales of eight groups, zeros after the last */
INLINE __m256 eight_scales(const uint8_t *scales, int groups)
{
    uint16_t held[8] = { 0 };
    if (groups >= 8)
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales));
    memcpy(held, scales, 2 * (size_t)groups);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)held));
}

/* One row times token t. Per group the integer sum times both scales; the bias of the codes is taken
 * off at the end, from the sums of the activations. */
INLINE float dot_row(const struct codes *w, const int is_int8, const struct inputs *in, int t,
                     int groups)
{
    const int8_t *values = in->values + (size_t)t * stripes_of(groups) * STRIPE_VALUES;
    size_t from = (size_t)t * batches_of(groups) * BATCH;
    __m256 sum = _mm256_setzero_ps(), bias = _mm256_setzero_ps();
    for (int g = 0; g < groups; g += 8) {
        float both[8];
        __m256 scales = _mm256_mul_ps(eight_scales(w->scales + 2 * g, groups - g),
                                      _mm256_loadu_ps(in->scales + from + g));
        bias = _mm256_fmadd_ps(scales, _mm256_loadu_ps(in->sums + from + g), bias);
        _mm256_storeu_ps(both, scales);
        for (int k = 0; k < 8 && g + k < groups; k += 2) {
            int at = g + k, rest = groups - at;
            const int8_t *x = values + at / STRIPE * STRIPE_VALUES + (at & 2) * 16;
            __m256i x0 = _mm256_loadu_si256((const __m256i *)x);
            __m256i x1 = _mm256_loadu_si256((const __m256i *)(x + 64));
            __m256i whole = dot15(two_groups(w->q + 16 * at, rest), x0, x1);
            if (is_int8)
                whole = _mm256_add_epi32(_mm256_slli_epi32(whole, 4),
                                         dot15(two_groups(w->r + 16 * at, rest), x0, x1));
            __m256 two = _mm256_set_m128(_mm_set1_ps(both[k + 1]), _mm_set1_ps(both[k]));
            sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), two, sum);
        }
    }
    sum = _mm256_fnmadd_ps(bias, _mm256_set1_ps(is_int8 ? 136.0f : 8.0f), sum);
    return sum_of(sum) * (is_int8 ? 0.0625f : 1.0f);
}

TARGET static void dot_codes(const struct codes *w, int count, const struct inputs *in, int groups,
                             float *out, int64_t stride)
{
    for (int i = 0; i < count; i++) {
        fetch_scales(w[i].next, groups);
        for (int s = 0; s < stripes_of(groups); s++)
            fetch_stripe(w[i].next, (size_t)s);
        for (int t = 0; t < in->tokens; t++)
            out[i * stride + t] = w[i].r ? dot_row(w + i, 1, in, t, groups)
                                         : dot_row(w + i, 0, in, t, groups);
    }
}

INLINE __m256 widen8(const uint16_t *w, int is_bf16)
{
    __m128i raw = _mm_loadu_si128((const __m128i *)w);
    if (!is_bf16)
        return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

INLINE float widen1(uint16_t w, int is_bf16)
{
    if (!is_bf16)
        return _cvtsh_ss(w);
    uint32_t bits = (uint32_t)w << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

TARGET static void dot_wide(const uint16_t *const *w, int count, const struct inputs *in,
                            int length, int is_bf16, const size_t *ahead, float *out, int64_t stride)
{
    for (int i = 0; i < count; i++) {
        for (int at = 0; at < 2 * length; at += 64)
            fetch_wanted((const uint8_t *)w[i] + at, ahead);
        for (int t = 0; t < in->tokens; t++) {
            const float *x = in->x + (size_t)t * length;
            __m256 a = _mm256_setzero_ps(), b = _mm256_setzero_ps();
            int j = 0;
            for (; j + 15 < length; j += 16) {
                a = _mm256_fmadd_ps(widen8(w[i] + j, is_bf16), _mm256_loadu_ps(x + j), a);
                b = _mm256_fmadd_ps(widen8(w[i] + j + 8, is_bf16), _mm256_loadu_ps(x + j + 8), b);
            }
            float sum = sum_of(_mm256_add_ps(a, b));
            for (; j < length; j++)
                sum += widen1(w[i][j], is_bf16) * x[j];
            out[i * stride + t] = sum;
        }
    }
}

#include "columns2.inc.c"

/* one token's */
INLINE void add_wide1(float *y, const struct sums_of *s, const float *h,
                      const uint16_t *const *columns, int length, int is_bf16)
{
    int j = 0;
    for (; j + 7 < length; j += 8) {
        __m256 sum = _mm256_loadu_ps(y + j);
        for (int n = 0; n < s->count; n++)
            sum = _mm256_fmadd_ps(widen8(columns[n] + j, is_bf16),
                                  _mm256_set1_ps(h[n * s->h_stride]), sum);
        _mm256_storeu_ps(y + j, sum);
    }
    for (; j < length; j++)
        for (int n = 0; n < s->count; n++)
            y[j] += widen1(columns[n][j], is_bf16) * h[n * s->h_stride];
}

TARGET static void add_wide(const struct sums_of *s, const uint16_t *const *columns, int length,
                            int is_bf16)
{
    for (int t = 0; t < s->tokens; t++)
        add_wide1(s->y + t * s->y_stride, s, s->h + t, columns, length, is_bf16);
}

INLINE __m256 cached8(struct cached from, size_t at)
{
    return from.is_f16 ? widen8((const uint16_t *)from.at + at, 0)
                       : _mm256_loadu_ps((const float *)from.at + at);
}

INLINE float cached1(struct cached from, size_t at)
{
    return from.is_f16 ? _cvtsh_ss(((const uint16_t *)from.at)[at])
                       : ((const float *)from.at)[at];
}

TARGET static void scores(float *to, const float *q, struct cached keys, int positions, int dim)
{
    for (int p = 0; p < positions; p++) {
        size_t row = (size_t)p * dim;
        __m256 sum = _mm256_setzero_ps();
        int j = 0;
        for (; j + 7 < dim; j += 8)
            sum = _mm256_fmadd_ps(cached8(keys, row + j), _mm256_loadu_ps(q + j), sum);
        float total = sum_of(sum);
        for (; j < dim; j++)
            total += cached1(keys, row + j) * q[j];
        to[p] = total;
    }
}

TARGET static void mixed(float *out, const float *weights, struct cached values, int positions,
                         int dim)
{
    int j = 0;
    for (; j + 31 < dim; j += 32) {
        __m256 sums[4];
        for (int k = 0; k < 4; k++)
            sums[k] = _mm256_setzero_ps();
        for (int p = 0; p < positions; p++)
            for (int k = 0; k < 4; k++)
                sums[k] = _mm256_fmadd_ps(cached8(values, (size_t)p * dim + j + 8 * k),
                                          _mm256_set1_ps(weights[p]), sums[k]);
        for (int k = 0; k < 4; k++)
            _mm256_storeu_ps(out + j + 8 * k, sums[k]);
    }
    for (; j < dim; j++) {
        out[j] = 0;
        for (int p = 0; p < positions; p++)
            out[j] += weights[p] * cached1(values, (size_t)p * dim + j);
    }
}

TARGET static void to_half(uint16_t *to, const float *from, int count)
{
    int j = 0;
    for (; j + 7 < count; j += 8)
        _mm_storeu_si128((__m128i *)(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), 0));
    for (; j < count; j++)
        to[j] = _cvtss_sh(from[j], 0);
}

const struct primitives primitives_avx2 = {
    dot_codes, dot_wide, add_codes, add_wide, scores, mixed, to_half,
    exact_unpack_avx2,
};

#endif
