/* The scales and codes of a lot, once for every instruction set: part of encode.c, which says what
 * `lanes` of LANES floats are. Operators work on them. */

INLINE lanes NAME(magnitude)(lanes x)
{
    return MAX(x, -x);
}

INLINE lanes NAME(code)(lanes x)
{
    return MIN(MAX(RINT(x), SET(-8.0f)), SET(7.0f));
}

INLINE lanes NAME(inverse)(lanes scale)
{
    return LESS(SET(0.0f), NAME(magnitude)(scale), SET(1.0f) / scale, SET(0.0f));
}

TARGET static void NAME(widen)(struct lot *lot, int is_bf16)
{
    const lanes largest = SET(LARGEST);
    for (int i = 0; i < LOT; i++) {
        uint32_t wide[GROUP];
        for (int j = 0; j < GROUP; j++)
            wide[j] = (uint32_t)lot->bits[i][j] << 16;
        memcpy(lot->values[i], wide, sizeof wide);
        for (int j = 0; j < GROUP; j += LANES) {
            lanes x = is_bf16 ? LOAD(lot->values[i] + j) : LOAD_HALF(lot->bits[i] + j);
            STORE(lot->values[i] + j, MIN(MAX(x, -largest), largest));
        }
    }
    for (int j = 0; j < GROUP; j++)
        for (int i = 0; i < LOT; i++)
            lot->across[j][i] = lot->values[i][j];
}

/* For each number of levels that the extreme value may get: sums over the codes that follow of code
 * times value and of code squared. Their quotient is the scale that fits these codes best. */
INLINE void NAME(project)(const struct lot *lot, int at, lanes safe, lanes *along, lanes *norm)
{
    lanes factors[CANDIDATES];
    for (int s = 0; s < CANDIDATES; s++) {
        factors[s] = SET(-LEVELS[s]) / safe;
        along[s] = norm[s] = SET(0.0f);
    }
    for (int j = 0; j < GROUP; j++) {
        lanes x = LOAD(lot->across[j] + at), weight = LOAD(lot->importance[j] + at);
        lanes weighted = x * weight;
        for (int s = 0; s < CANDIDATES; s++) {
            lanes q = NAME(code)(x * factors[s]);
            along[s] += weighted * q;
            norm[s] += q * q * weight;
        }
    }
}

/* The error of each of the scales. */
INLINE void NAME(errors)(const struct lot *lot, int at, const lanes *scales, lanes *errors)
{
    lanes inverses[CANDIDATES];
    for (int s = 0; s < CANDIDATES; s++) {
        inverses[s] = NAME(inverse)(scales[s]);
        errors[s] = SET(0.0f);
    }
    for (int j = 0; j < GROUP; j++) {
        lanes x = LOAD(lot->across[j] + at), weight = LOAD(lot->importance[j] + at);
        for (int s = 0; s < CANDIDATES; s++) {
            lanes off = NAME(code)(x * inverses[s]) * scales[s] - x;
            errors[s] += off * off * weight;
        }
    }
}

/* The scales of LANES groups: of the candidates, those whose codes have the least error. */
TARGET static void NAME(search)(struct lot *lot, int at)
{
    const lanes zero = SET(0.0f), one = SET(1.0f), limit = SET(LARGEST_HALF);
    lanes low = LOAD(lot->across[0] + at), high = low, extreme = low;
    for (int j = 1; j < GROUP; j++) {
        lanes x = LOAD(lot->across[j] + at);
        low = MIN(x, low);
        high = MAX(x, high);
        extreme = LESS(NAME(magnitude)(extreme), NAME(magnitude)(x), x, extreme);
    }
    lanes safe = LESS(NAME(magnitude)(extreme), SET(SMALLEST), one, extreme);
    /* rounding is monotone: the least quotient is that of the least or the largest value */
    lanes opposite = -MIN(LESS(zero, safe, low, high) / safe, zero);
    lanes bound = MAX(SET(LEAST_SHARE), opposite * SET(OPPOSITE_SHARE));
    lanes along[CANDIDATES], norm[CANDIDATES], scales[CANDIDATES], errors[CANDIDATES];
    NAME(project)(lot, at, safe, along, norm);
    for (int s = 0; s < CANDIDATES; s++) {
        lanes share = NAME(magnitude)(along[s] / LESS(zero, norm[s], norm[s], one) / safe);
        uint16_t half[LANES];
        STORE_HALF(half, MIN(MAX(-safe * MAX(share, bound), -limit), limit));
        scales[s] = LOAD_HALF(half);
    }
    NAME(errors)(lot, at, scales, errors);
    lanes best = zero, least = SET(INFINITY);
    for (int s = 0; s < CANDIDATES; s++) {
        best = LESS(errors[s], least, scales[s], best);
        least = MIN(errors[s], least);
    }
    STORE(lot->scales + at, LESS(NAME(magnitude)(extreme), SET(SMALLEST), zero, best));
}

