/* The experts of one token: each summed by itself and weighted, one after the other. */

#include <string.h>

#include "rows.h"

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
