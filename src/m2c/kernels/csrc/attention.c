/* The attention half of a layer in one call: norm, projections, rotary positions, KV cache, softmax,
 * output projection, residual. Equal to model/attention.py up to the rounding of activations.
 *
 * Every sum is computed by one thread in one order, whatever the threads and the tokens of the call.
 */

#include <math.h>
#include <string.h>

#include "rows.h"

struct attend_call {
    struct kernels *k;
    const struct primitives *use;
    const struct attention *a;
    const struct inputs *in;
    float *made[3]; /* q, k, v: [tokens, heads, dim] */
    float *scores; /* [threads, positions] */
    float *mixed; /* [tokens, heads, dim] */
    float *x; /* [tokens, hidden]: the residual stream */
    float *out; /* where the output goes: x, or memory of its own if it is normed first */
    int tokens;
    struct pieces pieces;
};

/* q, k and v as one row of rows */
static void project_part(void *context, int part, int parts)
{
    struct attend_call *c = context;
    (void)parts;
    for (int64_t i; next_piece(&c->pieces, &i);) {
        int64_t start = i * c->pieces.size, stop = start + c->pieces.size;
        for (int which = 0; which < 3; which++) {
            const struct rows *r = c->a->projections[which];
            int64_t last = stop < r->count ? stop : r->count;
            if (start < last)
                product(c->k, part, r, c->in, start, last, c->a->biases[which], 0,
                        c->made[which], r->count);
            start = start > r->count ? start - r->count : 0;
            stop -= r->count;
        }
    }
}

static void rotate(float *x, const float *cosines, const float *sines, int half)
{
    for (int i = 0; i < half; i++) {
        float low = x[i], high = x[i + half];
        x[i] = low * cosines[i] - high * sines[i];
        x[i + half] = high * cosines[i] + low * sines[i];
    }
}

/* heads of q (which = 0) or k made ready: normed, then turned */
static void turn(const struct attention *a, int which, float *heads, int count, int64_t position)
{
    int64_t at = position * (a->rotary / 2);
    for (float *x = heads; x < heads + (size_t)count * a->dim; x += a->dim) {
        if (a->head_norms[which])
            rms_norm(x, a->head_norms[which], a->eps, a->dim, x);
        if (a->cosines)
            rotate(x, a->cosines + at, a->sines + at, a->rotary / 2);
    }
}

static void keep(const struct attend_call *c, void *cache, int head, int64_t position,
                 const float *from)
{
    int dim = c->a->dim;
    size_t at = ((size_t)head * c->a->positions + position) * dim;
    if (c->a->is_f16)
        c->use->to_half((uint16_t *)cache + at, from, dim);
    else
        memcpy((float *)cache + at, from, (size_t)dim * sizeof(float));
}

static void place_part(void *context, int part, int parts)
{
    struct attend_call *c = context;
    const struct attention *a = c->a;
    (void)part, (void)parts;
    for (int64_t t; next_piece(&c->pieces, &t);) {
        size_t kv = (size_t)t * a->kv_heads * a->dim;
        turn(a, 0, c->made[0] + (size_t)t * a->heads * a->dim, a->heads, a->start + t);
        turn(a, 1, c->made[1] + kv, a->kv_heads, a->start + t);
        for (int head = 0; head < a->kv_heads; head++) {
            size_t at = kv + (size_t)head * a->dim;
            keep(c, a->keys, head, a->start + t, c->made[1] + at);
            keep(c, a->values, head, a->start + t, c->made[2] + at);
        }
    }
}

static void softmax(float *scores, int count, float scale, float cap)
{
    float largest = -INFINITY, total = 0;
    for (int p = 0; p < count; p++) {
        scores[p] *= scale;
        if (cap) /* and NaN of an infinite score, of which the cap would make a number */
            scores[p] = tanhf(scores[p] / cap) * cap + (scores[p] - scores[p]);
        largest = scores[p] > largest ? scores[p] : largest;
    }
    for (int p = 0; p < count; p++) {
        scores[p] = expf(scores[p] - largest);
        total += scores[p];
    }
    for (int p = 0; p < count; p++)
        scores[p] /= total;
}

