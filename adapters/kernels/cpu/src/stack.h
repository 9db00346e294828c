// All decoder blocks of a Llama-like model in one call, for the flattened tokens of a step.
//
//   x += o( attention( rope(q(n(x))), rope(k(n(x))), v(n(x)) ) )
//   x += down( act(gate(n(x))) * up(n(x)) )
//
// n is RMSNorm. Each linear includes its adapters. Everything runs in one parallel region. Only attention reads other
// tokens. So if the team splits by rows, the threads wait for each other only in attention.

// One thread's part of a step: the tokens that it computes.
struct ThreadStep {
    const StackCall& call;
    const Team& team;
    const int64_t begin = team.begin(call.tokens->count), count = team.end(call.tokens->count) - begin;
    const Segment* segments;  // of its tokens; start and stop count from its first token
    int64_t n_segments;

    template <typename T>
    T* own(T* rows, int64_t stride) const {
        return rows + begin * stride;
    }
};

// Adds the time until the end of the scope to the step's `part`. It measures the first thread only.
struct Timed {
    const ThreadStep& step;
    const Part part;
    const int64_t began;

    static int64_t now() {
        timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1000000000ll + t.tv_nsec;
    }
    Timed(const ThreadStep& w, Part p) : step(w), part(p), began(w.team.thread == 0 ? now() : 0) {}
    ~Timed() {
        if (step.team.thread == 0) step.call.nanoseconds[part] += now() - began;
    }
};

// Computes n linears that share x, with their adapters. They write side by side into rows of `stride` elements. The
// adapters' rows are prefetched during the products.
static void project(const ThreadStep& w, const Linear* parts, int64_t n, const bf16* x, int64_t x_stride, bf16* out,
                    int64_t stride) {
    constexpr int MOST = sizeof(Product::parts) / sizeof(Linear);
    const Linear* which[MOST];
    bf16* ys[MOST];
    const LoraSite* sites[MOST];
    int64_t strides[MOST], column = 0;
    for (int64_t i = 0; i < n; i++) {
        which[i] = parts + i, sites[i] = parts[i].lora;
        ys[i] = w.own(out, stride) + column, strides[i] = stride;
        column += parts[i].out;
    }
    const LinearCall products = {which, ys, n, stride, w.own(x, x_stride), x_stride, w.count, w.call.codebook};
    const LoraCall adapted = {sites, ys, strides, n, w.own(x, x_stride), x_stride, w.segments, w.n_segments};
    {
        Timed timed(w, LINEARS);
        Prefetcher prefetcher = prefetcher_for(adapted, prefetch_turns(products), w.team);
        linears(products, w.team, prefetcher);
    }
    if (w.call.n_segments == 0) return;
    Timed timed(w, LORA);
    lora(adapted, w.team);
}

static void project(const ThreadStep& w, const Product& product, const bf16* x, int64_t x_stride, bf16* out,
                    int64_t stride) {
    project(w, product.parts, product.n, x, x_stride, out, stride);
}

template <typename F>
static void each_token(const ThreadStep& w, F f) {
    Timed timed(w, ROWS);
    w.team.share(w.count, [&](int64_t i) { f(w.begin + i); });
}

// The norm's weights for token t: its adapter's, or the base's.
static inline const float* weight_of(const StackCall& call, const Norm& norm, int64_t t) {
    const int64_t slot = call.norm_slots != nullptr ? call.norm_slots[t] : -1;
    const float* own = slot >= 0 ? (*norm.by_slot)[slot] : nullptr;
    return own != nullptr ? own : norm.weight;
}

// out = norm(x) for token t. Does nothing if the model has no such norm.
static inline void normalise(const StackCall& call, const Norm& norm, int64_t t, const bf16* x, int64_t n, bf16* out) {
    if (norm.weight != nullptr) rms_norm(x, weight_of(call, norm, t), n, call.eps, out);
}

// Adds the output of half a block to x, and applies the norm before the next half.
static void add_and_norm(const ThreadStep& w, const Norm& after, const Norm& before) {
    const StackCall& call = w.call;
    const int64_t hidden = call.hidden;
    each_token(w, [&](int64_t t) {
        bf16 *x = call.x + t * hidden, *delta = call.scratch.delta + t * hidden;
        normalise(call, after, t, delta, hidden, delta);
        add_row(x, delta, hidden);
        normalise(call, before, t, x, hidden, call.scratch.normed + t * hidden);
    });
}

