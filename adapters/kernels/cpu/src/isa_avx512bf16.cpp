#include "kernels.h"

MANYLORA_KERNELS(avx512bf16)
