#include "kernels.h"

MANYLORA_KERNELS(avx2)
