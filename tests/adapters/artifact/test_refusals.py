"""Everything that is refused, with the message that the user gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.artifact import Limits, inspect_adapter, load_adapter
from adapters.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported
from tests.adapters.artifact.folders import LAYOUT, LIMITS, Q, V, config, key, tensors, write_folder

UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "ADALORA"}, r"peft_type is 'ADALORA'; only 'LORA'"),
    ({"peft_type": None}, r"has no peft_type, which PEFT always writes"),
    ({"peft_type": "lora"}, r"peft_type is 'lora'; only 'LORA'"),
    (
        {"modules_to_save": ["k_proj", "self_attn"]},
        r"modules_to_save: 'model.layers.0.self_attn' of",
    ),
    ({"modules_to_save": "q_proj"}, rf"modules_to_save: '{Q}' of the base is neither a norm nor"),
    ({"trainable_token_indices": [1]}, r"trainable_token_indices is set"),
    ({"layer_replication": [[0, 1]]}, r"layer_replication is set"),
    ({"target_parameters": ["experts.up_proj"]}, r"target_parameters is set"),
    ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is set in adapter_config.json: aLoRA"),
    ({"use_qalora": True}, r"use_qalora is set"),
    ({"use_bdlora": {"nblocks": 2}}, r"use_bdlora is set"),
    ({"arrow_config": {"top_k": 1}}, r"arrow_config is set"),
    ({"kasa_config": {"beta": 0.1}}, r"kasa_config is set"),
    ({"monteclora_config": {"buffer_size": 3}}, r"monteclora_config is set"),
    ({"velora_config": {"x": 3}}, r"velora_config is set"),
    ({"megatron_config": {"x": 3}}, r"megatron_config is set"),
    *(
        (
            {"init_lora_weights": init},
            rf"init_lora_weights is '{init}'.*path_initial_model_for_weight_conversion",
        )
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga")
    ),
    ({"init_lora_weights": "loftq"}, r"init_lora_weights is 'loftq'.*replace_lora_weights_loftq"),
    ({"init_lora_weights": "brand_new"}, r"init_lora_weights is 'brand_new', which may have changed"),
    ({"hyper_lora": {"depth": 2}, "peft_version": "0.99.1"}, r"hyper_lora is set .* PEFT 0.99.1 wrote"),
    ({"enable_lora": [True, False, True]}, r"enable_lora is set .* PEFT 0.2's fused layers"),
    ({"invocation_string": "<|start|>"}, r"invocation_string is set .* aLoRA"),
    ({"use_mora": True}, r"use_mora is set .* MoRA"),
    ({"target_modules": r".*\.self_attn"}, r"'model.layers.0.self_attn' of the base is not a linear"),
]

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, r"r in adapter_config.json must be a positive integer, not 0"),
    ({"r": True}, r"r in adapter_config.json must be a positive integer, not True"),
    ({"r": None}, r"has shape \[4, 8\]; it must be \[8, 8\], for rank 8 of the config"),
    ({"lora_alpha": "8"}, r"lora_alpha in adapter_config.json must be a finite number, not '8'"),
    ({"use_rslora": "yes"}, r"use_rslora in adapter_config.json must be true or false"),
    ({"rank_pattern": ["q_proj"]}, r"rank_pattern in adapter_config.json must be an object"),
    ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern in adapter_config.json must be a positive integer"),
    ({"target_modules": None}, r"has no target_modules"),
    ({"target_modules": [1]}, r"target_modules in adapter_config.json must be a string or a list of strings"),
    ({"target_modules": ["qq_proj"]}, r"target_modules \('qq_proj',\) matches no module of the base"),
    ({"layers_to_transform": ["0"]}, r"layers_to_transform in adapter_config.json must be an integer or"),
    ({"layers_pattern": "layers"}, r"layers_pattern needs layers_to_transform"),
    ({"target_modules": "x", "layers_to_transform": [0]}, r"need target_modules to be a list of names"),
    ({"use_dora": True}, rf"{Q} has only lora_A, lora_B; its magnitude is missing"),
    ({"lora_bias": True}, rf"{Q} has only lora_A, lora_B; its lora_B.bias is missing"),
    ({"use_dora": True, "lora_bias": True}, r"use_dora and lora_bias cannot both be true"),
    ({"use_dora": "yes"}, r"use_dora in adapter_config.json must be true or false"),
    ({"bias": "some"}, r"bias in adapter_config.json must be 'none', 'all' or 'lora_only', not 'some'"),
    (
        {"modules_to_save": ["lm_head"]},
        r"modules_to_save names lm_head, but the file does not contain its weight",
    ),
    ({"modules_to_save": [1]}, r"modules_to_save in adapter_config.json must be a string or a list"),
    ({"target_modules": ["embed_tokens"]}, rf"2 modules have tensors, but target_modules does not .*: {Q}"),
    ({"base_model_name_or_path": 7}, r"base_model_name_or_path in adapter_config.json must be a string"),
    ({"r": 8}, r"has shape \[4, 8\]; it must be \[8, 8\], for rank 8 of the config"),
    (
        {"target_modules": ["q_proj"]},
        rf"1 modules have tensors, but target_modules does not select them: {V}",
    ),
]


@pytest.mark.parametrize(("fields", "message"), UNSUPPORTED, ids=lambda x: str(x)[:40])
def test_unsupported_configs(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterUnsupported, match=message):
        load_adapter(write_folder(tmp_path / "a", config(**fields)), LAYOUT, LIMITS)


@pytest.mark.parametrize(("fields", "message"), INVALID, ids=lambda x: str(x)[:40])
def test_invalid_configs(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=message):
        load_adapter(write_folder(tmp_path / "a", config(**fields)), LAYOUT, LIMITS)


def _swap(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The usual tensors with some replaced, added, or left out (None). Names may be short, as in ``q_A``."""
    short = {f"{site[0]}_{side}": key(name, side) for site, name in (("q", Q), ("v", V)) for side in "AB"}
    result: dict[str, torch.Tensor | None] = {**tensors(), **{short.get(k, k): v for k, v in changes.items()}}
    return {name: tensor.contiguous() for name, tensor in result.items() if tensor is not None}


