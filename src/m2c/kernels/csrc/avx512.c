/* The primitives with AVX-512 VNNI. Every sum runs in one order, whatever shares the call. */

#include "primitives.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* lane i of the result: value i, four times */
INLINE __m512i spread(__m128i four)
{
    const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_epi32(lanes, _mm512_castsi128_si512(four));
}

INLINE __m512i stripe_codes(const uint8_t *codes, int groups)
{
    return groups >= STRIPE ? _mm512_loadu_si512(codes)
                            : _mm512_maskz_loadu_epi8((1ull << 16 * groups) - 1, codes);
}

/* The first and the second 16 codes of four groups, as bytes: q + 8, at INT8 16 q + r + 136. */
INLINE void unpack(__m512i q, __m512i r, const int is_int8, __m512i *first, __m512i *second)
{
    const __m512i low = _mm512_set1_epi8(15);
    if (!is_int8) {
        *first = _mm512_and_si512(q, low);
        *second = _mm512_and_si512(_mm512_srli_epi16(q, 4), low);
        return;
    }
    /* 0xD8: the second operand where the third has ones, else the first */
    *first = _mm512_ternarylogic_epi32(_mm512_slli_epi16(q, 4), r, low, 0xD8);
    *second = _mm512_ternarylogic_epi32(q, _mm512_srli_epi16(r, 4), low, 0xD8);
}

INLINE __m512 batch_scales(const uint8_t *scales, int groups)
{
    __m256i raw = groups >= BATCH ? _mm256_loadu_si256((const __m256i *)scales)
                                  : _mm256_maskz_loadu_epi16((1 << groups) - 1, scales);
    return _mm512_cvtph_ps(raw);
}

/* Sums of R rows times T tokens. Per group the integer sum counts times both scales; the bias of the
 * codes is taken off at the end, from the sums of the activations. */
struct sums {
    __m512 values[ROWS_AT_ONCE][2], biases[ROWS_AT_ONCE][2];
};

/* a batch of groups from g on, `groups` of them; x: of the first token */
INLINE void dot_batch(const struct codes *w, const int R, const int is_int8,
                      const struct inputs *in, size_t t, const int T, size_t g, const int groups,
                      size_t length, size_t scales_length, struct sums *sums)
{
    __m512 both[ROWS_AT_ONCE][2];
    for (int i = 0; i < R; i++) {
        __m512 scales = batch_scales(w[i].scales + 2 * g, groups);
        for (int k = 0; k < T; k++) {
            size_t at = (t + k) * scales_length + g;
            both[i][k] = _mm512_mul_ps(scales, _mm512_loadu_ps(in->scales + at));
            sums->biases[i][k] = _mm512_fmadd_ps(both[i][k], _mm512_loadu_ps(in->sums + at),
                                                 sums->biases[i][k]);
        }
    }
#pragma GCC unroll 4
    for (int s = 0; s < BATCH / STRIPE; s++) {
        if (STRIPE * s >= groups)
            break;
        const __m512i lanes = _mm512_add_epi32(
            _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0),
            _mm512_set1_epi32(STRIPE * s));
        size_t at = g + STRIPE * s;
        __m512i first[ROWS_AT_ONCE], second[ROWS_AT_ONCE];
        for (int i = 0; i < R; i++) {
            __m512i q = stripe_codes(w[i].q + 16 * at, groups - STRIPE * s), r = q;
            if (is_int8)
                r = stripe_codes(w[i].r + 16 * at, groups - STRIPE * s);
            unpack(q, r, is_int8, first + i, second + i);
            fetch_stripe(w[i].next, at / STRIPE);
        }
        for (int k = 0; k < T; k++) {
            const int8_t *x = in->values + (t + k) * length + at * GROUP;
            __m512i x0 = _mm512_loadu_si512(x), x1 = _mm512_loadu_si512(x + 64);
            for (int i = 0; i < R; i++) {
                __m512i whole = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first[i], x0);
                whole = _mm512_dpbusd_epi32(whole, second[i], x1);
                sums->values[i][k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole),
                                                     _mm512_permutexvar_ps(lanes, both[i][k]),
                                                     sums->values[i][k]);
            }
        }
    }
}

