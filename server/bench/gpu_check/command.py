"""The command: flags, the sections in order, a table after each section, the report at the end. No torch."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from server.bench.errors import BenchError
from server.bench.gpu_check import report
from server.bench.gpu_check.rows import Result
from server.bench.gpu_check.sections import SECTIONS, Section
from server.bench.gpu_check.supervisor import run as run_sections

_DESCRIPTION = """\
Test and measure the GPU path: kernels, attention, whole models with and without CUDA graphs, decoding
compared with its roofline, loading adapters, and PEFT on the same GPU. If a package is missing, the report
names the parts that were skipped. The exit code is 1 if a result is wrong. A figure that misses its target
is reported and does not change the exit code.

Without a GPU everything runs with small sizes on the CPU, with Triton's interpreter. This tests the check
itself.
"""


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the kind ``gpu-check`` to ``manylora bench``."""
    parser = kinds.add_parser(
        "gpu-check",
        help="test and measure the GPU path",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the report as JSON")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append the output of libraries to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the decode steps")
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=540.0,
        metavar="SECONDS",
        help="the time for all sections (default: %(default)s)",
    )
    parser.add_argument(
        "--sections",
        type=_sections,
        default=SECTIONS,
        metavar="NAMES",
        help=f"run only these sections, separated by commas: {', '.join(s.name for s in SECTIONS)}",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the sections. Returns the exit code: 1 if a section failed, else 0."""
    for file in (arguments.output, arguments.plot, arguments.log):
        if file is not None and not file.absolute().parent.is_dir():
            raise BenchError(
                f"{file} cannot be written: {file.absolute().parent} is not a folder; create it first"
            )
    began = time.monotonic()
    results: list[Result] = []

    def done(result: Result) -> None:
        """Write the results so far, so that a later failure cannot lose them."""
        results.append(result)
        print(report.section_text(result), flush=True)
        _write(arguments, results, time.monotonic() - began)

    run_sections(arguments.sections, arguments.budget, done, arguments.log)
    print(report.targets_text(results))
    if arguments.plot:
        print(_plot(results, arguments.plot))
    failed = [result.title for result in results if result.status == "failed"]
    print(f"\nFAILED: {'; '.join(failed)}" if failed else "\nnothing failed")
    return 1 if failed else 0


def _write(arguments: argparse.Namespace, results: Sequence[Result], seconds: float) -> None:
    if arguments.output:
        document = report.document(results, arguments.budget, seconds)
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")


def _plot(results: Sequence[Result], file: Path) -> str:
    """Draw the plot. Returns the line to print: the file, or why there is no plot."""
    if find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed"
    from server.bench.gpu_check.plot import draw

    found = [row for result in results if result.name == "device" for row in result.table("gpu")]
    title = str(found[0]["name"]) if found else "no GPU: a tiny model on the CPU"
    return f"plot: {file}" if draw(results, title, file) else "no plot: no decode step was measured"


def _sections(text: str) -> tuple[Section, ...]:
    """The named sections, in the order in which they run."""
    known = {section.name for section in SECTIONS}
    names = {name.strip() for name in text.split(",")}
    if not names <= known:
        unknown = ", ".join(sorted(names - known))
        raise argparse.ArgumentTypeError(
            f"there is no section {unknown!r}; sections: {', '.join(sorted(known))}"
        )
    return tuple(section for section in SECTIONS if section.name in names)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0")
    return seconds
