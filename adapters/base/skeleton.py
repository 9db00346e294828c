"""A base without weights. Its weights pass through it in parts: read, converted and quantised.

transformers renames, joins and splits tensors when it loads and saves some architectures. Here its own
functions do that for one part at a time, so each tensor gets the bits that it gets when the whole model is
loaded and saved. ``Skeleton.check`` tells beforehand whether the parts together give the same tensors.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict

from adapters.base.experts import MATRICES, Nf4Experts, nf4_experts
from adapters.base.head import quantize_head
from adapters.base.headers import Header
from adapters.base.quantizer import Nf4Config, bitsandbytes_nf4
from adapters.base.reading import load_whole
from adapters.base.unpack import four_bit_linears
from adapters.errors import BaseCorrupt

_META = torch.device("meta")


class CannotStream(Exception):
    """The parts of this model would not give what the whole model gives. The text is the reason."""


def load_skeleton(folder: Path) -> Any:
    """The model of a transformers folder that is not quantised, on the meta device.

    Raises:
        BaseCorrupt: tensors are missing, or have other shapes than the config says.
    """
    model = load_whole(folder, quantization_config=Nf4Config(), device_map={"": "meta"})
    # transformers checks the shapes of all tensors that are not quantised
    for name, linear in four_bit_linears(model).items():
        expected = (linear.out_features, linear.in_features)
        _check_shape(folder, f"{name}.weight", linear.weight, expected)
    for name, experts in nf4_experts(model).items():
        for matrix, (outputs, inputs) in experts.shapes.items():
            packed = (experts.num_experts, outputs, inputs // 2)
            _check_shape(folder, f"{name}.{matrix} in 4 bits", getattr(experts, matrix), packed)
    return model


def _check_shape(folder: Path, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise BaseCorrupt(
            f"{folder}: {name} is {list(tensor.shape)}, but config.json says {list(expected)}; "
            "fetch the model again."
        )


class Skeleton:
    """A model on the meta device, with 4-bit linears.

    Args:
        model: what ``load_skeleton`` returned.
        headers: the tensors of its folder.
        head: ``nf4`` also quantises the output head.

    Raises:
        CannotStream: weights that are tied are in the files twice.
    """

    def __init__(self, model: Any, headers: Mapping[str, Header], head: str) -> None:
        self.model, self._headers = model, headers
        self._check_ties()
        self._is_sparse = bool(nf4_experts(model))
        if not self._is_sparse:  # then bitsandbytes alone can load it
            model.config.quantization_config = bitsandbytes_nf4()
        self._tied_head: str | None = self._quantize_head() if head == "nf4" else None
        self._used = self.model._weight_conversions
        self._mapping = get_model_conversion_mapping(self.model, None, self.model.hf_quantizer)
        self._dtypes = self.model._get_dtype_plan(torch.bfloat16)
        self._empty = _parameters(self.model)
        for parameter in self._empty.values():  # else bitsandbytes gets the mark as an argument
            parameter.__dict__.pop("_is_hf_initialized", None)
        self._kept = self._kept_names()

    def check(self, parts: Iterable[Collection[str]]) -> list[frozenset[str]]:
        """The parameters that each part fills, by name.

        Args:
            parts: names of the tensors in the files, of each part.

        Raises:
            CannotStream: the parts do not fill each parameter once, or would be saved under other names.
        """
        filled = [self._fill(part, _META) for part in parts]
        self._forget()
        names = [name for part in filled for name in part]
        if len(names) != len(set(names)) or set(names) != self._kept:
            different = sorted(set(names) ^ self._kept) or sorted(
                name for name in names if names.count(name) > 1
            )
            raise CannotStream(f"its tensors are converted across layers (first: {different[0]})")
        apart = {name: shape for part in filled for name, shape in self._saved_shapes(part).items()}
        if apart != self._saved_shapes(self._kept):
            raise CannotStream("its tensors are joined across layers when they are saved")
        return filled

    def convert(self, keys: Collection[str], device: torch.device) -> dict[str, Tensor]:
        """Read and quantise the tensors ``keys``: what a checkpoint has to contain, in memory of its own."""
        try:
            names = self._fill(keys, device)
            state = {name: value for name, value in self.model.state_dict().items() if _owner(name) in names}
            saved = self._in_original_format(state)
            return {name: value.detach().cpu().contiguous().clone() for name, value in saved.items()}
        finally:
            self._forget()

    def stored_bytes(self, names: Iterable[str]) -> int:
        """Bytes of the parameters ``names`` in the checkpoint, roughly: scales count as 1/16 of a weight."""
        return sum(self._stored(name) for name in names)

    def quantized_weights(self, name: str) -> int:
        """How many weights of the parameter ``name`` are quantised: all or none."""
        parameter = self._empty[name]
        if hasattr(parameter, "quant_state"):
            return parameter.numel()
        path, _, leaf = name.rpartition(".")
        is_packed = leaf in MATRICES and isinstance(self.model.get_submodule(path), Nf4Experts)
        return 2 * parameter.numel() if is_packed else 0

    def save_configs(self, folder: Path) -> None:
        """Write the configs that transformers writes beside the weights of a whole model."""
        quantizer, self.model.hf_quantizer = self.model.hf_quantizer, None  # with it, state_dict is ignored
        with TemporaryDirectory(dir=folder) as temporary:
            self.model.save_pretrained(temporary, state_dict={})
            for file in Path(temporary).glob("*.json"):
                os.replace(file, folder / file.name)
        self.model.hf_quantizer = quantizer

    def _fill(self, keys: Iterable[str], device: torch.device) -> frozenset[str]:
        """Load the tensors ``keys`` into the model. Returns the parameters that have weights now."""
        with ExitStack() as stack:
            opened = {
                file: stack.enter_context(safe_open(file, "pt"))
                for file in {self._headers[key].file for key in keys}
            }
            slices = {key: opened[self._headers[key].file].get_slice(key) for key in keys}
            config = LoadStateDictConfig(
                device_map={"": device},
                dtype=torch.bfloat16,
                dtype_plan=self._dtypes,
                hf_quantizer=self.model.hf_quantizer,
                weight_mapping=self._mapping,
            )
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, config, None)
        self.model._weight_conversions = self._used
        if info.conversion_errors:
            raise CannotStream(f"a conversion failed: {next(iter(info.conversion_errors.values()))}")
        filled = (self._empty.keys() - info.missing_keys) & self._kept
        return frozenset(filled | self._fill_tied_head(filled))

    def _quantize_head(self) -> str | None:
        """Make the head a 4-bit linear. If it shared the embedding's weight, return the embedding's name."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        tied = head.weight is embedding.weight
        quantize_head(self.model)
        self.model.get_output_embeddings().source_cls = nn.Linear  # as transformers marks its own
        names = (name for name, module in self.model.named_modules() if module is embedding)
        return f"{next(names)}.weight" if tied else None

    def _fill_tied_head(self, filled: Collection[str]) -> set[str]:
        if self._tied_head not in filled:
            return set()
        head = self.model.get_output_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is head)
        weight = self.model.get_input_embeddings().weight.detach()
        head.weight = type(head.weight)(weight, **self._empty[f"{name}.weight"].__dict__).to(weight.device)
        return {f"{name}.weight"}

    def _forget(self) -> None:
        """Give back the memory of what was loaded."""
        for name, empty in self._empty.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if getattr(module, leaf) is not empty:
                setattr(module, leaf, empty)
            if hasattr(module, "quant_state"):
                module.quant_state = None

    def _check_ties(self) -> None:
        for target, source in self.model.all_tied_weights_keys.items():
            if self.model.get_parameter_or_buffer(target) is not self.model.get_parameter_or_buffer(source):
                raise CannotStream(f"{target} and {source} are tied, but both are in the files")

    def _kept_names(self) -> frozenset[str]:
        """The parameters that a checkpoint has: without those that are tied or never saved."""
        state = {name: value for name, value in self.model.state_dict().items() if name in self._empty}
        for name in self.model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        return frozenset(remove_tied_weights_from_state_dict(state, self.model))

    def _saved_shapes(self, names: Iterable[str]) -> dict[str, torch.Size]:
        state = {name: self._empty[name].detach() for name in names}
        return {name: value.shape for name, value in self._in_original_format(state).items()}

    def _in_original_format(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # The original format has each expert by itself. Packed experts stay together.
        if self._is_sparse:
            return state
        saved: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        return saved

    def _stored(self, name: str) -> int:
        parameter = self._empty[name]
        if hasattr(parameter, "quant_state"):
            return parameter.numel() // 2 + parameter.numel() // 32
        return parameter.nbytes


def _owner(name: str) -> str:
    """The parameter that a tensor of a state dict belongs to: 4-bit weights have more tensors beside them."""
    weight, dot, _ = name.partition(".weight.")
    return f"{weight}.weight" if dot else name


def _parameters(model: Any) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
