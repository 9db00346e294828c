"""Bases whose own code is not in transformers compute what their published equations say.

The references are written from the papers and configs, in plain torch and float32, on the original tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu, softmax

from adapters.artifact import Limits, inspect_adapter
from adapters.base import load_base, prepare_base
from adapters.base.outline import outline_of
from adapters.base.unpack import dequantized, four_bit_linears
from adapters.errors import AdapterError, BaseCorrupt, BaseModelError
from tests.support.original_models import ORIGINALS, make_original
from tests.support.tiny_models import make_peft_adapter, tiny_tokenizer

Tensors = dict[str, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def angles(tokens: int, width: int) -> Tensor:
    """[tokens, width / 2]"""
    return torch.tensor([[p * 10000 ** (-2 * i / width) for i in range(width // 2)] for p in range(tokens)])


def turned_in_halves(x: Tensor) -> Tensor:
    """Rotary embedding of [tokens, heads, width]: pairs (i, i + width / 2)."""
    a, b = x.chunk(2, -1)
    cos, sin = (f(angles(x.shape[0], x.shape[-1]))[:, None] for f in (torch.cos, torch.sin))
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def turned_in_pairs(x: Tensor) -> Tensor:
    """Rotary embedding of the first half of [tokens, heads, width]: pairs (2i, 2i + 1)."""
    half = x.shape[-1] // 2
    first = torch.view_as_complex(x[..., :half].reshape(*x.shape[:-1], -1, 2))
    turned = torch.view_as_real(first * torch.exp(1j * angles(x.shape[0], half))[:, None]).flatten(-2)
    return torch.cat([turned, x[..., half:]], -1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[tokens, heads, width], with fewer heads of k and v; each of them serves neighbouring heads of q."""
    tokens, heads, width = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", softmax(scores, -1), v).reshape(tokens, heads * width)


def heads_of(x: Tensor, count: int) -> Tensor:
    return x.view(len(x), count, -1)


def qwen_logits(t: Tensors, ids: Tensor) -> Tensor:
    h, eps = t["transformer.wte.weight"][ids], 1e-6
    for n in range(2):
        p = f"transformer.h.{n}."
        x = norm(h, t[p + "ln_1.weight"], eps)
        q, k, v = torch.split(x @ t[p + "attn.c_attn.weight"].T + t[p + "attn.c_attn.bias"], 64, -1)
        q, k, v = (heads_of(part, 4) for part in (q, k, v))
        h = h + attention(turned_in_halves(q), turned_in_halves(k), v) @ t[p + "attn.c_proj.weight"].T
        x = norm(h, t[p + "ln_2.weight"], eps)
        h = (
            h
            + (x @ t[p + "mlp.w1.weight"].T * silu(x @ t[p + "mlp.w2.weight"].T))
            @ t[p + "mlp.c_proj.weight"].T
        )
    return norm(h, t["transformer.ln_f.weight"], eps) @ t["lm_head.weight"].T


