/* Frames of the exact plane while they are written: bits of bytes, and bytes of bits. For every
 * instruction set; knows nothing of what the bits mean. */
#ifndef M2C_ENCODE_BITS_H
#define M2C_ENCODE_BITS_H

#include <stdint.h>
#include <string.h>

#include "exact.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define WORD 8 /* bytes that are written at a time */

/* A frame that is being written. */
struct frame {
    uint8_t *to, *escape; /* where the next word and the next escape go */
    uint64_t word;
    int filled; /* bits of word */
    uint32_t weights; /* so far */
};

static inline void put_bits(struct frame *f, uint64_t bits, int count)
{
    f->word |= bits << f->filled;
    f->filled += count;
    if (f->filled < 64)
        return;
    memcpy(f->to, &f->word, WORD);
    f->to += WORD;
    f->filled -= 64;
    f->word = f->filled ? bits >> (count - f->filled) : 0;
}

/* List the weights at `far` of a pair whose first group has `count` values. */
static void put_escapes(struct frame *f, uint64_t far, const uint16_t *bits, int count)
{
    for (; far; far &= far - 1) {
        int i = __builtin_ctzll(far);
        uint32_t position = f->weights + (uint32_t)(i < GROUP ? i : i - GROUP + count);
        memcpy(f->escape, &position, 4);
        memcpy(f->escape + 4, bits + i, 2);
        f->escape += ESCAPE_NBYTES;
    }
}

/* Those of the bits where `mask` has ones, from bit 0 of the result on. */
static inline uint64_t gather_bits(uint64_t bits, uint64_t mask)
{
    uint64_t to = 0;
    for (int n = 0; mask; mask &= mask - 1)
        to |= (uint64_t)((bits & mask & -mask) != 0) << n++;
    return to;
}

/* Which of PAIR bytes are larger than k */
static inline uint64_t wider_scalar(const uint8_t *bytes, int k)
{
    uint64_t found = 0;
    for (int i = 0; i < PAIR; i++)
        found |= (uint64_t)(bytes[i] > k) << i;
    return found;
}

/* Bit k of each of PAIR bytes */
static inline uint64_t bit_scalar(const uint8_t *bytes, int k)
{
    uint64_t found = 0;
    for (int i = 0; i < PAIR; i++)
        found |= (uint64_t)(bytes[i] >> k & 1) << i;
    return found;
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) static inline uint64_t join_avx2(__m256i low, __m256i high)
{
    return (uint32_t)_mm256_movemask_epi8(low) | (uint64_t)_mm256_movemask_epi8(high) << 32;
}

__attribute__((target("avx2"))) static inline uint64_t wider_avx2(const uint8_t *bytes, int k)
{
    const __m256i *at = (const __m256i *)bytes, than = _mm256_set1_epi8((char)k);
    return join_avx2(_mm256_cmpgt_epi8(_mm256_loadu_si256(at), than),
                     _mm256_cmpgt_epi8(_mm256_loadu_si256(at + 1), than));
}

__attribute__((target("avx2"))) static inline uint64_t bit_avx2(const uint8_t *bytes, int k)
{
    const __m256i *at = (const __m256i *)bytes;
    __m128i up = _mm_cvtsi32_si128(7 - k); /* to the highest of its byte */
    return join_avx2(_mm256_sll_epi16(_mm256_loadu_si256(at), up),
                     _mm256_sll_epi16(_mm256_loadu_si256(at + 1), up));
}

#endif
#endif
