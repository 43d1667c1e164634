/* Down columns with AVX2: part of avx2.c.
 *
 * y += sum over neurons of (h scale) (code - bias), as columns512.inc.c does it: per group of outputs
 * the products h * scale of up to TILE neurons become 16-bit factors with one common step, as 256 high
 * + low. Two neurons' codes meet two factors in one instruction; the sums of a tile of 4-bit codes just
 * fit 16 bits: 8 pairs of 2 * 15 * 128.
 */

#define LARGEST 32512 /* 127 * 256: both bytes fit */
#define PAIRS (TILE / 2)

/* Of eight groups from g on: the factors' high and low bytes by pairs of neurons, the step, and the sum
 * of the factors times the step. */
struct factors {
    uint16_t *high, *low; /* [PAIRS, stride]: the bytes of two neurons */
    float *steps, *sums; /* [stride] */
    int stride;
};

/* eight pairs of bytes: the low ones of a and b */
INLINE __m128i byte_pairs(__m256i a, __m256i b)
{
    const __m256i byte = _mm256_set1_epi32(255);
    __m256i both = _mm256_or_si256(_mm256_and_si256(a, byte),
                                   _mm256_slli_epi32(_mm256_and_si256(b, byte), 8));
    both = _mm256_permute4x64_epi64(_mm256_packus_epi32(both, both), 0xd8);
    return _mm256_castsi256_si128(both);
}

INLINE void factors_of(const struct codes *columns, const float *h, int count, int g, int groups,
                       const struct factors *to)
{
    const __m256 sign = _mm256_set1_ps(-0.0f), least = _mm256_set1_ps(1e-30f);
    __m256 products[TILE];
    /* as integers: of magnitudes the order is the same, and NaN is above all, never passed over */
    __m256i top = _mm256_setzero_si256();
    for (int n = 0; n < count; n++) {
        __m256 scales = eight_scales(columns[n].scales + 2 * g, groups - g);
        if (g % 32 == 0 && columns[n].next)
            fetch_line(columns[n].next->scales + 2 * g);
        products[n] = _mm256_mul_ps(scales, _mm256_set1_ps(h[n]));
        __m256i magnitude = _mm256_castps_si256(_mm256_andnot_ps(sign, products[n]));
        top = _mm256_max_epu32(top, magnitude);
    }
    __m256 largest = _mm256_castsi256_ps(top);
    __m256 inverse = _mm256_and_ps(_mm256_cmp_ps(largest, least, _CMP_GT_OQ),
                                   _mm256_div_ps(_mm256_set1_ps(LARGEST), largest));
    __m256 step = _mm256_mul_ps(largest, _mm256_set1_ps(1.0f / LARGEST));
    __m256i total = _mm256_setzero_si256();
    for (int pair = 0; 2 * pair < count; pair++) {
        __m256i f[2] = { _mm256_setzero_si256(), _mm256_setzero_si256() }, upper[2];
        for (int k = 0; k < 2; k++) {
            if (2 * pair + k < count)
                f[k] = _mm256_cvtps_epi32(_mm256_mul_ps(products[2 * pair + k], inverse));
            total = _mm256_add_epi32(total, f[k]);
            upper[k] = _mm256_srai_epi32(_mm256_add_epi32(f[k], _mm256_set1_epi32(128)), 8);
        }
        _mm_storeu_si128((__m128i *)(to->high + pair * to->stride + g),
                         byte_pairs(upper[0], upper[1]));
        _mm_storeu_si128((__m128i *)(to->low + pair * to->stride + g), byte_pairs(f[0], f[1]));
    }
    _mm256_storeu_ps(to->steps + g, step);
    _mm256_storeu_ps(to->sums + g, _mm256_mul_ps(_mm256_cvtepi32_ps(total), step));
}

/* Two pairs of bytes, each all over its half. */
INLINE __m256i both_halves(const uint16_t *at)
{
    const __m256i spread = _mm256_set_epi64x(0x0302030203020302, 0x0302030203020302,
                                             0x0100010001000100, 0x0100010001000100);
    int32_t raw;
    memcpy(&raw, at, 4);
    return _mm256_shuffle_epi8(_mm256_set1_epi32(raw), spread);
}

