// All kernels for one instruction set: each isa_*.cpp is this, compiled with that set's flags.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <ctime>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <omp.h>

#include "native.h"

// Everything here has internal linkage, and the standard library's templates are not used: an instance of
// theirs made for AVX-512 could be the one that the linker keeps for every machine.
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

// Each kernel alone, in a parallel region of its own.
void linears(const LinearCall* call) {
    parallel([&](Team team) {
        Prefetcher none;
        linears(*call, team, none);
    });
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
    extern const Kernels isa##_kernels = {#isa, linears, lora, attention, stack, head};
