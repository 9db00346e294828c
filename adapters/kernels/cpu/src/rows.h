// Operations on one token's row: norms, rotary embedding, activation. They compute in float32 and store bf16.

// out = x / sqrt(mean(x^2) + eps) * w  (RMSNorm, Zhang & Sennrich 2019)
static void rms_norm(const bf16* x, const float* w, int64_t n, float eps, bf16* out) {
    f32x16 squares = {};
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 v = load_floats(x + i, n - i);
        squares += v * v;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / n + eps);
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 v = load_floats(x + i, n - i), weight = {};
        __builtin_memcpy(&weight, w + i, 4 * min_of(16, n - i));
        store_bf16s(out + i, v * scale * weight, n - i);
    }
}

// x += y
static void add_row(bf16* x, const bf16* y, int64_t n) {
    for (int64_t i = 0; i < n; i += 16)
        store_bf16s(x + i, load_floats(x + i, n - i) + load_floats(y + i, n - i), n - i);
}

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) over the two halves of x (RoPE, Su et al. 2021). x is a head, or its
// first `dim` dimensions.
static void rotate_head(bf16* x, const float* cosines, const float* sines, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const int64_t left = half - i, bytes = 4 * min_of(16, left);
        f32x16 c1 = {}, c2 = {}, s1 = {}, s2 = {};
        __builtin_memcpy(&c1, cosines + i, bytes);
        __builtin_memcpy(&c2, cosines + half + i, bytes);
        __builtin_memcpy(&s1, sines + i, bytes);
        __builtin_memcpy(&s2, sines + half + i, bytes);
        f32x16 x1 = load_floats(x + i, left), x2 = load_floats(x + half + i, left);
        store_bf16s(x + i, x1 * c1 - x2 * s1, left);
        store_bf16s(x + half + i, x2 * c2 + x1 * s2, left);
    }
}

// gate = act(gate) * up
static void activate(bf16* gate, const bf16* up, int64_t n, bool gelu) {
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 g = load_floats(gate + i, n - i), u = load_floats(up + i, n - i);
        f32x16 a =
            gelu ? 0.5f * g * (1.0f + tanh16(0.7978845608f * (g + 0.044715f * g * g * g))) : g / (1.0f + exp16(-g));
        store_bf16s(gate + i, a * u, n - i);
    }
}