/* y += step * (256 high + low) - offset; eight outputs of group g, and of the group after it */
INLINE void add_eights(float *y, __m256i high, __m256i low, const float *steps,
                       const float *offsets)
{
    for (int k = 0; k < 2; k++, y += GROUP) {
        __m128i upper = k ? _mm256_extracti128_si256(high, 1) : _mm256_castsi256_si128(high);
        __m128i lower = k ? _mm256_extracti128_si256(low, 1) : _mm256_castsi256_si128(low);
        __m256i whole = _mm256_add_epi32(_mm256_slli_epi32(_mm256_cvtepi16_epi32(upper), 8),
                                         _mm256_cvtepi16_epi32(lower));
        __m256 value = _mm256_fmsub_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(steps[k]),
                                       _mm256_set1_ps(offsets[k]));
        _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), value));
    }
}

/* One nibble of the codes (those at q, or at r) of two groups from g on. */
INLINE void add_nibbles(float *y, const struct codes *columns, int count, const int is_r, int g,
                        int groups, const struct factors *f, const float *steps,
                        const float *offsets)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i sums[4][2]; /* outputs / 8, high and low */
    for (int i = 0; i < 8; i++)
        sums[i >> 1][i & 1] = _mm256_setzero_si256();
    for (int pair = 0; 2 * pair < count; pair++) {
        /* without a second neuron its factor is 0 */
        const struct codes *a = columns + 2 * pair, *b = 2 * pair + 1 < count ? a + 1 : a;
        __m256i za = two_groups((is_r ? a->r : a->q) + 16 * g, groups - g);
        __m256i zb = two_groups((is_r ? b->r : b->q) + 16 * g, groups - g);
        __m256i z[2] = { _mm256_unpacklo_epi8(za, zb), _mm256_unpackhi_epi8(za, zb) };
        __m256i upper = both_halves(f->high + pair * f->stride + g);
        __m256i lower = both_halves(f->low + pair * f->stride + g);
        for (int k = 0; k < 4; k++) {
            __m256i u = k < 2 ? z[k] : _mm256_srli_epi16(z[k - 2], 4);
            u = _mm256_and_si256(u, nibble);
            sums[k][0] = _mm256_add_epi16(sums[k][0], _mm256_maddubs_epi16(u, upper));
            sums[k][1] = _mm256_add_epi16(sums[k][1], _mm256_maddubs_epi16(u, lower));
        }
    }
    for (int k = 0; k < 4; k++)
        add_eights(y + 8 * k, sums[k][0], sums[k][1], steps + g, offsets + g);
}

TARGET static void add_codes(float *y, const struct codes *columns, const float *h, int count,
                             int groups)
{
    int stride = (groups + 7) / 8 * 8, is_int8 = columns->r != NULL;
    uint16_t high[PAIRS * stride], low[PAIRS * stride];
    float steps[stride], offsets[stride], small[stride], none[stride], finite = 0;
    struct factors f = { high, low, steps, offsets, stride };
    for (int n = 0; n < count; n++)
        finite += h[n] - h[n]; /* 0, or NaN when some activation is not finite */
    for (int g = 0; g < groups; g += 8)
        factors_of(columns, h, count, g, groups, &f);
    for (int g = 0; g < stride; g++) {
        offsets[g] = offsets[g] * (is_int8 ? 8.5f : 8.0f) + finite;
        small[g] = steps[g] * 0.0625f;
        none[g] = 0;
    }
    for (int g = 0; g < groups; g += 2) {
        for (int n = 0; n < count && !(g & 3); n++)
            fetch_stripe(columns[n].next, (size_t)g / STRIPE);
        add_nibbles(y + g * GROUP, columns, count, 0, g, groups, &f, steps, offsets);
        if (is_int8)
            add_nibbles(y + g * GROUP, columns, count, 1, g, groups, &f, small, none);
    }
}
