/* Packed rows times activations: the kernels of m2c in C, chosen by instruction set at run time.
 *
 * Every function equals its torch reference (kernels/reference.py) up to the rounding of activations
 * to int8 per group of 32, and gives the same bits for any number of threads and of tokens: the
 * order of every sum is fixed. docs/DESIGN.md, sections 5 and 6.
 *
 * Knows nothing about files, layers or which neurons a token wants.
 */

#include "rows.h"

#include <stdlib.h>

#define AHEAD_NBYTES 8192 /* how far ahead of their use rows are fetched, at least */
#define TOKENS_AT_ONCE 32 /* whose activations stay in the second-level cache */

/* want: "auto", "scalar", "avx2" or "avx512". NULL if this machine cannot run it or has no memory. */
struct kernels *m2c_open(const char *want, int threads)
{
    struct kernels *k = calloc(1, sizeof(*k));
    if (!k || !(k->use = primitives_for(want, &k->name)) || !(k->pool = m2c_pool_new(threads))) {
        free(k);
        return NULL;
    }
    return k;
}

const char *m2c_name(const struct kernels *k)
{
    return k->name;
}

void m2c_close(struct kernels *k)
{
    if (k) {
        m2c_pool_free(k->pool);
        scratch_reset(k);
        free(k->scratch.at);
    }
    free(k);
}

void dot_vectors(const struct primitives *use, const struct rows *r, int64_t row, int count,
                 int vector, const struct inputs *in, float *out, int64_t stride)
{
    if (r->kind == 16) {
        const uint16_t *wide[ROWS_AT_ONCE];
        for (int i = 0; i < count; i++)
            wide[i] = wide_of(r, row + i, vector);
        /* The same vector of the neuron after the next, or some rows further on; and, before a
         * neuron's last dot product, the down column of the next one. */
        size_t own = (size_t)r->length * 2, record = r->vectors * own;
        const size_t ahead[2] = { r->vectors > 1 ? 2 * record : AHEAD_NBYTES,
                                  vector == r->vectors - 2 ? own + record : 0 };
        use->dot_wide(wide, count, in, r->length, r->is_bf16, ahead, out, stride);
        return;
    }
    struct codes codes[2 * ROWS_AT_ONCE];
    int record = r->vectors * r->groups * (GROUP / 2 + 2);
    int ahead = (AHEAD_NBYTES + record - 1) / record;
    ahead = ahead < ROWS_AT_ONCE ? ROWS_AT_ONCE : ahead;
    for (int i = 0; i < count; i++) {
        codes[i] = codes_of(r, row + i, vector);
        if (row + i + ahead < r->count) {
            codes[ROWS_AT_ONCE + i] = codes_of(r, row + i + ahead, vector);
            codes[i].next = codes + ROWS_AT_ONCE + i;
        }
    }
    use->dot_codes(codes, count, in, r->groups, out, stride);
}

static void product_of(const struct primitives *use, const struct rows *r, const struct inputs *in,
                       int64_t start, int64_t stop, const float *bias, int add, float *out,
                       int64_t out_stride)
{
    float sums[ROWS_AT_ONCE * TOKENS_AT_ONCE];
    for (int t = 0; t < in->tokens; t += TOKENS_AT_ONCE) {
        int tokens = in->tokens - t < TOKENS_AT_ONCE ? in->tokens - t : TOKENS_AT_ONCE;
        struct inputs some = tokens_from(in, t, tokens, r->length);
        for (int64_t row = start; row < stop; row += ROWS_AT_ONCE) {
            int count = (int)(stop - row < ROWS_AT_ONCE ? stop - row : ROWS_AT_ONCE);
            dot_vectors(use, r, row, count, 0, &some, sums, TOKENS_AT_ONCE);
            for (int k = 0; k < tokens; k++) {
                float *to = out + (t + k) * out_stride + row;
                for (int i = 0; i < count; i++) {
                    float value = sums[i * TOKENS_AT_ONCE + k] + (bias ? bias[row + i] : 0);
                    to[i] = add ? to[i] + value : value;
                }
            }
        }
    }
}

void product(struct kernels *k, int part, const struct rows *r, const struct inputs *in,
             int64_t start, int64_t stop, const float *bias, int add, float *out,
             int64_t out_stride)
{
    if (!r->frames) {
        product_of(k->use, r, in, start, stop, bias, add, out, out_stride);
        return;
    }
    for (int64_t row = start, next; row < stop; row = next) {
        next = (row / r->frame_records + 1) * r->frame_records;
        next = next < stop ? next : stop;
        struct rows some = rows_from(k, part, r, row, next);
        product_of(k->use, &some, in, 0, next - row, bias ? bias + row : NULL, add, out + row,
                   out_stride);
    }
}

struct matmul_call {
    struct kernels *k;
    const struct rows *rows;
    const struct inputs *in;
    float *out; /* [tokens, rows], a token's `stride` behind the one before */
    int64_t stride;
    struct pieces pieces;
};

static void matmul_part(void *context, int part, int parts)
{
    struct matmul_call *c = context;
    (void)parts;
    for (int64_t i; next_piece(&c->pieces, &i);) {
        int64_t start = i * c->pieces.size, stop = start + c->pieces.size;
        stop = stop < c->rows->count ? stop : c->rows->count;
        product(c->k, part, c->rows, c->in, start, stop, NULL, 0, c->out, c->stride);
    }
}

/* out [tokens, rows] = x . rows, each token's `stride` values behind those of the one before; 0, or 1
 * without memory */
int m2c_matmul(struct kernels *k, const struct given *given, const struct rows *rows, float *out,
               int64_t stride)
{
    struct inputs in;
    int failed = prepare(k, given, rows->kind, &in) || room_for(k, rows);
    if (!failed) {
        struct matmul_call c = { k, rows, &in, out, stride, pieces_of(k, rows->count) };
        pool_run(k->pool, matmul_part, &c);
    }
    return finish(k, failed);
}

struct read_call {
    const uint64_t *at;
    int64_t count;
    uint64_t *sums; /* [threads] */
};

static void read_part(void *context, int part, int parts)
{
    const struct read_call *c = context;
    uint64_t sums[16] = { 0 }, total = 0;
    int64_t start = c->count / 16 * part / parts, stop = c->count / 16 * (part + 1) / parts;
    for (int64_t i = start; i < stop; i++)
        for (int k = 0; k < 16; k++)
            sums[k] ^= c->at[16 * i + k];
    for (int k = 0; k < 16; k++)
        total ^= sums[k];
    c->sums[part] = total;
}

/* Reads nbytes once with all threads and does nothing else: what memory can give. */
uint64_t m2c_read(struct kernels *k, const void *at, int64_t nbytes)
{
    uint64_t *sums = scratch_take(k, pool_threads(k->pool) * sizeof(*sums)), total = 0;
    if (sums) {
        struct read_call c = { at, nbytes / 8, sums };
        pool_run(k->pool, read_part, &c);
        for (int i = 0; i < pool_threads(k->pool); i++)
            total ^= sums[i];
    }
    scratch_reset(k);
    return total;
}
