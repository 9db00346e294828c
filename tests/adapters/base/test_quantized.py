"""What is quantised already: NF4 of bitsandbytes is used as it is, all else is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapters.base import load_base, prepare_base
from adapters.base.source import resolve
from adapters.base.weights import BaseWeights
from adapters.errors import BaseCorrupt, BaseModelError
from tests.support.tiny_models import tiny_tokenizer

PROMPT = torch.arange(3, 23)[None]
STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"


def by_transformers(source: Path, folder: Path, **fields: Any) -> Path:
    """A 4-bit folder that transformers and bitsandbytes alone have made."""
    how = BitsAndBytesConfig(
        load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16} | fields
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=how, device_map={"": "cpu"})
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    content = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in content.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("skipped", [["lm_head"], ["lm_head", "model.layers.1.mlp", "vision_tower"]])
def test_a_folder_of_bitsandbytes_is_served_as_it_is(
    double: bool, skipped: list[str], llama: Path, tmp_path: Path
) -> None:
    """Unsloth's folders skip modules like this."""
    fields = {"bnb_4bit_use_double_quant": double, "llm_int8_skip_modules": skipped}
    folder = by_transformers(llama, tmp_path / "tiny-bnb-4bit", **fields)
    prepared = prepare_base(str(folder), tmp_path / "cache", progress=False)
    assert prepared.path == folder
    base = load_base(prepared)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(base.model(PROMPT).logits, theirs(PROMPT).logits)
    weight = base.model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == (torch.bfloat16 if "model.layers.1.mlp" in skipped else torch.uint8)
    dense = BaseWeights(base.model, base.layout).dense("model.layers.0.mlp.up_proj")
    original = load_file(llama / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert 0.01 < ((dense - original).float().std() / original.float().std()).item() < 0.2


def test_the_digest_follows_the_content(llama: Path, tmp_path: Path) -> None:
    folder = by_transformers(llama, tmp_path / "one")
    copy = shutil.copytree(folder, tmp_path / "two")
    assert resolve(str(folder), tmp_path, False).digest == resolve(str(copy), tmp_path, False).digest
    change_weights(copy, {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)})
    assert resolve(str(folder), tmp_path, False).digest != resolve(str(copy), tmp_path, False).digest


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "brand_new"}, "brand_new"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "8-bit bitsandbytes"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "bitsandbytes FP4",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes FP4"),  # its default
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_quant_storage": "bfloat16",
            },
            "bitsandbytes NF4 in bfloat16",
        ),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_other_methods_are_refused_by_name(
    settings: dict[str, Any], name: str, nested: bool, copied: Path, tmp_path: Path
) -> None:
    """The weights are not read: they are not even quantised here."""
    fields = {"quantization_config": settings}
    change_config(copied, **({"text_config": fields} if nested else fields))
    with pytest.raises(BaseModelError, match=rf"as {name}.*Give --base the unquantised model"):
        resolve(str(copied), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 128, dtype=torch.int32)}, "GPTQ or AWQ"),
        ({"model.layers.0.mlp.up_proj.g_idx": torch.zeros(64, dtype=torch.int32)}, "GPTQ"),
        (
            {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(128, 8, dtype=torch.int32)},
            "compressed-tensors",
        ),
        ({"model.layers.0.mlp.experts.up_proj_blocks": torch.zeros(4, 2, dtype=torch.uint8)}, "MXFP4"),
        ({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}, "FP8"),
        ({"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64).to(torch.float8_e4m3fn)}, "FP8"),
        ({"model.layers.0.mlp.up_proj.SCB": torch.ones(128)}, "8-bit bitsandbytes"),
        ({STATE.replace("nf4", "fp4"): torch.zeros(9, dtype=torch.uint8)}, "bitsandbytes FP4"),
        ({STATE.replace("mlp", "mlp.experts.3"): torch.zeros(9, dtype=torch.uint8)}, "each expert by itself"),
    ],
)
def test_headers_tell_the_method_if_the_config_does_not(
    tensors: dict[str, torch.Tensor | None], name: str, copied: Path, tmp_path: Path
) -> None:
    change_weights(copied, tensors)
    with pytest.raises(BaseModelError, match=rf"{name}.*tensor {next(iter(tensors))}"):
        resolve(str(copied), tmp_path, progress=False)


@pytest.mark.parametrize("field", ["blocksize", "nested_blocksize"])
def test_other_block_sizes_are_refused(field: str, llama: Path, tmp_path: Path) -> None:
    folder = by_transformers(llama, tmp_path / "bnb", bnb_4bit_use_double_quant=True)
    state = json.loads(bytes(load_file(folder / "model.safetensors")[STATE].tolist()))
    assert (state["blocksize"], state["nested_blocksize"]) == (64, 256)
    changed = json.dumps(state | {field: 128}).encode()
    change_weights(folder, {STATE: torch.tensor(list(changed), dtype=torch.uint8)})
    with pytest.raises(BaseModelError, match=r"NF4 in blocks of .*128"):
        resolve(str(folder), tmp_path, progress=False)


def test_a_config_that_contradicts_the_weights(llama: Path, tmp_path: Path) -> None:
    folder = by_transformers(llama, tmp_path / "bnb")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config=None)
    with pytest.raises(BaseCorrupt, match=r"are quantised by bitsandbytes, but its config\.json has no"):
        resolve(str(folder), tmp_path, progress=False)
    dense = shutil.copytree(llama, tmp_path / "dense")
    change_config(dense, quantization_config=settings)
    with pytest.raises(BaseCorrupt, match=r"are not quantised by bitsandbytes, but its config\.json says"):
        resolve(str(dense), tmp_path, progress=False)


def test_a_broken_state(llama: Path, tmp_path: Path) -> None:
    folder = by_transformers(llama, tmp_path / "bnb")
    change_weights(folder, {STATE: torch.tensor([7, 7], dtype=torch.uint8)})
    with pytest.raises(BaseCorrupt, match=f"{STATE} is not a state of bitsandbytes"):
        resolve(str(folder), tmp_path, progress=False)
