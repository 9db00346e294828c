// Prefetches memory that is needed soon into the L2 cache, a little at a time during another computation.
//
// In a decoding step, LoRA reads an adapter's rows for a single token, so it is limited by memory. The products before
// it are limited by the processor. Prefetching the rows during the products overlaps the two.

constexpr int64_t LINE = 64;
constexpr int64_t PREFETCH_BYTES = 640 << 10;  // with more, the first lines would be evicted before their use

struct Range {
    const char *at, *end;
};

struct Prefetcher {
    const Range *next = nullptr, *last = nullptr;
    int64_t lines = 0;  // lines to fetch in one call of advance()
    const char *at = nullptr, *end = nullptr;

    // Prefetches the ranges [first, after) over `turns` calls of advance().
    Prefetcher(const Range* first, const Range* after, int64_t turns) : next(first), last(after) {
        int64_t bytes = 0;
        for (const Range* s = first; s < after; s++) bytes += s->end - s->at;
        lines = min_of(bytes, PREFETCH_BYTES) / (LINE * max_of(turns, 1)) + 1;
    }
    Prefetcher() = default;

    inline void advance() {
        for (int64_t i = 0; i < lines; i++, at += LINE) {
            if (at >= end) {
                if (next == last) {
                    lines = 0;
                    return;
                }
                at = next->at, end = next->end, next++;
            }
            __builtin_prefetch(at, 0, 2);
        }
    }
};
