// Products with 4-bit weights:  y = x W^T + bias,  W[n][k] = codebook[w[n][k]] * absmax[k / blocksize][n]
//
// The weights have the layout that bitsandbytes uses on CPUs: panels of 32 outputs. For each pair of inputs a panel has
// 32 bytes. Their low halves are outputs 0-15 (both inputs of output 0, then both of output 1, ...), and their high
// halves are outputs 16-31. A look-up in one register decodes them into bf16 pairs for `dot2`. The sum over a
// quantisation block is scaled once, in float32.
//
// y is bf16, or float32 for the output head.
//
// Rows are computed in groups. With many rows, a panel is decoded once into memory. With few rows, it is decoded again
// for each group. The sums are formed in the same order, so the results are equal.

constexpr int PANEL = 32;
constexpr int NF4_ROWS = 8;      // rows in a group; their sums are kept in registers
constexpr int NF4_DECODED = 32;  // from this many rows on, decoding a panel once is faster

struct Codebook {
    u16x32 values;
    explicit Codebook(const bf16* sixteen) {
        for (int i = 0; i < 32; i++) values[i] = sixteen[i % 16];
    }
    // Decodes one pair of inputs: low has outputs 0-15, high has outputs 16-31.
    inline void decode(const uint8_t* w, u32x16& low, u32x16& high) const {
        typedef uint8_t u8x32 __attribute__((vector_size(32)));
        u16x32 both = __builtin_convertvector(load<u8x32>(w), u16x32);
        low = (u32x16)__builtin_shuffle(values, both & 15);
        high = (u32x16)__builtin_shuffle(values, both >> 4);
    }
};

// Decodes weights while multiplying.
struct Decoding {
    const Codebook& codebook;
    const uint8_t* w;
    inline void pair(int64_t p, u32x16& low, u32x16& high) const { codebook.decode(w + p * PANEL, low, high); }
};

// Reads weights that were decoded before.
struct Decoded {
    const u32x16* pairs;
    inline void pair(int64_t p, u32x16& low, u32x16& high) const { low = pairs[2 * p], high = pairs[2 * p + 1]; }
};

static inline void store_sums(bf16* y, f32x16 sums) { store_bf16s(y, sums); }
static inline void store_sums(float* y, f32x16 sums) { store(y, sums); }

template <int ROWS, typename Weights, typename Y>
static inline void nf4_rows(const Linear& l, int64_t panel, const Weights& weights, const bf16* x, int64_t x_stride,
                            Y* y, int64_t y_stride, Prefetcher& prefetcher) {
    f32x16 total[ROWS][2] = {};
    const int64_t pairs = l.blocksize / 2;
    for (int64_t b = 0; b < l.in / l.blocksize; b++) {
        f32x16 part[ROWS][2] = {};
        for (int64_t p = b * pairs; p < (b + 1) * pairs; p++) {
            u32x16 low, high;
            weights.pair(p, low, high);
            for (int r = 0; r < ROWS; r++) {
                u32x16 xs = splat_pair(x + r * x_stride + 2 * p);
                part[r][0] = dot2(part[r][0], low, xs);
                part[r][1] = dot2(part[r][1], high, xs);
            }
        }
        prefetcher.advance();
        const bf16* absmax = l.absmax + b * l.out + panel * PANEL;
        const f32x16 scale[2] = {load_floats(absmax), load_floats(absmax + 16)};
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 2; i++) total[r][i] = fma16(part[r][i], scale[i], total[r][i]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 2; i++) {
            if (l.bias != nullptr) total[r][i] += load_floats(l.bias + panel * PANEL + 16 * i);
            store_sums(y + r * y_stride + panel * PANEL + 16 * i, total[r][i]);
        }
}

