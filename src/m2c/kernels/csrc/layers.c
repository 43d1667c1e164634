/* Whole layers, one after the other: a call per token instead of two per layer.
 *
 * For rows that are all in memory. The same functions as layer by layer, so the same bits.
 */

#include "rows.h"

/* Mirrored by kernels/native.py. */
struct layer {
    struct attention *attention;
    const float *attn_norm;
    const struct rows *neurons;
    const float *ffn_norm;
    float attn_eps, ffn_eps;
    struct activation act;
};

/* x [tokens, hidden] through `count` layers in place: both parts read it only through their norm,
 * before they add to it. What a part returns unless that is 0. */
int m2c_layers(struct kernels *k, struct layer *layers, int32_t count, int64_t start,
               int32_t tokens, int32_t hidden, float *x)
{
    for (struct layer *layer = layers; layer < layers + count; layer++) {
        struct given given = { x, layer->attn_norm, layer->attn_eps, tokens, hidden };
        layer->attention->start = start;
        int failed = m2c_attention(k, &given, layer->attention, x);
        given.norm = layer->ffn_norm;
        given.eps = layer->ffn_eps;
        if (!failed)
            failed = m2c_ffn(k, &given, layer->neurons, &layer->act, NULL, NULL, x);
        if (failed)
            return failed;
    }
    return 0;
}
