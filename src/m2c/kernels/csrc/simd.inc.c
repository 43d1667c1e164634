/* Primitives on one vector of one row, compiled once per instruction set by primitives.c.
 *
 * A group is 32 weights: 16 bytes, byte j holds element j low and element j + 16 high, biased by 8.
 * xq: the activations as int8, one scale per group; ss: weight scale times activation scale.
 * Sums run in the same order however many tokens share a call, so results do not depend on it.
 */

#if M2C_ISA == 2
#define SUFFIX(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")))
#else
#define SUFFIX(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#endif

TARGET static inline float SUFFIX(sum8)(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

TARGET static inline __m256i SUFFIX(low_high)(const uint8_t *codes)
{
    __m128i raw = _mm_loadu_si128((const __m128i *)codes);
    __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(raw), _mm_srli_epi16(raw, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

/* eight sums of four products of u in [0, 15] and x */
TARGET static inline __m256i SUFFIX(dot15)(__m256i u, __m256i x)
{
#if M2C_ISA == 2
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), u, x);
#else
    return _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), _mm256_set1_epi16(1));
#endif
}

/* sum over groups of ss[g] * sum(u * x), u = q + 8 */
TARGET static float SUFFIX(dot4)(const uint8_t *q, const uint8_t *next, const float *ss,
                                 const int8_t *xq, int groups)
{
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    int g = 0;
    for (; g + 1 < groups; g += 2) {
        __builtin_prefetch(next + 16 * g);
        __m256i a = SUFFIX(dot15)(SUFFIX(low_high)(q + 16 * g),
                                  _mm256_loadu_si256((const __m256i *)(xq + 32 * g)));
        __m256i b = SUFFIX(dot15)(SUFFIX(low_high)(q + 16 * g + 16),
                                  _mm256_loadu_si256((const __m256i *)(xq + 32 * g + 32)));
        even = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), _mm256_broadcast_ss(ss + g), even);
        odd = _mm256_fmadd_ps(_mm256_cvtepi32_ps(b), _mm256_broadcast_ss(ss + g + 1), odd);
    }
    if (g < groups) {
        __m256i a = SUFFIX(dot15)(SUFFIX(low_high)(q + 16 * g),
                                  _mm256_loadu_si256((const __m256i *)(xq + 32 * g)));
        even = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), _mm256_broadcast_ss(ss + g), even);
    }
    return SUFFIX(sum8)(_mm256_add_ps(even, odd));
}

/* the same with u = 16 (q + 8) + (r + 8) */
TARGET static float SUFFIX(dot8)(const uint8_t *q, const uint8_t *r, const uint8_t *next,
                                 const float *ss, const int8_t *xq, int groups)
{
    __m256 sum = _mm256_setzero_ps();
    for (int g = 0; g < groups; g++) {
        __builtin_prefetch(next + 16 * g);
        __m256i x = _mm256_loadu_si256((const __m256i *)(xq + 32 * g));
        __m256i high = SUFFIX(dot15)(SUFFIX(low_high)(q + 16 * g), x);
        __m256i low = SUFFIX(dot15)(SUFFIX(low_high)(r + 16 * g), x);
        __m256i both = _mm256_add_epi32(_mm256_slli_epi32(high, 4), low);
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(both), _mm256_broadcast_ss(ss + g), sum);
    }
    return SUFFIX(sum8)(sum);
}

