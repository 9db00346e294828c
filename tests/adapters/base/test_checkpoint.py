"""A base is quantised once for each content. An incomplete checkpoint is never used."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapters.base import Quantization, checkpoint, find_sites, load_base, prepare_base, source
from adapters.base.weights import BaseWeights
from adapters.errors import BaseCorrupt, BaseModelError
from tests.support.tiny_models import TinyBase, make_tiny_model

PROMPT = torch.arange(3, 23)[None]


@pytest.fixture
def forbid_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(checkpoint, "_convert", fail)


def change_tensors(folder: Path, drop: str | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensor + 0.25 for name, tensor in tensors.items() if name != drop}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(PROMPT).logits
    return result


def test_names_and_digest(llama: Path, tmp_path: Path) -> None:
    prepared = prepare_base(str(llama), tmp_path, progress=False)
    assert (prepared.name, prepared.source) == ("tiny-llama", str(llama))
    assert prepared.path == tmp_path / "bases" / prepared.digest
    assert len(bytes.fromhex(prepared.digest)) == 32


def test_second_start_converts_nothing(
    llama: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_base(str(llama), tmp_path, progress=False)
    request.getfixturevalue("forbid_conversion")
    monkeypatch.setattr("adapters.base.digests.sha256_of", lambda *_: pytest.fail("hashed again"))
    assert prepare_base(str(llama), tmp_path, progress=False) == first


def test_a_copy_elsewhere_shares_the_checkpoint(
    llama: Path, copied: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    first = prepare_base(str(llama), tmp_path, progress=False)
    request.getfixturevalue("forbid_conversion")
    assert prepare_base(str(copied), tmp_path, progress=False).path == first.path


@pytest.mark.parametrize("what", ["weights", "template"])
def test_other_content_is_another_base(llama: Path, copied: Path, tmp_path: Path, what: str) -> None:
    before = prepare_base(str(copied), tmp_path, progress=False)
    if what == "weights":
        change_tensors(copied)
    else:
        (copied / "chat_template.jinja").write_text("{{ messages }}")
    after = prepare_base(str(copied), tmp_path, progress=False)
    assert before.digest == prepare_base(str(llama), tmp_path, progress=False).digest
    assert after.digest != before.digest
    assert after.path != before.path


def test_equals_quantising_on_load(llama: Path, tmp_path: Path) -> None:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    fresh = AutoModelForCausalLM.from_pretrained(llama, quantization_config=nf4, device_map={"": "cpu"})
    prepared = prepare_base(str(llama), tmp_path, progress=False)
    assert torch.equal(logits(load_base(prepared).model), logits(fresh.eval()))
    # a checkpoint that transformers loads without our loader is equal too
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(prepared.path)), logits(fresh))


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_in_4_bits_is_a_linear_of_its_own_that_transformers_loads(
    tied: bool, tmp_path: Path
) -> None:
    source = make_tiny_model("llama", tmp_path / "tiny", tie_word_embeddings=tied)
    prepared = prepare_base(str(source), tmp_path, head_quantization="nf4", progress=False)
    with_bf16 = prepare_base(str(source), tmp_path, progress=False)
    assert prepared.digest != with_bf16.digest
    base, plain = load_base(prepared), load_base(with_bf16)
    assert (base.layout.tied, base.layout.head_apart) == (tied, tied)
    assert (plain.layout.tied, plain.layout.head_apart) == (tied, False)
    assert base.layout.head == plain.layout.head
    assert "lm_head" not in base.layout.sites
    assert torch.equal(base.model.model.embed_tokens.weight, plain.model.model.embed_tokens.weight)
    dense, expected = BaseWeights(base.model, base.layout).dense("lm_head"), plain.model.lm_head.weight
    assert 0.01 < ((dense - expected).float().std() / expected.float().std()).item() < 0.2
    theirs = AutoModelForCausalLM.from_pretrained(prepared.path)
    assert torch.equal(logits(base.model), logits(theirs))


def test_a_head_that_cannot_be_quantised_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="leave out one of the two options"):
        prepare_base(str(llama), tmp_path, quantization="none", head_quantization="nf4", progress=False)
    odd = make_tiny_model("llama", tmp_path / "odd", vocab_size=521)
    with pytest.raises(BaseModelError, match="multiple of 32, but this base has 521"):
        prepare_base(str(odd), tmp_path, head_quantization="nf4", progress=False)


def test_a_4bit_checkpoint_keeps_the_head_that_it_has(llama: Path, tmp_path: Path) -> None:
    heads: tuple[Quantization, ...] = ("none", "nf4")
    for there in heads:
        made = prepare_base(str(llama), tmp_path, head_quantization=there, progress=False).path
        for wanted in heads:
            prepared = prepare_base(str(made), tmp_path, head_quantization=wanted, progress=False)
            assert prepared.path == made
            if wanted == there:
                load_base(prepared)
            else:
                with pytest.raises(
                    BaseModelError, match=f"quantised with --head-quantization {there}, not {wanted}"
                ):
                    load_base(prepared)


def test_loaded_base_is_frozen_and_knows_its_sites(tiny_base: TinyBase) -> None:
    base = tiny_base("llama")
    sites = base.layout.sites
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert len(sites) == 2 * 7
    assert "lm_head" not in sites
    assert "lm_head" in base.layout.modules
    down = sites["model.layers.1.mlp.down_proj"]
    assert (down.in_features, down.out_features) == (128, 64)
    assert base.model.lm_head.weight.dtype == torch.bfloat16
    assert base.model.get_submodule(down.name).weight.dtype == torch.uint8
    assert base.model.name_or_path == base.layout.name_or_path == base.prepared.source
    assert base.tokenizer.chat_template


def test_conv1d_sites_are_named_by_features() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    site = find_sites(model)["transformer.h.0.attn.c_attn"]
    assert (site.in_features, site.out_features) == (32, 96)


def test_unquantised_is_served_in_place(llama: Path, tmp_path: Path) -> None:
    prepared = prepare_base(str(llama), tmp_path, quantization="none", progress=False)
    base = load_base(prepared)
    assert prepared.path == llama
    assert prepared.digest != prepare_base(str(llama), tmp_path, progress=False).digest
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(base.model), logits(AutoModelForCausalLM.from_pretrained(llama)))


def test_a_4bit_checkpoint_is_used_as_it_is(llama: Path, tmp_path: Path) -> None:
    four_bit = prepare_base(str(llama), tmp_path, progress=False).path
    assert prepare_base(str(four_bit), tmp_path, progress=False).path == four_bit
    with pytest.raises(BaseModelError, match="quantised already"):
        prepare_base(str(four_bit), tmp_path, quantization="none", progress=False)


def test_a_missing_tensor_is_refused(copied: Path, tmp_path: Path) -> None:
    change_tensors(copied, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(BaseCorrupt, match=r"lacks 1 of the model's tensors.*layers\.1\.mlp\.up_proj"):
        prepare_base(str(copied), tmp_path, progress=False)
    assert not [path for path in (tmp_path / "bases").iterdir() if path.is_dir()]


def test_truncated_weights_are_refused(copied: Path, tmp_path: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BaseCorrupt, match="cannot be read"):
        prepare_base(str(copied), tmp_path, progress=False)


@pytest.mark.parametrize(("progress", "terminal"), [(True, True), (True, False), (False, True)])
def test_bars_are_shown_on_a_terminal_if_asked_for(
    llama: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    progress: bool,
    terminal: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    load_base(prepare_base(str(llama), tmp_path, progress=progress), progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("Loading weights" in err) == (progress and terminal)


def test_an_interrupted_conversion_leaves_no_checkpoint(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # the weights are written by then, the tokenizer is not
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", die)
        with pytest.raises(KeyboardInterrupt):
            prepare_base(str(llama), tmp_path, progress=False)
    folders = [path.suffix for path in (tmp_path / "bases").iterdir() if path.is_dir()]
    assert folders == [".partial"]  # the next try continues with it
    load_base(prepare_base(str(llama), tmp_path, progress=False))


def test_files_of_a_killed_process_are_removed(llama: Path, tmp_path: Path) -> None:
    digest = prepare_base(str(llama), tmp_path, progress=False).digest
    target = tmp_path / "bases" / digest
    partial = target.rename(target.with_suffix(".partial"))
    (partial / "stray").touch()
    again = prepare_base(str(llama), tmp_path, progress=False)
    assert not partial.exists()
    assert not (again.path / "stray").exists()


def test_two_concurrent_starts_convert_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads take the place of processes: flock excludes any two open files."""
    conversions: list[Path] = []
    convert, both_are_here = checkpoint._convert, threading.Barrier(2)

    def resolved(*arguments: Any) -> source.Source:
        found = source.resolve(*arguments)
        both_are_here.wait(10)
        return found

    def counted(files: Path, *arguments: Any) -> None:
        conversions.append(files)
        time.sleep(0.1)  # without the lock, the other thread would reach this point in that time
        convert(files, *arguments)

    monkeypatch.setattr(checkpoint, "resolve", resolved)
    monkeypatch.setattr(checkpoint, "_convert", counted)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(prepare_base, str(llama), tmp_path, progress=False) for _ in range(2)]
    assert runs[0].result() == runs[1].result()
    assert conversions == [llama]


def test_an_error_in_the_models_code_fetches_no_files_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")

    def from_pretrained(*_: object, **__: object) -> None:
        raise NotImplementedError("\"normal_kernel_cpu\" not implemented for 'Byte'")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(BaseModelError, match=r"a LlamaForCausalLM \(llama\), cannot be loaded") as raised:
        prepare_base(str(folder), tmp_path, progress=False)
    assert not isinstance(raised.value, BaseCorrupt)
    assert "fetch it again" not in str(raised.value)
