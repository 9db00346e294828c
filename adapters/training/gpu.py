"""What training asks of a GPU besides attention: its optimiser, and how much memory a run may take there.

A server may live on the same GPU. A run therefore never takes more than what was free when it began, and is
refused at once where that cannot be enough; running out later ends the run alone, as a process of its own.
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

# Of what is free, the rest being for what others on the GPU may need besides: a server's larger batches.
_SHARE = 0.9
# A loaded base is so many times its files; adapter, optimiser and a layer's activations are some hundreds
# of MiB, and the evaluation after them takes 1 GiB for keys and values, and a step.
_LEAST_TIMES, _LEAST_MORE = 1.1, 2 << 30


def optimizer_for(device: str) -> tuple[str, str]:
    """transformers' name of the optimiser on ``device``, and the choice as a sentence."""
    if device == "cpu":
        return CPU_OPTIMIZER, "Optimiser: AdamW."
    if (obstacle := _against_paged()) is None:
        return PAGED_OPTIMIZER, "Optimiser: AdamW in 8 bits, paged out of the GPU when memory is short."
    return FUSED_OPTIMIZER, f"Optimiser: AdamW in 32 bits, since {obstacle}."


def _against_paged() -> str | None:
    """Why bitsandbytes cannot optimise on this GPU; None = it can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    from bitsandbytes.cextension import lib

    if not lib.compiled_with_cuda:
        return f"bitsandbytes has no kernels for CUDA {torch.version.cuda}"
    return None


def claim_memory(device: str, wanted: int | None, base: Path) -> str:
    """Bound what this process may take of the GPU ``device``; the bound as a sentence.

    Args:
        wanted: bytes; None = nine tenths of what is free.
        base: the checkpoint folder that will be loaded.

    Raises:
        TrainingOutOfResources: so much is not free, or the base alone would not fit into it.
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
            f"Training on this base takes {_gib(need)} of a GPU at the very least, and this run may take "
            f"{_gib(limit)} ({_gib(free)} of {_gib(total)} are free). {_REMEDY}"
        )
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    return f"GPU memory: at most {_gib(limit)} of {_gib(total)}, of which {_gib(free)} were free."


_REMEDY = (
    "A server on the same GPU must leave room (its --gpu-memory-utilization), or train on another GPU "
    "(CUDA_VISIBLE_DEVICES; the server's --train-gpu) or with --device cpu."
)


def free_gpu_memory(device: str) -> int:
    """Bytes that this process may still take: within its bound, and of what others have left."""
    free, total = torch.cuda.mem_get_info(device)
    held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    bound = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free + held, bound) - used)


def release_memory() -> None:
    """Give back what a run held whose objects nobody refers to any more."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager.get_instance().initialize()  # transformers lists the embeddings there, for good
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _weights_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
