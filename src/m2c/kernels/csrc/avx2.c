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

/* the first and the second halves of two groups' 4-bit codes, as bytes */
INLINE void unpack(const uint8_t *codes, int rest, __m256i *first, __m256i *second)
{
    const __m256i low = _mm256_set1_epi8(15);
    __m256i u = two_groups(codes, rest);
    *first = _mm256_and_si256(u, low);
    *second = _mm256_and_si256(_mm256_srli_epi16(u, 4), low);
}

/* eight sums of four products of codes and x, four of each group */
INLINE __m256i dot15(__m256i first, __m256i second, __m256i x0, __m256i x1)
{
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

/* Sums of R rows times T tokens. Per group the integer sum counts times both scales; the bias of the
 * codes is taken off at the end, from the sums of the activations. */
struct sums {
    __m256 values[2][2], biases[2][2];
};

/* up to eight groups from g on; x: of token t */
INLINE void dot_eight(const struct codes *w, const int R, const int is_int8,
                      const struct inputs *in, size_t t, const int T, int g, int groups,
                      struct sums *sums)
{
    size_t length = (size_t)stripes_of(groups) * STRIPE_VALUES;
    size_t scales_length = (size_t)batches_of(groups) * BATCH;
    __m256 both[2][2];
    for (int i = 0; i < R; i++) {
        __m256 scales = eight_scales(w[i].scales + 2 * g, groups - g);
        for (int k = 0; k < T; k++) {
            size_t at = (t + k) * scales_length + g;
            both[i][k] = _mm256_mul_ps(scales, _mm256_loadu_ps(in->scales + at));
            sums->biases[i][k] = _mm256_fmadd_ps(both[i][k], _mm256_loadu_ps(in->sums + at),
                                                 sums->biases[i][k]);
        }
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < 8; pair += 2) {
        if (g + pair >= groups)
            break;
        const __m256i lanes = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1),
                                               _mm256_set1_epi32(pair));
        int at = g + pair, rest = groups - at;
        __m256i first[2], second[2], r_first[2], r_second[2];
        for (int i = 0; i < R; i++) {
            unpack(w[i].q + 16 * at, rest, first + i, second + i);
            if (is_int8)
                unpack(w[i].r + 16 * at, rest, r_first + i, r_second + i);
            if (!(pair & 2))
                fetch_stripe(w[i].next, (size_t)at / STRIPE);
        }
        for (int k = 0; k < T; k++) {
            const int8_t *x = in->values + (t + k) * length + at / STRIPE * STRIPE_VALUES
                              + (at & 2) * 16;
            __m256i x0 = _mm256_loadu_si256((const __m256i *)x);
            __m256i x1 = _mm256_loadu_si256((const __m256i *)(x + 64));
            for (int i = 0; i < R; i++) {
                __m256i whole = dot15(first[i], second[i], x0, x1);
                if (is_int8)
                    whole = _mm256_add_epi32(_mm256_slli_epi32(whole, 4),
                                             dot15(r_first[i], r_second[i], x0, x1));
                sums->values[i][k] = _mm256_fmadd_ps(
                    _mm256_cvtepi32_ps(whole), _mm256_permutevar8x32_ps(both[i][k], lanes),
                    sums->values[i][k]);
            }
        }
    }
}

INLINE void dot_block(const struct codes *w, const int R, const int is_int8,
                      const struct inputs *in, int t, const int T, int groups, float *out,
                      int64_t row_stride)
{
    struct sums sums;
    for (int i = 0; i < R; i++)
        for (int k = 0; k < T; k++)
            sums.values[i][k] = sums.biases[i][k] = _mm256_setzero_ps();
    for (int g = 0; g < groups; g += 8)
        dot_eight(w, R, is_int8, in, (size_t)t, T, g, groups, &sums);
    for (int i = 0; i < R; i++)
        fetch_scales(w[i].next, groups);
    for (int i = 0; i < R; i++)
        for (int k = 0; k < T; k++) {
            __m256 sum = _mm256_fnmadd_ps(sums.biases[i][k],
                                          _mm256_set1_ps(is_int8 ? 136.0f : 8.0f),
                                          sums.values[i][k]);
            out[i * row_stride + t + k] = sum_of(sum) * (is_int8 ? 0.0625f : 1.0f);
        }
}

INLINE void dot_rows(const struct codes *w, const int R, const int is_int8,
                     const struct inputs *in, int groups, float *out, int64_t stride)
{
    int t = 0;
    for (; t + 2 <= in->tokens; t += 2)
        dot_block(w, R, is_int8, in, t, 2, groups, out, stride);
    if (t < in->tokens)
        dot_block(w, R, is_int8, in, t, 1, groups, out, stride);
}

/* Two rows and two tokens share what they read; with one token a row at a time, in the order of
 * memory. */
TARGET static void dot_codes(const struct codes *w, int count, const struct inputs *in, int groups,
                             float *out, int64_t stride)
{
    int i = 0, is_int8 = w->r != NULL;
    for (; in->tokens > 1 && i + 2 <= count; i += 2)
        is_int8 ? dot_rows(w + i, 2, 1, in, groups, out + i * stride, stride)
                : dot_rows(w + i, 2, 0, in, groups, out + i * stride, stride);
    for (; i < count; i++)
        is_int8 ? dot_rows(w + i, 1, 1, in, groups, out + i * stride, stride)
                : dot_rows(w + i, 1, 0, in, groups, out + i * stride, stride);
}

#include "wide2.inc.c"

#include "columns2.inc.c"

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
