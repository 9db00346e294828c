// Paged attention with an online softmax (FlashAttention-2, Dao 2023, algorithm 1). It reads the pages in place.
//
// A tile holds 16 tokens of one KV head, in the layout that `dot2` needs:
//   keys    [head_dim / 2][16 tokens][2]: one dot2 adds two dimensions to sixteen scores
//   values  [8 token pairs][head_dim][2]: one dot2 adds two tokens to sixteen dimensions
// A query reads its sequence's tiles in order, from the first tile that it attends to up to its own. Tiles begin at
// positions that are multiples of 16. So the sums have the same order in a whole prompt, in a chunk and in decoding.

constexpr int64_t TILE = 16;
constexpr int64_t PREFETCH_DISTANCE = 2;  // tiles from the one that is read to the one that is prefetched
constexpr float MASKED = -1e30f;          // score of a masked token; finite, so that a difference is never NaN

static inline bf16* tile_of(bf16* pages, const Pages& p, int64_t tile, int64_t head) {
    return pages + (tile * p.kv_heads + head) * TILE * p.head_dim;
}

// Tiles are scattered in memory, so the hardware prefetcher cannot find the next one. This prefetches into the L2
// cache. Prefetching into the L1 cache would use up its few outstanding misses, which reading the current tile needs.
static inline void prefetch(const bf16* tile, int64_t head_dim) {
    for (int64_t i = 0; i < TILE * head_dim; i += 32) __builtin_prefetch(tile + i, 0, 2);
}

static void store_kv(const AttentionCall& call, int64_t t) {
    const Pages& p = *call.pages;
    const int64_t tile = call.tokens->kv_slots[t] / TILE, place = call.tokens->kv_slots[t] % TILE;
    for (int64_t head = 0; head < p.kv_heads; head++) {
        const bf16* k = call.k + t * call.k_stride + head * p.head_dim;
        const bf16* v = call.v + t * call.v_stride + head * p.head_dim;
        bf16* keys = tile_of(p.keys, p, tile, head) + place * 2;
        bf16* values = tile_of(p.values, p, tile, head) + (place / 2) * 2 * p.head_dim + place % 2;
        for (int64_t d = 0; d < p.head_dim; d += 2) __builtin_memcpy(keys + d * TILE, k + d, 4);
        for (int64_t d = 0; d < p.head_dim; d++) values[2 * d] = v[d];
    }
}

// The online softmax of G query heads that share a KV head. A tile is read once for all of them.
template <int G>
struct SoftmaxState {
    f32x16 sums[G] = {};  // sum of exp(score - max), by place in the tile
    float max[G];         // largest score so far
    f32x16* out;          // [head_dim / 16][G] sum of exp(score - max) * value
};

template <int G>
static inline void scores_of(const bf16* q, const bf16* keys, int64_t head_dim, float scale, float softcap, f32x16* s) {
    f32x16 part[4][G] = {};
    for (int64_t d = 0; d < head_dim; d += 8)
        for (int i = 0; i < 4; i++) {
            const u32x16 k = load<u32x16>(keys + (d + 2 * i) * TILE);
            for (int g = 0; g < G; g++) part[i][g] = dot2(part[i][g], k, splat_pair(q + g * head_dim + d + 2 * i));
        }
    for (int g = 0; g < G; g++)
        s[g] = softcapped(((part[0][g] + part[1][g]) + (part[2][g] + part[3][g])) * scale, softcap);
}