static void attention_half(const ThreadStep& w, const Block& b) {
    const StackCall& call = w.call;
    const Scratch& s = call.scratch;
    const int64_t dim = call.head_dim, turned = call.rotary_dim;
    const int64_t q_size = call.heads * dim, kv_size = b.pages.kv_heads * dim, stride = q_size + 2 * kv_size;
    project(w, b.qkv, s.normed, call.hidden, s.qkv, stride);
    const AttentionCall a = {&b.pages,   call.tokens,  s.qkv,   s.qkv + q_size, s.qkv + q_size + kv_size,
                             stride,     stride,       stride,  s.attended,     call.heads,
                             call.scale, call.softcap, b.window};
    each_token(w, [&](int64_t t) {
        const float* cosines = b.cosines + call.tokens->positions[t] * turned;
        const float* sines = b.sines + call.tokens->positions[t] * turned;
        for (int64_t i = 0; i < q_size + kv_size; i += dim) {
            bf16* head = s.qkv + t * stride + i;
            normalise(call, i < q_size ? b.q_norm : b.k_norm, t, head, dim, head);
            rotate_head(head, cosines, sines, turned);
        }
        store_kv(a, t);
    });
    {
        Timed timed(w, ATTENTION);
        attend_all(a, w.team);
    }
    project(w, b.o, s.attended, q_size, s.delta, call.hidden);
}

static void mlp_half(const ThreadStep& w, const Block& b) {
    const Scratch& s = w.call.scratch;
    const int64_t hidden = w.call.hidden, inner = w.call.intermediate;
    if (w.team.by_rows) {  // the adapters' rows of both linears would not fit in the cache
        bf16* out = s.gate_up;
        for (int64_t i = 0; i < b.gate_up.n; out += b.gate_up.parts[i++].out)
            project(w, b.gate_up.parts + i, 1, s.normed, hidden, out, 2 * inner);
    } else {
        project(w, b.gate_up, s.normed, hidden, s.gate_up, 2 * inner);
    }
    each_token(w, [&](int64_t t) {
        bf16* gate = s.gate_up + t * 2 * inner;
        activate(gate, gate + inner, inner, w.call.gelu != 0);
    });
    project(w, b.down, s.gate_up, 2 * inner, s.delta, hidden);
}

static void run_blocks(const ThreadStep& w) {
    const StackCall& call = w.call;
    each_token(w, [&](int64_t t) {
        normalise(call, call.blocks[0].norm_before_attention, t, call.x + t * call.hidden, call.hidden,
                  call.scratch.normed + t * call.hidden);
    });
    for (const Block *b = call.blocks, *end = b + call.n_blocks; b < end; b++) {
        attention_half(w, *b);
        add_and_norm(w, b->norm_after_attention, b->norm_before_mlp);
        mlp_half(w, *b);
        add_and_norm(w, b->norm_after_mlp, b + 1 < end ? b[1].norm_before_attention : Norm{});
    }
}

// Cuts the segments to the tokens [begin, end). The results count from `begin`. Returns their number.
static int64_t cut(const Segment* segments, int64_t n, int64_t begin, int64_t end, Segment* own) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t start = max_of(segments[i].start, begin), stop = min_of(segments[i].stop, end);
        if (start < stop) own[count++] = {segments[i].slot, start - begin, stop - begin};
    }
    return count;
}

static void stack(const StackCall* call) {
    parallel([&](Team team) {
        const int64_t tokens = call->tokens->count;
        team.by_rows = best_by_rows(tokens, team.threads, call->hidden * call->intermediate / 2);
        static thread_local Buffer<Segment> kept;
        Segment* own = kept.at_least(call->n_segments);
        const int64_t count = cut(call->segments, call->n_segments, team.begin(tokens), team.end(tokens), own);
        run_blocks({*call, team, team.begin(tokens), team.end(tokens) - team.begin(tokens), own, count});
    });
}
