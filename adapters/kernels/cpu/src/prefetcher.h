// Memory that is needed soon, fetched into the second cache a little at a time while something else is computed.
//
// A decoding step reads an adapter's rows for one token: that takes the memory's time. The products before take the
// processor's. One after the other, each would wait for the other.

constexpr int64_t LINE = 64;
constexpr int64_t PREFETCH_BYTES = 640 << 10;  // of more the first would be gone again before it is needed

struct Range {
    const char *at, *end;
};

struct Prefetcher {
    const Range *next = nullptr, *last = nullptr;
    int64_t lines = 0;  // of a turn
    const char *at = nullptr, *end = nullptr;

    // The ranges [first, after), in `turns` calls of advance().
    Prefetcher(const Range* first, const Range* after, int64_t turns) : next(first), last(after) {
        int64_t bytes = 0;
        for (const Range* s = first; s < after; s++) bytes += s->end - s->at;
        lines = least(bytes, PREFETCH_BYTES) / (LINE * most_of(turns, 1)) + 1;
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
