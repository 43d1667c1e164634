/* exact.c with AVX-512. */

#include "exact_bits.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target( \
    "avx512f,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* Two groups of weights: candidates, and masks of 64 weights. */
struct lane_pair {
    __m512i low[2], last[2]; /* 32 x u16 */
    __mmask64 below, zero; /* codes that are negative, that are 0 */
    uint16_t *places[2]; /* where they go; NULL without a second group */
    int counts[2];
};

INLINE __m256i two_codes(const uint8_t *at, int both)
{
    return both ? _mm256_loadu_si256((const __m256i *)at)
                : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)at));
}

/* 16 q + r of two groups in order, 136 too large */
INLINE __m512i pair_codes(const struct exact_record *r, int g, int both)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i q = two_codes(r->q + 16 * g, both), s = two_codes(r->r + 16 * g, both);
    /* 0xD8: the second operand where the third has ones, else the first */
    __m256i first = _mm256_ternarylogic_epi32(_mm256_slli_epi16(q, 4), s, nibble, 0xD8);
    __m256i second = _mm256_ternarylogic_epi32(q, _mm256_srli_epi16(s, 4), nibble, 0xD8);
    return _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_permute2x128_si256(first, second, 0x20)),
        _mm256_permute2x128_si256(first, second, 0x31), 1);
}

/* |scale| / 32 */
INLINE __m512 unit_of(const uint8_t *scale)
{
    uint16_t raw;
    memcpy(&raw, scale, 2);
    __m128 value = _mm_cvtph_ps(_mm_cvtsi32_si128(raw & 0x7fff));
    return _mm512_broadcastss_ps(_mm_mul_ss(value, _mm_set_ss(0.03125f)));
}

/* The 16-bit numbers at or above (up), or below, 32 counts of units. As the upper half of an f32,
 * 0x4B00 makes a count 2^23 more; the product is exact, for its result is. */
INLINE __m512i bounds_of(__m512i counts, __m512 unit, const int up, const int is_bf16)
{
    const __m512i magic = _mm512_set1_epi16(0x4B00);
    const __m512 base = _mm512_mul_ps(unit, _mm512_set1_ps(8388608.0f));
    /* of every eight counts the first four, and the others */
    __m512 v[2] = { _mm512_castsi512_ps(_mm512_unpacklo_epi16(counts, magic)),
                    _mm512_castsi512_ps(_mm512_unpackhi_epi16(counts, magic)) };
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_fmsub_ps(v[i], unit, base);
    if (is_bf16) {
        const __m512i upper = _mm512_set_epi16(
            63, 61, 59, 57, 31, 29, 27, 25, 55, 53, 51, 49, 23, 21, 19, 17, 47, 45, 43, 41, 15, 13,
            11, 9, 39, 37, 35, 33, 7, 5, 3, 1);
        const __m512i most = _mm512_set1_epi32(up ? 0xffff : 0);
        return _mm512_permutex2var_epi16(_mm512_add_epi32(_mm512_castps_si512(v[0]), most), upper,
                                         _mm512_add_epi32(_mm512_castps_si512(v[1]), most));
    }
    const __m512i order = _mm512_set_epi16(
        31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8, 23, 22, 21, 20, 7, 6, 5, 4,
        19, 18, 17, 16, 3, 2, 1, 0);
    __m256i half[2];
    for (int i = 0; i < 2; i++)
        half[i] = up ? _mm512_cvtps_ph(v[i], _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)
                     : _mm512_cvtps_ph(v[i], _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    return _mm512_permutexvar_epi16(
        order, _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1));
}

INLINE __m512i words_of(__m512i bytes, int half)
{
    return _mm512_cvtepu8_epi16(half ? _mm512_extracti64x4_epi64(bytes, 1)
                                     : _mm512_castsi512_si256(bytes));
}

/* bytes: half a step, and what r = 7 and r = -8 add to it where these masks say so */
INLINE __m512i reach_of(__mmask64 above, __mmask64 below)
{
    __m512i reach = _mm512_mask_mov_epi8(_mm512_set1_epi8(1), above, _mm512_set1_epi8(1 + ABOVE));
    return _mm512_mask_mov_epi8(reach, below, _mm512_set1_epi8(1 + BELOW));
}

