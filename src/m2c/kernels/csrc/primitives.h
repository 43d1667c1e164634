/* Sums over one vector of one row, for one instruction set. */
#ifndef M2C_PRIMITIVES_H
#define M2C_PRIMITIVES_H

#include <stddef.h>
#include <stdint.h>

#define GROUP 32 /* weights that share a scale: 16 bytes of codes */

/* One down column, or a part of it. */
struct column {
    const uint8_t *q, *r; /* r is NULL at INT4 */
    const float *scales; /* of its groups, times the neuron's activation */
    ptrdiff_t ahead; /* from q to the same place in the next column */
};

struct primitives {
    float (*dot4)(const uint8_t *, const uint8_t *, const float *, const int8_t *, int);
    float (*dot8)(const uint8_t *, const uint8_t *, const uint8_t *, const float *, const int8_t *,
                  int);
    float (*dot16)(const uint16_t *, const float *, int, int);
    void (*axpy16)(float *, const uint16_t *, float, int, int);
    void (*axpy_codes)(float *, const struct column *, int, int);
    void (*scaled)(float *, const uint8_t *, float, int);
    void (*scale_products)(float *, const uint8_t *, const float *, int);
    float (*dot_f32)(const float *, const float *, int);
};

extern const struct primitives primitives_scalar;

/* want: "auto", "scalar", "avx2" or "avx512"; sets the name of what was taken. NULL if this machine
 * cannot run it. */
const struct primitives *primitives_for(const char *want, const char **name);

#endif
