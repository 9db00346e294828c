"""The probe at the start: which linears adapters may change, and which architectures cannot run in steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from adapters.base import LoadedBase, load_base, prepare_base
from adapters.base.load import layout_of
from adapters.errors import AdapterUnsupported, BaseModelError
from adapters.kernels import Segment
from adapters.pool.rank_pool import RankPool
from server.engine.attention import MAX_LAYERS
from server.engine.build import assemble
from server.engine.model.probe import probe, servable
from server.engine.model.supported import check_config, check_layers
from server.engine.model.transformers_model import TransformersModel
from tests.support.running_engine import Asked, Driver, build, config_for
from tests.support.tiny_models import make_peft_adapter, make_tiny_model


class Gate(nn.Module):
    """An MLP with a linear that gets only some tokens, like an expert."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.expert = mlp, nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x)
        sent = x[..., 0] > 0
        y[sent] += self.expert(x[sent])
        return y


def _odd_base(home: Path) -> LoadedBase:
    """A base with linears that do not get each token once: after logits_to_keep, an expert, an unused one."""
    base = load_base(
        prepare_base(str(make_tiny_model("llama", home / "model")), home, "none", progress=False)
    )
    model = base.model
    model.late, model.unused = (nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(2))
    model.model.layers[1].mlp = Gate(model.model.layers[1].mlp)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] + model.late(inputs[0]),))
    model.eval().requires_grad_(False)
    return LoadedBase(model, base.tokenizer, base.prepared, layout_of(model, "odd"))


ODD = ["late", "model.layers.1.mlp.expert", "unused"]


def test_linears_that_do_not_get_each_token_once_are_not_sites(tmp_path: Path) -> None:
    base = _odd_base(tmp_path)
    found = servable(base, probe(base)).layout
    assert sorted(found.unservable) == ODD
    assert found.sites.keys() == base.layout.sites.keys() - set(ODD)
    assert "model.layers.1.mlp.mlp.up_proj" in found.sites


@pytest.mark.parametrize("module", ODD)
def test_an_adapter_on_such_a_linear_is_refused_and_others_are_served(module: str, tmp_path: Path) -> None:
    base = _odd_base(tmp_path)
    targets = {"good": ["q_proj"], "odd": ["q_proj", module.rpartition(".")[2]]}
    for name, modules in targets.items():
        make_peft_adapter(base.model, tmp_path / "adapters" / name, target_modules=modules)
    parts = assemble(config_for(tmp_path / "model", tmp_path, "--quantization", "none"), base)
    parts.registry.register("good", tmp_path / "adapters" / "good", replace=False)
    with pytest.raises(AdapterUnsupported, match=f"LoRA on '{module}' .* not run it on each token"):
        parts.registry.register("odd", tmp_path / "adapters" / "odd", replace=False)
    driver = Driver(parts)
    asked = Asked([5, 6, 7, 8], "good")
    driver.run(asked, Asked([9, 10]))
    assert asked.error is None
    assert asked.tokens


def test_a_linear_with_an_unexpected_number_of_rows_raises(tmp_path: Path) -> None:
    """This happens if a router sent all of the probe's tokens to one expert."""
    base = _odd_base(tmp_path)
    pool = RankPool(base.layout.sites, 4, base.model.dtype)
    model = TransformersModel(base, pool).model
    state = model.late._state
    state.begin(3, [Segment(0, 0, 3)], torch.tensor([2]))
    with pytest.raises(ValueError, match="1 rows in a step of 3 tokens"):
        model.late(torch.zeros(1, 1, 64, dtype=torch.bfloat16))


# -- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "kind"),
    [
        (
            "granitemoehybrid",
            {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
            "linear_attention",
        ),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv"),
        ("jamba", {}, "linear_attention"),
    ],
)
def test_architectures_that_cannot_run_in_steps_are_refused_with_the_reason(
    family: str, fields: dict[str, Any], kind: str
) -> None:
    with pytest.raises(BaseModelError, match=rf"\({family}\) cannot be served: it has layers of .*{kind}"):
        check_config(AutoConfig.for_model(family, **fields))


@pytest.mark.parametrize("family", ["llama4", "llama4_text"])
def test_llama4_is_served_up_to_one_attention_chunk(family: str) -> None:
    config = AutoConfig.for_model(family)
    for longest in (None, 8192):
        with pytest.raises(BaseModelError, match=rf"\({family}\) cannot be .*--max-model-len 8191, or"):
            check_config(config, longest)
    check_config(config, 8191)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "mixtral", "gpt2"]
)
def test_causal_and_sliding_window_attention_is_accepted(family: str) -> None:
    check_config(AutoConfig.for_model(family))


def test_a_layer_that_does_not_use_our_attention_is_refused() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=3)
    check_layers(config, {0, 1, 2})
    check_layers(config, {0, 1, MAX_LAYERS})  # two stacks of layers with the same numbers
    with pytest.raises(BaseModelError, match=r"\(llama\) cannot be served: 1 of its 3 layers .* layer 1"):
        check_layers(config, {0, 2})


def test_it_is_refused_before_it_is_quantised(tmp_path: Path) -> None:
    folder = make_tiny_model("lfm2", tmp_path / "model", layer_types=["conv", "full_attention"])
    with pytest.raises(BaseModelError, match=r"Lfm2ForCausalLM \(lfm2\) cannot be served"):
        build(folder, tmp_path / "home")
    assert not (tmp_path / "home" / "bases").exists()


def test_errors_of_a_models_code_name_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(
        prepare_base(str(make_tiny_model("llama", tmp_path / "model")), tmp_path, "none", progress=False)
    )

    def forward(*_: object, **__: object) -> None:
        raise TypeError("got an unexpected keyword argument 'cache'")

    monkeypatch.setattr(base.model.model, "forward", forward)
    with pytest.raises(BaseModelError, match=r"LlamaForCausalLM \(llama\) cannot be served: .*TypeError"):
        probe(base)
