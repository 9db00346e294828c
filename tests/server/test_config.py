"""Each option is a flag and a variable. Flags have precedence. Errors name the option."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from server.config import ConfigError, ServerConfig, from_args, from_options
from server.config.options import OPTIONS, Option

KEY_FILE = Path(tempfile.mkdtemp()) / "keys"
KEY_FILE.write_text("from-file\n")

# For each option, a text that is not its default, and the value of the text.
OTHER: dict[str, tuple[str, Any]] = {
    "--home": ("/srv/m", Path("/srv/m")),
    "--base": ("org/model", "org/model"),
    "--quantization": ("none", "none"),
    "--head-quantization": ("nf4", "nf4"),
    "--hf-overrides": ('{"b": 1,  "a": {}}', '{"a": {}, "b": 1}'),
    "--rope-scaling": ('{"factor": 2}', '{"factor": 2}'),
    "--generation-config": ("none", "none"),
    "--served-model-name": ("gpt-x", ("gpt-x",)),
    "--device": ("cpu", "cpu"),
    "--adapter-dir": ("/srv/a", Path("/srv/a")),
    "--max-loras": ("8", 8),
    "--max-lora-rank": ("32", 32),
    "--lora-pool-rows": ("512", 512),
    "--lora-extra-memory": ("64MiB", 64 << 20),
    "--lora-host-memory": ("2GiB", 2 << 30),
    "--max-lora-bytes": ("1M", 1 << 20),
    "--ignore-adapter-templates": ("true", True),
    "--max-model-len": ("2048", 2048),
    "--max-num-seqs": ("32", 32),
    "--max-num-batched-tokens": ("1024", 1024),
    "--kv-cache-memory": ("256MiB", 256 << 20),
    "--gpu-memory-utilization": ("0.5", 0.5),
    "--block-size": ("32", 32),
    "--allow-special-tokens": ("true", True),
    "--enable-prefix-caching": ("false", False),
    "--enforce-eager": ("true", True),
    "--async-scheduling": ("true", True),
    "--max-queued-requests": ("9", 9),
    "--threads": ("7", 7),
    "--host": ("0.0.0.0", "0.0.0.0"),
    "--port": ("0", 0),
    "--api-key": ("k1", ("k1",)),
    "--admin-key": ("a1", "a1"),
    "--metrics-key": ("m1", "m1"),
    "--api-key-file": (str(KEY_FILE), KEY_FILE),
    "--admin-key-file": (str(KEY_FILE), KEY_FILE),
    "--metrics-key-file": (str(KEY_FILE), KEY_FILE),
    "--shutdown-timeout": ("1.5", 1.5),
    "--max-body-bytes": ("2048", 2048),
    "--allowed-hosts": ("*.Example.com", ("*.example.com",)),
    "--limit-concurrency": ("9", 9),
    "--timeout-keep-alive": ("9", 9),
    "--keep-alive-max-requests": ("9", 9),
    "--max-url-bytes": ("1KiB", 1024),
    "--max-header-bytes": ("8KiB", 8192),
    "--max-header-count": ("99", 99),
    "--header-timeout": ("1.5", 1.5),
    "--body-timeout": ("1.5", 1.5),
    "--write-timeout": ("1.5", 1.5),
    "--min-data-rate": ("2KiB", 2048),
    "--max-training-jobs": ("3", 3),
    "--train-threads": ("5", 5),
    "--train-yield": ("0.25", 0.25),
    "--train-nice": ("5", 5),
    "--train-gpu": ("1", "1"),
    "--train-gpu-memory": ("12GiB", 12 << 30),
    "--max-file-bytes": ("1MiB", 1 << 20),
    "--log-level": ("debug", "debug"),
    "--log-format": ("text", "text"),
}
EACH = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)


def value_of(config: ServerConfig, option: Option) -> Any:
    owner = config if option.group == "state" else getattr(config, option.group)
    return getattr(owner, option.field)


def typed_as(option: Option, text: str) -> list[str]:
    if option.metavar is not None:
        return [option.flag, text]
    return [option.flag if text == "true" else option.flag.replace("--", "--no-", 1)]


@EACH
def test_flag_and_variable_have_the_same_meaning(option: Option) -> None:
    text, value = OTHER[option.flag]
    typed = typed_as(option, text)
    assert value_of(from_args(typed, {}), option) == value
    assert value_of(from_args([], {option.variable: text}), option) == value
    assert value_of(from_args([], {}), option) != value


@EACH
def test_the_flag_wins(option: Option) -> None:
    text, value = OTHER[option.flag]
    typed = typed_as(option, text)
    environ = {option.variable: option.default or "loser"}
    assert value_of(from_args(typed, environ), option) == value


def test_every_field_has_an_option() -> None:
    config = from_args([], {})
    declared = {option.target for option in OPTIONS}
    groups = [field.name for field in fields(config) if field.name != "home"]
    assert {f"{group}.{field.name}" for group in groups for field in fields(getattr(config, group))} | {
        "state.home"
    } == declared


@pytest.mark.parametrize(
    ("flag", "text", "remedy"),
    [
        ("--port", "65536", "from 0 to 65535"),
        ("--port", "80.5", "whole number"),
        ("--max-loras", "0", "from 1"),
        ("--max-lora-rank", "", "whole number"),
        ("--lora-pool-rows", "many", "or auto"),
        ("--quantization", "int8", "nf4, none"),
        ("--kv-cache-memory", "1 GiB extra", "512MiB"),
        ("--kv-cache-memory", "-1", "512MiB"),
        ("--kv-cache-memory", "0", "at least 1"),
        ("--gpu-memory-utilization", "0", "above 0"),
        ("--gpu-memory-utilization", "1.01", "at most 1"),
        ("--shutdown-timeout", "-1", "0 or more"),
        ("--shutdown-timeout", "nan", "0 or more"),
        ("--shutdown-timeout", "inf", "0 or more"),
        ("--enable-prefix-caching", "maybe", "true or false"),
        ("--served-model-name", "a b", "letters"),
        ("--home", " ", "empty"),
        ("--hf-overrides", "rope_theta=9", "a JSON object such as"),
        ("--rope-scaling", "[4]", "a JSON object such as"),
        ("--train-gpu", "0,1", "a GPU's number or UUID"),
        ("--train-gpu-memory", "half", "or auto"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(flag: str, text: str, remedy: str) -> None:
    option = next(option for option in OPTIONS if option.flag == flag)
    with pytest.raises(ConfigError, match=remedy) as raised:
        from_args([], {option.variable: text})
    if option.several:
        return
    assert str(raised.value).startswith(f"{option.variable}={text!r}: ")
    if option.metavar:
        with pytest.raises(ConfigError, match=remedy) as raised:
            from_args([f"{flag}={text}"], {})
        assert str(raised.value).startswith(f"{flag} {text!r}: ")


def test_keys_are_never_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        from_args(["--admin-key", "my secret"], {})
    assert "secret" not in str(raised.value)
    assert "sesame" not in repr(from_args(["--api-key", "sesame", "--admin-key", "sesame"], {}))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("2G", 2 << 30),
        ("2gib", 2 << 30),
        ("1.5K", 1536),
        ("3MB", 3_000_000),
        ("7B", 7),
        ("1 TiB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert from_args(["--kv-cache-memory", text], {}).engine.kv_cache_memory == size


def test_several_values() -> None:
    assert from_args(["--api-key", "a", "--api-key", "b"], {}).http.api_keys == ("a", "b")
    assert from_args([], {"MANYLORA_API_KEY": "a, b,"}).http.api_keys == ("a", "b")


def test_rope_scaling_is_an_override() -> None:
    rope = '{"rope_type": "yarn", "factor": 4.0}'
    both = ["--hf-overrides", '{"rope_theta": 1e6}', "--rope-scaling", rope]
    expected = '{"rope_scaling": {"factor": 4.0, "rope_type": "yarn"}, "rope_theta": 1000000.0}'
    assert from_args(both, {}).model.overrides == expected
    options = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "hf_overrides": {"rope_theta": 1e6}}
    assert from_options(options, {}).model.overrides == expected
    assert from_args([], {}).model.overrides == ""
    assert from_args(["--hf-overrides", "{}"], {}).model.overrides == ""
    for name in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ConfigError, match=f"--rope-scaling: --hf-overrides has {name} too"):
            from_args(["--hf-overrides", f'{{"{name}": {{}}}}', "--rope-scaling", rope], {})


def test_auto_is_resolved_if_possible() -> None:
    config = from_args(["--home", "h", "--max-loras", "2"], {})
    assert config.adapters.folder == Path("h/adapters")
    assert config.adapters.pool_rows == 64  # an adapter of the largest rank must fit
    assert from_args(["--max-loras", "10"], {}).adapters.pool_rows == 160
    assert from_args([], {}).adapters.pool_rows is None  # the device decides
    assert config.engine.threads >= 1
    assert (config.engine.max_model_len, config.engine.max_num_batched_tokens) == (None, None)
    assert config.engine.kv_cache_memory is None


def test_values_must_fit_each_other() -> None:
    with pytest.raises(ConfigError, match="--max-lora-rank 64"):
        from_args(["--lora-pool-rows", "63"], {})
    with pytest.raises(ConfigError, match="--max-num-seqs 64"):
        from_args(["--max-num-batched-tokens", "63"], {})


def test_key_files_add_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the web shop\nk1\n\n  k2  \n")
    assert from_args(["--api-key", "k0", "--api-key-file", str(file)], {}).http.api_keys == ("k0", "k1", "k2")
    for name in ("admin", "metrics"):
        http = from_args([f"--{name}-key-file", str(KEY_FILE)], {}).http
        assert getattr(http, f"{name}_key") == "from-file"


@pytest.mark.parametrize("flag", ["--api-key-file", "--admin-key-file", "--metrics-key-file"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        (b"", "has none"),
        (b"# none\n\n", "has none"),
        (b"k1\nse cret\n", "line 2 must be visible ASCII"),
        ("schlüssel".encode(), "visible ASCII"),
    ],
)
def test_a_key_file_that_gives_no_key_does_not_open_the_server(
    tmp_path: Path, flag: str, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{flag} .*{reason}") as error:
        from_args([flag, str(file)], {})
    assert "cret" not in str(error.value)


@pytest.mark.parametrize("flag", ["--admin-key", "--metrics-key"])
def test_there_is_one_admin_key(tmp_path: Path, flag: str) -> None:
    (tmp_path / "two").write_text("a\nb\n")
    with pytest.raises(ConfigError, match=f"{flag}-file"):
        from_args([f"{flag}-file", str(tmp_path / "two")], {})
    with pytest.raises(ConfigError, match=f"{flag}-file"):
        from_args([f"{flag}-file", str(KEY_FILE), flag, "a"], {})
