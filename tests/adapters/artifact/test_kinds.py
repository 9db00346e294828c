"""DoRA, biases, norms, embeddings and heads: the served modules equal PEFT's in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from adapters.artifact import (
    WEIGHTS_FILE,
    Adapter,
    Adjustment,
    Limits,
    LoraWeights,
    inspect_adapter,
    load_adapter,
)
from adapters.base.weights import BaseWeights
from adapters.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported
from tests.adapters.artifact.folders import LIMITS, layout_of
from tests.support.tiny_models import make_peft_adapter

EMBED, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "dora with biases": {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "bias": "all"},
    "biases": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "biases of lora_B": {"target_modules": ["k_proj", "up_proj"], "lora_bias": True},
    "both ends": {"target_modules": [EMBED, HEAD], "use_dora": True},
    "own modules": {"target_modules": ["q_proj"], "modules_to_save": ["norm", HEAD, EMBED]},
    "own modules saved thrice": {
        "target_modules": ["q_proj"],
        "modules_to_save": [HEAD, EMBED],
        "save_embedding_layers": True,
    },
}


def _model(tied: bool = False) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def _load(model: Any, folder: Path, limits: Limits = LIMITS) -> Adapter:
    layout = layout_of(model)
    return load_adapter(folder, layout, limits, torch.float32, base=BaseWeights(model, layout))


def _served(y: Tensor, x: Tensor, lora: LoraWeights | None, adjustment: Adjustment | None) -> Tensor:
    """Compute scale * y + shift + lora(x)."""
    if adjustment is not None and adjustment.scale is not None:
        y = y * adjustment.scale
    if adjustment is not None and adjustment.shift is not None:
        y = y + adjustment.shift
    return y if lora is None else y + (x @ lora.a.t()) @ lora.b


def _check_module(name: str, base: Any, theirs: Any, adapter: Adapter) -> None:
    layout, extras = layout_of(base), adapter.extras
    module = base.get_submodule(name)
    if name in layout.norms:
        x = torch.randn(3, 32)
        weight = extras.norms[name]["weight"] if name in extras.norms else module.weight
        torch.testing.assert_close(x / x.square().mean(-1, True).add(1e-6).sqrt() * weight, theirs(x))
        return
    if name == EMBED:
        ids, end = torch.arange(40), extras.embedding
        matrix = module.weight if end is None or end.matrix is None else end.matrix
        x, y, expected = torch.eye(40), matrix[ids], theirs(ids)
    else:
        width = (layout.sites.get(name) or layout.embedding_and_head[name]).in_features
        x, end = torch.randn(3, width), extras.head if name == HEAD else None
        y = module(x) if end is None or end.matrix is None else x @ end.matrix.t()
        expected = theirs(x)
    at_end = name in (EMBED, HEAD)
    lora = (end.lora if end else None) if at_end else adapter.weights.get(name)
    adjustment = (end.adjustment if end else None) if at_end else extras.adjustments.get(name)
    torch.testing.assert_close(_served(y, x, lora, adjustment), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_module_equals_pefts(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = _model()
    folder = make_peft_adapter(base, tmp_path / "a", r=3, **KINDS[kind])
    adapter = _load(base, folder)
    peft = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval().base_model.model
    layout = layout_of(base)
    with torch.inference_mode():
        for name in (*layout.sites, *layout.embedding_and_head, *layout.norms):
            _check_module(name, base, peft.get_submodule(name), adapter)


def _sizes(adapter: Adapter) -> int:
    """The bytes of everything served except the rank rows."""
    found: list[Tensor | None] = []
    extras = adapter.extras
    ends = [end for end in (extras.embedding, extras.head) if end is not None]
    for adjustment in [*extras.adjustments.values(), *(end.adjustment for end in ends if end.adjustment)]:
        found += [adjustment.scale, adjustment.shift]
    for end in ends:
        found += [end.matrix, *((end.lora.a, end.lora.b) if end.lora else ())]
    found += [tensor for own in extras.norms.values() for tensor in own.values()]
    return sum(tensor.nbytes for tensor in found if tensor is not None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_known_from_the_header_and_capped(kind: str, tmp_path: Path) -> None:
    base = _model()
    folder = make_peft_adapter(base, tmp_path / "a", r=3, **KINDS[kind])
    adapter = _load(base, folder)
    rows = sum(pair.a.nbytes + pair.b.nbytes for pair in adapter.weights.values())
    assert adapter.info.extra_bytes == _sizes(adapter) > 0
    assert adapter.info.nbytes == rows + adapter.info.extra_bytes
    with pytest.raises(AdapterTooLarge, match=f"takes {adapter.info.nbytes} bytes as served"):
        _load(base, folder, Limits(64, adapter.info.nbytes - 1))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_saved_copy_of_the_bases_embedding_costs_no_memory(tmp_path: Path) -> None:
    base = _model()
    fields: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", EMBED, HEAD]}
    lean = _load(base, make_peft_adapter(base, tmp_path / "lean", **fields))
    folder = make_peft_adapter(base, tmp_path / "fat", save_embedding_layers=True, **fields)
    fat = _load(base, folder)
    assert fat.info.nbytes == lean.info.nbytes
    assert fat.extras.embedding is not None
    assert fat.extras.embedding.matrix is None
    layout = layout_of(base)
    inspected = inspect_adapter(folder, layout, LIMITS, torch.float32, BaseWeights(base, layout))
    assert inspected.nbytes == fat.info.nbytes


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_replaced_shared_matrix_changes_embedding_and_head_but_modules_to_save_only_one(
    tmp_path: Path,
) -> None:
    base = _model(tied=True)
    folder = make_peft_adapter(base, tmp_path / "a", 3, ["q_proj", "embed_tokens"], replaced_embedding=True)
    assert not any(HEAD in name for name in load_file(folder / WEIGHTS_FILE))
    put_back = _load(base, folder).extras
    assert put_back.embedding is not None
    assert put_back.head is not None
    assert put_back.embedding.matrix is put_back.head.matrix is not None
    own = _load(base, make_peft_adapter(base, tmp_path / "b", 3, ["q_proj"], modules_to_save=[EMBED]))
    assert own.extras.embedding is not None
    assert own.extras.head is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_trained_copy_of_a_module_is_read_and_not_the_original(tmp_path: Path) -> None:
    base = _model()
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": [HEAD, EMBED]}
    folder = make_peft_adapter(base, tmp_path / "a", r=3, save_embedding_layers=True, **fields)
    weights = load_file(folder / WEIGHTS_FILE)
    name = "base_model.model.lm_head"
    copies = {f"{name}.weight", f"{name}.modules_to_save.weight", f"{name}.original_module.weight"}
    assert copies <= weights.keys()
    trained = weights[f"{name}.weight"]
    assert not torch.equal(trained, weights[f"{name}.original_module.weight"])
    for kept in ("weight", "modules_to_save.weight", "modules_to_save.default.weight"):
        rest = {key: tensor for key, tensor in weights.items() if key not in copies}
        rest |= {f"{name}.{kept}": trained, f"{name}.original_module.weight": base.lm_head.weight.detach()}
        save_file(rest, folder / WEIGHTS_FILE)
        head = _load(base, folder).extras.head
        assert head is not None
        assert head.matrix is not None
        assert torch.equal(head.matrix, trained)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rows", [37, 43])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "modules_to_save": [HEAD]},
        {"target_modules": ["q_proj"], "save_embedding_layers": True},
        {"target_modules": [EMBED]},
        {"target_modules": [HEAD]},
    ],
    ids=["modules_to_save", "embedding layers", "LoRA of the embedding", "LoRA of the head"],
)
def test_a_resized_vocabulary_has_its_own_reason(fields: dict[str, Any], rows: int, tmp_path: Path) -> None:
    resized = _model()
    resized.resize_token_embeddings(rows, mean_resizing=False)
    folder = make_peft_adapter(resized, tmp_path / "a", r=3, **fields)
    with pytest.raises(AdapterUnsupported, match=rf"for a vocabulary of {rows} tokens, but the base has 40"):
        _load(_model(), folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bias_that_the_file_lacks_stays_as_in_the_base(tmp_path: Path) -> None:
    base = _model()
    folder = make_peft_adapter(base, tmp_path / "a", r=3, target_modules=["q_proj"], bias="all")
    weights = load_file(folder / WEIGHTS_FILE)
    save_file({k: v for k, v in weights.items() if "k_proj" not in k}, folder / WEIGHTS_FILE)
    adapter = _load(base, folder)
    (warning,) = adapter.info.warnings
    assert warning.startswith(
        "bias is 'all', but the file lacks 1 biases, which stay as in the base: model.lay"
    )
    peft = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval().base_model.model
    with torch.inference_mode():
        for name in layout_of(base).sites:
            _check_module(name, base, peft.get_submodule(name), adapter)


def _with_head_apart(tied: Any) -> Any:
    """A base as ``--head-quantization nf4`` makes it: the head is a less precise copy, no longer shared."""
    model = copy.deepcopy(tied)
    model.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().half().float())
    model.config.tied_before_quantization = True
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_on_a_base_with_a_separate_head_copies_of_the_shared_matrix_cost_no_memory(tmp_path: Path) -> None:
    tied = _model(tied=True)
    fields: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", EMBED, HEAD]}
    folder = make_peft_adapter(tied, tmp_path / "fat", save_embedding_layers=True, **fields)
    extras = _load(_with_head_apart(tied), folder).extras
    assert extras.embedding is not None
    assert extras.head is not None
    assert extras.embedding.matrix is extras.head.matrix is None
    assert extras.embedding.lora is not None
    assert extras.head.lora is not None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_on_a_base_with_a_separate_head_a_changed_shared_matrix_is_refused(
    tmp_path: Path,
) -> None:
    tied = _model(tied=True)
    apart = _with_head_apart(tied)
    folder = make_peft_adapter(tied, tmp_path / "a", 3, ["q_proj", "embed_tokens"], replaced_embedding=True)
    with pytest.raises(AdapterUnsupported, match=r"separates them.*--head-quantization none"):
        _load(apart, folder)
    own = _load(apart, make_peft_adapter(tied, tmp_path / "b", 3, ["q_proj"], modules_to_save=[EMBED]))
    assert own.extras.embedding is not None
    assert own.extras.head is None
    own = _load(apart, make_peft_adapter(tied, tmp_path / "c", 3, ["q_proj"], modules_to_save=[HEAD]))
    assert own.extras.embedding is None
    assert own.extras.head is not None


def test_dora_on_a_row_of_zeros_is_refused(tmp_path: Path) -> None:
    base = _model()
    folder = make_peft_adapter(base, tmp_path / "a", 3, ["o_proj"], use_dora=True)
    base.model.layers[0].self_attn.o_proj.weight.data.zero_()
    weights = load_file(folder / WEIGHTS_FILE)
    save_file({k: v * ("lora_B" not in k) for k, v in weights.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterInvalid, match=r"DoRA at .*o_proj divides by zero"):
        _load(base, folder)
