/* exact.c with AVX2 and BMI2. */

#include "exact_bits.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* Candidates of 32 weights, 16 in each half. */
struct half_intervals {
    __m256i low[2]; /* u16 */
    __m256i minus[2], zero[2]; /* codes that are negative, that are 0: u16, all ones or none */
    __m256i wide[2]; /* u8: in the lower and the upper byte of an offset, ones up to its width */
};

/* The 16-bit numbers at or above (up), or below, 16 values >= 0: those of `a` are the first and third
 * quarter of them, those of `b` the others, which is how unpacking 16 to 32 bits leaves them. */
INLINE __m256i bounds_of(__m256 a, __m256 b, const int up, const int is_bf16)
{
    if (is_bf16) {
        const __m256i most = _mm256_set1_epi32(up ? 0xffff : 0);
        return _mm256_packus_epi32(
            _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(a), most), 16),
            _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(b), most), 16));
    }
    __m128i x = up ? _mm256_cvtps_ph(a, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)
                   : _mm256_cvtps_ph(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    __m128i y = up ? _mm256_cvtps_ph(b, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)
                   : _mm256_cvtps_ph(b, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    return _mm256_set_m128i(_mm_unpackhi_epi64(x, y), _mm_unpacklo_epi64(x, y));
}

/* 16 whole numbers >= 0, times unit, to 16-bit numbers. */
INLINE __m256i scaled_bounds(__m256i whole, __m256 unit, const int up, const int is_bf16)
{
    const __m256i none = _mm256_setzero_si256();
    __m256 a = _mm256_cvtepi32_ps(_mm256_unpacklo_epi16(whole, none));
    __m256 b = _mm256_cvtepi32_ps(_mm256_unpackhi_epi16(whole, none));
    return bounds_of(_mm256_mul_ps(a, unit), _mm256_mul_ps(b, unit), up, is_bf16);
}

/* Where r is limited the interval reaches further, away from q. */
INLINE __m256i reach(__m256i where, __m256i minus, int with_minus, int without)
{
    __m256i most = _mm256_blendv_epi8(_mm256_set1_epi16((short)without),
                                      _mm256_set1_epi16((short)with_minus), minus);
    return _mm256_and_si256(where, most);
}

/* 16 x u16 from the code bytes of half a group; its last candidates, 0 for padding. */
INLINE __m256i half_of(struct half_intervals *in, int half, __m128i raw, __m256 unit, int count,
                       const int is_bf16)
{
    const __m256i none = _mm256_setzero_si256(), one = _mm256_set1_epi16(1);
    const __m256i nibble = _mm256_set1_epi16(15), places = _mm256_set_epi16(
        15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m256i bytes = _mm256_cvtepu8_epi16(raw);
    __m256i fine = _mm256_and_si256(bytes, nibble);
    __m256i code = _mm256_sub_epi16(bytes, _mm256_set1_epi16(136));
    __m256i minus = _mm256_cmpgt_epi16(none, code), zero = _mm256_cmpeq_epi16(code, none);
    __m256i top = _mm256_cmpeq_epi16(fine, nibble), bottom = _mm256_cmpeq_epi16(fine, none);
    __m256i size = _mm256_slli_epi16(_mm256_abs_epi16(code), 1);
    __m256i from = _mm256_sub_epi16(size, one), to = _mm256_add_epi16(size, one);
    from = _mm256_sub_epi16(from, reach(top, minus, ABOVE, 0));
    from = _mm256_sub_epi16(from, reach(bottom, minus, 0, BELOW));
    to = _mm256_add_epi16(to, reach(top, minus, 0, ABOVE));
    to = _mm256_add_epi16(to, reach(bottom, minus, BELOW, 0));
    from = _mm256_andnot_si256(zero, from);
    __m256i low = scaled_bounds(from, unit, 1, is_bf16);
    __m256i high = scaled_bounds(to, unit, 0, is_bf16);
    __m256i last = _mm256_subs_epu16(high, low);
    __m256i both = _mm256_add_epi16(_mm256_add_epi16(high, high), one);
    last = _mm256_blendv_epi8(last, both, zero);
    in->low[half] = low;
    in->minus[half] = minus;
    in->zero[half] = zero;
    __m256i left = _mm256_set1_epi16((short)(count - 16 * half));
    return _mm256_and_si256(last, _mm256_cmpgt_epi16(left, places));
}

/* 16 x u16 twice to 32 bytes, in order. */
INLINE __m256i joined_bytes(__m256i first, __m256i second)
{
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xd8);
}

INLINE __m256i ones_up_to_width(__m256i last)
{
    last = _mm256_or_si256(last, _mm256_srli_epi16(last, 1));
    last = _mm256_or_si256(last, _mm256_srli_epi16(last, 2));
    last = _mm256_or_si256(last, _mm256_srli_epi16(last, 4));
    return _mm256_or_si256(last, _mm256_srli_epi16(last, 8));
}

INLINE __m256 unit_of(const uint8_t *scale)
{
    uint16_t raw;
    memcpy(&raw, scale, 2);
    __m128 value = _mm_cvtph_ps(_mm_cvtsi32_si128(raw & 0x7fff));
    return _mm256_broadcastss_ps(_mm_mul_ss(value, _mm_set_ss(0.03125f)));
}

INLINE void group_of(struct half_intervals *in, const struct exact_record *r, int g, int count,
                     const int is_bf16)
{
    const __m128i nibble = _mm_set1_epi8(15);
    const __m256i byte = _mm256_set1_epi16(255);
    __m128i q = _mm_loadu_si128((const __m128i *)(r->q + 16 * g));
    __m128i s = _mm_loadu_si128((const __m128i *)(r->r + 16 * g));
    /* 16 q + r, 136 too large */
    __m128i first = _mm_or_si128(_mm_andnot_si128(nibble, _mm_slli_epi16(q, 4)),
                                 _mm_and_si128(s, nibble));
    __m128i second = _mm_or_si128(_mm_andnot_si128(nibble, q),
                                  _mm_and_si128(_mm_srli_epi16(s, 4), nibble));
    __m256 unit = unit_of(r->scales + 2 * g);
    __m256i a = ones_up_to_width(half_of(in, 0, first, unit, count, is_bf16));
    __m256i b = ones_up_to_width(half_of(in, 1, second, unit, count, is_bf16));
    in->wide[0] = joined_bytes(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
    in->wide[1] = joined_bytes(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
}

/* The weights of a pair whose offsets have bit k of one of their bytes. */
INLINE uint64_t wide_at(const __m256i first, const __m256i second, const int k)
{
    uint32_t low = (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(first, 7 - k));
    uint32_t high = (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(second, 7 - k));
    return (uint64_t)high << 32 | low;
}

/* Byte i is 1 << k where bit i is one. */
INLINE __m256i bytes_of(uint32_t plane, const int k)
{
    const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202,
                                             0x0101010101010101, 0);
    const __m256i each = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi32((int)plane), spread);
    __m256i ones = _mm256_cmpeq_epi8(_mm256_and_si256(bits, each), each);
    return _mm256_and_si256(ones, _mm256_set1_epi8((char)(1 << k)));
}

/* One bit-plane into the bytes of a pair. */
INLINE void add_plane(struct bits *b, uint64_t mask, take_function take, __m256i *to, const int k)
{
    uint64_t plane = _pdep_u64(take(b, (int)_mm_popcnt_u64(mask)), mask);
    to[0] = _mm256_or_si256(to[0], bytes_of((uint32_t)plane, k));
    to[1] = _mm256_or_si256(to[1], bytes_of((uint32_t)(plane >> 32), k));
}

/* The offsets of a pair: lower bytes in `low`, upper ones in `high`, of either group. */
INLINE void offsets_of(struct bits *bits, const struct half_intervals *in, take_function take,
                       __m256i *low, __m256i *high)
{
    struct bits b = *bits;
    /* eight planes whether there or not: where they end is hard to predict */
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
        add_plane(&b, wide_at(in[0].wide[0], in[1].wide[0], k), take, low, k);
    __m256i any = _mm256_or_si256(in[0].wide[1], in[1].wide[1]);
    if (!_mm256_testz_si256(any, any)) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++)
            add_plane(&b, wide_at(in[0].wide[1], in[1].wide[1], k), take, high, k);
    }
    *bits = b;
}

