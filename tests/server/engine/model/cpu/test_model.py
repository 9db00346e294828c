"""Compares the fused step with transformers' blocks in float32, at sizes that do not fill whole registers.

Norms, rotary embedding, activation, residuals, biases, windows and soft caps are tested together, with every
instruction set, on the same 4-bit weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.base import LoadedBase, Quantization, load_base, prepare_base
from adapters.pool.rank_pool import RankPool
from server.engine.kv_cache import BlockTable, chain_root
from server.engine.model.cpu.model import CpuModel, check_cpu_model
from server.engine.model.transformers_model import TransformersModel
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Chunk, Sequence
from tests.support.native_kernels import ISAS, TILE, using
from tests.support.tiny_models import make_tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 48, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 9, "vocab_size": 521},
    "qwen2": {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 192},
    "qwen3": {"head_dim": 80, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "gemma": {"head_dim": 256, "num_key_value_heads": 1},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5},
    "gemma3_text": {"head_dim": 48, "sliding_window": 9, "final_logit_softcapping": 2.0},
    "phi3": {
        "head_dim": 96,
        "sliding_window": 9,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    },
}
HEADS: list[tuple[str, Quantization]] = [
    *((family, "none") for family in MODELS),
    ("llama", "nf4"),
    ("gemma2", "nf4"),
]
LENGTHS = [1, 2, 15, 16, 17, 37]


class Bed:
    """A fused model, the logits of transformers in float32, and prompts of ``LENGTHS``."""

    def __init__(self, base: LoadedBase) -> None:
        vocabulary = base.model.config.vocab_size
        torch.manual_seed(0)
        self.prompts = [torch.randint(3, vocabulary, (length,)) for length in LENGTHS]
        float32 = copy.deepcopy(base.model).dequantize().float().eval()
        with torch.inference_mode():
            self.expected = torch.stack([float32(prompt[None]).logits[0, -1] for prompt in self.prompts])
        pool = RankPool(base.layout.sites, 4, torch.bfloat16)
        unfused = TransformersModel(base, pool)
        unsupported = check_cpu_model(unfused, TILE)
        if unsupported is not None:
            pytest.skip(unsupported.reason)
        self.fused = CpuModel(unfused, pool, sum(LENGTHS))
        self.fused.allocate(3 * len(LENGTHS), TILE)

    def chunks(self, sizes: list[int]) -> Iterator[list[Chunk]]:
        """Steps that compute all prompts together: first by ``sizes`` tokens each, then the rest."""
        sequences = [self._sequence(i) for i in range(len(self.prompts))]
        start = 0
        for size in [*sizes, max(LENGTHS)]:
            yield [
                Chunk(s, start, min(size, s.num_prompt - start)) for s in sequences if s.num_prompt > start
            ]
            start += size

    def _sequence(self, i: int) -> Sequence:
        prompt = tuple(self.prompts[i].tolist())
        sequence = Sequence(str(i), 0, prompt, None, SamplingParams(max_tokens=1), 0, i, frozenset())
        sequence.table = BlockTable(chain_root(None))
        sequence.table.blocks = [3 * i + 2, 3 * i, 3 * i + 1]
        return sequence

    def run(self, sizes: list[int]) -> Tensor:
        """The logits [prompts, vocabulary] after the last token of each prompt."""
        rows: dict[str, Tensor] = {}
        for chunks in self.chunks(sizes):
            sampling = [chunk.sequence.request_id for chunk in chunks if chunk.samples]
            rows |= dict(zip(sampling, self.fused(chunks), strict=True))
        return torch.stack([rows[str(i)] for i in range(len(self.prompts))])


@pytest.fixture(scope="module", params=HEADS, ids="-".join)
def bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bed:
    home = tmp_path_factory.mktemp("stack")
    family, head = request.param
    folder = make_tiny_model(family, home / family, **MODELS[family])
    return Bed(load_base(prepare_base(str(folder), home, head_quantization=head, progress=False)))


@pytest.mark.parametrize("isa", ISAS)
def test_it_equals_transformers_in_float32(bed: Bed, isa: str) -> None:
    with using(isa):
        whole = bed.run([])
        cut = bed.run([1, 13, 2])
    distance = ((whole - bed.expected).square().mean(-1).sqrt() / bed.expected.std(-1)).max().item()
    assert distance < 0.03, "bf16 rounds each intermediate number to within 0.4%"
    assert torch.equal(cut, whole)
