/* Reading the exact plane: bits in order, and where the weights of a group go. Shared by all
 * instruction sets; knows nothing about any. */
#ifndef M2C_EXACT_BITS_H
#define M2C_EXACT_BITS_H

#include "exact.h"

/* The next `count` <= PAIR bits, from bit 0 of the result on. */
static inline __attribute__((always_inline)) uint64_t take_bits(struct bits *b, int count)
{
    int64_t left = b->end - b->next, byte = b->next >> 3;
    int shift = (int)(b->next & 7);
    uint64_t low = 0, high = 0;
    if (left >= 80) {
        memcpy(&low, b->at + byte, 8);
        high = b->at[byte + 8];
    } else if (left > 0) {
        uint8_t last[16] = { 0 };
        memcpy(last, b->at + byte, (size_t)((left + shift + 7) >> 3));
        memcpy(&low, last, 8);
        high = last[8];
    }
    b->next += count;
    return low >> shift | high << 1 << (63 - shift);
}

#define SURE (PAIR * 16 + 80) /* bits left that make a look at the end needless for a pair */

/* The same, where SURE bits are left. */
static inline __attribute__((always_inline)) uint64_t take_surely(struct bits *b, int count)
{
    const uint8_t *at = b->at + (b->next >> 3);
    int shift = (int)(b->next & 7);
    uint64_t low, high = at[8];
    memcpy(&low, at, 8);
    b->next += count;
    return low >> shift | high << 1 << (63 - shift);
}

typedef uint64_t (*take_function)(struct bits *b, int count);

static inline float half_value(const uint8_t *at)
{
    uint16_t h;
    memcpy(&h, at, 2);
    uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t bits = (exponent + 112) << 23 | mantissa << 13;
    float value;
    if (!exponent)
        return (float)mantissa * 5.9604644775390625e-08f; /* 2^-24 */
    memcpy(&value, &bits, 4);
    return value;
}

/* Where the next group of a record goes, and how many of its values are no padding. at: the first of
 * them in its vector. */
static inline uint16_t *next_place(const struct exact_record *r, int *at, uint16_t **to, int *count)
{
    uint16_t *place = *to;
    *count = r->length - *at < GROUP ? r->length - *at : GROUP;
    *to += *count;
    *at = *at + *count == r->length ? 0 : *at + GROUP;
    return place;
}

#endif
