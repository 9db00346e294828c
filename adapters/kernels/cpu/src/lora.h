// LoRA over rank rows:  y_t += sum over j in rows(adapter of t) of (A_j . x_t) B_j
// Before that, for the few adapters that have an adjustment:  y_t = scale * y_t + shift
//
// shrink: h_tj = A_j . x_t in sixteen partial sums along the input, which are added and rounded to bf16
// expand: y_t += h_t B in float32, two rows of B at a time, in the order of the adapter's row list
//
// A task is up to TASK_TOKENS tokens of one segment at one linear. So a decoding step has at least one task for each
// adapter, and a long prompt is split into many tasks. Nothing is padded to a maximum rank, and a linear that an
// adapter does not change takes no time.

constexpr int64_t TASK_TOKENS = 16;  // the most tokens in a task
constexpr int TOKENS = 8;            // tokens for which a row is read once

// Adds 32 inputs, or the last `left` ones, to the sums of T tokens and R rows.
template <int T, int R>
static inline void shrink_chunk(const bf16* const* x, const bf16* const* a, int64_t i, int64_t left, f32x16 acc[T][R]) {
    u32x16 as[R];
    for (int j = 0; j < R; j++) as[j] = load_pairs(a[j] + i, left);
    for (int t = 0; t < T; t++) {
        const u32x16 xs = load_pairs(x[t] + i, left);
        for (int j = 0; j < R; j++) acc[t][j] = dot2(acc[t][j], xs, as[j]);
    }
}

// Computes h[t][j] for T tokens and R rows. The sums are kept in registers.
template <int T, int R>
static inline void shrink_tile(const bf16* const* x, const bf16* const* a, int64_t in, float h[T][R]) {
    f32x16 acc[T][R] = {};
    int64_t i = 0;
    for (; i + 32 <= in; i += 32) shrink_chunk<T, R>(x, a, i, 32, acc);
    if (i < in) shrink_chunk<T, R>(x, a, i, in - i, acc);
    for (int t = 0; t < T; t++)
        for (int j = 0; j < R; j++) h[t][j] = sum(acc[t][j]);
}

// Adjusts up to 32 columns of T tokens, from column c on.
template <int T>
static inline void adjust_chunk(const Adjust& adjust, f32x16 acc[T][2], int64_t c, int64_t left) {
    for (int i = 0; i < (left > 16 ? 2 : 1); i++) {
        const int64_t at = c + 16 * i, bytes = 4 * min_of(16, left - 16 * i);
        f32x16 scale = {}, shift = {};
        if (adjust.scale != nullptr) __builtin_memcpy(&scale, adjust.scale + at, bytes);
        if (adjust.shift != nullptr) __builtin_memcpy(&shift, adjust.shift + at, bytes);
        for (int t = 0; t < T; t++) {
            if (adjust.scale != nullptr) acc[t][i] = acc[t][i] * scale;
            acc[t][i] = acc[t][i] + shift;
        }
    }
}

// Updates 32 columns of y, or the last `left` ones, for T tokens. The sums over all rows are kept in registers.
template <int T, bool ADJUSTED>
static inline void expand_chunk(const LoraSite& site, const Adjust& adjust, const int32_t* rows, int64_t rank,
                                const bf16* h, int64_t h_stride, bf16* const* y, int64_t c, int64_t left) {
    f32x16 acc[T][2];
    for (int t = 0; t < T; t++) {
        acc[t][0] = load_floats(y[t] + c, left);
        acc[t][1] = left > 16 ? load_floats(y[t] + c + 16, left - 16) : f32x16{};
    }
    if constexpr (ADJUSTED) adjust_chunk<T>(adjust, acc, c, left);
    for (int64_t j = 0; j < rank; j += 2) {
        const bf16* b0 = site.b + rows[j] * site.out + c;
        const bf16* b1 = j + 1 < rank ? site.b + rows[j + 1] * site.out + c : b0;  // there h is 0
        u32x16 low, high;
        interleave(load_pairs(b0, left), load_pairs(b1, left), low, high);
        for (int t = 0; t < T; t++) {
            const u32x16 pair = splat_pair(h + t * h_stride + j);
            acc[t][0] = dot2(acc[t][0], low, pair);
            acc[t][1] = dot2(acc[t][1], high, pair);
        }
    }
    for (int t = 0; t < T; t++) {
        store_bf16s(y[t] + c, acc[t][0], left);
        if (left > 16) store_bf16s(y[t] + c + 16, acc[t][1], left - 16);
    }
}

template <int T, bool ADJUSTED>
static inline void expand(const LoraSite& site, const Adjust& adjust, const int32_t* rows, int64_t rank, const bf16* h,
                          int64_t h_stride, bf16* const* y) {
    int64_t c = 0;
    for (; c + 32 <= site.out; c += 32) expand_chunk<T, ADJUSTED>(site, adjust, rows, rank, h, h_stride, y, c, 32);
    if (c < site.out) expand_chunk<T, ADJUSTED>(site, adjust, rows, rank, h, h_stride, y, c, site.out - c);
}

// Prefetches R rows of B, which are scattered in memory, before their rows of A are read.
template <int R>
static inline void fetch_rows(const LoraSite& site, const int32_t* rows) {
    for (int i = 0; i < R; i++)
        for (int64_t c = 0; c < site.out; c += 32) __builtin_prefetch(site.b + rows[i] * site.out + c, 0, 2);
}