TARGET static inline __m256 SUFFIX(widen8)(const uint16_t *w, int is_bf16)
{
    __m128i raw = _mm_loadu_si128((const __m128i *)w);
    if (!is_bf16)
        return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

TARGET static inline float SUFFIX(widen1)(uint16_t w, int is_bf16)
{
    if (!is_bf16)
        return _cvtsh_ss(w);
    uint32_t bits = (uint32_t)w << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

TARGET static float SUFFIX(dot16)(const uint16_t *w, const float *x, int length, int is_bf16)
{
    __m256 a = _mm256_setzero_ps(), b = _mm256_setzero_ps();
    int i = 0;
    for (; i + 15 < length; i += 16) {
        a = _mm256_fmadd_ps(SUFFIX(widen8)(w + i, is_bf16), _mm256_loadu_ps(x + i), a);
        b = _mm256_fmadd_ps(SUFFIX(widen8)(w + i + 8, is_bf16), _mm256_loadu_ps(x + i + 8), b);
    }
    float sum = SUFFIX(sum8)(_mm256_add_ps(a, b));
    for (; i < length; i++)
        sum += SUFFIX(widen1)(w[i], is_bf16) * x[i];
    return sum;
}

TARGET static void SUFFIX(axpy16)(float *y, const uint16_t *w, float h, int length, int is_bf16)
{
    __m256 scale = _mm256_set1_ps(h);
    int i = 0;
    for (; i + 7 < length; i += 8)
        _mm256_storeu_ps(y + i, _mm256_fmadd_ps(SUFFIX(widen8)(w + i, is_bf16), scale,
                                                _mm256_loadu_ps(y + i)));
    for (; i < length; i++)
        y[i] += SUFFIX(widen1)(w[i], is_bf16) * h;
}

/* The 32 codes of a group in order, as signed bytes: q at INT4; 16 q + r + 8 at INT8. */
TARGET static inline __m256i SUFFIX(codes)(const struct column *c, int g)
{
    __m256i u = SUFFIX(low_high)(c->q + 16 * g);
    if (!c->r)
        return _mm256_sub_epi8(u, _mm256_set1_epi8(8));
    u = _mm256_or_si256(_mm256_slli_epi16(u, 4), SUFFIX(low_high)(c->r + 16 * g));
    return _mm256_xor_si256(u, _mm256_set1_epi8((char)0x80));
}

/* y += sum over columns of scale * code: `count` columns with y in registers. At INT8 the bytes are
 * 8 above the code (biased by 136, not 128), which costs one more addition. */
TARGET static void SUFFIX(axpy_codes)(float *y, const struct column *columns, int count, int groups)
{
    for (int g = 0; g < groups; g++) {
        float *out = y + 32 * g;
#if M2C_ISA == 2
        __m512 low = _mm512_loadu_ps(out), high = _mm512_loadu_ps(out + 16);
        for (int n = 0; n < count; n++) {
            const struct column *c = columns + n;
            if (!(g & 3))
                __builtin_prefetch(c->q + c->ahead + 16 * g);
            __m512 scale = _mm512_set1_ps(c->scales[g]);
            __m256i u = SUFFIX(codes)(c, g);
            if (c->r) {
                __m512 offset = _mm512_mul_ps(scale, _mm512_set1_ps(-8.0f));
                low = _mm512_add_ps(low, offset);
                high = _mm512_add_ps(high, offset);
            }
            __m512i a = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(u));
            __m512i b = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(u, 1));
            low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), scale, low);
            high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), scale, high);
        }
        _mm512_storeu_ps(out, low);
        _mm512_storeu_ps(out + 16, high);
#else
        __m256 sum[4];
        for (int k = 0; k < 4; k++)
            sum[k] = _mm256_loadu_ps(out + 8 * k);
        for (int n = 0; n < count; n++) {
            const struct column *c = columns + n;
            if (!(g & 3))
                __builtin_prefetch(c->q + c->ahead + 16 * g);
            __m256 scale = _mm256_broadcast_ss(c->scales + g);
            __m256 offset = _mm256_mul_ps(scale, _mm256_set1_ps(-8.0f));
            __m256i u = SUFFIX(codes)(c, g);
            __m128i half[2] = { _mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1) };
            for (int k = 0; k < 4; k++) {
                __m128i eight = k & 1 ? _mm_srli_si128(half[k >> 1], 8) : half[k >> 1];
                __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
                if (c->r)
                    sum[k] = _mm256_add_ps(sum[k], offset);
                sum[k] = _mm256_fmadd_ps(code, scale, sum[k]);
            }
        }
        for (int k = 0; k < 4; k++)
            _mm256_storeu_ps(out + 8 * k, sum[k]);
#endif
    }
}

/* scales of `groups` groups, times h */
TARGET static void SUFFIX(scaled)(float *to, const uint8_t *scales, float h, int groups)
{
    int g = 0;
    for (; g + 7 < groups; g += 8) {
        __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 2 * g)));
        _mm256_storeu_ps(to + g, _mm256_mul_ps(s, _mm256_set1_ps(h)));
    }
    for (; g < groups; g++) {
        uint16_t raw;
        memcpy(&raw, scales + 2 * g, 2);
        to[g] = _cvtsh_ss(raw) * h;
    }
}

TARGET static void SUFFIX(scale_products)(float *ss, const uint8_t *scales, const float *xs,
                                          int groups)
{
    int g = 0;
    for (; g + 7 < groups; g += 8) {
        __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 2 * g)));
        _mm256_storeu_ps(ss + g, _mm256_mul_ps(s, _mm256_loadu_ps(xs + g)));
    }
    for (; g < groups; g++) {
        uint16_t raw;
        memcpy(&raw, scales + 2 * g, 2);
        ss[g] = _cvtsh_ss(raw) * xs[g];
    }
}

TARGET static float SUFFIX(dot_f32)(const float *a, const float *b, int n)
{
    __m256 sum = _mm256_setzero_ps();
    int i = 0;
    for (; i + 7 < n; i += 8)
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sum);
    float total = SUFFIX(sum8)(sum);
    for (; i < n; i++)
        total += a[i] * b[i];
    return total;
}


static const struct primitives SUFFIX(primitives) = {
    SUFFIX(dot4), SUFFIX(dot8), SUFFIX(dot16), SUFFIX(axpy16),
    SUFFIX(axpy_codes), SUFFIX(scaled), SUFFIX(scale_products), SUFFIX(dot_f32),
};

#undef SUFFIX
#undef TARGET
#undef M2C_ISA