EMBED = "base_model.model.model.embed_tokens"
FOUR = torch.ones(4, 8)
HEAD = torch.ones(16, 8)


def _rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(4, 8).contiguous()


def _cancelling(out: int) -> torch.Tensor:
    """A tensor without zeros whose rows sum to zero."""
    column = torch.randn(out, 1)
    return torch.cat([column, -column, 2 * column, -2 * column], dim=1)


TENSORS: list[tuple[dict[str, torch.Tensor | None], type[Exception], str]] = [
    (
        {"v_A": None, "v_B": None, "q_A": None, "q_B": None, "base_model.model.lm_head.weight": HEAD},
        AdapterInvalid,
        rf"None of the modules that target_modules selects has tensors: {Q}, {V}",
    ),
    ({"v_B": None}, AdapterInvalid, rf"{V} has only lora_A; its lora_B is missing"),
    ({"v_A": None}, AdapterInvalid, rf"{V} has only lora_B; its lora_A is missing"),
    ({"v_A": torch.ones(4, 7)}, AdapterInvalid, r"has shape \[4, 7\]; it must be \[4, 8\]"),
    ({"v_B": torch.ones(4, 5)}, AdapterInvalid, r"has shape \[4, 5\]; it must be \[4, 4\]"),
    ({"v_A": torch.ones(32)}, AdapterInvalid, r"has shape \[32\]"),
    (
        {"v_A": torch.ones(4, 8, dtype=torch.float64)},
        AdapterInvalid,
        r"has dtype F64; save the adapter in F32",
    ),
    ({"v_A": torch.ones(4, 8, dtype=torch.int8)}, AdapterInvalid, r"has dtype I8"),
    ({"v_A": torch.full((4, 8), torch.nan)}, AdapterInvalid, rf"{V}.lora_A.weight' contains NaN or infinity"),
    ({"v_B": torch.full((4, 4), torch.inf)}, AdapterInvalid, rf"{V}.lora_B.weight' contains NaN or infinity"),
    ({"v_B": torch.full((4, 4), 3e38)}, AdapterInvalid, r"overflows bfloat16 after scaling"),
    (
        {"q_B": torch.zeros(6, 4), "v_B": torch.zeros(4, 4)},
        AdapterInvalid,
        r"The adapter is untrained",
    ),
    (
        {"q_A": _rows(1, 0, 0, 2), "q_B": _rows(0, 3, 4, 0).t()[:6], "v_B": torch.zeros(4, 4)},
        AdapterInvalid,
        r"The adapter is untrained",
    ),
    (
        {
            "q_A": torch.randn(1, 8).expand(4, 8),
            "q_B": _cancelling(6),
            "v_A": torch.randn(1, 8).expand(4, 8),
            "v_B": _cancelling(4),
        },
        AdapterInvalid,
        r"The adapter is untrained",
    ),
    ({key(Q.replace("q_proj", "q_prj"), "A"): FOUR}, AdapterInvalid, rf"the nearest are {Q}"),
    ({key("transformer.h.0.attn.c_attn", "A"): FOUR}, AdapterInvalid, r"seems to be for another base"),
    ({key("lm_head", "A"): FOUR}, AdapterInvalid, r"but target_modules does not select them: lm_head"),
    (
        {key("model.layers.0.norm", "A"): FOUR},
        AdapterUnsupported,
        r"'model.layers.0.norm' of the base is",
    ),
    (
        {"base_model.model.model.embed_tokens.lora_embedding_A": FOUR},
        AdapterInvalid,
        r"but target_modules does not select them: model.embed_tokens",
    ),
    ({f"base_model.model.{Q}.lora_magnitude_vector": FOUR}, AdapterInvalid, r"but use_dora is false"),
    ({f"base_model.model.{Q}.lora_B.bias": FOUR}, AdapterInvalid, r"but lora_bias is false"),
    ({f"base_model.model.{Q}.bias": FOUR}, AdapterInvalid, r"with bias='none' in the config it is not one"),
    ({f"base_model.model.{V}.bias": FOUR}, AdapterInvalid, r"with bias='none' in the config it is not one"),
    ({f"base_model.model.{Q}.weight": FOUR}, AdapterUnsupported, r"would replace the base's .*q_proj"),
    ({"base_model.model.model.layers.0.norm.weight": FOUR}, AdapterUnsupported, r"modules_to_save does not"),
    (
        {"base_model.model.lm_head.weight": FOUR},
        AdapterUnsupported,
        r"is for a vocabulary of 4 tokens, but the base has 16: the vocabulary was resized in training",
    ),
    (
        {"base_model.model.lm_head.weight": torch.ones(16, 4)},
        AdapterInvalid,
        r"shape \[16, 4\].* has \[16, 8\]; the adapter was trained on another base",
    ),
    (
        {"base_model.model.score.modules_to_save.weight": FOUR},
        AdapterUnsupported,
        r"the head of a classifier",
    ),
    ({"model.layers.0.self_attn.q_proj.lora_a": FOUR}, AdapterUnsupported, r"belongs to mlx-lm"),
    ({"lora_unet_down_blocks.lora_down.weight": FOUR}, AdapterUnsupported, r"a diffusion model's LoRA"),
    ({f"{EMBED}.token_adapter.trainable_tokens_delta": FOUR}, AdapterUnsupported, r"trainable_token_indices"),
    ({f"{Q}.lora_E.default": FOUR}, AdapterUnsupported, r"a kind of LoRA that this server does not know"),
    (
        {"optimizer.state": FOUR},
        AdapterInvalid,
        r"'optimizer.state' has a name that PEFT's LoRA never writes",
    ),
    ({f"{Q}.lora_A.weight": FOUR}, AdapterInvalid, r"name the same tensor"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), TENSORS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_tensors_that_do_not_fit(
    changes: dict[str, torch.Tensor | None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        load_adapter(write_folder(tmp_path / "a", weights=_swap(**changes)), LAYOUT, LIMITS)


def test_a_zero_alpha_is_the_base(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="The adapter is untrained"):
        load_adapter(write_folder(tmp_path / "a", config(lora_alpha=0)), LAYOUT, LIMITS)


def test_one_trained_site_is_enough(tmp_path: Path) -> None:
    adapter = load_adapter(write_folder(tmp_path / "a", weights=_swap(v_B=torch.zeros(4, 4))), LAYOUT, LIMITS)
    assert adapter.info.ranks == {Q: 4, V: 4}


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("lora_A.weight", "lora_A.default.weight").replace(
            "B.weight", "B.default.weight"
        ),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
    ids=["adapter name", "no prefix", "compiled", "FSDP"],
)
def test_tensor_names_of_other_tools(rename: Any, tmp_path: Path) -> None:
    renamed = {rename(name): tensor for name, tensor in tensors().items()}
    usual = load_adapter(write_folder(tmp_path / "usual"), LAYOUT, LIMITS)
    other = load_adapter(write_folder(tmp_path / "other", weights=renamed), LAYOUT, LIMITS)
    assert renamed.keys() != tensors().keys()
    assert all(torch.equal(other.weights[s].b, usual.weights[s].b) for s in (Q, V))


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    mixed = {
        name.replace(".weight", ".one.weight" if Q in name else ".two.weight"): t
        for name, t in tensors().items()
    }
    with pytest.raises(AdapterInvalid, match="mixes the tensors of several adapters \\(one, two\\)"):
        load_adapter(write_folder(tmp_path / "a", weights=mixed), LAYOUT, LIMITS)


def test_caps_hold_before_any_value_is_read(tmp_path: Path) -> None:
    poisoned = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors().items()}
    folder = write_folder(tmp_path / "a", weights=poisoned)
    with pytest.raises(AdapterTooLarge, match=rf"{Q} has rank 4; --max-lora-rank allows 3"):
        load_adapter(folder, LAYOUT, Limits(max_rank=3, max_bytes=10_000))
    with pytest.raises(AdapterTooLarge, match=r"takes 208 bytes as served; this server allows 207"):
        load_adapter(folder, LAYOUT, Limits(max_rank=4, max_bytes=207))
    with pytest.raises(AdapterInvalid, match="NaN"):
        load_adapter(folder, LAYOUT, Limits(max_rank=4, max_bytes=208))


@pytest.mark.parametrize(
    ("base", "warned"),
    [
        ("TINY-1b", False),
        ("/data/models/tiny-1b/", False),
        ("unsloth/Tiny-1B-unsloth-bnb-4bit", False),
        (None, False),
        ("other/Huge-70B", True),
        ("", False),
        (
            "/root/.cache/huggingface/hub/models--some-lab--Tiny-1B/snapshots/0e9e39f249a16976918f6564b8830bc8",
            False,
        ),
        ("/cache/models--unsloth--tiny-1b-bnb-4bit/snapshots/main/", False),
        ("models--some-lab--Tiny-1B", False),
        ("/cache/models--some-lab--Tiny-1B-Instruct/snapshots/main", True),
        ("C:\\models\\Tiny-1B", False),
        ("mlx-community/Tiny-1B-4bit", False),
    ],
)
def test_another_bases_name_is_a_warning_only(base: str | None, warned: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", config(base_model_name_or_path=base))
    info = inspect_adapter(folder, LAYOUT, LIMITS)
    assert info.base_model == base
    expected = (f"It was trained on {base!r}, but the base is 'some-lab/Tiny-1B'.",) if warned else ()
    assert info.warnings == expected