template <int T, bool ADJUSTED>
static inline void lora_tokens(const LoraSite& site, const Adjust& adjust, const int32_t* rows, int64_t rank,
                               const bf16* x, int64_t x_stride, bf16* y, int64_t y_stride, bf16* h, int64_t h_stride) {
    constexpr int R = T == 1 ? 8 : 2;
    const bf16* xs[T];
    bf16* ys[T];
    for (int t = 0; t < T; t++) xs[t] = x + t * x_stride, ys[t] = y + t * y_stride;
    int64_t j = 0;
    for (; j + R <= rank; j += R) {
        const bf16* as[R];
        float found[T][R];
        for (int i = 0; i < R; i++) as[i] = site.a + rows[j + i] * site.in;
        if (T == 1) fetch_rows<R>(site, rows + j);
        shrink_tile<T, R>(xs, as, site.in, found);
        for (int t = 0; t < T; t++)
            for (int i = 0; i < R; i++) h[t * h_stride + j + i] = to_bf16(found[t][i]);
    }
    for (; j < rank; j++) {
        const bf16* as[1] = {site.a + rows[j] * site.in};
        float found[T][1];
        shrink_tile<T, 1>(xs, as, site.in, found);
        for (int t = 0; t < T; t++) h[t * h_stride + j] = to_bf16(found[t][0]);
    }
    if (rank % 2)
        for (int t = 0; t < T; t++) h[t * h_stride + rank] = 0;
    expand<T, ADJUSTED>(site, adjust, rows, rank, h, h_stride, ys);
}

struct LoraTask {
    int64_t site, slot, start, stop;
};

template <bool ADJUSTED>
static void lora_task(const LoraCall& call, const LoraTask& task) {
    const LoraSite& site = *call.sites[task.site];
    const int64_t rank = site.ranks[task.slot], h_stride = rank + rank % 2;
    const int32_t* rows = site.rows[task.slot];
    const Adjust& adjust = site.adjusts[task.slot];
    static thread_local Buffer<bf16> kept;
    bf16* h = kept.at_least(TOKENS * max_of(h_stride, 2));
    const int64_t y_stride = call.y_strides[task.site];
    int64_t t = task.start;
    for (; t + TOKENS <= task.stop; t += TOKENS)
        lora_tokens<TOKENS, ADJUSTED>(site, adjust, rows, rank, call.x + t * call.x_stride, call.x_stride,
                                      call.y[task.site] + t * y_stride, y_stride, h, h_stride);
    for (; t < task.stop; t++)
        lora_tokens<1, ADJUSTED>(site, adjust, rows, rank, call.x + t * call.x_stride, call.x_stride,
                                 call.y[task.site] + t * y_stride, y_stride, h, h_stride);
}

static bool adjusts(const LoraSite& site, int64_t slot) {
    return site.adjusts[slot].scale != nullptr || site.adjusts[slot].shift != nullptr;
}

static int64_t tasks_of(const LoraCall& call, LoraTask* tasks) {
    int64_t count = 0;
    for (int64_t i = 0; i < call.n_segments; i++) {
        const Segment& s = call.segments[i];
        for (int64_t site = 0; site < call.n_sites; site++) {
            if (call.sites[site]->ranks[s.slot] == 0 && !adjusts(*call.sites[site], s.slot)) continue;
            for (int64_t t = s.start; t < s.stop; t += TASK_TOKENS)
                tasks[count++] = {site, s.slot, t, min_of(t + TASK_TOKENS, s.stop)};
        }
    }
    return count;
}

// The ranges of memory that hold a slot's rows of a matrix. Adjacent rows are one range.
static Range* ranges_of(const LoraSite& site, int64_t slot, const bf16* matrix, int64_t width, Range* to) {
    const int32_t* rows = site.rows[slot];
    for (int64_t j = 0, stop, rank = site.ranks[slot]; j < rank; j = stop) {
        for (stop = j + 1; stop < rank && rows[stop] == rows[stop - 1] + 1;) stop++;
        *to++ = {(const char*)(matrix + rows[j] * width), (const char*)(matrix + (rows[stop - 1] + 1) * width)};
    }
    return to;
}

// A prefetcher for the rows that `lora` will read. All threads together call advance() `turns` times. If the team
// splits by columns, it is not known yet which thread will read which rows, so each thread fetches an equal part.
static Prefetcher prefetcher_for(const LoraCall& call, int64_t turns, const Team& team) {
    static thread_local Buffer<Range> kept;
    int64_t most = 0;
    for (int64_t i = 0; i < call.n_segments; i++)
        for (int64_t n = 0; n < call.n_sites; n++) most += 2 * call.sites[n]->ranks[call.segments[i].slot];
    Range *first = kept.at_least(most), *last = first;
    for (int64_t i = 0; i < call.n_segments; i++)
        for (int64_t n = 0; n < call.n_sites; n++) {
            const LoraSite& site = *call.sites[n];
            last = ranges_of(site, call.segments[i].slot, site.a, site.in, last);
            last = ranges_of(site, call.segments[i].slot, site.b, site.out, last);
        }
    if (team.by_rows) return {first, last, turns};
    const int64_t count = last - first;
    return {first + count * team.thread / team.threads, first + count * (team.thread + 1) / team.threads,
            (turns + team.threads - 1) / team.threads};
}

static void lora(const LoraCall& call, const Team& team) {
    static thread_local Buffer<LoraTask> kept;
    int64_t bound = 0;
    for (int64_t i = 0; i < call.n_segments; i++)
        bound += call.n_sites * ((call.segments[i].stop - call.segments[i].start) / TASK_TOKENS + 1);
    LoraTask* tasks = kept.at_least(bound);
    const int64_t count = tasks_of(call, tasks);
    team.share_unequal(count, [&](int64_t i) {
        if (adjusts(*call.sites[tasks[i].site], tasks[i].slot))
            lora_task<true>(call, tasks[i]);
        else
            lora_task<false>(call, tasks[i]);
    });
}
