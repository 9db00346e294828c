"""Llama-like models on a GPU: few launches for each block, and decode steps as CUDA graphs.

It uses the weights and the attention of ``TransformersModel``. That model itself runs the rare steps with an
adapter that has its own norms, embedding or head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.base.context import own_length
from adapters.kernels.triton import TritonLora
from adapters.pool.rank_pool import RankPool
from adapters.transfer import send
from server.engine.attention import AttentionSpec
from server.engine.attention.flash_paged import FlashPaged
from server.engine.kernels import BlockOps
from server.engine.model.cuda.graphs import MAX_GRAPH_BATCH_SIZE, DecodeGraphs, Graph
from server.engine.model.cuda.joined import JoinedLinear, check_joinable
from server.engine.model.cuda.product_timing import choose_by_shape, stopwatch
from server.engine.model.llama_like import (
    ACTIVATIONS,
    ALIKE,
    activation_of,
    angle_bytes,
    check_llama_like,
    decoder_name,
    decoder_of,
    distance,
    norm_weight,
    norms_of,
    products_of,
    rotary_angles,
    text_config_of,
)
from server.engine.model.made_up import warming_steps
from server.engine.model.steps import flatten, lora_segments
from server.engine.model.transformers_model import TransformersModel
from server.engine.sequence import Chunk
from server.engine.transfer import resolve
from server.engine.unsupported import Unsupported

log = logging.getLogger("manylora.engine")

_NAME = "fused on the device"


def check_cuda_model(unfused: TransformersModel) -> Unsupported | None:
    """Why this model cannot run fused on its GPU, or None. Its attention must be allocated already."""
    model: Any = unfused.model
    if not isinstance(unfused.lora_kernel, TritonLora):
        return Unsupported("the fused step on a GPU needs Triton")
    if not isinstance(unfused.attention, FlashPaged):
        return Unsupported("its attention does not run over pages")
    if (unsupported := check_llama_like(model)) is not None:
        return unsupported
    for layer in decoder_of(model).layers:
        for paths in products_of(model).values():
            unsupported = check_joinable([layer.get_submodule(path).base for path in paths])
            if unsupported is not None:
                return unsupported
    return None


@dataclass(frozen=True, slots=True)
class Block:
    """One block's weights.

    Attributes:
        norms: float32 weights, by role (``llama_like.norms_of``).
        delta_norm: the norm of the previous block's output; None = the output is added as it is.
    """

    layer: int
    spec: AttentionSpec
    norms: dict[str, Tensor]
    delta_norm: Tensor | None
    qkv: JoinedLinear
    o: JoinedLinear
    gate_up: JoinedLinear
    down: JoinedLinear


class CudaModel:
    """See ``StepModel``.

    Args:
        unfused: the same model as transformers runs it. Its weights are joined in place.
        pool: the adapters' rank rows.
        ops: the fused operations of a block.
        max_seqs: most sequences of a step. Steps with up to ``MAX_GRAPH_BATCH_SIZE`` may be graphs.
        new_graph: makes an empty graph; None = no CUDA graphs.
    """

    def __init__(
        self,
        unfused: TransformersModel,
        pool: RankPool,
        ops: BlockOps,
        max_seqs: int,
        new_graph: Callable[[], Graph] | None,
    ) -> None:
        self.name = _NAME + (", decoding in CUDA graphs" if new_graph else "")
        self.shapes = unfused.shapes
        self.bytes_a_position = angle_bytes(unfused.model)
        self.fallbacks: list[str] = []
        assert isinstance(unfused.lora_kernel, TritonLora)
        self._unfused, self._ops, self._kernel = unfused, ops, unfused.lora_kernel
        self._model: Any = unfused.model
        self._decoder = decoder_of(unfused.model)
        self._config: Any = text_config_of(unfused.model)
        self._gelu = bool(ACTIVATIONS[activation_of(self._model)])
        self._blocks = self._make_blocks(pool)
        self._final_norm = norm_weight(self._model, self._decoder.norm.weight.detach())
        self._softcap: float = getattr(self._model.config, "final_logit_softcapping", None) or 0.0
        self._angles: list[tuple[Tensor, Tensor]] = []
        self._sizes = 0, 0
        graph_batch_size = min(max_seqs, MAX_GRAPH_BATCH_SIZE) if new_graph else 0
        words = self._model.get_output_embeddings().out_features
        self._graph_inputs = torch.zeros(2, graph_batch_size, dtype=torch.long, device=unfused.device)
        self._graph_logits = torch.empty(graph_batch_size, words, dtype=torch.float32, device=unfused.device)
        self._graphs = new_graph and DecodeGraphs(
            self._prepare_empty, self._run_graph, graph_batch_size, new_graph
        )

    @property
    def attention_name(self) -> str:
        return self._unfused.attention_name

    def allocate(self, num_blocks: int, block_size: int) -> None:
        self._sizes = num_blocks, block_size
        self._unfused.allocate(num_blocks, block_size)
        positions = num_blocks * block_size
        positions = min(positions, own_length(self._config) or positions)
        self._angles = rotary_angles(self._model, positions)

    def warm_up(self) -> None:
        self._unfused.warm_up()
        self._choose_products()
        prompt, token = warming_steps(self._config, *self._sizes)
        self(prompt)
        expected = self(token)
        if self._graphs is not None:
            reason = self._record(self._graphs, token, expected)
            if reason is not None:
                self._graphs, self.name = None, _NAME
                self._falls_back(f"Decoding is slower than it could be, without CUDA graphs: {reason}.")

    @torch.inference_mode()
    def __call__(
        self, chunks: SequenceOf[Chunk], rows: Tensor | None = None, prev_tokens: Tensor | None = None
    ) -> Tensor:
        tokens, positions, last = flatten(chunks)
        segments = lora_segments(chunks)
        unfused = self._unfused
        unfused.lora.begin(len(tokens), segments, last if rows is None else rows)
        if unfused.lora.extras_segments:
            return unfused(chunks, rows, prev_tokens)
        alone = rows is None and len(last) == len(chunks) == len(tokens)
        graph_batch_size = (
            self._graphs.batch_size_for(len(tokens)) if self._graphs is not None and alone else None
        )
        self._attention.begin(chunks, graph_batch_size)
        self._kernel.prepare(segments, graph_batch_size)
        tokens, positions = send(torch.stack([tokens, positions]), unfused.device)
        tokens = resolve(tokens, prev_tokens)
        if graph_batch_size is None or self._graphs is None:
            rows = send(last if rows is None else rows, unfused.device)
            return self._forward(tokens, positions, bool(segments), rows)
        self._graph_inputs[0, : len(tokens)], self._graph_inputs[1, : len(tokens)] = tokens, positions
        return self._graphs.replay(graph_batch_size, bool(segments))[: len(tokens)]

    # -- graphs -----------------------------------------------------------------------------------

    def _record(self, graphs: DecodeGraphs, token: list[Chunk], expected: Tensor) -> str | None:
        """Record all graphs; returns why they cannot be used, or None if they give the ``expected`` logits.

        If a driver or library cannot do it, the server is slower, but it starts and its answers are right.
        """
        try:
            graphs.capture_all()
            difference = distance(self(token), expected)
        except Exception as error:  # drivers and Triton raise more than RuntimeError
            return f"recording them raised {type(error).__name__} ({str(error).partition(chr(10))[0]})"
        return None if difference < ALIKE else f"their logits are off by {difference:.2f}"

    @torch.inference_mode()
    def _prepare_empty(self, graph_batch_size: int) -> None:
        self._unfused.lora.begin(graph_batch_size, [], torch.empty(0))
        self._attention.begin([], graph_batch_size)
        self._kernel.prepare(self._unfused.lora.segments, graph_batch_size)

    @torch.inference_mode()
    def _run_graph(self, graph_batch_size: int, adapted: bool) -> Tensor:
        tokens, positions = self._graph_inputs[:, :graph_batch_size]
        return self._forward(tokens, positions, adapted, None, self._graph_logits[:graph_batch_size])

    # -- one pass ---------------------------------------------------------------------------------

    @property
    def _attention(self) -> FlashPaged:
        attention = self._unfused.attention
        assert isinstance(attention, FlashPaged)
        return attention

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        adapted: bool,
        rows: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """float32 logits of ``rows`` (None = of all tokens), written to ``out`` if it is given."""
        x = self._decoder.embed_tokens(tokens[None])[0]
        delta = None
        for block in self._blocks:
            delta = self._run_block(block, x, delta, positions, adapted)
        if rows is not None:
            x, delta = x[rows], None if delta is None else delta[rows]
        after = self._blocks[-1].norms.get("norm_after_mlp")
        normed = self._ops.fused_add_rms_norm(x, delta, self._final_norm, self._eps, after)
        rounded: Tensor = self._model.lm_head(normed[None])[0]
        logits = rounded.float() if out is None else out.copy_(rounded)
        return logits.div_(self._softcap).tanh_().mul_(self._softcap) if self._softcap else logits

    def _run_block(
        self, block: Block, x: Tensor, delta: Tensor | None, positions: Tensor, adapted: bool
    ) -> Tensor:
        """Add the previous block's output ``delta`` to x; return this block's output."""
        ops, norms = self._ops, block.norms
        normed = ops.fused_add_rms_norm(x, delta, norms["norm_before_attention"], self._eps, block.delta_norm)
        q = self._rope_and_cache(block, block.qkv(normed, adapted), positions)
        attended = self._attention.attend(block.layer, q, block.spec)
        delta = block.o(attended.flatten(1), adapted)
        normed = ops.fused_add_rms_norm(
            x, delta, norms["norm_before_mlp"], self._eps, norms.get("norm_after_attention")
        )
        return block.down(ops.act_and_mul(block.gate_up(normed, adapted), self._gelu), adapted)

    def _rope_and_cache(self, block: Block, qkv: Tensor, positions: Tensor) -> Tensor:
        """Return q [tokens, heads, dim]; write the keys and values to their pages."""
        attention, norms = self._attention, block.norms
        return self._ops.rope_and_cache(
            qkv,
            *self._angles[block.layer],
            positions,
            attention.new_slots,
            *attention.pages[block.layer],
            norms.get("q_norm"),
            norms.get("k_norm"),
            self._eps,
        )

    # -- parts ------------------------------------------------------------------------------------

    def _choose_products(self) -> None:
        """Choose the products, before recording: a graph keeps the products that it was recorded with."""
        products = [p for block in self._blocks for p in (block.qkv, block.o, block.gate_up, block.down)]
        weights = [product.nf4 for product in products if product.nf4 is not None]
        with stopwatch(self._unfused.device, graphs=self._graphs is not None) as timer:
            if timer is None or not weights:
                return
            choices = choose_by_shape(weights, timer)
        for product in products:
            product.choose(choices)
        for (outputs, inputs), choice in choices.items():
            if choice.refused:
                shape = f"{outputs} x {inputs}"
                self._falls_back(f"Our product of NF4 weights is not used for {shape}: {choice.refused}.")

    def _falls_back(self, why: str) -> None:
        log.warning(why)
        self.fallbacks.append(why)

    @property
    def _eps(self) -> float:
        eps: float = self._config.rms_norm_eps
        return eps

    def _make_blocks(self, pool: RankPool) -> list[Block]:
        blocks: list[Block] = []
        name = decoder_name(self._model)
        for i, layer in enumerate(self._decoder.layers):
            norms = {
                role: norm_weight(self._model, layer.get_submodule(path).weight.detach())
                for role, path in norms_of(self._model, layer).items()
            }
            products = {
                product: self._joined(layer, f"{name}.layers.{i}", paths, pool)
                for product, paths in products_of(self._model).items()
            }
            before = blocks[-1].norms.get("norm_after_mlp") if blocks else None
            blocks.append(Block(i, self._unfused.specs[i], norms, before, **products))
        return blocks

    def _joined(self, layer: Any, name: str, paths: SequenceOf[str], pool: RankPool) -> JoinedLinear:
        parts = {f"{name}.{path}": layer.get_submodule(path) for path in paths}
        return JoinedLinear(parts, pool.sites, self._unfused.lora, self._kernel)
