// All decoder blocks of a Llama-like model in one call, for the flattened tokens of a step.
//
//   x += o( attention( rope(q(n(x))), rope(k(n(x))), v(n(x)) ) )        each linear with its adapters
//   x += down( act(gate(n(x))) * up(n(x)) )                             n = RMSNorm

// Books the time until the end of its scope.
struct Timed {
    const StackCall& call;
    const Part part;
    const int64_t began;

    static int64_t now() {
        timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1000000000ll + t.tv_nsec;
    }
    Timed(const StackCall& c, Part p) : call(c), part(p), began(now()) {}
    ~Timed() { call.nanoseconds[part] += now() - began; }
};

// Linears that share x and write side by side into rows of `stride`, with their adapters' part.
template <int N>
static void project(const StackCall& call, const Linear* const (&which)[N], const bf16* x, int64_t x_stride, bf16* out,
                    int64_t stride) {
    bf16* ys[N];
    const LoraSite* sites[N];
    int64_t strides[N], column = 0;
    for (int i = 0; i < N; i++) {
        ys[i] = out + column, sites[i] = which[i]->lora, strides[i] = stride;
        column += which[i]->out;
    }
    {
        Timed timed(call, LINEARS);
        LinearCall base = {which, ys, N, stride, x, x_stride, call.tokens->count, call.codebook};
        linears(&base);
    }
    if (call.n_segments == 0) return;
    Timed timed(call, LORA);
    LoraCall adapters = {sites, ys, strides, N, x, x_stride, call.segments, call.n_segments};
    lora(&adapters);
}

template <typename F>
static void each_token(const StackCall& call, F f) {
    Timed timed(call, ROWS);
    const int64_t count = call.tokens->count;
#pragma omp parallel for schedule(static) if (count >= 8)
    for (int64_t t = 0; t < count; t++) f(t);
}

// The weights for token t.
static inline const float* weight_of(const StackCall& call, const Norm& norm, int64_t t) {
    const int64_t slot = call.norm_slots != nullptr ? call.norm_slots[t] : -1;
    const float* own = slot >= 0 ? (*norm.own)[slot] : nullptr;
    return own != nullptr ? own : norm.weight;
}

static void attention_half(const StackCall& call, const Block& b) {
    const int64_t hidden = call.hidden, dim = call.head_dim;
    const int64_t q_size = b.q.out, kv_size = b.k.out, stride = q_size + 2 * kv_size;
    const Scratch& s = call.scratch;
    each_token(call, [&](int64_t t) {
        rms_norm(call.x + t * hidden, weight_of(call, b.norm_before_attention, t), hidden, call.eps, s.normed + t * hidden);
    });
    project(call, {&b.q, &b.k, &b.v}, s.normed, hidden, s.qkv, stride);
    each_token(call, [&](int64_t t) {
        const float* cosines = call.cosines + call.tokens->positions[t] * dim;
        const float* sines = call.sines + call.tokens->positions[t] * dim;
        for (int64_t i = 0; i < q_size + kv_size; i += dim) {
            bf16* head = s.qkv + t * stride + i;
            const Norm& norm = i < q_size ? b.q_norm : b.k_norm;
            if (norm.weight != nullptr) rms_norm(head, weight_of(call, norm, t), dim, call.eps, head);
            rotate_head(head, cosines, sines, dim);
        }
    });
    AttentionCall a = {&b.pages, call.tokens, s.qkv, s.qkv + q_size, s.qkv + q_size + kv_size, stride, stride, stride,
                       s.attended, call.heads, call.scale, call.softcap, b.window};
    {
        Timed timed(call, ATTENTION);
        attention(&a);
    }
    project(call, {&b.o}, s.attended, q_size, s.delta, hidden);
    each_token(call, [&](int64_t t) {
        bf16* delta = s.delta + t * hidden;
        if (b.norm_after_attention.weight != nullptr)
            rms_norm(delta, weight_of(call, b.norm_after_attention, t), hidden, call.eps, delta);
        add_row(call.x + t * hidden, delta, hidden);
    });
}

static void mlp_half(const StackCall& call, const Block& b) {
    const int64_t hidden = call.hidden, inner = call.intermediate;
    const Scratch& s = call.scratch;
    each_token(call, [&](int64_t t) {
        rms_norm(call.x + t * hidden, weight_of(call, b.norm_before_mlp, t), hidden, call.eps, s.normed + t * hidden);
    });
    project(call, {&b.gate, &b.up}, s.normed, hidden, s.gate_up, 2 * inner);
    each_token(call, [&](int64_t t) {
        bf16* gate = s.gate_up + t * 2 * inner;
        activate(gate, gate + inner, inner, call.gelu != 0);
    });
    project(call, {&b.down}, s.gate_up, 2 * inner, s.delta, hidden);
    each_token(call, [&](int64_t t) {
        bf16* delta = s.delta + t * hidden;
        if (b.norm_after_mlp.weight != nullptr)
            rms_norm(delta, weight_of(call, b.norm_after_mlp, t), hidden, call.eps, delta);
        add_row(call.x + t * hidden, delta, hidden);
    });
}

static void stack(const StackCall* call) {
    for (int64_t i = 0; i < call->n_blocks; i++) {
        attention_half(*call, call->blocks[i]);
        mlp_half(*call, call->blocks[i]);
    }
}
