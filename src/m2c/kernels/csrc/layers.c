/* Whole layers, one after the other: a call per token instead of two per layer.
 *
 * For rows that are all in memory. The same functions as layer by layer, so the same bits.
 */

#include <string.h>

#include "rows.h"

/* Mirrored by kernels/structures.py. */
struct layer {
    struct attention *attention;
    const float *attn_norm, *attn_norm_bias;
    const struct rows *neurons;
    const float *ffn_norm, *ffn_norm_bias;
    const float *out_bias; /* [hidden], added with the FFN, or NULL */
    float attn_eps, ffn_eps;
    struct activation act;
};

/* x [tokens, hidden] through `count` layers in place: both parts read it only through their norm,
 * before they add to it. before: NULL, or memory of the size of x where both parts of a layer read what
 * the layer was given. What a part returns unless that is 0. */
int m2c_layers(struct kernels *k, struct layer *layers, int32_t count, int64_t start,
               int32_t tokens, int32_t hidden, float *x, float *before)
{
    for (struct layer *layer = layers; layer < layers + count; layer++) {
        struct given given = { x, layer->attn_norm, layer->attn_norm_bias, layer->attn_eps, tokens,
                               hidden };
        layer->attention->start = start;
        if (before)
            memcpy(before, x, (size_t)tokens * hidden * sizeof(float));
        int failed = m2c_attention(k, &given, layer->attention, x);
        given = (struct given){ before ? before : x, layer->ffn_norm, layer->ffn_norm_bias,
                                layer->ffn_eps, tokens, hidden };
        if (!failed)
            failed = m2c_ffn(k, &given, layer->neurons, &layer->act, NULL, NULL, x);
        if (failed)
            return failed;
        for (int t = 0; layer->out_bias && t < tokens; t++)
            for (int j = 0; j < hidden; j++)
                x[(size_t)t * hidden + j] += layer->out_bias[j];
    }
    return 0;
}
