// Chooses the best instruction set of this machine once, and exports plain C functions.
#include <omp.h>

#include <cstring>

#include "native.h"

extern const Kernels portable_kernels;
#ifdef MANYLORA_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512bf16_kernels;
#endif

static bool runs_here(const Kernels& kernels) {
#ifdef MANYLORA_X86
    if (&kernels == &avx512bf16_kernels)
        return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (&kernels == &avx2_kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &kernels == &portable_kernels;
}

static const Kernels* const all[] = {
#ifdef MANYLORA_X86
    &avx512bf16_kernels, &avx2_kernels,
#endif
    &portable_kernels};

static const Kernels* best() {
    for (const Kernels* kernels : all)
        if (runs_here(*kernels)) return kernels;
    return &portable_kernels;
}

static const Kernels* chosen = best();

#define EXPORT __attribute__((visibility("default")))

extern "C" {
EXPORT const char* manylora_isa() { return chosen->name; }

// For tests: uses another instruction set. Returns 0 if this machine does not have it.
EXPORT int manylora_choose(const char* name) {
    for (const Kernels* kernels : all)
        if (std::strcmp(kernels->name, name) == 0 && runs_here(*kernels)) return chosen = kernels, 1;
    return 0;
}

// Ends the OpenMP workers of the calling thread. If it computes again, it gets new ones.
EXPORT void manylora_release_workers() { omp_pause_resource_all(omp_pause_soft); }

EXPORT void manylora_linears(const LinearCall* call) { chosen->linears(call); }
EXPORT void manylora_experts(const ExpertsCall* call) { chosen->experts(call); }
EXPORT void manylora_lora(const LoraCall* call) { chosen->lora(call); }
EXPORT void manylora_attention(const AttentionCall* call) { chosen->attention(call); }
EXPORT void manylora_stack(const StackCall* call) { chosen->stack(call); }
EXPORT void manylora_head(const HeadCall* call) { chosen->head(call); }
}