INLINE __m256i weights_of(const struct half_intervals *in, int half, __m128i low, __m128i high,
                          __m256i flip)
{
    __m256i offsets = _mm256_or_si256(_mm256_cvtepu8_epi16(low),
                                      _mm256_slli_epi16(_mm256_cvtepu8_epi16(high), 8));
    __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(in->minus[half], flip), 15);
    __m256i weights = _mm256_or_si256(_mm256_add_epi16(in->low[half], offsets), sign);
    __m256i zeros = _mm256_or_si256(_mm256_srli_epi16(offsets, 1), _mm256_slli_epi16(offsets, 15));
    return _mm256_blendv_epi8(weights, zeros, in->zero[half]);
}

INLINE void store_group(const struct half_intervals *in, const struct exact_record *r, int g,
                        __m256i low, __m256i high, int count, uint16_t *to)
{
    __m256i flip = _mm256_set1_epi16(r->scales[2 * g + 1] >> 7 ? -1 : 0);
    __m256i a = weights_of(in, 0, _mm256_castsi256_si128(low), _mm256_castsi256_si128(high), flip);
    __m256i b = weights_of(in, 1, _mm256_extracti128_si256(low, 1),
                           _mm256_extracti128_si256(high, 1), flip);
    uint16_t some[GROUP], *whole = count < GROUP ? some : to;
    _mm256_storeu_si256((__m256i *)whole, a);
    _mm256_storeu_si256((__m256i *)(whole + 16), b);
    if (count < GROUP)
        memcpy(to, some, (size_t)count * sizeof(uint16_t));
}

INLINE void unpack_halves(const struct exact_record *r, struct bits *bits, uint16_t *to,
                          const int is_bf16)
{
    int groups = r->vectors * r->groups, at = 0;
    for (int g = 0; g < groups; g += 2) {
        const __m256i none = _mm256_setzero_si256();
        struct half_intervals in[2];
        __m256i low[2] = { none, none }, high[2] = { none, none };
        uint16_t *places[2];
        int counts[2], both = g + 1 < groups;
        places[0] = next_place(r, &at, &to, counts);
        group_of(in, r, g, counts[0], is_bf16);
        in[1].wide[0] = in[1].wide[1] = none;
        if (both) {
            places[1] = next_place(r, &at, &to, counts + 1);
            group_of(in + 1, r, g + 1, counts[1], is_bf16);
        }
        if (bits->end - bits->next >= SURE)
            offsets_of(bits, in, take_surely, low, high);
        else
            offsets_of(bits, in, take_bits, low, high);
        store_group(in, r, g, low[0], high[0], counts[0], places[0]);
        if (both)
            store_group(in + 1, r, g + 1, low[1], high[1], counts[1], places[1]);
    }
}

TARGET void exact_unpack_avx2(const struct exact_record *r, struct bits *bits, uint16_t *to)
{
    if (r->is_bf16)
        unpack_halves(r, bits, to, 1);
    else
        unpack_halves(r, bits, to, 0);
}

#endif
