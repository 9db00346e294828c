// The final norm and the output head:  logits = norm(x) W^T, softcapped. W is bf16 or NF4 (see nf4.h). bf16 weights are
// packed so that one register holds the sums of sixteen vocabulary entries. The logits are float32, because rounding
// them to bf16 would make different ones equal.

constexpr int HEAD_ROWS = 8;  // rows whose sums, for two groups of sixteen entries, are kept in registers

template <int ROWS>
static inline void head_rows(const HeadCall& call, int64_t row, int64_t group) {
    f32x16 acc[ROWS][2] = {};
    const int64_t groups = (call.vocabulary + 15) / 16, width = groups * 16;
    const bf16* first = call.w + group * call.hidden * 16;
    // A last group without a partner is computed twice.
    const bf16* second = group + 1 < groups ? first + call.hidden * 16 : first;
    const bf16* x = call.normed + row * call.hidden;
    for (int64_t i = 0; i < call.hidden; i += 2) {
        const u32x16 w[2] = {load<u32x16>(first + i * 16), load<u32x16>(second + i * 16)};
        // The next two groups.
        for (int k = 0; k < 2; k++) __builtin_prefetch(first + (call.hidden * (2 + k) + i) * 16, 0, 2);
        for (int r = 0; r < ROWS; r++) {
            const u32x16 xs = splat_pair(x + r * call.hidden + i);
            for (int k = 0; k < 2; k++) acc[r][k] = dot2(acc[r][k], w[k], xs);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < 2 && group + k < groups; k++)
            store(call.out + (row + r) * width + (group + k) * 16, softcapped(acc[r][k], call.softcap));
}

// Computes `count` rows from `row` on. `count` is at most MAX.
template <int MAX>
static inline void head_last_rows(const HeadCall& call, int64_t row, int64_t count, int64_t group) {
    if (count == MAX) return head_rows<MAX>(call, row, group);
    if constexpr (MAX > 1) head_last_rows<MAX - 1>(call, row, count, group);
}

static void head_bf16(const HeadCall& call, const Team& team) {
    const int64_t groups = (call.vocabulary + 15) / 16;
    team.share((groups + 1) / 2, [&](int64_t pair) {
        int64_t row = 0;
        for (; row + HEAD_ROWS <= call.n; row += HEAD_ROWS) head_rows<HEAD_ROWS>(call, row, 2 * pair);
        if (row < call.n) head_last_rows<HEAD_ROWS - 1>(call, row, call.n - row, 2 * pair);
    });
}

static void head_nf4(const HeadCall& call, const Team& team) {
    const Codebook codebook(call.codebook);
    Prefetcher none;
    team.share(call.vocabulary / PANEL, [&](int64_t panel) {
        nf4_panel(*call.nf4, panel, codebook, call.n, call.normed, call.hidden, call.out, call.vocabulary, none);
        if (call.softcap == 0) return;
        for (int64_t row = 0; row < call.n; row++)
            for (int i = 0; i < PANEL; i += 16) {
                float* sums = call.out + row * call.vocabulary + panel * PANEL + i;
                store(sums, softcapped(load<f32x16>(sums), call.softcap));
            }
    });
}

static void head(const HeadCall* call) {
    for (int64_t i = 0; i < call->n; i++)
        rms_norm(call->x + call->rows[i] * call->hidden, call->norm, call->hidden, call->eps,
                 call->normed + i * call->hidden);
    parallel([&](Team team) { call->w != nullptr ? head_bf16(*call, team) : head_nf4(*call, team); });
}
