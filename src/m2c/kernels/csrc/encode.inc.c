/* The scales, codes and offsets of a lot, once for every instruction set: part of encode.c, which says
 * what `lanes` of LANES floats are. Operators work on them. */

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
    best = LESS(NAME(magnitude)(extreme), SET(SMALLEST), zero, best);
    STORE(lot->scales + at, best);
    STORE_HALF(lot->halves + at, best);
}

/* The ends of the intervals that codes q, r stand for, with a scale of 32 `unit`: see exact.h. */
INLINE void NAME(interval)(lanes q, lanes r, lanes unit, int is_bf16, struct ends *ends, int at)
{
    const lanes zero = SET(0.0f), one = SET(1.0f);
    lanes n = q * SET(16.0f) + r, twice = NAME(magnitude)(n) * SET(2.0f);
    lanes up = LESS(SET(6.5f), r, SET(ABOVE), zero), down = LESS(r, SET(-7.5f), SET(BELOW), zero);
    lanes low = unit * MAX(twice - one - LESS(n, zero, up, down), zero);
    lanes high = unit * (twice + one + LESS(n, zero, down, up));
    STORE_BYTES(ends->below + at, LESS(n, zero, one, zero));
    STORE_BYTES(ends->zero + at, LESS(twice, one, one, zero));
    if (is_bf16) {
        STORE(ends->low + at, low);
        STORE(ends->high + at, high);
    } else {
        STORE_HALF_ABOVE(ends->first + at, low);
        STORE_HALF_BELOW(ends->stop + at, high);
    }
}

/* The codes of group i, and what they leave open. given: those of the INT4 plane are. */
INLINE void NAME(codes)(struct lot *lot, int i, int given, int is_bf16, struct ends *ends)
{
    const lanes scale = SET(lot->scales[i]), inverse = NAME(inverse)(scale);
    /* the zero that comes second is the one that MAX takes: the sign of -0 would be a bit too many */
    const lanes unit = MAX(NAME(magnitude)(scale), SET(0.0f)) * SET(1.0f / 32);
    for (int j = 0; j < GROUP / 2; j += LANES) {
        lanes q[2], r[2];
        for (int half = 0; half < 2; half++) {
            int at = j + GROUP / 2 * half;
            lanes ratio = LOAD(lot->values[i] + at) * inverse;
            ratio = MIN(MAX(ratio, SET(-9.0f)), SET(9.0f));
            q[half] = given ? LOAD(lot->given[i] + at) : NAME(code)(ratio);
            r[half] = NAME(code)((ratio - q[half]) * SET(16.0f));
            NAME(interval)(q[half], r[half], unit, is_bf16, ends, at);
        }
        STORE_BYTES(lot->q[i] + j, q[0] + q[1] * SET(16.0f) + SET(BIASES));
        STORE_BYTES(lot->r[i] + j, r[0] + r[1] * SET(16.0f) + SET(BIASES));
    }
    uint32_t low[GROUP], high[GROUP];
    memcpy(low, ends->low, sizeof low);
    memcpy(high, ends->high, sizeof high);
    for (int j = 0; is_bf16 && j < GROUP; j++) {
        ends->first[j] = (uint16_t)((low[j] + 0xffff) >> 16);
        ends->stop[j] = (uint16_t)(high[j] >> 16);
    }
}

