/* Neurons: gate and up, sums over down columns, and the whole FFN in one pass over each record.
 * A neuron of two vectors has no gate: the activation of its up row is all.
 *
 * Sums over neurons run in chunks of CHUNK and the chunks in order, whoever computed them; inside a
 * chunk TILE neurons at a time, those whose activation is zero left out.
 */

#include <math.h>
#include <string.h>

#include "rows.h"

#define CHUNK 256
#define TOKENS_AT_ONCE 64 /* whose partial sums are kept together */
#define PARTIAL_NBYTES (8 << 20)

static inline float activate(float gate, float up, struct activation act)
{
    if (act.kind == ACT_RELU)
        return (gate <= act.threshold ? 0 : gate) * up; /* NaN is not below it: it stays */
    if (act.kind == ACT_GELU)
        return 0.5f * gate * (1.0f + erff(gate * 0.70710678118654752f)) * up;
    float slope = gate;
    if (act.kind == ACT_GELU_TANH) /* 1 + tanh(z) is 2 / (1 + exp(-2 z)) */
        slope = 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1.0f + expf(-slope)) * up;
}

/* h[i * stride + t]: activations of neurons row to row + count - 1, count <= TILE; act.bias is that of
 * neuron row. */
static void activations(const struct primitives *use, const struct rows *r, int64_t row, int count,
                        const struct inputs *in, struct activation act, float *h,
                        int64_t stride)
{
    float up[ROWS_AT_ONCE * TOKENS_AT_ONCE];
    /* 16-bit rows are long: with one token a neuron at a time, in the order of memory */
    int most = r->kind == 16 && in->tokens < 2 ? 1 : ROWS_AT_ONCE;
    for (int first = 0; first < count; first += most) {
        int some = count - first < most ? count - first : most;
        float *gate = h + first * stride;
        dot_vectors(use, r, row + first, some, 0, in, gate, stride);
        if (r->vectors == 2) {
            for (int i = 0; i < some; i++) {
                float bias = act.bias ? act.bias[first + i] : 0;
                for (int t = 0; t < in->tokens; t++)
                    gate[i * stride + t] = activate(gate[i * stride + t] + bias, 1, act);
            }
            continue;
        }
        dot_vectors(use, r, row + first, some, 1, in, up, TOKENS_AT_ONCE);
        for (int i = 0; i < some; i++)
            for (int t = 0; t < in->tokens; t++)
                gate[i * stride + t] = activate(gate[i * stride + t], up[i * TOKENS_AT_ONCE + t],
                                                act);
    }
}

static struct activation from_row(struct activation act, int64_t row)
{
    act.bias = act.bias ? act.bias + row : NULL;
    return act;
}

/* from a 16-bit column to that of the same neuron of the next tile */
static size_t next_tile(const struct rows *r)
{
    return (size_t)TILE * r->vectors * r->length * 2;
}

/* y += sum of h[i * stride] * down column of row + i, zeros left out */
static void add_columns(const struct primitives *use, const struct rows *r, int64_t row, int count,
                        const float *h, int64_t stride, float *y)
{
    struct codes columns[TILE], next[TILE];
    const uint16_t *wide[TILE];
    float held[TILE];
    int n = 0, last = r->vectors - 1;
    for (int i = 0; i < count; i++) {
        if (h[i * stride] == 0)
            continue;
        held[n] = h[i * stride];
        if (r->kind == 16) {
            wide[n++] = wide_of(r, row + i, last);
            continue;
        }
        columns[n] = codes_of(r, row + i, last);
        if (row + i + TILE < r->count) {
            next[n] = codes_of(r, row + i + TILE, last);
            columns[n].next = next + n;
        }
        n++;
    }
    if (n && r->kind == 16)
        use->add_wide(&(struct sums_of){ y, 0, held, 1, n, 1, next_tile(r) }, wide, r->length,
                      r->is_bf16);
    else if (n)
        use->add_codes(y, columns, held, n, r->groups);
}

/* The same for h[i * tokens + t] and y[t * y_stride]. Where no activation is zero tokens share what is
 * read of 16-bit columns: the same sums. */