// Computes `count` rows. `count` is at most MAX.
template <int MAX, typename Weights, typename Y>
static inline void nf4_last_rows(const Linear& l, int64_t panel, const Weights& weights, int64_t count, const bf16* x,
                                 int64_t x_stride, Y* y, int64_t y_stride, Prefetcher& prefetcher) {
    if (count == MAX) return nf4_rows<MAX>(l, panel, weights, x, x_stride, y, y_stride, prefetcher);
    if constexpr (MAX > 1) nf4_last_rows<MAX - 1>(l, panel, weights, count, x, x_stride, y, y_stride, prefetcher);
}

template <typename Weights, typename Y>
static void nf4_all_rows(const Linear& l, int64_t panel, const Weights& weights, int64_t count, const bf16* x,
                         int64_t x_stride, Y* y, int64_t y_stride, Prefetcher& prefetcher) {
    int64_t t = 0;
    for (; t + NF4_ROWS <= count; t += NF4_ROWS)
        nf4_rows<NF4_ROWS>(l, panel, weights, x + t * x_stride, x_stride, y + t * y_stride, y_stride, prefetcher);
    if (t < count)
        nf4_last_rows<NF4_ROWS - 1>(l, panel, weights, count - t, x + t * x_stride, x_stride, y + t * y_stride,
                                    y_stride, prefetcher);
}

template <typename Y>
static void nf4_panel(const Linear& l, int64_t panel, const Codebook& codebook, int64_t count, const bf16* x,
                      int64_t x_stride, Y* y, int64_t y_stride, Prefetcher& prefetcher) {
    const uint8_t* w = l.w + panel * PANEL * l.in / 2;
    if (count < NF4_DECODED)
        return nf4_all_rows(l, panel, Decoding{codebook, w}, count, x, x_stride, y, y_stride, prefetcher);
    static thread_local Buffer<u32x16> kept;
    u32x16* pairs = kept.at_least(l.in);
    for (int64_t p = 0; p < l.in / 2; p++) codebook.decode(w + p * PANEL, pairs[2 * p], pairs[2 * p + 1]);
    nf4_all_rows(l, panel, Decoded{pairs}, count, x, x_stride, y, y_stride, prefetcher);
}

// The number of times that a call advances its prefetcher.
static int64_t prefetch_turns(const LinearCall& call) {
    int64_t turns = 0;
    for (int64_t i = 0; i < call.n_linears; i++)
        turns += call.linears[i]->out / PANEL * (call.linears[i]->in / call.linears[i]->blocksize);
    return turns * ((call.count + NF4_ROWS - 1) / NF4_ROWS);
}

// Computes all panels of linears that share x.
static void linears(const LinearCall& call, const Team& team, Prefetcher& prefetcher) {
    const Codebook codebook(call.codebook);
    int64_t panels = 0;
    for (int64_t i = 0; i < call.n_linears; i++) panels += call.linears[i]->out / PANEL;
    team.share(panels, [&](int64_t panel) {
        int64_t which = 0;
        while (panel >= call.linears[which]->out / PANEL) panel -= call.linears[which++]->out / PANEL;
        nf4_panel(*call.linears[which], panel, codebook, call.count, call.x, call.x_stride, call.y[which],
                  call.y_stride, prefetcher);
    });
}

// Computes one matrix of a layer's experts. Only the weights of the chosen ones are read.
static void experts(const ExpertsCall& call, const Team& team) {
    const Codebook codebook(call.codebook);
    const int64_t panels = call.out / PANEL, weights = call.in * call.out;
    Prefetcher none;
    team.share_unequal(call.n_chosen * panels, [&](int64_t task) {
        const int64_t i = task / panels, expert = call.chosen[i], start = call.starts[i];
        const Linear l{call.w + expert * (weights / 2),
                       call.absmax + expert * (weights / call.blocksize),
                       nullptr,
                       call.in,
                       call.out,
                       call.blocksize,
                       nullptr};
        nf4_panel(l, task % panels, codebook, call.starts[i + 1] - start, call.x + start * call.in, call.in,
                  call.y + start * call.out, call.out, none);
    });
}
