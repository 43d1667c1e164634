/* Which neurons are the best of a token: a level per neuron by rank of its score. */

#include <math.h>
#include <string.h>

#include "rows.h"

#define DIGIT 11
#define DIGITS (1 << DIGIT)

/* non-negative floats order as their bits do; NaN is the largest */
static inline uint32_t key_of(float activation, float norm)
{
    float score = fabsf(activation) * norm;
    uint32_t key;
    memcpy(&key, &score, 4);
    return key & 0x7fffffff;
}

/* The key of rank `rank` (0: the largest), and how many keys are larger. */
static uint32_t key_at_rank(const uint32_t *keys, int64_t count, int64_t rank, int64_t *larger)
{
    uint32_t prefix = 0, known = 0;
    *larger = 0;
    for (int shift = 32 - DIGIT; known != 0xffffffff; shift = shift > DIGIT ? shift - DIGIT : 0) {
        int32_t seen[DIGITS] = { 0 };
        uint32_t mask = (uint32_t)(DIGITS - 1) << shift;
        int digit = DIGITS - 1;
        for (int64_t i = 0; i < count; i++)
            if ((keys[i] & known) == prefix)
                seen[keys[i] >> shift & (DIGITS - 1)]++;
        while (*larger + seen[digit] <= rank)
            *larger += seen[digit--];
        prefix = (prefix & ~mask) | (uint32_t)digit << shift;
        known |= mask;
    }
    return prefix;
}

/* levels of the `best` largest become `level`; of equal scores the lower ids are taken */
static void mark(const uint32_t *keys, int64_t count, int64_t best, int8_t level, int8_t *levels)
{
    int64_t larger;
    if (best <= 0)
        return;
    uint32_t last = key_at_rank(keys, count, best - 1, &larger);
    int64_t equal = best - larger;
    for (int64_t i = 0; i < count; i++)
        if (keys[i] > last || (keys[i] == last && equal-- > 0))
            levels[i] = level;
}

struct rank_call {
    const float *activations, *norms;
    const int64_t *bests;
    const int8_t *marks;
    int64_t count;
    int32_t steps;
    uint32_t *keys; /* [tokens, count] */
    int8_t *levels;
    struct pieces pieces;
};

static void rank_part(void *context, int part, int parts)
{
    struct rank_call *c = context;
    (void)part, (void)parts;
    for (int64_t t; next_piece(&c->pieces, &t);) {
        uint32_t *keys = c->keys + t * c->count;
        for (int64_t i = 0; i < c->count; i++)
            keys[i] = key_of(c->activations[t * c->count + i], c->norms[i]);
        for (int k = 0; k < c->steps; k++)
            mark(keys, c->count, c->bests[k], c->marks[k], c->levels + t * c->count);
    }
}

/* levels [tokens, count]: for each step in turn, the bests[k] neurons with the largest
 * |activation| * norm get marks[k]; others keep what is there. 0, or 1 without memory. */
int m2c_rank(struct kernels *k, const float *activations, const float *norms, int32_t tokens,
             int64_t count, int32_t steps, const int64_t *bests, const int8_t *marks,
             int8_t *levels)
{
    uint32_t *keys = scratch_take(k, tokens * count * sizeof(*keys));
    if (keys) {
        struct rank_call c = { activations, norms, bests, marks, count, steps, keys, levels,
                               { 0, tokens, 1 } };
        if (tokens == 1)
            rank_part(&c, 0, 1);
        else
            pool_run(k->pool, rank_part, &c);
    }
    scratch_reset(k);
    return !keys;
}