// Adds the places [first, last] of a tile. Places beyond `last` may never have been written and may hold any bits.
template <int G>
static inline void add_tile(SoftmaxState<G>& state, f32x16* s, const bf16* values, int64_t head_dim, int64_t first,
                            int64_t last) {
    const i32x16 place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const bool partly = first > 0 || last < TILE - 1;
    float shrunk[G];
    bf16 pairs[G][TILE];
    for (int g = 0; g < G; g++) {
        if (partly) s[g] = (place >= int32_t(first)) & (place <= int32_t(last)) ? s[g] : splat(MASKED);
        const float most = larger_of(state.max[g], largest(s[g]));
        shrunk[g] = most == state.max[g] ? 1.0f : exp16(splat(state.max[g] - most))[0];
        const f32x16 p = exp16(s[g] - most);
        state.sums[g] = state.sums[g] * shrunk[g] + p;
        state.max[g] = most;
        store(pairs[g], to_bf16s(p));
    }
    const int64_t chunks = head_dim / 16, whole = (last + 1) / 2;
    for (int64_t c = 0; c < chunks; c++) {
        f32x16 acc[G];
        for (int g = 0; g < G; g++) acc[g] = state.out[c * G + g] * shrunk[g];
        for (int64_t i = 0; i < whole; i++) {
            const u32x16 v = load<u32x16>(values + (i * chunks + c) * 32);
            for (int g = 0; g < G; g++) acc[g] = dot2(acc[g], v, splat_pair(pairs[g] + 2 * i));
        }
        if (last % 2 == 0) {  // the pair's second token has not been written yet
            const u32x16 v = load<u32x16>(values + (whole * chunks + c) * 32) & 0xffffu;
            for (int g = 0; g < G; g++) acc[g] = dot2(acc[g], v, splat_pair(pairs[g] + 2 * whole));
        }
        for (int g = 0; g < G; g++) state.out[c * G + g] = acc[g];
    }
}

// Attention of the query heads [head, head + G), which share `kv_head`, for one token.
template <int G>
static void attend_heads(const AttentionCall& call, int64_t t, int64_t head, int64_t kv_head) {
    const Pages& p = *call.pages;
    const Tokens& tokens = *call.tokens;
    const int64_t chunks = p.head_dim / 16;
    static thread_local Buffer<f32x16> kept;
    SoftmaxState<G> state;
    state.out = kept.at_least(G * chunks);
    for (int g = 0; g < G; g++) state.max[g] = MASKED;
    for (int64_t i = 0; i < G * chunks; i++) state.out[i] = f32x16{};

    const bf16* q = call.q + t * call.q_stride + head * p.head_dim;
    const int64_t* tiles = tokens.tiles + tokens.tile_starts[tokens.sequences[t]];
    const int64_t last = tokens.positions[t];
    const int64_t first = call.window > 0 ? max_of(0, last - call.window + 1) : 0;
    for (int64_t i = first / TILE; i <= last / TILE; i++) {
        if (i + PREFETCH_DISTANCE <= last / TILE) {
            prefetch(tile_of(p.keys, p, tiles[i + PREFETCH_DISTANCE], kv_head), p.head_dim);
            prefetch(tile_of(p.values, p, tiles[i + PREFETCH_DISTANCE], kv_head), p.head_dim);
        }
        f32x16 s[G];
        scores_of<G>(q, tile_of(p.keys, p, tiles[i], kv_head), p.head_dim, call.scale, call.softcap, s);
        add_tile<G>(state, s, tile_of(p.values, p, tiles[i], kv_head), p.head_dim, max_of(0, first - i * TILE),
                    min_of(TILE - 1, last - i * TILE));
    }
    bf16* out = call.out + (t * call.heads + head) * p.head_dim;
    for (int g = 0; g < G; g++) {
        const float all = sum(state.sums[g]);
        for (int64_t c = 0; c < chunks; c++) store_bf16s(out + g * p.head_dim + c * 16, state.out[c * G + g] / all);
    }
}

// Attention of all query heads that share one KV head, for one token. It takes up to four heads at a time.
static void attend(const AttentionCall& call, int64_t t, int64_t kv_head) {
    const int64_t group = call.heads / call.pages->kv_heads, end = (kv_head + 1) * group;
    for (int64_t head = kv_head * group; head < end; head += 4) switch (min_of(4, end - head)) {
            case 1: attend_heads<1>(call, t, head, kv_head); break;
            case 2: attend_heads<2>(call, t, head, kv_head); break;
            case 3: attend_heads<3>(call, t, head, kv_head); break;
            case 4: attend_heads<4>(call, t, head, kv_head); break;
        }
}

// Attention of all tokens, whose keys and values must be stored. Returns when all threads have finished.
static void attend_all(const AttentionCall& call, const Team& team) {
    const int64_t kv_heads = call.pages->kv_heads, count = call.tokens->count * kv_heads;
    if (team.by_rows) {
#pragma omp barrier
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) attend(call, i / kv_heads, i % kv_heads);
}
