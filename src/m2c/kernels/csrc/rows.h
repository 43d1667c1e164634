/* Rows, activations, and what the entry points share. */
#ifndef M2C_ROWS_H
#define M2C_ROWS_H

#include <stdatomic.h>

#include "pool.h"
#include "primitives.h"

/* Memory that lasts for one call; kept for the next one. */
struct scratch {
    char *at;
    size_t size, used;
    struct scratch *full; /* blocks that became too small during this call */
};

/* An instruction set, the threads that use it, and their memory. */
struct kernels {
    const struct primitives *use;
    const char *name;
    struct pool *pool;
    struct scratch scratch;
    uint16_t *room; /* [threads, room_values]: rows with frames, decoded where they are used */
    size_t room_values;
    atomic_int damaged; /* a frame of this call does not hold what it should */
};

/* Rows in memory. kind: 4 or 8 (codes), or 16: `wide`, or codes and frames. Mirrored by
 * kernels/structures.py. */
struct rows {
    const uint8_t *int4; /* records: codes of all vectors, then their FP16 scales */
    const uint8_t *int8; /* records: second codes; NULL unless kind is 8 */
    const uint16_t *wide; /* records: 16-bit weights, kind 16 */
    const int32_t *index4, *index8; /* which records are the rows; NULL: all, as they lie */
    int64_t count;
    int32_t vectors, length, groups;
    int32_t kind, is_bf16;
    const uint8_t *frames; /* exact plane, one frame after another, or NULL */
    const int64_t *frame_at; /* [frames + 1]: where each begins */
    const uint32_t *frame_escapes; /* [frames] */
    int64_t frame_records;
};

/* What rows are to meet. Mirrored by kernels/structures.py. */
struct given {
    const float *x; /* [tokens, length] */
    const float *norm; /* [length] weights of a norm applied first, or NULL */
    const float *norm_bias; /* [length]: then it is a layer norm; NULL: an RMS norm */
    float eps;
    int32_t tokens, length;
};

/* Mirrored by kernels/structures.py. */
struct attention {
    const struct rows *projections[4]; /* q, k, v, o */
    const float *biases[4]; /* or NULL */
    void *keys, *values; /* this layer's [kv_heads, positions, dim] */
    const float *cosines, *sines; /* [positions, rotary / 2], or NULL: nothing is turned */
    int64_t positions; /* that the cache has room for */
    int64_t start; /* position of the first token */
    int32_t heads, kv_heads, dim, is_f16;
    float scale; /* of the scores */
    int64_t window; /* how many positions a token sees, its own included */
    const float *head_norms[2]; /* [dim]: RMS norms of every head of q and of k, or NULL */
    const float *out_norm; /* [hidden]: RMS norm of what is added to the residual stream, or NULL */
    float eps; /* of these norms */
    float softcap; /* the scores are squeezed to within -softcap and softcap; 0: not */
    int32_t rotary; /* how many values of a head are turned, the first ones */
};

/* What the gate, or without one the up row, goes through. Mirrored by kernels/structures.py. */
struct activation {
    int32_t kind;
    float threshold; /* of ACT_RELU: what is not above it gives zero */
    const float *bias; /* [rows], added before it where neurons have no gate; or NULL */
};
enum { ACT_SILU, ACT_RELU, ACT_GELU_TANH, ACT_GELU };

/* Pieces of one call, handed out to whoever is free: `size` things each. */
struct pieces {
    atomic_long next;
    int64_t count, size;
};

/* A few pieces for each thread: long ones, since memory is fastest along long streams. */
static inline struct pieces pieces_of(const struct kernels *k, int64_t things)
{
    int64_t shares = 4 * (int64_t)pool_threads(k->pool);
    int64_t size = ((things + shares - 1) / shares + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE;
    return (struct pieces){ 0, size ? (things + size - 1) / size : 0, size };
}

static inline int next_piece(struct pieces *p, int64_t *piece)
{
    *piece = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
    return *piece < p->count;
}

static inline size_t code_nbytes(const struct rows *r)
{
    return (size_t)r->vectors * r->groups * (GROUP / 2);
}

static inline const uint8_t *record4(const struct rows *r, int64_t row)
{
    size_t at = (size_t)(r->index4 ? r->index4[row] : row);
    return r->int4 + at * (code_nbytes(r) + (size_t)r->vectors * r->groups * 2);
}

static inline struct codes codes_of(const struct rows *r, int64_t row, int vector)
{
    size_t half = (size_t)r->groups * (GROUP / 2);
    const uint8_t *record = record4(r, row), *second = NULL;
    if (r->int8)
        second = r->int8 + (size_t)(r->index8 ? r->index8[row] : row) * code_nbytes(r)
                 + vector * half;
    return (struct codes){ record + vector * half, second,
                           record + code_nbytes(r) + (size_t)vector * r->groups * 2,
                           NULL };
}

static inline const uint16_t *wide_of(const struct rows *r, int64_t row, int vector)
{
    return r->wide + ((size_t)row * r->vectors + vector) * r->length;
}

static inline size_t padded_length(int length)
{
    return (size_t)(length + STRIPE_VALUES - 1) / STRIPE_VALUES * STRIPE_VALUES;
}

static inline size_t padded_groups(int length)
{
    return (size_t)batches_of((length + GROUP - 1) / GROUP) * BATCH;
}

/* nbytes for the rest of this call, aligned to 64; NULL when there is no memory */
void *scratch_take(struct kernels *k, size_t nbytes);
/* The call is over. */
void scratch_reset(struct kernels *k);
/* The same; what the entry point returns: `failed`, or 2 if a frame was damaged. */
int finish(struct kernels *k, int failed);

/* Memory to decode rows into, if they have frames. 0, or 1 without memory. */
int room_for(struct kernels *k, const struct rows *rows);
/* Rows [start, stop), at most TILE of them or a frame's, decoded into the room of a thread. */
struct rows rows_from(struct kernels *k, int part, const struct rows *rows, int64_t start,
                      int64_t stop);

/* to[j] = x[j] / root mean square of x * weights[j]; `to` may be x */
void rms_norm(const float *x, const float *weights, float eps, int length, float *to);
/* out [tokens, length] += norm(x) */
void add_normed(struct kernels *k, const struct given *given, float *out);
/* The activations normed, and rounded to int8 when rows have codes. 0, or 1 without memory. */
int prepare(struct kernels *k, const struct given *given, int kind, struct inputs *in);
/* The same activations from token t on. */
struct inputs tokens_from(const struct inputs *in, int t, int tokens, int length);

/* out[i * stride + t] = vector of row + i times x[t], for `count` <= ROWS_AT_ONCE rows */
void dot_vectors(const struct primitives *use, const struct rows *r, int64_t row, int count,
                 int vector, const struct inputs *in, float *out, int64_t stride);
/* out[t * out_stride + row] = x[t] . row + bias (+ what is there), rows [start, stop) */
void product(struct kernels *k, int part, const struct rows *r, const struct inputs *in,
             int64_t start, int64_t stop, const float *bias, int add, float *out,
             int64_t out_stride);

int m2c_matmul(struct kernels *k, const struct given *given, const struct rows *rows, float *out,
               int64_t stride);
int m2c_attention(struct kernels *k, const struct given *given, const struct attention *a, float *x);
int m2c_ffn(struct kernels *k, const struct given *given, const struct rows *rows,
            const struct activation *act, const float *mask, float *kept, float *out);

#endif
