/* Weights from their codes and the bit-planes of their offsets, for any processor: the inverse of what
 * encode.c writes. */

#include "exact_bits.h"

/* Bits 0, 1, ... of `packed` to the places where `mask` has ones. */
static inline uint64_t spread_bits(uint64_t packed, uint64_t mask)
{
    uint64_t to = 0;
    for (; mask; mask &= mask - 1, packed >>= 1)
        to |= packed & 1 ? mask & -mask : 0;
    return to;
}

/* Codes, candidates and widths of one group; padding has no candidates. */
static inline __attribute__((always_inline)) void group_intervals(
    const struct exact_record *r, int g, int count, int16_t *codes, uint16_t *low, uint8_t *widths)
{
    const uint8_t *q = r->q + 16 * g, *second = r->r + 16 * g;
    float unit = half_value(r->scales + 2 * g) * 0.03125f;
    for (int i = 0; i < GROUP; i++) {
        int shift = i < 16 ? 0 : 4, fine = (second[i & 15] >> shift) & 15;
        int code = 16 * ((q[i & 15] >> shift) & 15) + fine - 136;
        struct interval in = interval_of(code, fine, unit, r->is_bf16);
        codes[i] = (int16_t)code;
        low[i] = (uint16_t)in.low;
        widths[i] = i < count ? (uint8_t)width_of(in.last) : 0;
    }
}

void exact_unpack_scalar(const struct exact_record *r, struct bits *bits, uint16_t *to)
{
    int groups = r->vectors * r->groups, at = 0;
    for (int g = 0; g < groups; g += 2) {
        int16_t codes[PAIR];
        uint16_t low[PAIR], offsets[PAIR] = { 0 };
        uint8_t widths[PAIR] = { 0 };
        int both = g + 1 < groups ? 2 : 1, counts[2];
        uint16_t *places[2];
        for (int half = 0; half < both; half++) {
            places[half] = next_place(r, &at, &to, counts + half);
            group_intervals(r, g + half, counts[half], codes + half * GROUP, low + half * GROUP,
                            widths + half * GROUP);
        }
        for (int k = 0;; k++) {
            uint64_t mask = 0;
            for (int i = 0; i < PAIR; i++)
                mask |= (uint64_t)(widths[i] > k) << i;
            if (!mask)
                break;
            uint64_t plane = spread_bits(take_bits(bits, __builtin_popcountll(mask)), mask);
            for (int i = 0; i < PAIR; i++)
                offsets[i] |= (uint16_t)((plane >> i & 1) << k);
        }
        for (int i = 0; i < both * GROUP; i++) {
            int half = i / GROUP, below = (codes[i] < 0) ^ (r->scales[2 * (g + half) + 1] >> 7);
            uint16_t weight = codes[i] ? (uint16_t)(low[i] + offsets[i]) | (uint16_t)(below << 15)
                                       : (uint16_t)(offsets[i] >> 1 | offsets[i] << 15);
            if (i % GROUP < counts[half])
                places[half][i % GROUP] = weight;
        }
    }
}
