/* 16-bit rows and columns with AVX2: part of avx2.c.
 *
 * Two rows and two tokens share what is read and widened. A sum's order never depends on how many there
 * are.
 */

INLINE __m256 widen8(const uint16_t *w, int is_bf16)
{
    __m128i raw = _mm_loadu_si128((const __m128i *)w);
    if (!is_bf16)
        return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

INLINE float widen1(uint16_t w, int is_bf16)
{
    if (!is_bf16)
        return _cvtsh_ss(w);
    uint32_t bits = (uint32_t)w << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* 16 values a step; even and odd eights are summed apart, and what is left one by one. */
INLINE void dot_wide_block(const uint16_t *const *w, const int R, const float *x, const int T,
                           int length, const int is_bf16, const size_t *ahead, float *out,
                           int64_t stride)
{
    __m256 even[2][2], odd[2][2];
    for (int i = 0; i < R; i++)
        for (int k = 0; k < T; k++)
            even[i][k] = odd[i][k] = _mm256_setzero_ps();
    int j = 0;
    for (; j + 15 < length; j += 16) {
        for (int i = 0; i < R; i++) {
            __m256 a = widen8(w[i] + j, is_bf16), b = widen8(w[i] + j + 8, is_bf16);
            if (!(j & 16))
                fetch_wanted((const uint8_t *)(w[i] + j), ahead);
            for (int k = 0; k < T; k++) {
                const float *at = x + (size_t)k * length + j;
                even[i][k] = _mm256_fmadd_ps(a, _mm256_loadu_ps(at), even[i][k]);
                odd[i][k] = _mm256_fmadd_ps(b, _mm256_loadu_ps(at + 8), odd[i][k]);
            }
        }
    }
    for (int i = 0; i < R; i++)
        for (int k = 0; k < T; k++) {
            float sum = sum_of(_mm256_add_ps(even[i][k], odd[i][k]));
            for (int rest = j; rest < length; rest++)
                sum += widen1(w[i][rest], is_bf16) * x[(size_t)k * length + rest];
            out[i * stride + k] = sum;
        }
}

INLINE void dot_wide_rows(const uint16_t *const *w, const int R, const struct inputs *in,
                          int length, const int is_bf16, const size_t *ahead, float *out,
                          int64_t stride)
{
    int t = 0;
    for (; t + 2 <= in->tokens; t += 2)
        dot_wide_block(w, R, in->x + (size_t)t * length, 2, length, is_bf16, ahead, out + t,
                       stride);
    if (t < in->tokens)
        dot_wide_block(w, R, in->x + (size_t)t * length, 1, length, is_bf16, ahead, out + t,
                       stride);
}

TARGET static void dot_wide(const uint16_t *const *w, int count, const struct inputs *in,
                            int length, int is_bf16, const size_t *ahead, float *out,
                            int64_t stride)
{
    int i = 0;
    for (; in->tokens > 1 && i + 2 <= count; i += 2)
        is_bf16 ? dot_wide_rows(w + i, 2, in, length, 1, ahead, out + i * stride, stride)
                : dot_wide_rows(w + i, 2, in, length, 0, ahead, out + i * stride, stride);
    for (; i < count; i++)
        is_bf16 ? dot_wide_rows(w + i, 1, in, length, 1, ahead, out + i * stride, stride)
                : dot_wide_rows(w + i, 1, in, length, 0, ahead, out + i * stride, stride);
}

/* one token's */
INLINE void add_wide1(float *y, const struct sums_of *s, const float *h,
                      const uint16_t *const *columns, int length, int is_bf16)
{
    int j = 0;
    for (; j + 7 < length; j += 8) {
        __m256 sum = _mm256_loadu_ps(y + j);
        for (int n = 0; n < s->count; n++)
            sum = _mm256_fmadd_ps(widen8(columns[n] + j, is_bf16),
                                  _mm256_set1_ps(h[n * s->h_stride]), sum);
        _mm256_storeu_ps(y + j, sum);
    }
    for (; j < length; j++)
        for (int n = 0; n < s->count; n++)
            y[j] += widen1(columns[n][j], is_bf16) * h[n * s->h_stride];
}

TARGET static void add_wide(const struct sums_of *s, const uint16_t *const *columns, int length,
                            int is_bf16)
{
    for (int t = 0; t < s->tokens; t++)
        add_wide1(s->y + t * s->y_stride, s, s->h + t, columns, length, is_bf16);
}
