"""``--generation-config``: the sampling defaults of requests."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from server.config import ConfigError, from_args
from server.engine.sampling_defaults import sampling_defaults
from server.engine.sampling_params import SAMPLING_RANGES, SamplingDefaults, SamplingParams
from tests.support.running_engine import build
from tests.support.tiny_models import make_tiny_model

FILE = "generation_config.json"
MAKERS: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}


def _base(**fields: Any) -> Any:
    return SimpleNamespace(model=SimpleNamespace(generation_config=GenerationConfig(**fields)))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_bases_generation_config_is_used_unless_disabled(quantization: str, tmp_path: Path) -> None:
    """Also after quantising, and without ``do_sample``. vLLM ignores ``do_sample`` too."""
    folder = make_tiny_model("llama", tmp_path / "model")
    own = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(own | MAKERS | {"max_new_tokens": 77}))
    flags = ["--quantization", quantization]
    served = build(folder, tmp_path, *flags).info.defaults
    assert served == SamplingDefaults(**MAKERS, max_tokens=77)
    assert build(folder, tmp_path, *flags, "--generation-config", "none").info.defaults == SamplingDefaults()


def test_a_generation_config_without_sampling_fields_changes_nothing() -> None:
    assert sampling_defaults("auto", _base(eos_token_id=2)) == SamplingDefaults()
    assert sampling_defaults("auto", _base(eos_token_id=2)).given() == {}


def test_a_folder_with_another_file(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"min_p": 0.1, "temperature": 1}')
    found = sampling_defaults(str(tmp_path), _base(**MAKERS))
    assert found == SamplingDefaults(temperature=1.0, min_p=0.1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read there"),
        ("{", "cannot be read there"),
        ("[]", "not a JSON object"),
        ('{"temperature": 3}', "temperature is 3, and must be from 0.0 to 2.0"),
        ('{"temperature": NaN}', "temperature is nan"),
        ('{"top_k": 0.5}', "top_k is 0.5, which is not a number of its kind"),
        ('{"top_p": true}', "top_p is True"),
        ('{"repetition_penalty": 1e-38}', "repetition_penalty is 1e-38"),
        ('{"max_new_tokens": 0}', "max_tokens is 0"),
    ],
)
def test_values_that_a_request_could_not_set_are_refused_at_the_start(
    content: str | None, reason: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigError, match=reason):
        sampling_defaults(str(tmp_path), _base())


def test_every_range_is_a_default_and_a_parameter() -> None:
    fields = SAMPLING_RANGES.keys() | {"max_tokens"}
    assert fields == set(SamplingDefaults.__slots__)
    assert fields <= set(SamplingParams.__slots__)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("auto", "auto"), ("NONE", "none"), ("vllm", "none"), ("some/Folder", "some/Folder")],
)
def test_the_flag(typed: str, meant: str) -> None:
    assert from_args(["--generation-config", typed], {}).model.generation_config == meant
    assert from_args([], {}).model.generation_config == "auto"
