/* INT4 codes that make up for each other's errors: the C of bundle/steering.py, which is the reference
 * and says what is computed. The same bits: every float operation in its order.
 *
 * A strip of lanes goes through all steps. Rows: a lane is a row, a step one of its weights. Down
 * columns: a lane is an output, a step a neuron. Knows nothing of threads: calls share nothing. */

/* nobody asks which comparisons trapped: loops over lanes may compute both sides of a choice */
#pragma GCC optimize("no-trapping-math")

#include <math.h>
#include <string.h>

#include "primitives.h"

#define LANES 32
#define MOST_DIRECTIONS 64
#define REACH 0.625f /* steps from a weight to its code: half a step, and what FORMAT.md lets r mend */
#define LARGEST (float)(65504 * 8.5)

struct steer_call {
    const uint16_t *weights; /* finite */
    int8_t *codes; /* laid out like the weights */
    const uint16_t *scales; /* F16 */
    const float *directions, *feedback; /* [steps, rank] */
    int64_t steps, lanes;
    int64_t step, lane; /* strides of weights and codes */
    int64_t scale_step, scale_lane; /* strides of scales */
    int32_t step_group, lane_group; /* steps, and lanes, that share a scale */
    int32_t rank, is_bf16;
};

#define INLINE static inline __attribute__((always_inline))

/* of finite F16 */
INLINE float half_value(uint16_t half)
{
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13 | (uint32_t)(half & 0x8000) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value * 0x1p112f; /* the exponents' biases differ by 112 */
}

INLINE float clamp(float x, float low, float high)
{
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* Values of step i; lanes past `count` are zeros. */
INLINE void load_values(const struct steer_call *c, int64_t i, int64_t first, int count, float *x)
{
    const uint16_t *from = c->weights + i * c->step + first * c->lane;
    uint16_t bits[LANES] = { 0 };
    for (int l = 0; l < count; l++)
        bits[l] = from[l * c->lane];
    for (int l = 0; l < LANES; l++) {
        uint32_t wide = (uint32_t)bits[l] << 16;
        float value;
        memcpy(&value, &wide, 4);
        x[l] = clamp(c->is_bf16 ? value : half_value(bits[l]), -LARGEST, LARGEST);
    }
}

/* Scales of the group that step i begins; places: where in a row of scales those of the lanes are. */
INLINE void load_scales(const struct steer_call *c, int64_t i, const int64_t *places, int count,
                        float *scale, float *inverse)
{
    const uint16_t *from = c->scales + i / c->step_group * c->scale_step;
    uint16_t halves[LANES] = { 0 };
    for (int l = 0; l < count; l++)
        halves[l] = from[places[l]];
    for (int l = 0; l < LANES; l++) {
        scale[l] = half_value(halves[l]);
        inverse[l] = scale[l] != 0 ? 1 / scale[l] : 0;
    }
}

/* The code of each lane; `pull`: what the errors so far ask of it. error: left by the codes. All in one
 * type, so that lanes are computed side by side. */
INLINE void choose(const float *x, const float *scale, const float *inverse, const float *pull,
                   float *error, float *codes)
{
    for (int l = 0; l < LANES; l++) {
        float ratio = clamp(x[l] * inverse[l], -9, 9);
        float low = clamp(ceilf(ratio - REACH), -8, 7), high = clamp(floorf(ratio + REACH), -8, 7);
        float q = clamp(rintf((x[l] - pull[l]) * inverse[l]), low, high);
        error[l] = q * scale[l] - x[l];
        codes[l] = q;
    }
}

INLINE void strip(const struct steer_call *c, int64_t first, int count)
{
    float felt[MOST_DIRECTIONS][LANES]; /* the errors so far, along each direction */
    float scale[LANES], inverse[LANES];
    int64_t places[LANES];
    memset(felt, 0, sizeof felt[0] * (size_t)c->rank);
    for (int l = 0; l < count; l++)
        places[l] = (first + l) / c->lane_group * c->scale_lane;
    for (int64_t i = 0; i < c->steps; i++) {
        const float *v = c->directions + i * c->rank, *u = c->feedback + i * c->rank;
        float x[LANES], pull[LANES] = { 0 }, error[LANES], codes[LANES];
        load_values(c, i, first, count, x);
        if (i % c->step_group == 0)
            load_scales(c, i, places, count, scale, inverse);
        for (int k = 0; k < c->rank; k++)
            for (int l = 0; l < LANES; l++)
                pull[l] += u[k] * felt[k][l];
        choose(x, scale, inverse, pull, error, codes);
        for (int k = 0; k < c->rank; k++)
            for (int l = 0; l < LANES; l++)
                felt[k][l] += v[k] * error[l];
        int8_t *to = c->codes + i * c->step + first * c->lane;
        for (int l = 0; l < count; l++)
            to[l * c->lane] = (int8_t)codes[l];
    }
}

typedef void strip_function(const struct steer_call *, int64_t, int);

static void strip_scalar(const struct steer_call *c, int64_t first, int count)
{
    strip(c, first, count);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void strip_avx2(const struct steer_call *c, int64_t first,
                                                       int count)
{
    strip(c, first, count);
}

__attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512"))) static void
strip_avx512(const struct steer_call *c, int64_t first, int count)
{
    strip(c, first, count);
}
#endif

static strip_function *function_for(const char *want)
{
    const char *name;
    const struct primitives *taken = primitives_for(want, &name);
#if defined(__x86_64__)
    if (taken == &primitives_avx512)
        return strip_avx512;
    if (taken == &primitives_avx2)
        return strip_avx2;
#endif
    return taken ? strip_scalar : NULL;
}

/* want: as for primitives_for. Returns 0, -1 if this machine cannot, -2 for too many directions. */
int m2c_steer(const char *want, const struct steer_call *c)
{
    strip_function *run = function_for(want);
    if (!run)
        return -1;
    if (c->rank < 0 || c->rank > MOST_DIRECTIONS)
        return -2;
    for (int64_t first = 0; first < c->lanes; first += LANES) {
        int64_t left = c->lanes - first;
        run(c, first, left < LANES ? (int)left : LANES);
    }
    return 0;
}
