"""Builds the parts in order of dependency and connects them. No other module knows them all."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from adapters.artifact import Adapter, AdapterInfo, Limits, inspect_adapter, load_adapter
from adapters.artifact.chat_config import ChatConfig
from adapters.artifact.regex import BudgetExceeded, time_for
from adapters.base import LoadedBase, load_base, prepare_base
from adapters.base.context import served_length
from adapters.base.experts import pack_experts
from adapters.base.rope import settle_rope
from adapters.base.weight_bytes import WeightBytes, count_weight_bytes, log_weight_bytes
from adapters.base.weights import BaseWeights
from adapters.kernels.cpu import isa
from adapters.pool.rank_pool import RankPool
from adapters.registry import Registry, Version
from adapters.residency import Residency
from adapters.text.chat_format import ChatFormat, ChatFormats
from adapters.text.renderer import base_renderer
from adapters.text.sandbox import MAX_CPU_SECONDS, TemplateTooSlow
from adapters.transfer import copying_for
from adapters.watcher import Watcher
from server.config import AdapterConfig, ConfigError, EngineConfig, ServerConfig
from server.engine import threads
from server.engine.admission import ResidencyGate
from server.engine.attention import uninstall
from server.engine.check import StartCheck
from server.engine.engine import Engine
from server.engine.interface import EngineStats, ModelInfo
from server.engine.kv_cache import BlockManager
from server.engine.listing import AdapterListing
from server.engine.model import StepModel, build_model
from server.engine.model.probe import Probe, probe, servable
from server.engine.model.supported import check_config, check_temperature, naming
from server.engine.sampling_defaults import sampling_defaults
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.service import EngineService
from server.engine.sizes import Sizes, max_model_len, out_of_memory_names
from server.engine.text_bounds import TextBounds
from server.engine.tokenizer import Tokenizer

log = logging.getLogger("manylora.engine")


@dataclass(frozen=True)
class Parts:
    """All parts of a server, built and connected but not started."""

    base: LoadedBase
    info: ModelInfo
    model: StepModel
    engine: Engine
    registry: Registry
    residency: Residency
    watcher: Watcher
    tokenizer: Tokenizer

    def close(self) -> None:
        """End the threads and processes. The memory is freed with the last reference to the parts."""
        self.residency.close()
        self.tokenizer.chat_formats.close()
        uninstall(self.base.model)


def build_parts(config: ServerConfig) -> Parts:
    """Prepare and load the base, take the memory, read the adapter folder.

    Raises:
        ConfigError: a size that does not fit the model or the memory.
        BaseModelError: the base cannot be obtained or served.
    """
    threads.claim(config.engine.threads)
    return assemble(config, _load(config))


def assemble(
    config: ServerConfig, base: LoadedBase, load: Callable[[Version], Adapter] | None = None
) -> Parts:
    """The parts around a loaded base, which belongs to them from now on.

    ``load`` reads an adapter version; None = from its folder.
    """
    pack_experts(base.model)
    found = probe(base, config.engine.max_model_len)
    base = servable(base, found)
    weights, weight_bytes = BaseWeights(base.model, base.layout), count_weight_bytes(base.model)
    sizes = Sizes(config, base)
    pool = _rank_pool(config.adapters, base, sizes.pool_rows())
    step_tokens = sizes.step_tokens
    check = _start_check(config, base, found, sizes)
    check.prepare(pool)
    with naming(base.model.config, "the start"):
        model = build_model(
            base,
            pool,
            sizes.block_size,
            step_tokens,
            config.engine.max_num_seqs,
            config.engine.enforce_eager,
            found,
        )
        blocks, longest = _allocate_kv(
            config.engine, base, model, sizes.kv_blocks(model, pool), sizes.block_size
        )
        with out_of_memory_names("--kv-cache-memory, --gpu-memory-utilization", "the first steps"):
            model.warm_up()
            check.run(model, pool, step_tokens, blocks.num_blocks, sizes.block_size)
    tokenizer = _tokenizer(base, config.model.allow_special_tokens, longest)
    info = _info(config, base, tokenizer, longest, model.attention_name, weight_bytes)
    registry, residency = _adapters(
        config.adapters, base, weights, pool, frozenset(info.served_names), tokenizer.chat_formats, load
    )
    gate = ResidencyGate(residency, registry)
    scheduler = Scheduler(SchedulerLimits(config.engine.max_num_seqs, step_tokens, longest), blocks, gate)
    engine = Engine(model, scheduler, gate, registry, tokenizer.eos, _async_scheduling(config.engine, base))
    watcher = Watcher(registry)
    watcher.scan_once(progress=True)
    _log_sizes(model, info, blocks, pool, registry)
    log_weight_bytes(weight_bytes, info.quantization)
    return Parts(base, info, model, engine, registry, residency, watcher, tokenizer)


def build_service(config: ServerConfig) -> EngineService:
    """The service, ready to start. Raises as ``build_parts`` does."""
    parts = build_parts(config)
    service = EngineService(
        parts.info,
        parts.engine,
        parts.registry,
        parts.watcher,
        parts.tokenizer,
        AdapterListing(parts.registry, parts.residency),
        stats=partial(_stats, parts.engine, parts.residency),
        max_queued=config.engine.max_queued_requests,
        num_threads=config.engine.threads,
        on_close=parts.close,
    )
    parts.residency.on_change = service.wake
    gc.freeze()  # these objects stay alive: the garbage collector need not scan them between two tokens
    return service


def _info(
    config: ServerConfig,
    base: LoadedBase,
    tokenizer: Tokenizer,
    max_model_len: int,
    attention: str,
    weight_bytes: WeightBytes,
) -> ModelInfo:
    prepared = base.prepared
    names = config.model.served_names or (prepared.name,)
    return ModelInfo(
        prepared.name,
        names,
        prepared.digest,
        prepared.quantization,
        max_model_len,
        time.time(),
        attention,
        prepared.head_quantization,
        takes_reasoning=tokenizer.renderer is not None and tokenizer.renderer.template.takes_reasoning,
        defaults=sampling_defaults(config.model.generation_config, base),
        weight_bytes={
            "nf4": weight_bytes.four_bit,
            "bf16": weight_bytes.dense,
            "bf16_experts": weight_bytes.dense_experts,
        },
    )


def _load(config: ServerConfig) -> LoadedBase:
    device = config.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch sees no CUDA device; use --device cpu, or install torch for CUDA"
        )
    prepared = prepare_base(
        config.model.name,
        config.home,
        config.model.quantization,
        config.model.head_quantization,
        check=partial(check_config, longest=config.engine.max_model_len),
        hf_overrides=config.model.overrides,
    )
    with out_of_memory_names("--base", f"the base {prepared.name}"):
        return load_base(prepared, device, progress=True)


def _start_check(config: ServerConfig, base: LoadedBase, found: Probe, sizes: Sizes) -> StartCheck:
    longest = served_length(base.model.config.get_text_config(), config.engine.max_model_len)
    check_temperature(base.model.config, longest, sizes.step_tokens)
    with naming(base.model.config, "the start"):
        is_settled = settle_rope(base.model, longest)
    rope = f", rotary frequencies for {longest} tokens" if is_settled else ""
    options = f"block size {sizes.block_size}, enforce eager {config.engine.enforce_eager}{rope}"
    return StartCheck(config.home, base, found, longest, options)


def _rank_pool(config: AdapterConfig, base: LoadedBase, num_rows: int) -> RankPool:
    with out_of_memory_names("--lora-pool-rows, --max-loras", f"{num_rows} rank rows"):
        return RankPool(
            base.layout.sites,
            num_rows,
            base.model.dtype,
            base.model.device,
            norms=base.layout.norms,
            extra_bytes=config.extra_memory,
            max_rank=config.max_lora_rank,
        )


def _allocate_kv(
    config: EngineConfig, base: LoadedBase, model: StepModel, num_blocks: int, block_size: int
) -> tuple[BlockManager, int]:
    with out_of_memory_names("--kv-cache-memory", f"{num_blocks} blocks of keys and values"):
        model.allocate(num_blocks, block_size)
    longest = max_model_len(config, base.model.config, num_blocks * block_size)
    return BlockManager(num_blocks, block_size, config.prefix_caching), longest


def _async_scheduling(config: EngineConfig, base: LoadedBase) -> bool:
    """By default only on a GPU. On a CPU the host computes the step itself, so nothing can overlap."""
    return base.model.device.type == "cuda" if config.async_scheduling is None else config.async_scheduling


def _adapters(
    config: AdapterConfig,
    base: LoadedBase,
    weights: BaseWeights,
    pool: RankPool,
    reserved: frozenset[str],
    chat_formats: ChatFormats,
    load: Callable[[Version], Adapter] | None,
) -> tuple[Registry, Residency]:
    config.folder.mkdir(parents=True, exist_ok=True)
    limits = Limits(config.max_lora_rank, config.max_bytes)
    dtype, ignored = base.model.dtype, config.ignore_templates
    copying = copying_for(pool.device)

    def inspect(folder: Path) -> AdapterInfo:
        with copying():  # DoRA reads the base's weights on the device
            info = inspect_adapter(folder, base.layout, limits, dtype, weights, ignored)
        if info.chat_config is not None:
            with time_for(MAX_CPU_SECONDS) as seconds:
                _check_text(chat_formats, info.chat_config, seconds)
        return info

    registry = Registry(config.folder, inspect, reserved)

    def from_folder(version: Version) -> Adapter:
        return load_adapter(version.path, base.layout, limits, dtype, version.digest, weights, ignored)

    residency = Residency(pool, load or from_folder, config.host_memory)
    registry.tier = residency.tier
    registry.on_retired.append(lambda version: residency.forget(version.digest))
    return registry, residency


def _check_text(chat_formats: ChatFormats, chat_config: ChatConfig, seconds: float) -> None:
    try:
        chat_formats.check(chat_config, seconds)
    except TemplateTooSlow:
        raise BudgetExceeded from None


def _tokenizer(base: LoadedBase, allow_special_tokens: bool, context: int) -> Tokenizer:
    configured = base.model.generation_config.eos_token_id
    generation_eos = frozenset(configured if isinstance(configured, list) else [configured]) - {None}
    eos = generation_eos | ({base.tokenizer.eos_token_id} - {None})
    vocab_size = base.model.get_output_embeddings().out_features
    renderer = base_renderer(base.tokenizer, allow_special_tokens)
    bounds = TextBounds(base.tokenizer.backend_tokenizer, context)
    chat_formats = ChatFormats(
        base.tokenizer, vocab_size, ChatFormat(renderer, eos), generation_eos, allow_special_tokens
    )
    return Tokenizer(base.tokenizer, vocab_size, eos, renderer, bounds, chat_formats)


def _stats(engine: Engine, residency: Residency) -> EngineStats:
    scheduler = engine.scheduler
    return EngineStats(
        running=len(scheduler.running),
        waiting=engine.num_waiting,
        kv_blocks_total=scheduler.blocks.num_blocks,
        kv_blocks_used=scheduler.blocks.num_used,
        prefix_queries_tokens=scheduler.prompt_tokens,
        prefix_hit_tokens=scheduler.cached_tokens,
        preemptions=scheduler.preemptions,
        pool_rows_total=residency.pool.rows_total,
        pool_rows_used=residency.pool.rows_used,
        adapter_evictions=residency.stats.evictions,
        adapter_loads=residency.stats.loads,
        adapter_load_seconds=residency.stats.load_seconds,
        steps=scheduler.steps,
    )


def _log_sizes(
    model: StepModel, base: ModelInfo, blocks: BlockManager, pool: RankPool, registry: Registry
) -> None:
    log.info(
        "base %s: %s, output head %s, digest %s",
        base.name, base.quantization, base.head_quantization, base.digest,
    )  # fmt: skip
    log.info("blocks: %s; attention: %s; native kernels: %s", model.name, base.attention, isa())
    log.info(
        "KV cache: %d blocks of %d tokens, %d tokens; context %d tokens", blocks.num_blocks,
        blocks.block_size, blocks.num_blocks * blocks.block_size, base.max_model_len,
    )  # fmt: skip
    log.info(
        "adapter pool: %d rows at %d sites, %.0f MB", pool.num_rows, len(pool.sites), pool.bytes_total / 1e6
    )
    log.info("adapters: %d served", sum(entry.state == "ready" for entry in registry.entries()))
