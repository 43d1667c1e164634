/* A mixture of experts: which a token goes to, and what those of one token give. */

#include <math.h>
#include <string.h>

#include "rows.h"

/* What a router is. Mirrored by kernels/structures.py. */
struct router {
    const struct rows *rows; /* [parts, experts + shared]: parts that add up */
    int32_t experts, active;
    int32_t sums_to_one; /* the weights of a token's experts */
    int32_t shared; /* 1: the last row of a part is the gate of the shared expert */
};

/* values [count] become exp(value) over the sum of all */
static void softmax(float *values, int count)
{
    float largest = values[0], total = 0;
    for (int i = 1; i < count; i++)
        largest = values[i] > largest ? values[i] : largest;
    for (int i = 0; i < count; i++)
        total += values[i] = expf(values[i] - largest);
    for (int i = 0; i < count; i++)
        values[i] /= total;
}

/* The best experts of one token, rising, and their shares; of equals the lower. taken [experts]: 0 */
static void choose(const struct router *r, const float *shares, char *taken, int64_t *chosen,
                   float *weights)
{
    float total = 0;
    for (int n = 0; n < r->active; n++) {
        int best = -1;
        for (int i = 0; i < r->experts; i++)
            if (!taken[i] && (best < 0 || shares[i] > shares[best]))
                best = i;
        taken[best] = 1;
        total += shares[best];
    }
    for (int i = 0, n = 0; i < r->experts; i++)
        if (taken[i]) {
            chosen[n] = i;
            weights[n++] = r->sums_to_one ? shares[i] / total : shares[i];
        }
}

/* chosen, weights [tokens, active], and how much of the shared expert a token takes: share [tokens],
 * if there is one. logits: memory for [tokens, rows]. 0, or 1 without memory. */
int m2c_route(struct kernels *k, const struct given *given, const struct router *r, float *logits,
              int64_t *chosen, float *weights, float *share)
{
    int width = r->experts + r->shared;
    int failed = m2c_matmul(k, given, r->rows, logits, r->rows->count);
    char *taken = failed ? NULL : scratch_take(k, (size_t)r->experts);
    for (int t = 0; taken && t < given->tokens; t++) {
        float *own = logits + t * r->rows->count;
        for (int64_t part = width; part < r->rows->count; part += width)
            for (int i = 0; i < width; i++)
                own[i] += own[part + i];
        softmax(own, r->experts);
        memset(taken, 0, (size_t)r->experts);
        choose(r, own, taken, chosen + t * r->active, weights + t * r->active);
        if (r->shared)
            share[t] = 1 / (1 + expf(-own[r->experts]));
    }
    return failed ? failed : finish(k, !taken);
}

/* out [length] += for each expert in turn: its FFN's output times its weight. given: of one token;
 * part: memory for [length]. What m2c_ffn returns unless that is 0. */
int m2c_experts(struct kernels *k, const struct given *given, const struct rows *const *experts,
                int32_t count, const struct activation *act, const float *weights, float *part,
                float *out)
{
    for (int i = 0; i < count; i++) {
        memset(part, 0, (size_t)given->length * sizeof(float));
        int failed = m2c_ffn(k, given, experts[i], act, NULL, NULL, part);
        if (failed)
            return failed;
        for (int j = 0; j < given->length; j++)
            out[j] += part[j] * weights[i];
    }
    return 0;
}
