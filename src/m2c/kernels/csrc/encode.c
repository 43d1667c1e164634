/* From 16-bit weights to the records of the three planes: codes, scales, and the distances that the
 * exact plane compresses. The same bits as bundle/planes.py and bundle/exact.py, which are the
 * reference: every float operation in their order.
 *
 * Knows nothing of threads: calls share nothing. */

#include <math.h>
#include <string.h>

#include "primitives.h"

#define LOT 16 /* groups whose scales are searched at a time, each in a lane of its own */
#define CODES (GROUP / 2) /* bytes of the codes of a group in one plane */
#define BIASES 136.0f /* two codes to a byte, both with 8 added: 8 + 16 * 8 */
#define ESCAPE 128 /* distances from here on take two bytes more, at the end of their frame */
#define MOST 3 /* bytes that a distance may take */

struct encode_call {
    const uint16_t *weights; /* [records, vectors, length] */
    const float *importance; /* [GROUP, vectors * groups] */
    int64_t records, frame_records;
    int32_t vectors, length, is_bf16;
    uint8_t *int4, *int8; /* [records, bytes of a record] */
    uint8_t *frames; /* room for MOST bytes a weight; a frame begins where its weights' room does */
    uint32_t *escapes; /* [frames] */
};

/* Consecutive groups of a record; those past its end are zeros. */
struct lot {
    uint16_t bits[LOT][GROUP];
    float values[LOT][GROUP];
    float across[GROUP][LOT]; /* the values, a group in each lane */
    float importance[GROUP][LOT];
    float scales[LOT];
};

/* Where the next distances of a frame go. */
struct frame {
    uint8_t *near, *far;
};

/* the constants of planes.py, rounded from binary64 as there */
#define CANDIDATES 5
static const float LEVELS[CANDIDATES] = { (float)6.8, (float)7.3, (float)7.8, (float)8.2, 8.5f };
#define LEAST_SHARE (float)(1 / 8.5)
#define OPPOSITE_SHARE (float)(1 / 7.45)
#define LARGEST (float)(65504 * 8.5)
#define LARGEST_HALF 65504.0f
#define SMALLEST 0x1p-24f

static inline float value_of_half(uint16_t half)
{
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f; /* the exponents' biases differ by 112; no infinities here */
    return half & 0x8000 ? -value : value;
}

static inline uint16_t half_of_value(float value)
{
    uint16_t half;
    primitives_scalar.to_half(&half, &value, 1);
    return half;
}

/* Fill a lot from group `first` of a record on; returns 0 if one of the weights is no number. */
static int take(struct lot *lot, const struct encode_call *c, const uint16_t *record, int first)
{
    const uint16_t infinity = c->is_bf16 ? 0x7f80 : 0x7c00;
    int groups = (c->length + GROUP - 1) / GROUP, total = c->vectors * groups, bad = 0;
    int count = total - first < LOT ? total - first : LOT;
    for (int i = 0; i < count; i++) {
        int vector = (first + i) / groups, at = (first + i) % groups * GROUP;
        const uint16_t *from = record + (size_t)vector * c->length + at;
        if (at + GROUP <= c->length) {
            memcpy(lot->bits[i], from, sizeof lot->bits[i]);
        } else {
            memset(lot->bits[i], 0, sizeof lot->bits[i]);
            memcpy(lot->bits[i], from, 2 * (size_t)(c->length - at));
        }
    }
    memset(lot->bits[count], 0, sizeof lot->bits[0] * (size_t)(LOT - count));
    for (int j = 0; j < GROUP; j++)
        memcpy(lot->importance[j], c->importance + (size_t)j * total + first, 4 * (size_t)count);
    for (int i = 0; i < LOT; i++)
        for (int j = 0; j < GROUP; j++)
            bad |= (lot->bits[i][j] & 0x7fff) >= infinity;
    return !bad;
}

/* A number that rises with the float that the bits stand for */
static inline uint16_t ordered(uint16_t bits)
{
    return bits ^ (uint16_t)((int16_t)bits >> 15 | 0x8000);
}

