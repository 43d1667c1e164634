/* The exact plane: where a weight lies in the interval that its INT8 code stands for.
 *
 * docs/FORMAT.md, "The exact plane". All products here are exact in f32: a scale has 11 significant
 * bits, a bound at most 9. Knows nothing about frames or threads.
 */
#ifndef M2C_EXACT_H
#define M2C_EXACT_H

#include <stdint.h>
#include <string.h>

#include "primitives.h"

#define PAIR (2 * GROUP) /* weights whose bit-planes lie together */
#define ESCAPE_NBYTES 6 /* u32 position in the frame, u16 the weight */

/* The codes of one record, and what they are codes of. */
struct exact_record {
    const uint8_t *q, *r; /* codes of all vectors */
    const uint8_t *scales; /* F16 of all groups */
    int32_t vectors, length, groups; /* groups: of a vector */
    int32_t is_bf16;
};

/* A string of bits, the lowest of each byte first. */
struct bits {
    const uint8_t *at;
    int64_t next, end; /* in bits; reading beyond the end gives zeros */
};

/* Candidates for the bits of a weight's magnitude: `last` + 1 of them from `low` on. For code 0 they
 * are magnitudes and signs, two for each from 0 on. */
struct interval {
    uint32_t low, last;
};

/* the largest F16 not above v >= 0, finite */
static inline uint32_t half_below(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, 4);
    if (bits >= 0x47800000)
        return 0x7bff;
    return bits < 0x38800000 ? (uint32_t)(v * 16777216.0f) : (bits - 0x38000000) >> 13;
}

/* the smallest F16 not below v >= 0 */
static inline uint32_t half_above(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, 4);
    if (bits > 0x477fe000)
        return 0x7c00;
    if (bits >= 0x38800000)
        return (bits - 0x38000000 + 0x1fff) >> 13;
    float units = v * 16777216.0f;
    uint32_t whole = (uint32_t)units;
    return whole + ((float)whole < units);
}

static inline uint32_t brain_below(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits >> 16;
}

static inline uint32_t brain_above(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return (bits + 0xffff) >> 16;
}

/* How much further the intervals of r = 7 and r = -8 reach, away from q, in half steps: r is limited,
 * and q need not be the nearest. */
#define ABOVE 5
#define BELOW 3

/* code: 16 q + r. fine: r + 8. unit: |scale| / 32. Where no number lies between the ends, the one above
 * the lower end is the only candidate. */
static inline __attribute__((always_inline)) struct interval interval_of(
    int code, int fine, float unit, int is_bf16)
{
    int size = code < 0 ? -code : code, up = fine == 15 ? ABOVE : 0, down = fine ? 0 : BELOW;
    int from = size ? 2 * size - 1 - (code < 0 ? up : down) : 0;
    int to = 2 * size + 1 + (code < 0 ? down : up);
    float low = unit * (float)from, high = unit * (float)to;
    uint32_t first = is_bf16 ? brain_above(low) : half_above(low);
    uint32_t stop = is_bf16 ? brain_below(high) : half_below(high);
    if (!size)
        return (struct interval){ 0, 2 * stop + 1 };
    return (struct interval){ first, stop > first ? stop - first : 0 };
}

/* bits that an offset up to `last` takes */
static inline int width_of(uint32_t last)
{
    return last ? 32 - __builtin_clz(last) : 0;
}

#endif