static void add_tile(const struct primitives *use, const struct rows *r, int64_t row, int count,
                     const float *h, int tokens, float *y, size_t y_stride)
{
    int zeros = 0;
    for (int i = 0; i < count * tokens; i++)
        zeros += h[i] == 0;
    if (r->kind != 16 || tokens == 1 || zeros) {
        for (int t = 0; t < tokens; t++)
            add_columns(use, r, row, count, h + t, tokens, y + t * y_stride);
        return;
    }
    const uint16_t *wide[TILE];
    for (int i = 0; i < count; i++)
        wide[i] = wide_of(r, row + i, r->vectors - 1);
    use->add_wide(&(struct sums_of){ y, y_stride, h, tokens, count, tokens, next_tile(r) }, wide,
                  r->length, r->is_bf16);
}

struct ffn_call {
    struct kernels *k;
    const struct rows *rows;
    const struct inputs *in; /* NULL: activations are given */
    const float *given; /* [tokens, rows]: activations, or factors of them, or NULL */
    float *kept; /* [tokens, rows]: receives activations, or NULL */
    struct activation act;
    int tokens;
    int64_t first; /* chunk of this wave */
    float *partial; /* [chunks, tokens, padded] */
    float *out; /* [tokens, length] */
    struct pieces pieces;
};

static void chunk_part(void *context, int part, int parts)
{
    struct ffn_call *c = context;
    const struct rows *r = c->rows;
    int tokens = c->tokens;
    size_t padded = padded_length(r->length);
    float h[TILE * TOKENS_AT_ONCE];
    (void)parts;
    for (int64_t k; next_piece(&c->pieces, &k);) {
        float *y = c->partial + (size_t)k * tokens * padded;
        int64_t start = (c->first + k) * CHUNK;
        int64_t stop = start + CHUNK < r->count ? start + CHUNK : r->count;
        memset(y, 0, tokens * padded * sizeof(float));
        for (int64_t row = start; row < stop; row += TILE) {
            int count = (int)(stop - row < TILE ? stop - row : TILE);
            struct rows decoded = *r;
            int64_t at = row;
            if (r->frames) {
                decoded = rows_from(c->k, part, r, row, row + count);
                at = 0;
            }
            if (c->in)
                activations(c->k->use, &decoded, at, count, c->in, from_row(c->act, row), h,
                            tokens);
            for (int i = 0; i < count; i++)
                for (int t = 0; c->given && t < tokens; t++) {
                    float factor = c->given[(size_t)t * r->count + row + i];
                    h[i * tokens + t] = c->in ? h[i * tokens + t] * factor : factor;
                }
            for (int i = 0; i < count; i++)
                for (int t = 0; c->kept && t < tokens; t++)
                    c->kept[(size_t)t * r->count + row + i] = h[i * tokens + t];
            add_tile(c->k->use, &decoded, at, count, h, tokens, y, padded);
        }
    }
}

#define COLUMNS 256 /* outputs handed out at a time */

static void sum_part(void *context, int part, int parts)
{
    struct ffn_call *c = context;
    size_t padded = padded_length(c->rows->length);
    int64_t chunks = c->first; /* how many, here */
    (void)part, (void)parts;
    for (int64_t i; next_piece(&c->pieces, &i);) {
        int64_t stop = (i + 1) * COLUMNS < c->rows->length ? (i + 1) * COLUMNS : c->rows->length;
        for (int t = 0; t < c->tokens; t++) {
            float *to = c->out + (size_t)t * c->rows->length;
            for (int64_t k = 0; k < chunks; k++) {
                const float *from = c->partial + ((size_t)k * c->tokens + t) * padded;
                for (int64_t j = i * COLUMNS; j < stop; j++)
                    to[j] += from[j];
            }
        }
    }
}

/* out [tokens, length] += for up to TOKENS_AT_ONCE tokens, a wave of chunks at a time */
static void sum_neurons(struct kernels *k, struct ffn_call *call, int64_t wave)
{
    int64_t chunks = (call->rows->count + CHUNK - 1) / CHUNK;
    for (int64_t first = 0; first < chunks; first += wave) {
        int64_t count = chunks - first < wave ? chunks - first : wave;
        call->first = first;
        call->pieces = (struct pieces){ 0, count, 1 };
        pool_run(k->pool, chunk_part, call);
        call->first = count;
        call->pieces = (struct pieces){ 0, (call->rows->length + COLUMNS - 1) / COLUMNS, COLUMNS };
        pool_run(k->pool, sum_part, call);
    }
}