/* The distances from `base` to `bits` of up to GROUP weights. */
static inline __attribute__((always_inline)) void put_distances(
    struct frame *frame, const uint16_t *bits, const uint16_t *base, int count)
{
    int8_t near[GROUP];
    int16_t steps[GROUP];
    uint16_t far = 0;
    for (int i = 0; i < GROUP; i++) {
        steps[i] = (int16_t)(ordered(bits[i]) - ordered(base[i]));
        uint16_t is_far = (uint16_t)(steps[i] + ESCAPE - 1) > 2 * (ESCAPE - 1);
        near[i] = (int8_t)(is_far ? -ESCAPE : steps[i]);
        far |= is_far;
    }
    if (count == GROUP) /* nearly always: a size that the compiler knows */
        memcpy(frame->near, near, GROUP);
    else
        memcpy(frame->near, near, (size_t)count);
    frame->near += count;
    for (int i = 0; far && i < count; i++) {
        if (near[i] != -ESCAPE)
            continue;
        *frame->far++ = (uint8_t)steps[i];
        *frame->far++ = (uint8_t)((uint16_t)steps[i] >> 8);
    }
}

#define JOIN(a, b) a##_##b
#define JOINED(a, b) JOIN(a, b)
#define NAME(what) JOINED(what, SET_NAME)
#define INLINE TARGET static inline __attribute__((always_inline))

#define SET_NAME scalar
#define TARGET
#define LANES 1
#define lanes float
#define LOAD(from) (*(from))
#define STORE(to, x) (*(to) = (x))
#define SET(x) (x)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define RINT(x) rintf(x)
#define LESS(a, b, yes, no) ((a) < (b) ? (yes) : (no))
#define LOAD_HALF(from) value_of_half(*(from))
#define STORE_HALF(to, x) (*(to) = half_of_value(x))
#define STORE_BYTES(to, x) (*(to) = (uint8_t)(x))
#include "encode.inc.c"

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) static inline void store_bytes_avx2(uint8_t *to, __m256 x)
{
    __m256i wide = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide),
                                    _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(words, words));
}

#define SET_NAME avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define lanes __m256
#define LOAD(from) _mm256_loadu_ps(from)
#define STORE(to, x) _mm256_storeu_ps(to, x)
#define SET(x) _mm256_set1_ps(x)
#define MIN(a, b) _mm256_min_ps(a, b)
#define MAX(a, b) _mm256_max_ps(a, b)
#define RINT(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define LESS(a, b, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ))
#define LOAD_HALF(from) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from)))
#define STORE_HALF(to, x) _mm_storeu_si128((__m128i *)(to), _mm256_cvtps_ph(x, 0))
#define STORE_BYTES(to, x) store_bytes_avx2(to, x)
#include "encode.inc.c"

#define SET_NAME avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")))
#define LANES 16
#define lanes __m512
#define LOAD(from) _mm512_loadu_ps(from)
#define STORE(to, x) _mm512_storeu_ps(to, x)
#define SET(x) _mm512_set1_ps(x)
#define MIN(a, b) _mm512_min_ps(a, b)
#define MAX(a, b) _mm512_max_ps(a, b)
#define RINT(x) _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define LESS(a, b, yes, no) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes)
#define LOAD_HALF(from) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from)))
#define STORE_HALF(to, x) _mm256_storeu_si256((__m256i *)(to), _mm512_cvtps_ph(x, 0))
#define STORE_BYTES(to, x) \
    _mm_storeu_si128((__m128i *)(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)))
#include "encode.inc.c"
#endif

typedef int record_function(const struct encode_call *, int64_t, struct frame *);

static record_function *function_for(const char *want)
{
    const char *name;
    const struct primitives *taken = primitives_for(want, &name);
#if defined(__x86_64__)
    if (taken == &primitives_avx512)
        return record_avx512;
    if (taken == &primitives_avx2)
        return record_avx2;
#endif
    return taken ? record_scalar : NULL;
}

/* want: as for primitives_for. Returns 0, 1 if a weight is no number, -1 if this machine cannot. */
int m2c_encode(const char *want, const struct encode_call *c)
{
    record_function *record = function_for(want);
    size_t weights = (size_t)c->vectors * c->length;
    if (!record)
        return -1;
    for (int64_t first = 0; first < c->records; first += c->frame_records) {
        int64_t left = c->records - first;
        int64_t count = left < c->frame_records ? left : c->frame_records;
        uint8_t *start = c->frames + MOST * (size_t)first * weights;
        struct frame frame = { start, start + (size_t)count * weights };
        for (int64_t i = 0; i < count; i++)
            if (!record(c, first + i, &frame))
                return 1;
        c->escapes[first / c->frame_records] = (uint32_t)((frame.far - frame.near) / 2);
    }
    return 0;
}
