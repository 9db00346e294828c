"""Writes docs/bases.md, and reads its rows.

python -m tests.support.bases_page
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from adapters.kernels.cpu import isa
from tests.support.base_rows import YES, Row, row_of
from tests.support.tiny_configs import MODEL_TYPES

PAGE = Path(__file__).parents[2] / "docs" / "bases.md"
REGENERATE = "python -m tests.support.bases_page"

_HEAD = """# Bases

What manylora does with each class of causal language models in transformers {version}.

A test makes the tables. `tests/support/base_rows.py` builds a tiny random model of each class, with one layer
of each kind that its config has, and starts the server with it in 4 bits on a CPU. The check at the start
compares it with transformers' own forward pass, as for every base (see [operations.md](operations.md)).
The first column is `model_type` in a base's `config.json`.

`tests/test_bases.py` fails if a row changes. If the new row is right, write the page again:

```sh
{regenerate}
```
"""
_SERVED = """
## Served

- **blocks**: "fused" means manylora's own fused step, on a CPU with AVX512-BF16 or on a GPU. Otherwise
  transformers' blocks run, with manylora's attention and LoRA.
- **LoRA targets**: the linears that adapters may change. Experts that transformers keeps in one tensor are
  not among them.
- **all-linear**: whether an adapter that PEFT made with `target_modules="all-linear"` is accepted. If it is
  not, name the linears of the column before.
- **trained**: whether `manylora train` with its defaults trains what can be served, and computes the rows of
  a batch apart.

"""
_REFUSED = """
## Refused

The start ends with an error that names the class and the reason.

"""
_NOT_TRIED = """
## Not tried

No tiny model of these classes can be built.

"""
_CONVERTED = """
## Converted

The code of these models is not in transformers but in their repositories, and manylora never runs such
code. Their weights are converted, tensor by tensor, to a class of transformers that computes the same.
`tests/adapters/base/test_converted.py` compares tiny models in the published files with the published
equations.

- Qwen of the first generation (model type `qwen`) becomes Qwen2. If `use_logn_attn` or `use_dynamic_ntk` is
  on, it is served up to `seq_length` tokens. Beyond, the original computes something that Qwen2 does not.
- Baichuan-7B and Baichuan2-7B (`baichuan`) become Llama. The 13B models have ALiBi and are refused.
- ChatGLM2 and ChatGLM3 (`chatglm`) become GLM. Models with `rope_ratio` (the 32k variants) are refused.

The folder needs safetensors weights and a `tokenizer.json` with the model's vocabulary and token ids.
The tokenizers in those repositories need code too. An answer also ends at the tokens that end it in their
chat code (`<|im_end|>` for Qwen, `<|user|>` for ChatGLM3).

Adapters need the names of the new class (`q_proj`). Those that PEFT trained on the old names
(`c_attn`, `W_pack`, `query_key_value`) are refused; train them again.
"""


def page_of(rows: Iterable[Row]) -> str:
    """The whole page."""
    rows = sorted(rows, key=lambda row: row.model_type)
    served = [row for row in rows if row.served]
    refused = [row for row in rows if not row.served and row.tried]
    others = [row for row in rows if not row.served and not row.tried]
    blocks = ["model type", "class", "blocks", "LoRA targets", "all-linear", "trained"]
    reasons = ["model type", "class", "reason"]
    return "".join(
        [
            _HEAD.format(version=version("transformers"), regenerate=REGENERATE),
            *(_SERVED, _table(blocks, [_cells(row) for row in served])),
            *(_REFUSED, _table(reasons, [_cells(row) for row in refused])),
            *(_NOT_TRIED, _table(reasons, [_cells(row) for row in others])),
            _CONVERTED,
        ]
    )


def lines_of(page: str) -> dict[str, str]:
    """The table lines of a page, by model type."""
    return {found[1]: found[0] for found in re.finditer(r"^\| `([^`]+)` \|.*$", page, re.M)}


def line_of(row: Row) -> str:
    return _line(_cells(row))


def _cells(row: Row) -> Sequence[str]:
    begin = f"`{row.model_type}`", row.architecture
    if not row.served:
        return *begin, row.reason
    return *begin, row.served, row.targets, _answer(row.all_linear), _answer(row.trained)


def _answer(text: str) -> str:
    return text if text.startswith(YES) else f"no: {text}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"{line}\n" for line in [_line(head), _line(["---"] * len(head)), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rows_of(page: str) -> dict[str, Row]:
    """The rows of a page, by model type."""
    rows = {}
    for model_type, line in lines_of(page).items():
        cells = [cell.strip() for cell in line.strip("|").split("|")][2:]
        if len(cells) == 1:
            rows[model_type] = Row(model_type, reason=cells[0])
        else:
            served, targets, *answers = cells
            all_linear, trained = (answer.removeprefix("no: ") for answer in answers)
            rows[model_type] = Row(model_type, served, "", targets, all_linear, trained)
    return rows


def main() -> None:
    """Write the page. Arguments are the model types whose rows are made again; without any, all are."""
    if isa() != "avx512bf16":
        sys.exit("The page needs a CPU with AVX512-BF16 and the native kernels.")
    rows = rows_of(PAGE.read_text("utf-8")) if PAGE.exists() else {}
    for model_type in sys.argv[1:] or MODEL_TYPES:
        with tempfile.TemporaryDirectory() as home:
            rows[model_type] = row_of(model_type, Path(home))
        print(line_of(rows[model_type]), file=sys.stderr)
    PAGE.write_text(page_of(rows[model_type] for model_type in MODEL_TYPES), encoding="utf-8")


if __name__ == "__main__":
    main()