def baichuan_logits(t: Tensors, ids: Tensor, normed: bool = True) -> Tensor:
    h, eps = t["model.embed_tokens.weight"][ids], 1e-6
    for n in range(2):
        p = f"model.layers.{n}."
        x = norm(h, t[p + "input_layernorm.weight"], eps)
        q, k, v = (heads_of(part, 4) for part in torch.split(x @ t[p + "self_attn.W_pack.weight"].T, 64, -1))
        h = h + attention(turned_in_halves(q), turned_in_halves(k), v) @ t[p + "self_attn.o_proj.weight"].T
        x = norm(h, t[p + "post_attention_layernorm.weight"], eps)
        gate, up = (x @ t[f"{p}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        h = h + (silu(gate) * up) @ t[p + "mlp.down_proj.weight"].T
    head = t["lm_head.weight"]
    if normed:  # the model's own code keeps the divided rows in the checkpoint's type
        head = (head / head.norm(dim=1, keepdim=True)).bfloat16().float()
    return norm(h, t["model.norm.weight"], eps) @ head.T


def plain_baichuan_logits(t: Tensors, ids: Tensor) -> Tensor:
    return baichuan_logits(t, ids, normed=False)


def chatglm_logits(t: Tensors, ids: Tensor) -> Tensor:
    h, eps = t["transformer.embedding.word_embeddings.weight"][ids], 1e-5
    for n in range(2):
        p = f"transformer.encoder.layers.{n}."
        x = norm(h, t[p + "input_layernorm.weight"], eps)
        fused = (
            x @ t[p + "self_attention.query_key_value.weight"].T
            + t[p + "self_attention.query_key_value.bias"]
        )
        q, k, v = torch.split(fused, [128, 64, 64], -1)
        q, k, v = heads_of(q, 4), heads_of(k, 2), heads_of(v, 2)
        h = h + attention(turned_in_pairs(q), turned_in_pairs(k), v) @ t[p + "self_attention.dense.weight"].T
        x = norm(h, t[p + "post_attention_layernorm.weight"], eps)
        a, b = (x @ t[p + "mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        h = h + (silu(a) * b) @ t[p + "mlp.dense_4h_to_h.weight"].T
    return (
        norm(h, t["transformer.encoder.final_layernorm.weight"], eps) @ t["transformer.output_layer.weight"].T
    )


Logits = Callable[[Tensors, Tensor], Tensor]
LOGITS: dict[str, Logits] = {
    "qwen": qwen_logits,
    "baichuan2": baichuan_logits,
    "baichuan": plain_baichuan_logits,
    "chatglm": chatglm_logits,
}
EACH = pytest.mark.parametrize("case", ORIGINALS)


def tensors_of(folder: Path) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value.float() for file in files for name, value in load_file(file).items()}


@EACH
def test_the_published_equations_hold(case: str, tmp_path: Path) -> None:
    folder = make_original(case, tmp_path / "model")
    prepared = prepare_base(str(folder), tmp_path / "home", "none", progress=False)
    ids = torch.arange(3, 63)
    expected = LOGITS[case](tensors_of(folder), ids)
    model = load_base(prepared).model.float()
    with torch.no_grad():
        got = model(ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


@EACH
def test_in_4_bits(case: str, tmp_path: Path) -> None:
    folder = make_original(case, tmp_path / "model")
    prepared = prepare_base(str(folder), tmp_path / "home", progress=False)
    assert prepared.path.name == prepared.digest
    assert not list((tmp_path / "home" / "bases").glob("*.dense"))
    base = load_base(prepared)
    dense = load_base(prepare_base(str(folder), tmp_path / "home", "none", progress=False))
    for name, linear in four_bit_linears(base.model).items():
        expected = dense.model.get_submodule(name).weight.float()
        got = dequantized(linear.weight, linear.weight.quant_state).float()
        assert (got - expected).square().mean() < 0.015 * expected.square().mean(), name
    text = "lora rank <|im_end|>"
    assert base.tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert base.tokenizer.chat_template == tiny_tokenizer().chat_template
    outline = outline_of(prepared)
    assert outline.layout == base.layout
    assert outline.eos == {2}


@pytest.mark.parametrize(
    ("flags", "length"), [((True, False), 64), ((False, True), 64), ((False, False), 256)]
)
def test_qwen_is_served_as_far_as_its_switches_do_nothing(
    flags: tuple[bool, bool], length: int, tmp_path: Path
) -> None:
    fields = dict(zip(("use_logn_attn", "use_dynamic_ntk"), flags, strict=True))
    folder = str(make_original("qwen", tmp_path / "model", **fields))
    prepared = prepare_base(folder, tmp_path / "home", "none", progress=False)
    assert outline_of(prepared).context == length
    longer = '{"rope_scaling": {"factor": 2.0, "rope_type": "dynamic"}}'
    if any(flags):
        with pytest.raises(BaseModelError, match=f"more than {length} tokens: .*use_logn_attn"):
            prepare_base(folder, tmp_path / "home", "none", progress=False, hf_overrides=longer)
    else:
        prepared = prepare_base(folder, tmp_path / "home", "none", progress=False, hf_overrides=longer)
        assert outline_of(prepared).context == 2 * length


def test_answers_end_as_in_the_models_own_chat_code(tmp_path: Path) -> None:
    def ends(case: str, name: str, generation_config: Any = None, renamed: str = "") -> frozenset[int]:
        folder = make_original(case, tmp_path / name)
        (folder / "generation_config.json").unlink()
        if generation_config is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation_config))
        if renamed:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                text = (folder / file).read_text().replace("<|im_start|>", renamed)
                (folder / file).write_text(text)
        return outline_of(prepare_base(str(folder), tmp_path / "home", "none", progress=False)).eos

    own = {"chat_format": "chatml", "eos_token_id": 5, "max_window_size": 24000, "top_k": 0, "top_p": 0.8}
    assert ends("qwen", "chat", own) == {5, 2, 1}  # <|endoftext|>, <|im_end|>, <|im_start|>
    assert ends("qwen", "plain", own | {"chat_format": "raw"}) == {5}
    assert ends("baichuan2", "baichuan", {"eos_token_id": 2, "user_token_id": 195}) == {2}
    assert ends("chatglm", "second") == {2}
    assert ends("chatglm", "third", renamed="<|user|>") == {2, 1}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen", {"no_bias": False}, "no_bias False in its config.json. Only models with True"),
    ("qwen", {"rotary_pct": 0.5}, "rotary_pct 0.5"),
    ("qwen", {"kv_channels": 8}, "kv_channels 8"),
    ("qwen", {"seq_length": ...}, "has no seq_length"),
    ("qwen", {"num_attention_heads": 0}, r"cannot be read as the config of a qwen model \(ZeroDivisionError"),
    ("chatglm", {"ffn_hidden_size": "wide"}, "cannot be read as the config of a chatglm model"),
    ("baichuan2", {"max_position_embeddings": ...}, "Baichuan2-13B cannot be served: they have ALiBi"),
    ("baichuan2", {"hidden_size": 5120}, "Baichuan2-13B cannot be served: they have ALiBi"),
    ("baichuan2", {"vocab_size": 64000}, r"\(BaichuanForCausalLM, vocabulary 64000\) is neither"),
    ("baichuan", {"vocab_size": 125696}, r"\(BaiChuanForCausalLM, vocabulary 125696\) is neither"),
    ("baichuan", {"architectures": ["OtherForCausalLM"]}, "output head is not known"),
    ("chatglm", {"rope_ratio": 50}, "rope_ratio 50 in its config.json"),
    ("chatglm", {"add_bias_linear": True}, "add_bias_linear True"),
    ("chatglm", {"multi_query_attention": False}, "multi_query_attention False"),
    ("chatglm", {"pre_seq_len": 128}, "pre_seq_len 128"),
    ("chatglm", {"quantization_bit": 4}, "quantization_bit 4"),
    ("chatglm", {"model_type": "chatglm", "rmsnorm": False}, "rmsnorm False"),
]


@pytest.mark.parametrize(("case", "fields", "message"), REFUSED)
def test_other_variants_are_refused(case: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_original(case, tmp_path / "model", **fields)
    with pytest.raises(BaseModelError, match=message):
        prepare_base(str(folder), tmp_path / "home", progress=False)
    assert not (tmp_path / "home" / "bases").exists()


@EACH
def test_a_tokenizer_that_needs_code_is_refused(case: str, tmp_path: Path) -> None:
    folder = make_original(case, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        BaseModelError, match=r"has no tokenizer.json.*never runs such code. Put a tokenizer.json"
    ):
        prepare_base(str(folder), tmp_path / "home", progress=False)


@EACH
def test_tensors_that_were_not_published_are_refused(case: str, tmp_path: Path) -> None:
    folder = make_original(case, tmp_path / "model")
    file = next(folder.glob("model-00001*"))
    tensors = load_file(file)
    save_file({**tensors, "transformer.visual.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"The tensor transformer\.visual\.weight is not one of a"):
        prepare_base(str(folder), tmp_path / "home", "none", progress=False)
    save_file(tensors, file, metadata={"format": "pt"})
    fused = next(
        name for name in ORIGINALS[case][1] if "_attn.weight" in name or "pack" in name or "key_value" in name
    )
    file = next(one for one in folder.glob("model-*") if fused in load_file(one))
    save_file({**load_file(file), fused: torch.ones(64, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(BaseCorrupt, match=f"{fused} has 64 rows, but config.json says"):
        prepare_base(str(folder), tmp_path / "home", "none", progress=False)


@EACH
def test_adapters_on_the_original_names_are_refused(case: str, tmp_path: Path) -> None:
    folder = make_original(case, tmp_path / "model")
    prepared = prepare_base(str(folder), tmp_path / "home", "none", progress=False)
    adapter = make_peft_adapter(prepared.path, tmp_path / "adapter", r=4, seed=1, target_modules=["q_proj"])
    fused = {"qwen": "c_attn", "chatglm": "query_key_value"}.get(case, "W_pack")
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", fused): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": [fused]}))
    with pytest.raises(
        AdapterError, match=f"where {fused} is q_proj, k_proj and v_proj; train the adapter on"
    ):
        inspect_adapter(adapter, load_base(prepared).layout, Limits(64, 1 << 29))
