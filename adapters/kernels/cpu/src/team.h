// How the threads of a parallel region share a step.
//
//   by columns: all threads take all tokens, each a part of every kernel's work, and wait for each other after it
//   by rows:    each thread takes tokens of its own through whatever concerns a token alone, and waits for nobody
//
// By columns the weights are read and decoded once, which is what a step of few tokens costs. By rows nothing moves
// between the processors' caches and nobody waits, which is what a step of many tokens gains from.

constexpr int64_t ROWS_EACH = 8;         // by rows from so many tokens a thread on,
constexpr int64_t ROWS_EACH_LARGE = 32;  // or so many, if a linear has more weights than a second cache holds
constexpr int64_t LARGE = 1 << 20;       // bytes

static bool best_by_rows(int64_t tokens, int64_t threads, int64_t largest) {
    return tokens >= threads * (largest > LARGE ? ROWS_EACH_LARGE : ROWS_EACH);
}

struct Team {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    bool by_rows = false;

    // The part of [0, n) that is this thread's own.
    int64_t begin(int64_t n) const { return by_rows ? n * thread / threads : 0; }
    int64_t end(int64_t n) const { return by_rows ? n * (thread + 1) / threads : n; }

    // f(i) for all i in [0, n), each about as long as the others.
    template <typename F>
    void share(int64_t n, F f) const {
        if (by_rows) {
            for (int64_t i = 0; i < n; i++) f(i);
            return;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) f(i);
    }

    // f(i) for all i in [0, n), some perhaps much longer than others.
    template <typename F>
    void share_unequal(int64_t n, F f) const {
        if (by_rows) {
            for (int64_t i = 0; i < n; i++) f(i);
            return;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n; i++) f(i);
    }
};

// Runs f(team) on every thread, by columns.
template <typename F>
static void parallel(F f) {
#pragma omp parallel
    f(Team());
}
