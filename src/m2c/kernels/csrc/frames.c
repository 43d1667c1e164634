/* Frames of the exact plane: rows that are decoded to 16 bits where they are computed. */

#include <string.h>

#include "exact.h"
#include "rows.h"

static size_t weights_of(const struct rows *r)
{
    return (size_t)r->vectors * r->length;
}

static int64_t records_in(const struct rows *r, int64_t frame)
{
    int64_t left = r->count - frame * r->frame_records;
    return left < r->frame_records ? left : r->frame_records;
}

/* Escapes of a frame: ascending, and all inside it. */
static int put_escapes(const uint8_t *at, uint32_t count, size_t weights, uint16_t *to)
{
    int64_t before = -1;
    for (uint32_t i = 0; i < count; i++, at += ESCAPE_NBYTES) {
        uint32_t place;
        memcpy(&place, at, 4);
        if ((int64_t)place <= before || place >= weights)
            return 1;
        memcpy(to + place, at + 4, 2);
        before = place;
    }
    return 0;
}

/* The 16-bit weights of one frame's records. 0, or 1 if the frame does not hold what it should. */
static int decode_frame(const struct primitives *use, const struct rows *r, int64_t frame,
                        uint16_t *to)
{
    int64_t start = r->frame_at[frame], escapes = r->frame_escapes[frame];
    int64_t nbytes = r->frame_at[frame + 1] - start, records = records_in(r, frame);
    int64_t planes = nbytes - ESCAPE_NBYTES * escapes;
    size_t weights = weights_of(r);
    if (planes < 0)
        return 1;
    struct bits bits = { r->frames + start, 0, 8 * planes };
    for (int64_t i = 0; i < records; i++) {
        int64_t row = frame * r->frame_records + i;
        const uint8_t *q = record4(r, row);
        struct exact_record record = { q, r->int8 + (size_t)row * code_nbytes(r),
                                       q + code_nbytes(r), r->vectors, r->length, r->groups,
                                       r->is_bf16 };
        use->unpack(&record, &bits, to + i * weights);
    }
    if ((bits.next + 7) >> 3 != planes)
        return 1;
    return put_escapes(r->frames + start + planes, (uint32_t)escapes, records * weights, to);
}

int room_for(struct kernels *k, const struct rows *r)
{
    if (r->frames) {
        size_t weights = weights_of(r), most = TILE > r->frame_records ? TILE : r->frame_records;
        size_t values = (most + r->frame_records) * weights;
        if (!k->room || values > k->room_values) {
            k->room_values = values;
            k->room = scratch_take(k, pool_threads(k->pool) * values * sizeof(uint16_t));
        }
        return !k->room;
    }
    return 0;
}

struct rows rows_from(struct kernels *k, int part, const struct rows *r, int64_t start, int64_t stop)
{
    struct rows found = *r;
    int64_t per = r->frame_records, weights = (int64_t)weights_of(r);
    uint16_t *room = k->room + part * k->room_values;
    for (int64_t row = start; row < stop;) {
        int64_t frame = row / per, first = frame * per, end = first + records_in(r, frame);
        int whole = first >= start && end <= stop;
        uint16_t *to = whole ? room + (row - start) * weights
                             : room + k->room_values - per * weights;
        if (decode_frame(k->use, r, frame, to))
            atomic_store_explicit(&k->damaged, 1, memory_order_relaxed);
        end = end < stop ? end : stop;
        if (!whole)
            memcpy(room + (row - start) * weights, to + (row - first) * weights,
                   (size_t)((end - row) * weights) * sizeof(uint16_t));
        row = end;
    }
    found.frames = NULL;
    found.wide = room;
    found.count = stop - start;
    return found;
}

struct decode_call {
    const struct primitives *use;
    const struct rows *rows;
    uint16_t *to;
    struct kernels *k;
    struct pieces pieces;
};

static void decode_part(void *context, int part, int parts)
{
    struct decode_call *c = context;
    (void)part, (void)parts;
    for (int64_t frame; next_piece(&c->pieces, &frame);) {
        uint16_t *to = c->to + (size_t)(frame * c->rows->frame_records) * weights_of(c->rows);
        if (decode_frame(c->use, c->rows, frame, to))
            atomic_store_explicit(&c->k->damaged, 1, memory_order_relaxed);
    }
}

/* to [rows, vectors * length]: the 16-bit weights of rows with frames; 0, or 2 if one is damaged */
int m2c_decode(struct kernels *k, const struct rows *rows, uint16_t *to)
{
    int64_t frames = (rows->count + rows->frame_records - 1) / rows->frame_records;
    struct decode_call c = { k->use, rows, to, k, { 0, frames, 1 } };
    pool_run(k->pool, decode_part, &c);
    return finish(k, 0);
}
