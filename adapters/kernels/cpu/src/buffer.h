// Memory that a thread keeps between calls.

template <typename T>
struct Buffer {
    T* data = nullptr;
    int64_t capacity = 0;

    T* at_least(int64_t count) {
        if (count > capacity) {
            std::free(data);
            capacity = count + count / 2;
            data = static_cast<T*>(std::aligned_alloc(64, (capacity * sizeof(T) + 63) / 64 * 64));
        }
        return data;
    }
    ~Buffer() { std::free(data); }
};

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
