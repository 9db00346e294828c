// The final norm and the output head:  logits = norm(x) W^T, softcapped, W in bf16, packed so that sixteen words' sums
// stand in one register. float32 out: rounding logits to bf16 would only make ties.

template <int ROWS>
static inline void head_group(const HeadCall& call, int64_t row, int64_t group) {
    f32x16 acc[ROWS] = {};
    const bf16* w = call.w + group * call.hidden * 16;
    const bf16* x = call.normed + row * call.hidden;
    for (int64_t i = 0; i < call.hidden; i += 2) {
        u32x16 pairs = load<u32x16>(w + i * 16);
        for (int r = 0; r < ROWS; r++) acc[r] = dot2(acc[r], pairs, splat_pair(x + r * call.hidden + i));
    }
    const int64_t width = (call.vocabulary + 15) / 16 * 16;
    for (int r = 0; r < ROWS; r++) store(call.out + (row + r) * width + group * 16, softcapped(acc[r], call.softcap));
}

static void head(const HeadCall* call) {
    const int64_t groups = (call->vocabulary + 15) / 16, n = call->n;
    for (int64_t i = 0; i < n; i++)
        rms_norm(call->x + call->rows[i] * call->hidden, call->norm, call->hidden, call->eps,
                 call->normed + i * call->hidden);
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
        int64_t row = 0;
        for (; row + 16 <= n; row += 16) head_group<16>(*call, row, g);
        for (; row + 4 <= n; row += 4) head_group<4>(*call, row, g);
        for (; row < n; row++) head_group<1>(*call, row, g);
    }
}
