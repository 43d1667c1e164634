/* Down columns with AVX-512 VNNI: part of avx512.c.
 *
 * y += sum over neurons of (h scale) (code - bias). Per group of outputs the products h * scale of up
 * to TILE neurons are rounded to 16 bits with one common step, as 256 high + low; then four neurons'
 * codes meet four factors in one instruction. The rounding is 2^-15 of the largest product, far
 * below that of the activations.
 */

#define LARGEST 32512 /* 127 * 256: both bytes fit */
#define QUADS (TILE / 4)

/* four int32 a lane as bytes of one: the low byte of each */
INLINE __m512i join(__m512i a, __m512i b, __m512i c, __m512i d)
{
    const __m512i low = _mm512_set1_epi32(255), pair = _mm512_set1_epi32(0xFFFF);
    __m512i ab = _mm512_ternarylogic_epi32(_mm512_slli_epi32(b, 8), a, low, 0xD8);
    __m512i cd = _mm512_ternarylogic_epi32(_mm512_slli_epi32(d, 8), c, low, 0xD8);
    return _mm512_ternarylogic_epi32(_mm512_slli_epi32(cd, 16), ab, pair, 0xD8);
}

/* Factors of 16 groups from group g on: high and low bytes by quads of neurons, the step, and the
 * sum of the factors times the bias of the codes, which is to be subtracted. */
INLINE void factors(const struct codes *columns, const float *h, int count, int g, int groups,
                    int32_t *high, int32_t *low, int stride, float *steps, float *offsets)
{
    __mmask16 mask = first_of(groups - g);
    __m512 products[TILE];
    /* as integers: of magnitudes the order is the same, and NaN is above all, never passed over */
    __m512i top = _mm512_setzero_si512();
    for (int n = 0; n < count; n++) {
        __m256i raw = _mm256_maskz_loadu_epi16(mask, columns[n].scales + 2 * g);
        products[n] = _mm512_mul_ps(_mm512_cvtph_ps(raw), _mm512_set1_ps(h[n]));
        if (g % 32 == 0 && columns[n].next)
            fetch_line(columns[n].next->scales + 2 * g);
        top = _mm512_max_epu32(top, _mm512_castps_si512(_mm512_abs_ps(products[n])));
    }
    __m512 largest = _mm512_castsi512_ps(top);
    __mmask16 usable = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
    __m512 inverse = _mm512_maskz_div_ps(usable, _mm512_set1_ps(LARGEST), largest);
    __m512 step = _mm512_mul_ps(largest, _mm512_set1_ps(1.0f / LARGEST));
    __m512i total = _mm512_setzero_si512();
    for (int quad = 0; 4 * quad < count; quad++) {
        __m512i f[4], upper[4];
        for (int k = 0; k < 4; k++) {
            f[k] = 4 * quad + k < count
                       ? _mm512_cvtps_epi32(_mm512_mul_ps(products[4 * quad + k], inverse))
                       : _mm512_setzero_si512();
            total = _mm512_add_epi32(total, f[k]);
            upper[k] = _mm512_srai_epi32(_mm512_add_epi32(f[k], _mm512_set1_epi32(128)), 8);
        }
        _mm512_storeu_si512(high + quad * stride + g, join(upper[0], upper[1], upper[2], upper[3]));
        _mm512_storeu_si512(low + quad * stride + g, join(f[0], f[1], f[2], f[3]));
    }
    __m512 bias = _mm512_set1_ps(columns->r ? 136.0f : 8.0f);
    _mm512_storeu_ps(steps + g, step);
    _mm512_storeu_ps(offsets + g,
                     _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), step), bias));
}

/* Bytes of four neurons, interleaved: lane = group, 32 bits = one output of all four. */
INLINE void interleave(const __m512i z[4], __m512i out[4])
{
    __m512i a = _mm512_unpacklo_epi8(z[0], z[1]), b = _mm512_unpackhi_epi8(z[0], z[1]);
    __m512i c = _mm512_unpacklo_epi8(z[2], z[3]), d = _mm512_unpackhi_epi8(z[2], z[3]);
    out[0] = _mm512_unpacklo_epi16(a, c);
    out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, d);
    out[3] = _mm512_unpackhi_epi16(b, d);
}