/* The codes of group i, and the bits of its values after the INT8 plane. */
INLINE void NAME(codes)(const struct lot *lot, int i, int is_bf16, uint8_t *int4, uint8_t *int8,
                        uint16_t *base)
{
    float values[GROUP];
    const lanes scale = SET(lot->scales[i]), inverse = NAME(inverse)(scale);
    for (int j = 0; j < GROUP / 2; j += LANES) {
        lanes q[2], r[2];
        for (int half = 0; half < 2; half++) {
            int at = j + GROUP / 2 * half;
            lanes ratio = LOAD(lot->values[i] + at) * inverse;
            ratio = MIN(MAX(ratio, SET(-9.0f)), SET(9.0f));
            q[half] = NAME(code)(ratio);
            r[half] = NAME(code)((ratio - q[half]) * SET(16.0f));
            lanes value = scale * (q[half] + r[half] * SET(1.0f / 16) + SET(0.0f));
            STORE(values + at, value);
            if (!is_bf16)
                STORE_HALF(base + at, value);
        }
        STORE_BYTES(int4 + j, q[0] + q[1] * SET(16.0f) + SET(BIASES));
        STORE_BYTES(int8 + j, r[0] + r[1] * SET(16.0f) + SET(BIASES));
    }
    uint32_t wide[GROUP];
    memcpy(wide, values, sizeof wide);
    for (int j = 0; is_bf16 && j < GROUP; j++)
        base[j] = (uint16_t)((wide[j] + 0x7fff + (wide[j] >> 16 & 1)) >> 16);
}

/* One record; returns 0 if one of its weights is no number. */
TARGET static int NAME(record)(const struct encode_call *c, int64_t number, struct frame *frame)
{
    struct lot lot;
    int groups = (c->length + GROUP - 1) / GROUP, total = c->vectors * groups;
    const uint16_t *record = c->weights + (size_t)number * c->vectors * c->length;
    uint8_t *int4 = c->int4 + (size_t)number * total * (CODES + 2), *scales = int4 + CODES * total;
    uint8_t *int8 = c->int8 + (size_t)number * total * CODES;
    memset(lot.importance, 0, sizeof lot.importance);
    for (int first = 0; first < total; first += LOT) {
        int count = total - first < LOT ? total - first : LOT;
        if (!take(&lot, c, record, first))
            return 0;
        NAME(widen)(&lot, c->is_bf16);
        for (int at = 0; at < LOT; at += LANES)
            NAME(search)(&lot, at);
        for (int i = 0; i < count; i++) {
            uint16_t base[GROUP];
            int g = first + i, left = c->length - g % groups * GROUP;
            NAME(codes)(&lot, i, c->is_bf16, int4 + CODES * g, int8 + CODES * g, base);
            put_distances(frame, lot.bits[i], base, left < GROUP ? left : GROUP);
        }
        uint16_t halves[LOT];
        for (int at = 0; at < LOT; at += LANES)
            STORE_HALF(halves + at, LOAD(lot.scales + at));
        memcpy(scales + 2 * first, halves, 2 * (size_t)count);
    }
    return 1;
}

#undef SET_NAME
#undef TARGET
#undef LANES
#undef lanes
#undef LOAD
#undef STORE
#undef SET
#undef MIN
#undef MAX
#undef RINT
#undef LESS
#undef LOAD_HALF
#undef STORE_HALF
#undef STORE_BYTES