static void heads_part(void *context, int part, int parts)
{
    struct attend_call *c = context;
    const struct attention *a = c->a;
    float *scores = c->scores + (size_t)part * a->positions;
    size_t item = a->is_f16 ? 2 : 4;
    (void)parts;
    for (int64_t i; next_piece(&c->pieces, &i);) {
        /* heads that share keys follow each other, and so do their tokens */
        int head = (int)(i / c->tokens), t = (int)(i % c->tokens);
        int64_t stop = a->start + t + 1, first = stop > a->window ? stop - a->window : 0;
        int64_t group = head / (a->heads / a->kv_heads);
        size_t from = (size_t)(group * a->positions + first) * a->dim * item;
        size_t at = ((size_t)t * a->heads + head) * a->dim;
        int seen = (int)(stop - first);
        struct cached keys = { (char *)a->keys + from, a->is_f16 };
        struct cached values = { (char *)a->values + from, a->is_f16 };
        c->use->scores(scores, c->made[0] + at, keys, seen, a->dim);
        softmax(scores, seen, a->scale, a->softcap);
        c->use->mixed(c->mixed + at, scores, values, seen, a->dim);
    }
}

static void output_part(void *context, int part, int parts)
{
    struct attend_call *c = context;
    const struct rows *r = c->a->projections[3];
    (void)parts;
    for (int64_t i; next_piece(&c->pieces, &i);) {
        int64_t start = i * c->pieces.size, stop = start + c->pieces.size;
        product(c->k, part, r, c->in, start, stop < r->count ? stop : r->count, c->a->biases[3],
                c->out == c->x, c->out, r->count);
    }
}

static void run(struct kernels *k, struct attend_call *c, pool_work work, struct pieces pieces)
{
    c->pieces = pieces;
    if (pieces.count == 1)
        work(c, 0, 1);
    else
        pool_run(k->pool, work, c);
}

/* x [tokens, hidden] += attention(norm(x)); keys and values of the tokens are stored from `start` on.
 * 0, or 1 without memory. */
int m2c_attention(struct kernels *k, const struct given *given, const struct attention *a, float *x)
{
    struct inputs in;
    int64_t made = 0;
    size_t tokens = (size_t)given->tokens, wide = (size_t)a->heads * a->dim;
    struct attend_call c = { .k = k, .use = k->use, .a = a, .in = &in, .x = x, .out = x,
                             .tokens = given->tokens };
    int failed = prepare(k, given, a->projections[0]->kind, &in);
    for (int i = 0; i < 3 && !failed; i++) {
        made += a->projections[i]->count;
        c.made[i] = scratch_take(k, tokens * a->projections[i]->count * sizeof(float));
        failed = !c.made[i];
    }
    for (int i = 0; i < 4 && !failed; i++)
        failed = room_for(k, a->projections[i]);
    c.scores = scratch_take(k, pool_threads(k->pool) * a->positions * sizeof(float));
    c.mixed = scratch_take(k, tokens * wide * sizeof(float));
    if (a->out_norm)
        c.out = scratch_take(k, tokens * a->projections[3]->count * sizeof(float));
    failed = failed || !c.scores || !c.mixed || !c.out;
    if (!failed) {
        run(k, &c, project_part, pieces_of(k, made));
        run(k, &c, place_part, (struct pieces){ 0, given->tokens, 1 });
        run(k, &c, heads_part, (struct pieces){ 0, (int64_t)a->heads * given->tokens, 1 });
        struct given mixed = { c.mixed, NULL, NULL, 0, given->tokens, (int32_t)wide };
        failed = prepare(k, &mixed, a->projections[3]->kind, &in);
    }
    if (!failed)
        run(k, &c, output_part, pieces_of(k, a->projections[3]->count));
    if (!failed && a->out_norm) {
        struct given out = { c.out, a->out_norm, NULL, a->eps, given->tokens, given->length };
        add_normed(k, &out, x);
    }
    return finish(k, failed);
}
