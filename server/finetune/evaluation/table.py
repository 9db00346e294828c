"""Formats an evaluation as a table."""

from __future__ import annotations

from server.finetune.evaluation.result import Evaluation, Scores


def table(evaluation: Evaluation) -> str:
    """One line for each model, and a line that says how many rows and tokens were used."""
    models = {"base": evaluation.base, "adapter": evaluation.adapter, "replaced": evaluation.replaced}
    lines = [f"{'':10}{'loss':>8}{'exact match':>13}{'token F1':>10}"]
    lines += [_line(name, scores) for name, scores in models.items() if scores is not None]
    lines.append(
        f"loss over {evaluation.tokens} tokens of {evaluation.rows} rows; exact match and token F1 over "
        f"{evaluation.short_rows} rows with a short reference; {evaluation.seconds:.1f} s"
    )
    return "\n".join(lines)


def _line(name: str, scores: Scores) -> str:
    return f"{name:10}{scores.loss:8.4f}{_share(scores.exact_match):>13}{_share(scores.token_f1):>10}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
