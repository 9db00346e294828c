"""Section ``peft_peer``: a decode step of PEFT with ``adapter_names``, on a base like that of ``decode``."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from server.bench.gpu_check.bases import SHAPES_BY_SIZE, random_base
from server.bench.gpu_check.context import Context
from server.bench.gpu_check.decode import RANK, plan_for
from server.bench.gpu_check.peft_loop import PeftLoop
from server.bench.gpu_check.rows import Row
from server.bench.gpu_check.served import make_prompt

_TOKENS = 5
_NEEDED_S = 20.0


def run(context: Context) -> Iterator[Row]:
    """One row: the number of sequences that ``decode`` measures first, each under its own adapter."""
    plan = plan_for(context)
    sequences = plan.sequences[0]
    context.check_time(_NEEDED_S if context.gpu else 0.0)
    names = [f"lora-{number}" for number in range(sequences)]
    peft = PeftLoop(random_base(plan.shape, plan.quantization, context.device))
    peft.add_random(names, RANK, between=context.check_time)
    vocabulary = SHAPES_BY_SIZE[plan.shape]["vocab_size"]
    prompts = [make_prompt(i, plan.context, vocabulary) for i in range(sequences)]
    took = median(peft.step_seconds(prompts, names, _TOKENS))
    yield Row(
        "PEFT",
        {
            "base": plan.shape,
            "weights": plan.quantization,
            "sequences": sequences,
            "adapters": sequences,
            "tokens/s": round(sequences / took, 1),
            "step ms": round(took * 1e3, 2),
        },
    )