/* R rows times T tokens from token t on */
INLINE void dot_block(const struct codes *w, const int R, const int is_int8,
                      const struct inputs *in, int t, const int T, int groups, float *out,
                      int64_t row_stride)
{
    size_t length = (size_t)stripes_of(groups) * STRIPE_VALUES;
    size_t scales_length = (size_t)batches_of(groups) * BATCH, g = 0;
    struct sums sums;
    for (int i = 0; i < R; i++)
        for (int k = 0; k < T; k++)
            sums.values[i][k] = sums.biases[i][k] = _mm512_setzero_ps();
    for (; g + BATCH <= (size_t)groups; g += BATCH)
        dot_batch(w, R, is_int8, in, t, T, g, BATCH, length, scales_length, &sums);
    if (g < (size_t)groups)
        dot_batch(w, R, is_int8, in, t, T, g, groups - (int)g, length, scales_length, &sums);
    for (int i = 0; i < R; i++)
        fetch_scales(w[i].next, groups);
    for (int i = 0; i < R; i++)
        for (int k = 0; k < T; k++) {
            __m512 sum = _mm512_fnmadd_ps(sums.biases[i][k],
                                          _mm512_set1_ps(is_int8 ? 136.0f : 8.0f),
                                          sums.values[i][k]);
            out[i * row_stride + t + k] = _mm512_reduce_add_ps(sum) * (is_int8 ? 0.0625f : 1.0f);
        }
}

/* Rows share what they read of the activations; with one token a row at a time, since the hardware
 * reads ahead best along one stream. */
#define ENOUGH_TOKENS 2

TARGET static void dot_codes(const struct codes *w, int count, const struct inputs *in, int groups,
                             float *out, int64_t stride)
{
    int t = 0, is_int8 = w->r != NULL;
    if (count == 4 && in->tokens >= ENOUGH_TOKENS) {
        for (; t + 1 < in->tokens; t += 2)
            is_int8 ? dot_block(w, 4, 1, in, t, 2, groups, out, stride)
                    : dot_block(w, 4, 0, in, t, 2, groups, out, stride);
        for (; t < in->tokens; t++)
            is_int8 ? dot_block(w, 4, 1, in, t, 1, groups, out, stride)
                    : dot_block(w, 4, 0, in, t, 1, groups, out, stride);
        return;
    }
    for (int i = 0; i < count; i++) {
        for (t = 0; t < in->tokens; t++)
            is_int8 ? dot_block(w + i, 1, 1, in, t, 1, groups, out + i * stride, stride)
                    : dot_block(w + i, 1, 0, in, t, 1, groups, out + i * stride, stride);
    }
}

#include "wide512.inc.c"

INLINE __m512 wide_at(struct cached from, size_t at, __mmask16 mask)
{
    if (from.is_f16)
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)from.at + at));
    return _mm512_maskz_loadu_ps(mask, (const float *)from.at + at);
}

TARGET static void scores(float *to, const float *q, struct cached keys, int positions, int dim)
{
    for (int p = 0; p < positions; p++) {
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; j < dim; j += 16) {
            __mmask16 mask = first_of(dim - j);
            sum = _mm512_fmadd_ps(wide_at(keys, (size_t)p * dim + j, mask),
                                  _mm512_maskz_loadu_ps(mask, q + j), sum);
        }
        to[p] = _mm512_reduce_add_ps(sum);
    }
}

TARGET static void mixed(float *out, const float *weights, struct cached values, int positions,
                         int dim)
{
    for (int j = 0; j < dim; j += 64) {
        __m512 sums[4];
        __mmask16 masks[4];
        for (int k = 0; k < 4; k++) {
            sums[k] = _mm512_setzero_ps();
            masks[k] = dim > j + 16 * k ? first_of(dim - j - 16 * k) : 0;
        }
        for (int p = 0; p < positions; p++) {
            __m512 weight = _mm512_set1_ps(weights[p]);
            for (int k = 0; k < 4; k++)
                sums[k] = _mm512_fmadd_ps(
                    wide_at(values, (size_t)p * dim + j + 16 * k, masks[k]), weight, sums[k]);
        }
        for (int k = 0; k < 4; k++)
            _mm512_mask_storeu_ps(out + j + 16 * k, masks[k], sums[k]);
    }
}

TARGET static void to_half(uint16_t *to, const float *from, int count)
{
    for (int j = 0; j < count; j += 16) {
        __mmask16 mask = first_of(count - j);
        __m256i half = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(mask, from + j), 0);
        _mm256_mask_storeu_epi16(to + j, mask, half);
    }
}

#include "columns512.inc.c"

const struct primitives primitives_avx512 = {
    dot_codes, dot_wide, add_codes, add_wide, scores, mixed, to_half,
    exact_unpack_avx512,
};

#endif
