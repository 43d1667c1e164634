/* exact.c with AVX-512. */

#include "exact_bits.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target( \
    "avx512f,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* What `group_intervals` gives, of 32 weights; `last` instead of widths. */
struct lane_intervals {
    __m512i low, last; /* 32 x u16 */
    __mmask32 below, zero; /* codes that are negative, that are 0 */
};

/* The upper halves of 32 f32, in order. */
INLINE __m512i upper_halves(__m512i low, __m512i high)
{
    const __m512i odd = _mm512_set_epi16(
        63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21,
        19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(low, odd, high);
}

/* The 16-bit numbers at or above (up), or below, each of 32 values >= 0. */
INLINE __m512i bounds_of(const __m512 *v, const int up, const int is_bf16)
{
    if (is_bf16) {
        const __m512i most = _mm512_set1_epi32(up ? 0xffff : 0);
        return upper_halves(_mm512_add_epi32(_mm512_castps_si512(v[0]), most),
                            _mm512_add_epi32(_mm512_castps_si512(v[1]), most));
    }
    __m256i half[2];
    for (int i = 0; i < 2; i++)
        half[i] = up ? _mm512_cvtps_ph(v[i], _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)
                     : _mm512_cvtps_ph(v[i], _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    return _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
}

INLINE __m512 unit_of(const uint8_t *scale)
{
    uint16_t raw;
    memcpy(&raw, scale, 2);
    __m128 value = _mm_cvtph_ps(_mm_cvtsi32_si128(raw & 0x7fff));
    return _mm512_broadcastss_ps(_mm_mul_ss(value, _mm_set_ss(0.03125f)));
}

INLINE struct lane_intervals lane_intervals(const struct exact_record *r, int g, int count,
                                            const int is_bf16)
{
    const __m128i nibble = _mm_set1_epi8(15);
    __m128i q = _mm_loadu_si128((const __m128i *)(r->q + 16 * g));
    __m128i s = _mm_loadu_si128((const __m128i *)(r->r + 16 * g));
    /* 16 q + r of the first and of the second 16 weights, 136 too large */
    __m256i raw = _mm256_set_m128i(
        _mm_or_si128(_mm_andnot_si128(nibble, q), _mm_and_si128(_mm_srli_epi16(s, 4), nibble)),
        _mm_or_si128(_mm_andnot_si128(nibble, _mm_slli_epi16(q, 4)), _mm_and_si128(s, nibble)));
    const __m256i fifteen = _mm256_set1_epi8(15);
    __mmask32 top = _mm256_cmpeq_epi8_mask(_mm256_and_si256(raw, fifteen), fifteen);
    __mmask32 bottom = _mm256_testn_epi8_mask(raw, fifteen);
    __mmask32 below = ~_mm256_cmpge_epu8_mask(raw, _mm256_set1_epi8((char)136));
    __mmask32 zero = _mm256_cmpeq_epi8_mask(raw, _mm256_set1_epi8((char)136));
    __m512 unit = unit_of(r->scales + 2 * g), from[2], to[2];
    const __m512 up = _mm512_mul_ps(unit, _mm512_set1_ps(ABOVE));
    const __m512 down = _mm512_mul_ps(unit, _mm512_set1_ps(BELOW));
    for (int half = 0; half < 2; half++) {
        __m128i part = half ? _mm256_extracti128_si256(raw, 1) : _mm256_castsi256_si128(raw);
        __m512i code = _mm512_sub_epi32(_mm512_cvtepu8_epi32(part), _mm512_set1_epi32(136));
        __m512 size = _mm512_cvtepi32_ps(_mm512_slli_epi32(_mm512_abs_epi32(code), 1));
        /* exact, for their results are: half a step to each side, and more where r is limited */
        from[half] = _mm512_fmsub_ps(size, unit, unit);
        to[half] = _mm512_fmadd_ps(size, unit, unit);
        __mmask16 highest = (__mmask16)(top >> 16 * half), minus = (__mmask16)(below >> 16 * half);
        __mmask16 lowest = (__mmask16)(bottom >> 16 * half);
        to[half] = _mm512_mask_add_ps(to[half], highest & ~minus, to[half], up);
        to[half] = _mm512_mask_add_ps(to[half], lowest & minus, to[half], down);
        from[half] = _mm512_mask_sub_ps(from[half], highest & minus, from[half], up);
        from[half] = _mm512_mask_sub_ps(from[half], lowest & ~minus, from[half], down);
    }
    __m512i low = bounds_of(from, 1, is_bf16), high = bounds_of(to, 0, is_bf16);
    __m512i last = _mm512_subs_epu16(high, low);
    last = _mm512_mask_add_epi16(last, zero, _mm512_add_epi16(high, high), _mm512_set1_epi16(1));
    return (struct lane_intervals){
        _mm512_maskz_mov_epi16(~zero, low),
        _mm512_maskz_mov_epi16(count < GROUP ? (1u << count) - 1 : ~0u, last), below, zero,
    };
}

INLINE void lane_store(const struct lane_intervals *in, const struct exact_record *r, int g,
                       __m256i first, __m256i second, int count, uint16_t *to)
{
    __m512i offsets = _mm512_or_si512(_mm512_cvtepu8_epi16(first),
                                      _mm512_slli_epi16(_mm512_cvtepu8_epi16(second), 8));
    __mmask32 negative = in->below ^ (r->scales[2 * g + 1] >> 7 ? ~0u : 0u);
    __m512i weights = _mm512_add_epi16(in->low, offsets);
    weights = _mm512_or_si512(weights, _mm512_maskz_set1_epi16(negative, (short)0x8000));
    __m512i zeros = _mm512_or_si512(_mm512_srli_epi16(offsets, 1), _mm512_slli_epi16(offsets, 15));
    weights = _mm512_mask_mov_epi16(weights, in->zero, zeros);
    _mm512_mask_storeu_epi16(to, count < GROUP ? (1u << count) - 1 : ~0u, weights);
}

/* The weights of a pair whose offsets have more than k bits. */
INLINE uint64_t wider_than(int k, const struct lane_intervals *in)
{
    const __m512i least = _mm512_set1_epi16((short)(1 << k));
    return (uint64_t)_mm512_cmpge_epu16_mask(in[1].last, least) << 32
           | _mm512_cmpge_epu16_mask(in[0].last, least);
}

/* The offsets of a pair: their lower and their upper bytes. */
INLINE void offsets_of(struct bits *bits, const struct lane_intervals *in, take_function take,
                       __m512i *first, __m512i *second)
{
    struct bits b = *bits;
    /* eight planes whether there or not: where they end is hard to predict */
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        uint64_t mask = wider_than(k, in);
        uint64_t plane = _pdep_u64(take(&b, (int)_mm_popcnt_u64(mask)), mask);
        *first = _mm512_mask_add_epi8(*first, plane, *first, _mm512_set1_epi8((char)(1 << k)));
    }
    for (int k = 8; k < 16; k++) {
        uint64_t mask = wider_than(k, in);
        if (!mask)
            break;
        uint64_t plane = _pdep_u64(take(&b, (int)_mm_popcnt_u64(mask)), mask);
        __m512i bit = _mm512_set1_epi8((char)(1 << (k - 8)));
        *second = _mm512_mask_add_epi8(*second, plane, *second, bit);
    }
    *bits = b;
}

/* Two groups and where they go; without a second one its place is NULL. */
struct lane_pair {
    struct lane_intervals in[2];
    uint16_t *places[2];
    int counts[2];
};

INLINE void next_pair(const struct exact_record *r, int g, int *at, uint16_t **to,
                      struct lane_pair *pair, const int is_bf16)
{
    pair->places[0] = next_place(r, at, to, pair->counts);
    pair->in[0] = lane_intervals(r, g, pair->counts[0], is_bf16);
    pair->places[1] = NULL;
    pair->in[1].last = _mm512_setzero_si512();
    if (g + 1 < r->vectors * r->groups) {
        pair->places[1] = next_place(r, at, to, pair->counts + 1);
        pair->in[1] = lane_intervals(r, g + 1, pair->counts[1], is_bf16);
    }
}

INLINE void unpack_lanes(const struct exact_record *r, struct bits *bits, uint16_t *to,
                         const int is_bf16)
{
    int groups = r->vectors * r->groups, at = 0;
    struct lane_pair pair, next;
    next_pair(r, 0, &at, &to, &next, is_bf16);
    for (int g = 0; g < groups; g += 2) {
        /* a pair ahead: both halves of the work are long chains, and run side by side */
        pair = next;
        if (g + 2 < groups)
            next_pair(r, g + 2, &at, &to, &next, is_bf16);
        __m512i first = _mm512_setzero_si512(), second = first;
        if (bits->end - bits->next >= SURE)
            offsets_of(bits, pair.in, take_surely, &first, &second);
        else
            offsets_of(bits, pair.in, take_bits, &first, &second);
        lane_store(pair.in, r, g, _mm512_castsi512_si256(first), _mm512_castsi512_si256(second),
                   pair.counts[0], pair.places[0]);
        if (pair.places[1])
            lane_store(pair.in + 1, r, g + 1, _mm512_extracti64x4_epi64(first, 1),
                       _mm512_extracti64x4_epi64(second, 1), pair.counts[1], pair.places[1]);
    }
}

TARGET void exact_unpack_avx512(const struct exact_record *r, struct bits *bits, uint16_t *to)
{
    if (r->is_bf16)
        unpack_lanes(r, bits, to, 1);
    else
        unpack_lanes(r, bits, to, 0);
}

#endif