/* y[32 lane + 4 k ..] += v[k] in lane: four groups, half of their outputs */
INLINE void add_lanes(float *y, const __m512 v[4])
{
    __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[0], v[1], 0xEE);
    __m512 c = _mm512_shuffle_f32x4(v[2], v[3], 0x44), d = _mm512_shuffle_f32x4(v[2], v[3], 0xEE);
    __m512 lanes[4] = { _mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(a, c, 0xDD),
                        _mm512_shuffle_f32x4(b, d, 0x88), _mm512_shuffle_f32x4(b, d, 0xDD) };
    for (int k = 0; k < 4; k++)
        _mm512_storeu_ps(y + GROUP * k, _mm512_add_ps(_mm512_loadu_ps(y + GROUP * k), lanes[k]));
}

INLINE void add_stripes(float *y, const struct codes *columns, int count, const int is_int8,
                        int groups, const int32_t *high, const int32_t *low, int stride,
                        const float *steps, const float *offsets)
{
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int s = 0; s < stripes_of(groups); s++, y += STRIPE_VALUES) {
        int rest = groups - STRIPE * s;
        __m512i sums[2][2][4]; /* first or second half of a group, high or low, output / 4 */
        for (int i = 0; i < 16; i++)
            sums[i >> 3][i >> 2 & 1][i & 3] = _mm512_setzero_si512();
        for (int quad = 0; 4 * quad < count; quad++) {
            __m512i z[4], q[4], r[4];
            for (int k = 0; k < 4; k++) {
                const struct codes *c = columns + (4 * quad + k < count ? 4 * quad + k : 0);
                fetch_stripe(c->next, (size_t)s);
                z[k] = stripe_codes(c->q + 64 * s, rest);
            }
            interleave(z, q);
            if (is_int8) {
                for (int k = 0; k < 4; k++) {
                    const struct codes *c = columns + (4 * quad + k < count ? 4 * quad + k : 0);
                    z[k] = stripe_codes(c->r + 64 * s, rest);
                }
                interleave(z, r);
            }
            const int32_t *at = high + quad * stride + STRIPE * s;
            __m512i upper = spread(_mm_loadu_si128((const __m128i *)at));
            at = low + quad * stride + STRIPE * s;
            __m512i lower = spread(_mm_loadu_si128((const __m128i *)at));
            for (int k = 0; k < 4; k++) {
                __m512i first, second;
                if (is_int8) {
                    unpack(q[k], r[k], 1, &first, &second);
                } else { /* the second half stays 16 times too large, which costs nothing */
                    first = _mm512_and_si512(q[k], nibble);
                    second = _mm512_andnot_si512(nibble, q[k]);
                }
                sums[0][0][k] = _mm512_dpbusd_epi32(sums[0][0][k], first, upper);
                sums[0][1][k] = _mm512_dpbusd_epi32(sums[0][1][k], first, lower);
                sums[1][0][k] = _mm512_dpbusd_epi32(sums[1][0][k], second, upper);
                sums[1][1][k] = _mm512_dpbusd_epi32(sums[1][1][k], second, lower);
            }
        }
        __m512 step = _mm512_castsi512_ps(
            spread(_mm_loadu_si128((const __m128i *)(steps + STRIPE * s))));
        __m512 offset = _mm512_castsi512_ps(
            spread(_mm_loadu_si128((const __m128i *)(offsets + STRIPE * s))));
        for (int half = 0; half < 2; half++) {
            __m512 values[4];
            __m512 own = half && !is_int8 ? _mm512_mul_ps(step, _mm512_set1_ps(0.0625f)) : step;
            for (int k = 0; k < 4; k++) {
                __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(sums[half][0][k], 8),
                                                 sums[half][1][k]);
                values[k] = _mm512_fmsub_ps(_mm512_cvtepi32_ps(whole), own, offset);
                if (is_int8)
                    values[k] = _mm512_mul_ps(values[k], _mm512_set1_ps(0.0625f));
            }
            add_lanes(y + 16 * half, values);
        }
    }
}

TARGET static void add_codes(float *y, const struct codes *columns, const float *h, int count,
                             int groups)
{
    int stride = (groups + 15) / 16 * 16;
    int32_t high[QUADS * stride], low[QUADS * stride];
    float steps[stride], offsets[stride], finite = 0;
    for (int n = 0; n < count; n++)
        finite += h[n] - h[n]; /* 0, or NaN when some activation is not finite */
    for (int g = 0; g < groups; g += 16)
        factors(columns, h, count, g, groups, high, low, stride, steps, offsets);
    for (int g = 0; g < stride; g++)
        offsets[g] += finite;
    if (columns->r)
        add_stripes(y, columns, count, 1, groups, high, low, stride, steps, offsets);
    else
        add_stripes(y, columns, count, 0, groups, high, low, stride, steps, offsets);
}
