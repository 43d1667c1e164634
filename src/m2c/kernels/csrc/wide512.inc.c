/* 16-bit rows and columns with AVX-512: part of avx512.c.
 *
 * Tokens share what is widened. A sum's order never depends on how many there are.
 */

#define TOKENS_SHARED 4

INLINE __m512 widen(__m256i raw, int is_bf16)
{
    if (!is_bf16)
        return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

INLINE __mmask16 first_of(int count)
{
    return count >= 16 ? 0xFFFF : count > 0 ? (__mmask16)((1 << count) - 1) : 0;
}

/* 16 values of R rows from `at` on, times those of T tokens */
INLINE void dot_sixteen(const uint16_t *const *w, const int R, const float *x, const int T,
                        int length, int is_bf16, int at, __mmask16 mask,
                        __m512 sums[ROWS_AT_ONCE][TOKENS_SHARED])
{
    __m512 values[ROWS_AT_ONCE];
    for (int i = 0; i < R; i++)
        values[i] = widen(_mm256_maskz_loadu_epi16(mask, w[i] + at), is_bf16);
    for (int k = 0; k < T; k++) {
        __m512 tokens = _mm512_maskz_loadu_ps(mask, x + (size_t)k * length + at);
        for (int i = 0; i < R; i++)
            sums[i][k] = _mm512_fmadd_ps(values[i], tokens, sums[i][k]);
    }
}

/* Even and odd sixteens are summed apart: one chain of additions would be slower than memory. */
INLINE void dot_wide_block(const uint16_t *const *w, const int R, const float *x, const int T,
                           int length, const int is_bf16, const size_t *ahead, float *out,
                           int64_t stride)
{
    __m512 even[ROWS_AT_ONCE][TOKENS_SHARED], odd[ROWS_AT_ONCE][TOKENS_SHARED];
    for (int i = 0; i < R; i++)
        for (int k = 0; k < T; k++)
            even[i][k] = odd[i][k] = _mm512_setzero_ps();
    int j = 0;
    for (; j + 32 <= length; j += 32) {
        for (int i = 0; i < R; i++)
            fetch_wanted((const uint8_t *)(w[i] + j), ahead);
        dot_sixteen(w, R, x, T, length, is_bf16, j, 0xFFFF, even);
        dot_sixteen(w, R, x, T, length, is_bf16, j + 16, 0xFFFF, odd);
    }
    if (j < length) {
        dot_sixteen(w, R, x, T, length, is_bf16, j, first_of(length - j), even);
        dot_sixteen(w, R, x, T, length, is_bf16, j + 16, first_of(length - j - 16), odd);
    }
    for (int i = 0; i < R; i++)
        for (int k = 0; k < T; k++)
            out[i * stride + k] = _mm512_reduce_add_ps(_mm512_add_ps(even[i][k], odd[i][k]));
}

INLINE void dot_wide_tokens(const uint16_t *const *w, const int R, const float *x, int tokens,
                            int length, const int is_bf16, const size_t *ahead, float *out,
                           int64_t stride)
{
    for (; tokens >= 4; tokens -= 4, x += (size_t)4 * length, out += 4)
        dot_wide_block(w, R, x, 4, length, is_bf16, ahead, out, stride);
    if (tokens == 3)
        dot_wide_block(w, R, x, 3, length, is_bf16, ahead, out, stride);
    else if (tokens == 2)
        dot_wide_block(w, R, x, 2, length, is_bf16, ahead, out, stride);
    else if (tokens == 1)
        dot_wide_block(w, R, x, 1, length, is_bf16, ahead, out, stride);
}

INLINE void dot_wide_typed(const uint16_t *const *w, int count, const struct inputs *in,
                           int length, const int is_bf16, const size_t *ahead, float *out,
                           int64_t stride)
{
    int i = 0;
    for (; in->tokens >= ENOUGH_TOKENS && i + 2 <= count; i += 2)
        dot_wide_tokens(w + i, 2, in->x, in->tokens, length, is_bf16, ahead, out + i * stride,
                        stride);
    for (; i < count; i++)
        dot_wide_tokens(w + i, 1, in->x, in->tokens, length, is_bf16, ahead, out + i * stride,
                        stride);
}

TARGET static void dot_wide(const uint16_t *const *w, int count, const struct inputs *in,
                            int length, int is_bf16, const size_t *ahead, float *out,
                            int64_t stride)
{
    if (is_bf16)
        dot_wide_typed(w, count, in, length, 1, ahead, out, stride);
    else
        dot_wide_typed(w, count, in, length, 0, ahead, out, stride);
}

/* 64 outputs of T tokens, or the `rest` that there are */
INLINE void add_outputs(const struct sums_of *s, int t, const int T,
                        const uint16_t *const *columns, int at, const int rest, const int is_bf16)
{
    __m512 sums[TOKENS_SHARED][4];
    __mmask16 masks[4];
    float *y = s->y + t * s->y_stride + at;
    for (int i = 0; i < 4; i++)
        masks[i] = first_of(rest - 16 * i);
    for (int k = 0; k < T; k++)
        for (int i = 0; i < 4; i++)
            sums[k][i] = _mm512_maskz_loadu_ps(masks[i], y + k * s->y_stride + 16 * i);
    for (int n = 0; n < s->count; n++) {
        if (!t)
            for (int line = 0; line < 128; line += 64)
                fetch_line((const uint8_t *)(columns[n] + at) + s->ahead + line);
        for (int i = 0; i < 4; i++) {
            __m512 values = widen(_mm256_maskz_loadu_epi16(masks[i], columns[n] + at + 16 * i),
                                  is_bf16);
            for (int k = 0; k < T; k++)
                sums[k][i] = _mm512_fmadd_ps(values, _mm512_set1_ps(s->h[n * s->h_stride + t + k]),
                                             sums[k][i]);
        }
    }
    for (int k = 0; k < T; k++)
        for (int i = 0; i < 4; i++)
            _mm512_mask_storeu_ps(y + k * s->y_stride + 16 * i, masks[i], sums[k][i]);
}

INLINE void add_wide_block(const struct sums_of *s, int t, const int T,
                           const uint16_t *const *columns, int length, const int is_bf16)
{
    int j = 0;
    for (; j + 64 <= length; j += 64)
        add_outputs(s, t, T, columns, j, 64, is_bf16);
    if (j < length)
        add_outputs(s, t, T, columns, j, length - j, is_bf16);
}

INLINE void add_wide_typed(const struct sums_of *s, const uint16_t *const *columns, int length,
                           const int is_bf16)
{
    int t = 0;
    for (; t + 4 <= s->tokens; t += 4)
        add_wide_block(s, t, 4, columns, length, is_bf16);
    if (s->tokens - t == 3)
        add_wide_block(s, t, 3, columns, length, is_bf16);
    else if (s->tokens - t == 2)
        add_wide_block(s, t, 2, columns, length, is_bf16);
    else if (s->tokens - t == 1)
        add_wide_block(s, t, 1, columns, length, is_bf16);
}

TARGET static void add_wide(const struct sums_of *s, const uint16_t *const *columns, int length,
                            int is_bf16)
{
    if (is_bf16)
        add_wide_typed(s, columns, length, 1);
    else
        add_wide_typed(s, columns, length, 0);
}
