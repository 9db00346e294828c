// All kernels for one instruction set: each isa_*.cpp is this, compiled with that set's flags.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <ctime>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include "native.h"

// Everything here has internal linkage, and the standard library's templates are not used: an instance of
// theirs made for AVX-512 could be the one that the linker keeps for every machine.
namespace {
#include "simd.h"
#include "buffer.h"
#include "nf4.h"
#include "lora.h"
#include "attention.h"
#include "rows.h"
#include "stack.h"
#include "head.h"
}  // namespace

#define MANYLORA_KERNELS(isa) \
    extern const Kernels isa##_kernels = {#isa, linears, lora, attention, stack, head};