/* The offsets of a group's weights, into the pair from `at` on. negative: 1 if the scale is. */
INLINE void NAME(offsets)(const uint16_t *bits, const struct ends *ends, uint16_t negative,
                          struct pair *pair, int at)
{
    uint16_t last[GROUP];
    for (int j = 0; j < GROUP; j++) {
        uint16_t magnitude = bits[j] & 0x7fff, sign = bits[j] >> 15;
        uint16_t first = ends->first[j], stop = ends->stop[j], below = ends->below[j] ^ negative;
        uint16_t span = stop > first ? stop - first : 0, offset = magnitude - first;
        span = ends->zero[j] ? 2 * stop + 1 : span;
        offset = ends->zero[j] ? (uint16_t)(magnitude << 1 | sign) : offset;
        uint16_t far = (offset > span) | ((sign ^ below) & (ends->zero[j] ^ 1));
        offset = far ? 0 : offset;
        pair->far[at + j] = (uint8_t)far;
        pair->offsets[0][at + j] = (uint8_t)offset;
        pair->offsets[1][at + j] = (uint8_t)(offset >> 8);
        last[j] = span;
    }
    float wide[GROUP];
    int32_t exponents[GROUP];
    for (int j = 0; j < GROUP; j++)
        wide[j] = (float)(int32_t)last[j];
    memcpy(exponents, wide, sizeof wide);
    for (int j = 0; j < GROUP; j++) {
        int32_t width = (exponents[j] >> 23) - 126; /* bits of a number, as its exponent says */
        pair->widths[at + j] = (uint8_t)(width > 0 ? width : 0);
    }
}

INLINE void NAME(put_pair)(struct frame *frame, const struct pair *pair)
{
    struct frame to = *frame;
    uint64_t mask = WIDER(pair->widths, 0);
    for (int k = 0; mask; mask = WIDER(pair->widths, ++k)) {
        uint64_t plane = BIT(pair->offsets[k >> 3], k & 7);
        put_bits(&to, GATHER(plane, mask), __builtin_popcountll(mask));
    }
    *frame = to;
}

/* The offsets of the `count` groups of a lot, the first of which is number `first` of its record. */
INLINE void NAME(put_offsets)(struct lot *lot, const struct encode_call *c, int first, int count,
                              struct frame *frame)
{
    int groups = (c->length + GROUP - 1) / GROUP;
    for (int i = 0; i < count; i += 2) {
        int values[2] = { 0, 0 };
        struct pair pair;
        for (int half = 0; half < 2 && i + half < count; half++) {
            struct ends ends;
            int at = GROUP * half, left = c->length - (first + i + half) % groups * GROUP;
            values[half] = left < GROUP ? left : GROUP;
            NAME(codes)(lot, i + half, c->codes != NULL, c->is_bf16, &ends);
            NAME(offsets)(lot->bits[i + half], &ends, lot->halves[i + half] >> 15, &pair, at);
        }
        for (int half = 0; half < 2; half++)
            if (values[half] < GROUP)
                clear_padding(&pair, GROUP * half + values[half], GROUP * (half + 1));
        NAME(put_pair)(frame, &pair);
        put_escapes(frame, WIDER(pair.far, 0), lot->bits[i], values[0]);
        frame->weights += (uint32_t)(values[0] + values[1]);
    }
}

/* One record; returns 0 if one of its weights is no number. */
TARGET static int NAME(record)(const struct encode_call *c, int64_t number, struct frame *frame)
{
    struct lot lot;
    int groups = (c->length + GROUP - 1) / GROUP, total = c->vectors * groups;
    const uint16_t *record = c->weights + (size_t)number * c->vectors * c->length;
    uint8_t *int4 = c->int4 + (size_t)number * total * (CODES + 2), *scales = int4 + CODES * total;
    uint8_t *int8 = c->int8 ? c->int8 + (size_t)number * total * CODES : NULL;
    memset(lot.importance, 0, sizeof lot.importance);
    for (int first = 0; first < total; first += LOT) {
        int count = total - first < LOT ? total - first : LOT;
        if (!take(&lot, c, record, first))
            return 0;
        NAME(widen)(&lot, c->is_bf16);
        for (int at = 0; at < LOT; at += LANES)
            NAME(search)(&lot, at);
        memcpy(scales + 2 * first, lot.halves, 2 * (size_t)count);
        if (!int8)
            continue;
        NAME(put_offsets)(&lot, c, first, count, frame);
        memcpy(int4 + CODES * first, lot.q, CODES * (size_t)count);
        memcpy(int8 + CODES * first, lot.r, CODES * (size_t)count);
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
#undef STORE_HALF_ABOVE
#undef STORE_HALF_BELOW
#undef STORE_BYTES
#undef GATHER
#undef WIDER
#undef BIT
