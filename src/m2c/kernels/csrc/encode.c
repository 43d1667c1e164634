/* From 16-bit weights to the bytes of the three planes: codes, scales, and the frames of the exact
 * plane. The same bits as bundle/planes.py and bundle/exact.py, which are the reference: every float
 * operation in their order.
 *
 * Knows nothing of threads: calls share nothing. */

#include <math.h>
#include <string.h>

#include "encode_bits.h"
#include "exact.h"

#define LOT 16 /* groups whose scales are searched at a time, each in a lane of its own */
#define CODES (GROUP / 2) /* bytes of the codes of a group in one plane */
#define BIASES 136.0f /* two codes to a byte, both with 8 added: 8 + 16 * 8 */

struct encode_call {
    const uint16_t *weights; /* [records, vectors, length] */
    const float *importance; /* [GROUP, vectors * groups] */
    const int8_t *codes; /* of the INT4 plane [records, vectors, length]; NULL: the nearest */
    int64_t records, frame_records;
    int32_t vectors, length, is_bf16;
    uint8_t *int4, *int8; /* [records, bytes of a record]; int8 NULL: only scales are written */
    uint8_t *frames; /* room for 2 + ESCAPE_NBYTES bytes a weight and two words; frames, joined */
    uint32_t *nbytes, *escapes; /* [frames] */
};

/* Consecutive groups of a record; those past its end are zeros. */
struct lot {
    uint16_t bits[LOT][GROUP];
    float values[LOT][GROUP];
    float given[LOT][GROUP]; /* codes that were chosen before */
    float across[GROUP][LOT]; /* the values, a group in each lane */
    float importance[GROUP][LOT];
    float scales[LOT];
    uint16_t halves[LOT]; /* the scales again */
    uint8_t q[LOT][CODES], r[LOT][CODES];
};

/* The intervals of a group's codes: candidates for its weights. */
struct ends {
    float low[GROUP], high[GROUP]; /* before they are BF16; F16 is made at once */
    uint16_t first[GROUP], stop[GROUP]; /* the least and the largest magnitude, as bits */
    uint8_t below[GROUP], zero[GROUP]; /* 1 where the code is negative, is 0 */
};

/* The offsets of two groups, each byte of the same significance together. */
struct pair {
    uint8_t offsets[2][PAIR];
    uint8_t widths[PAIR]; /* in bits; 0 for padding */
    uint8_t far[PAIR]; /* 1 for an escape */
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
        int values = c->length - at < GROUP ? c->length - at : GROUP;
        memset(lot->bits[i], 0, sizeof lot->bits[i]);
        memcpy(lot->bits[i], from, 2 * (size_t)values);
        memset(lot->given[i], 0, sizeof lot->given[i]);
        for (int j = 0; c->codes && j < values; j++)
            lot->given[i][j] = c->codes[from - c->weights + j];
    }
    memset(lot->bits[count], 0, sizeof lot->bits[0] * (size_t)(LOT - count));
    for (int j = 0; j < GROUP; j++)
        memcpy(lot->importance[j], c->importance + (size_t)j * total + first, 4 * (size_t)count);
    for (int i = 0; i < LOT; i++)
        for (int j = 0; j < GROUP; j++)
            bad |= (lot->bits[i][j] & 0x7fff) >= infinity;
    return !bad;
}

/* Padding has no offsets and is no escape. */
static void clear_padding(struct pair *pair, int from, int to)
{
    memset(pair->widths + from, 0, (size_t)(to - from));
    memset(pair->far + from, 0, (size_t)(to - from));
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
#define STORE_HALF_ABOVE(to, x) (*(to) = (uint16_t)half_above(x))
#define STORE_HALF_BELOW(to, x) (*(to) = (uint16_t)half_below(x))
#define STORE_BYTES(to, x) (*(to) = (uint8_t)(x))
#define GATHER(bits, mask) gather_bits(bits, mask)
#define WIDER(bytes, k) wider_scalar(bytes, k)
#define BIT(bytes, k) bit_scalar(bytes, k)
#include "encode.inc.c"

#if defined(__x86_64__)
__attribute__((target("avx2"))) static inline void store_bytes_avx2(uint8_t *to, __m256 x)
{
    __m256i wide = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide),
                                    _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(words, words));
}

#define SET_NAME avx2
#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))
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
#define STORE_HALF_ABOVE(to, x) \
    _mm_storeu_si128((__m128i *)(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_POS_INF))
#define STORE_HALF_BELOW(to, x) \
    _mm_storeu_si128((__m128i *)(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_ZERO))
#define STORE_BYTES(to, x) store_bytes_avx2(to, x)
#define GATHER(bits, mask) _pext_u64(bits, mask)
#define WIDER(bytes, k) wider_avx2(bytes, k)
#define BIT(bytes, k) bit_avx2(bytes, k)
#include "encode.inc.c"

#define SET_NAME avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")))
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
#define STORE_HALF_ABOVE(to, x) \
    _mm256_storeu_si256((__m256i *)(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_POS_INF))
#define STORE_HALF_BELOW(to, x) \
    _mm256_storeu_si256((__m256i *)(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_ZERO))
#define STORE_BYTES(to, x) \
    _mm_storeu_si128((__m128i *)(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)))
#define GATHER(bits, mask) _pext_u64(bits, mask)
#define WIDER(bytes, k) \
    _mm512_cmpgt_epu8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8((char)(k)))
#define BIT(bytes, k) \
    _mm512_test_epi8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8((char)(1 << (k))))
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

/* One frame of records first to first + count, at `to`; its end, or NULL if a weight is no number. */
static uint8_t *write_frame(const struct encode_call *c, record_function *record, int64_t first,
                            int64_t count, uint8_t *to)
{
    size_t weights = (size_t)(count * c->vectors * c->length);
    uint8_t *listed = to + 2 * weights + WORD; /* beyond what offsets may take */
    struct frame frame = { to, listed, 0, 0, 0 };
    for (int64_t i = 0; i < count; i++)
        if (!record(c, first + i, &frame))
            return NULL;
    memcpy(frame.to, &frame.word, WORD);
    size_t nbytes = (size_t)(frame.to - to) + (size_t)(frame.filled + 7) / 8;
    size_t listed_nbytes = (size_t)(frame.escape - listed);
    memmove(to + nbytes, listed, listed_nbytes);
    c->nbytes[first / c->frame_records] = (uint32_t)(nbytes + listed_nbytes);
    c->escapes[first / c->frame_records] = (uint32_t)(listed_nbytes / ESCAPE_NBYTES);
    return to + nbytes + listed_nbytes;
}

/* want: as for primitives_for. Returns 0, 1 if a weight is no number, -1 if this machine cannot. */
int m2c_encode(const char *want, const struct encode_call *c)
{
    record_function *record = function_for(want);
    uint8_t *to = c->frames;
    if (!record)
        return -1;
    for (int64_t i = 0; !c->int8 && i < c->records; i++)
        if (!record(c, i, NULL))
            return 1;
    for (int64_t first = 0; c->int8 && first < c->records; first += c->frame_records) {
        int64_t left = c->records - first;
        to = write_frame(c, record, first, left < c->frame_records ? left : c->frame_records, to);
        if (!to)
            return 1;
    }
    return 0;
}
