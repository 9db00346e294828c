// All kernels for one instruction set. Each isa_*.cpp includes this file and is compiled with that set's flags.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <ctime>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <omp.h>

#include "native.h"

// Everything here has internal linkage. The kernels do not use the standard library's templates. If they did, the
// linker could keep an instance compiled for AVX-512 and use it on every machine.
namespace {
#include "simd.h"
#include "buffer.h"
#include "team.h"
#include "prefetcher.h"
#include "nf4.h"
#include "lora.h"
#include "attention.h"
#include "rows.h"
#include "stack.h"
#include "head.h"

// Runs one kernel in its own parallel region.
void linears(const LinearCall* call) {
    parallel([&](Team team) {
        Prefetcher none;
        linears(*call, team, none);
    });
}
void experts(const ExpertsCall* call) {
    parallel([&](Team team) { experts(*call, team); });
}
void lora(const LoraCall* call) {
    parallel([&](Team team) { lora(*call, team); });
}
void attention(const AttentionCall* call) {
    parallel([&](Team team) {
        team.share(call->tokens->count, [&](int64_t t) { store_kv(*call, t); });
        attend_all(*call, team);
    });
}
}  // namespace

#define MANYLORA_KERNELS(isa) \
    extern const Kernels isa##_kernels = {#isa, linears, experts, lora, attention, stack, head};
