// Attention over pages in place, with an online softmax (FlashAttention-2, Dao 2023, algorithm 1).
//
// A tile holds 16 tokens of one KV head, laid out for `dot2`:
//   keys    [head_dim / 2][16 tokens][2]: sixteen scores at once, two dimensions at a time
//   values  [8 token pairs][head_dim][2]: sixteen dimensions at once, two tokens at a time
// A query walks its sequence's tiles from the first it sees to its own. Tiles begin at multiples of 16 of the
// position, so the sums have the same order in a prompt, in a chunk of one, and in decoding.

constexpr int64_t TILE = 16;
constexpr float NEVER = -1e30f;  // the score of what is not seen; finite, so that differences stay numbers

static inline bf16* tile_of(bf16* pages, const Pages& p, int64_t tile, int64_t head) {
    return pages + (tile * p.kv_heads + head) * TILE * p.head_dim;
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

// One query head's state along its walk.
struct Walk {
    f32x16 sums;     // of exp(score - most), by place in the tile
    float most;      // largest score so far
    f32x16* out;     // [head_dim / 16] sum of exp(score - most) * value
};

static inline f32x16 scores_of(const bf16* q, const bf16* keys, int64_t head_dim, float scale, float softcap) {
    f32x16 part[4] = {};
    for (int64_t d = 0; d < head_dim; d += 8)
        for (int i = 0; i < 4; i++)
            part[i] = dot2(part[i], load<u32x16>(keys + (d + 2 * i) * TILE), splat_pair(q + d + 2 * i));
    return softcapped(((part[0] + part[1]) + (part[2] + part[3])) * scale, softcap);
}

// Adds a tile of which places [first, last] are seen. What was never written beyond `last` may be anything.
static inline void add_tile(Walk& walk, f32x16 s, const bf16* values, int64_t head_dim, int64_t first, int64_t last) {
    if (first > 0 || last < TILE - 1) {
        const i32x16 place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        s = (place >= int32_t(first)) & (place <= int32_t(last)) ? s : splat(NEVER);
    }
    const float most = larger_of(walk.most, largest(s));
    const float shrunk = exp16(splat(walk.most - most))[0];
    f32x16 p = exp16(s - most);
    walk.sums = walk.sums * shrunk + p;
    walk.most = most;
    bf16 pairs[TILE];
    store(pairs, to_bf16s(p));
    const int64_t chunks = head_dim / 16, whole = (last + 1) / 2;
    for (int64_t c = 0; c < chunks; c++) {
        f32x16 acc = walk.out[c] * shrunk;
        for (int64_t i = 0; i < whole; i++)
            acc = dot2(acc, load<u32x16>(values + (i * chunks + c) * 32), splat_pair(pairs + 2 * i));
        if (last % 2 == 0)  // the pair's second token is not there yet
            acc = dot2(acc, load<u32x16>(values + (whole * chunks + c) * 32) & 0xffffu, splat_pair(pairs + 2 * whole));
        walk.out[c] = acc;
    }
}

// All query heads that share one KV head, for one token.
static void attend(const AttentionCall& call, int64_t t, int64_t kv_head) {
    const Pages& p = *call.pages;
    const Tokens& tokens = *call.tokens;
    const int64_t group = call.heads / p.kv_heads, chunks = p.head_dim / 16;
    static thread_local Buffer<Walk> kept_walks;
    static thread_local Buffer<f32x16> kept_outs;
    Walk* walks = kept_walks.at_least(group);
    f32x16* outs = kept_outs.at_least(group * chunks);
    for (int64_t g = 0; g < group; g++) walks[g] = {f32x16{}, NEVER, outs + g * chunks};
    for (int64_t i = 0; i < group * chunks; i++) outs[i] = f32x16{};

    const bf16* q = call.q + t * call.q_stride + kv_head * group * p.head_dim;
    const int64_t* tiles = tokens.tiles + tokens.tile_starts[tokens.sequences[t]];
    const int64_t last = tokens.positions[t];
    const int64_t first = call.window > 0 ? most_of(0, last - call.window + 1) : 0;
    for (int64_t i = first / TILE; i <= last / TILE; i++) {
        const bf16* keys = tile_of(p.keys, p, tiles[i], kv_head);
        const bf16* values = tile_of(p.values, p, tiles[i], kv_head);
        const int64_t from = most_of(0, first - i * TILE), to = least(TILE - 1, last - i * TILE);
        for (int64_t g = 0; g < group; g++) {
            f32x16 s = scores_of(q + g * p.head_dim, keys, p.head_dim, call.scale, call.softcap);
            add_tile(walks[g], s, values, p.head_dim, from, to);
        }
    }
    bf16* out = call.out + (t * call.heads + kv_head * group) * p.head_dim;
    for (int64_t g = 0; g < group; g++)
        for (int64_t c = 0; c < chunks; c++)
            store_bf16s(out + g * p.head_dim + c * 16, walks[g].out[c] / sum(walks[g].sums));
}

static void attention(const AttentionCall* call) {
    const int64_t count = call->tokens->count, kv_heads = call->pages->kv_heads;
#pragma omp parallel if (count * kv_heads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; t++) store_kv(*call, t);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * kv_heads; i++) attend(*call, i / kv_heads, i % kv_heads);
    }
}