INLINE void pair_intervals(const struct exact_record *r, int g, struct lane_pair *pair,
                           const int is_bf16)
{
    int groups = pair->places[1] ? 2 : 1;
    const __m512i fifteen = _mm512_set1_epi8(15), middle = _mm512_set1_epi8((char)136);
    __m512i raw = pair_codes(r, g, groups == 2);
    __mmask64 top = _mm512_cmpeq_epi8_mask(_mm512_and_si512(raw, fifteen), fifteen);
    __mmask64 bottom = _mm512_testn_epi8_mask(raw, fifteen);
    __mmask64 below = pair->below = _mm512_cmplt_epu8_mask(raw, middle);
    pair->zero = _mm512_cmpeq_epi8_mask(raw, middle);
    __m512i size = _mm512_sub_epi8(_mm512_max_epu8(raw, middle), _mm512_min_epu8(raw, middle));
    __m512i out = reach_of(top & ~below, bottom & below);
    __m512i in = reach_of(top & below, bottom & ~below);
    for (int i = 0; i < 2; i++) {
        if (i == groups) {
            pair->last[1] = _mm512_setzero_si512();
            break;
        }
        __m512 unit = unit_of(r->scales + 2 * (g + i));
        __m512i steps = words_of(size, i);
        steps = _mm512_add_epi16(steps, steps);
        /* for code 0 what is below it means nothing */
        __m512i low = bounds_of(_mm512_sub_epi16(steps, words_of(in, i)), unit, 1, is_bf16);
        __m512i high = bounds_of(_mm512_add_epi16(steps, words_of(out, i)), unit, 0, is_bf16);
        __mmask32 zero = (__mmask32)(pair->zero >> 32 * i);
        __m512i last = _mm512_subs_epu16(high, low);
        last = _mm512_mask_add_epi16(last, zero, _mm512_add_epi16(high, high),
                                     _mm512_set1_epi16(1));
        if (pair->counts[i] < GROUP)
            last = _mm512_maskz_mov_epi16((1u << pair->counts[i]) - 1, last);
        pair->low[i] = _mm512_maskz_mov_epi16(~zero, low);
        pair->last[i] = last;
    }
}

INLINE void lane_store(const struct lane_pair *pair, const struct exact_record *r, int g, int i,
                       __m512i offsets)
{
    __mmask32 zero = (__mmask32)(pair->zero >> 32 * i);
    __mmask32 negative = (__mmask32)(pair->below >> 32 * i)
                         ^ (r->scales[2 * (g + i) + 1] >> 7 ? ~0u : 0u);
    __m512i weights = _mm512_add_epi16(pair->low[i], offsets);
    weights = _mm512_mask_add_epi16(weights, negative, weights, _mm512_set1_epi16((short)0x8000));
    __m512i zeros = _mm512_or_si512(_mm512_srli_epi16(offsets, 1), _mm512_slli_epi16(offsets, 15));
    weights = _mm512_mask_mov_epi16(weights, zero, zeros);
    if (pair->counts[i] == GROUP)
        _mm512_storeu_si512(pair->places[i], weights);
    else
        _mm512_mask_storeu_epi16(pair->places[i], (1u << pair->counts[i]) - 1, weights);
}

/* Which weights of a pair have offsets of more than k >= 8 bits. */
INLINE uint64_t wider_than(int k, const struct lane_pair *pair)
{
    const __m512i least = _mm512_set1_epi16((short)(1 << k));
    return (uint64_t)_mm512_cmpge_epu16_mask(pair->last[1], least) << 32
           | _mm512_cmpge_epu16_mask(pair->last[0], least);
}

/* `bit` of some bytes, from the next bits. */
INLINE __m512i with_plane(__m512i bytes, __m512i bit, uint64_t mask, struct bits *bits,
                          take_function take)
{
    uint64_t plane = _pdep_u64(take(bits, (int)_mm_popcnt_u64(mask)), mask);
    return _mm512_mask_add_epi8(bytes, plane, bytes, bit);
}

/* The offsets of a pair: 32 x u16 each. */
INLINE void offsets_of(struct bits *bits, const struct lane_pair *pair, take_function take,
                       __m512i offsets[2])
{
    struct bits b = *bits;
    __m512i first = _mm512_setzero_si512(), second = first;
    const __m512i narrow = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm512_cvtusepi16_epi8(pair->last[0])),
        _mm512_cvtusepi16_epi8(pair->last[1]), 1);
    /* eight planes whether there or not: where they end is hard to predict */
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        const __m512i bit = _mm512_set1_epi8((char)(1 << k));
        uint64_t mask = _mm512_cmpge_epu8_mask(narrow, bit);
        first = with_plane(first, bit, mask, &b, take);
    }
    for (int i = 0; i < 2; i++)
        offsets[i] = words_of(first, i);
    uint64_t mask = wider_than(8, pair);
    if (mask) {
        for (int k = 8; k < 16 && mask; mask = wider_than(++k, pair))
            second = with_plane(second, _mm512_set1_epi8((char)(1 << k % 8)), mask, &b, take);
        for (int i = 0; i < 2; i++)
            offsets[i] = _mm512_or_si512(offsets[i], _mm512_slli_epi16(words_of(second, i), 8));
    }
    *bits = b;
}

INLINE void next_pair(const struct exact_record *r, int g, int *at, uint16_t **to,
                      struct lane_pair *pair, const int is_bf16)
{
    pair->places[0] = next_place(r, at, to, pair->counts);
    pair->places[1] = NULL;
    if (g + 1 < r->vectors * r->groups)
        pair->places[1] = next_place(r, at, to, pair->counts + 1);
    pair_intervals(r, g, pair, is_bf16);
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
        __m512i offsets[2];
        if (bits->end - bits->next >= SURE)
            offsets_of(bits, &pair, take_surely, offsets);
        else
            offsets_of(bits, &pair, take_bits, offsets);
        lane_store(&pair, r, g, 0, offsets[0]);
        if (pair.places[1])
            lane_store(&pair, r, g, 1, offsets[1]);
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