static int all_tokens(struct kernels *k, const struct rows *rows, const struct inputs *in,
                      int tokens, const float *given, struct activation act,
                      float *kept, float *out)
{
    int most = tokens < TOKENS_AT_ONCE ? tokens : TOKENS_AT_ONCE;
    size_t one = most * padded_length(rows->length) * sizeof(float);
    int64_t chunks = (rows->count + CHUNK - 1) / CHUNK, wave = (int64_t)(PARTIAL_NBYTES / one);
    int64_t least = 2 * pool_threads(k->pool);
    wave = wave < least ? least : wave;
    wave = wave < chunks ? wave : chunks;
    float *partial = scratch_take(k, wave * one);
    if (!partial || room_for(k, rows))
        return 1;
    for (int t = 0; t < tokens; t += most) {
        int some = tokens - t < most ? tokens - t : most;
        struct inputs part;
        if (in)
            part = tokens_from(in, t, some, rows->length);
        struct ffn_call c = { k, rows, in ? &part : NULL,
                              given ? given + (size_t)t * rows->count : NULL,
                              kept ? kept + (size_t)t * rows->count : NULL, act, some, 0, partial,
                              out + (size_t)t * rows->length, { 0, 0, 0 } };
        sum_neurons(k, &c, wave);
    }
    return 0;
}

/* out [tokens, length] += activations [tokens, rows] . down columns; 0, or 1 without memory */
int m2c_down(struct kernels *k, const struct rows *rows, const float *given, int32_t tokens,
             float *out)
{
    struct activation none = { 0 };
    int failed = all_tokens(k, rows, NULL, tokens, given, none, NULL, out);
    return finish(k, failed);
}

/* out [tokens, length] += the FFN of some neurons; mask [tokens, rows] multiplies activations, kept
 * [tokens, rows] receives them, or they are NULL. 0, or 1 without memory. */
int m2c_ffn(struct kernels *k, const struct given *given, const struct rows *rows,
            const struct activation *act, const float *mask, float *kept, float *out)
{
    struct inputs in;
    int failed = prepare(k, given, rows->kind, &in);
    if (!failed)
        failed = all_tokens(k, rows, &in, given->tokens, mask, *act, kept, out);
    return finish(k, failed);
}

struct gate_up_call {
    struct kernels *k;
    const struct rows *rows;
    const struct inputs *in;
    struct activation act;
    float *out; /* [tokens, rows] */
    struct pieces pieces;
};

static void gate_up_part(void *context, int part, int parts)
{
    struct gate_up_call *c = context;
    const struct rows *r = c->rows;
    float h[TILE * TOKENS_AT_ONCE];
    (void)parts;
    for (int64_t k; next_piece(&c->pieces, &k);) {
        int count = (int)(r->count - k * TILE < TILE ? r->count - k * TILE : TILE);
        struct rows decoded = *r;
        int64_t at = k * TILE;
        if (r->frames) {
            decoded = rows_from(c->k, part, r, at, at + count);
            at = 0;
        }
        for (int t = 0; t < c->in->tokens; t += TOKENS_AT_ONCE) {
            int tokens = c->in->tokens - t < TOKENS_AT_ONCE ? c->in->tokens - t : TOKENS_AT_ONCE;
            struct inputs in = tokens_from(c->in, t, tokens, r->length);
            activations(c->k->use, &decoded, at, count, &in, from_row(c->act, k * TILE), h, tokens);
            for (int i = 0; i < count; i++)
                for (int s = 0; s < tokens; s++)
                    c->out[(size_t)(t + s) * r->count + k * TILE + i] = h[i * tokens + s];
        }
    }
}

/* out [tokens, rows] = act(x . gate) (x . up), or act(x . up + bias); 0, or 1 without memory */
int m2c_gate_up(struct kernels *k, const struct given *given, const struct rows *rows,
                const struct activation *act, float *out)
{
    struct inputs in;
    int failed = prepare(k, given, rows->kind, &in) || room_for(k, rows);
    if (!failed) {
        struct gate_up_call c = { k, rows, &in, *act, out,
                                  { 0, (rows->count + TILE - 1) / TILE, TILE } };
        pool_run(k->pool, gate_up_part, &c);
    }
    return finish(k, failed);
}
