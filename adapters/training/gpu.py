"""GPU settings of training besides attention: the optimiser, and the memory that a run may use.

A server may run on the same GPU. So a run never takes more memory than was free when it began, and it is
refused at once if that cannot be enough. If memory runs out later, only the run fails, because it is a
separate process.
"""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path

import torch

from adapters.errors import TrainingOutOfResources

CPU_OPTIMIZER = "adamw_torch"
"""transformers' names, as ``TrainingArguments`` takes them."""
PAGED_OPTIMIZER = "paged_adamw_8bit"
FUSED_OPTIMIZER = "adamw_torch_fused"

# The share of the free memory. The rest is for others on the GPU, such as a server's larger batches.
_SHARE = 0.9
# Memory of a loaded base relative to its files. Adapter, optimiser and a layer's activations take some
# hundred MiB. The evaluation afterwards takes 1 GiB for keys and values, and a step.
_LEAST_TIMES, _LEAST_MORE = 1.1, 2 << 30


def optimizer_for(device: str) -> tuple[str, str]:
    """transformers' name of the optimiser for ``device``, and the choice as a sentence."""
    if device == "cpu":
        return CPU_OPTIMIZER, "Optimiser: AdamW."
    if (obstacle := _why_not_paged()) is None:
        return PAGED_OPTIMIZER, "Optimiser: AdamW in 8 bits, paged out of the GPU when memory is short."
    return FUSED_OPTIMIZER, f"Optimiser: AdamW in 32 bits, because {obstacle}."


def _why_not_paged() -> str | None:
    """The reason why bitsandbytes' optimiser cannot run on this GPU; None = it can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    from bitsandbytes.cextension import lib

    if not lib.compiled_with_cuda:
        return f"bitsandbytes has no kernels for CUDA {torch.version.cuda}"
    return None


def claim_memory(device: str, wanted: int | None, base: Path) -> str:
    """Limit the memory of this process on the GPU ``device``. Returns the limit as a sentence.

    Args:
        wanted: bytes; None = nine tenths of what is free.
        base: the checkpoint folder that will be loaded.

    Raises:
        TrainingOutOfResources: that much is not free, or the base alone would not fit.
    """
    free, total = torch.cuda.mem_get_info(device)
    limit = int(_SHARE * free) if wanted is None else wanted
    if limit > free:
        raise TrainingOutOfResources(
            f"--gpu-memory {_gib(limit)}: {_gib(free)} of the GPU's {_gib(total)} are free. {_REMEDY}"
        )
    need = int(_LEAST_TIMES * _weights_in(base)) + _LEAST_MORE
    if need > limit:
        raise TrainingOutOfResources(
            f"Training on this base needs at least {_gib(need)} of GPU memory, and this run may take "
            f"{_gib(limit)} ({_gib(free)} of {_gib(total)} are free). {_REMEDY}"
        )
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    return f"GPU memory: at most {_gib(limit)} of {_gib(total)}, of which {_gib(free)} were free."


_REMEDY = (
    "Lower --gpu-memory-utilization of a server on the same GPU, train on another GPU (CUDA_VISIBLE_DEVICES, "
    "or the server's --train-gpu), or use --device cpu."
)


def free_gpu_memory(device: str) -> int:
    """Bytes that this process may still take, by its limit and by the free memory."""
    free, total = torch.cuda.mem_get_info(device)
    held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    bound = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free + held, bound) - used)


def release_memory() -> None:
    """Free the memory of a finished run whose objects are unreferenced."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager.get_instance().initialize()  # it keeps references to the embeddings
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _weights_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
