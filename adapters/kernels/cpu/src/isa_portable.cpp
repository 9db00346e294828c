#include "kernels.h"

MANYLORA_KERNELS(portable)
