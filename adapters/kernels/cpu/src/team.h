// How the threads of a parallel region share a step.
//
//   by columns: every kernel splits its outputs over the threads. All threads work on all tokens, and they wait for
//               each other after each kernel.
//   by rows:    the tokens are split over the threads. A thread runs its tokens through all kernels without waiting,
//               except in attention.
//
// By columns, the weights are read and decoded once, which dominates the time of a step of few tokens. By rows, threads
// do not wait and no data moves between the cores' caches, which makes a step of many tokens faster.

constexpr int64_t ROWS_EACH = 8;         // the fewest tokens per thread for splitting by rows
constexpr int64_t ROWS_EACH_LARGE = 32;  // the same if the weights of one linear do not fit in the L2 cache
constexpr int64_t LARGE = 1 << 20;       // bytes of weights that fit in the L2 cache

static bool best_by_rows(int64_t tokens, int64_t threads, int64_t largest) {
    return tokens >= threads * (largest > LARGE ? ROWS_EACH_LARGE : ROWS_EACH);
}

struct Team {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    bool by_rows = false;

    // This thread's part of [0, n).
    int64_t begin(int64_t n) const { return by_rows ? n * thread / threads : 0; }
    int64_t end(int64_t n) const { return by_rows ? n * (thread + 1) / threads : n; }

    // Runs f(i) for all i in [0, n). Each call should take about equally long.
    template <typename F>
    void share(int64_t n, F f) const {
        if (by_rows) {
            for (int64_t i = 0; i < n; i++) f(i);
            return;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) f(i);
    }

    // Runs f(i) for all i in [0, n). Some calls may take much longer than others.
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

// Runs f(team) on every thread. The team splits by columns unless f changes it.
template <typename F>
static void parallel(F f) {
#pragma omp parallel
    f(Team());
}
