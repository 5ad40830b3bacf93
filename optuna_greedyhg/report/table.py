"""The comparison of methods as an HTML table."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from optuna_greedyhg.report import theme
from optuna_greedyhg.report.summary import MethodSummary

# The columns of every table: the group that they stand in, their heading, and the key in MethodSummary.as_json(). A
# task's own diagnostics stand between the two.
_FOUND = (
    ("", "Trials", "n_trials"),
    ("Validation", "Loss", "val_loss"),
    ("Validation", "Accuracy", "val_accuracy"),
    ("Test", "Loss", "test_loss"),
    ("Test", "Accuracy", "test_accuracy"),
)
_SPENT = (
    ("", "Seconds", "seconds"),
    ("Cost, in examples", "Train gradients", "n_train_gradients"),
    ("Cost, in examples", "Val. gradients", "n_val_gradients"),
    ("Cost, in examples", "Products", "n_products"),
    ("Cost, in examples", "Evaluations", "n_evaluations"),
    ("Cost, in examples", "Total", "cost"),
)
_BEST = {"val_loss": min, "test_loss": min, "val_accuracy": max, "test_accuracy": max}


def summary_table(summaries: Sequence[MethodSummary], colors: Mapping[str, str]) -> str:
    """One row a method; the best of each column of scores is marked, if there is a choice.

    Counts are shortened, and are given in full where the pointer rests on them. What a method lacks is a dash.

    Args:
        summaries: The rows.
        colors: The color of each method's lines in the figures, by name; others get none.
    """
    rows = [summary.as_json() for summary in summaries]
    diagnostics = dict.fromkeys(key for summary in summaries for key in summary.diagnostics)
    columns = [*_FOUND, *(("Diagnostics", key.replace("_", " "), key) for key in diagnostics), *_SPENT]
    best = {key: _best(key, [row[key] for row in rows]) for key in _BEST}
    body = []
    for row in rows:
        color = colors.get(row["name"])
        swatch = "" if color is None else f'<span class="swatch" style="background: {color}"></span>'
        name = html.escape(str(row["name"]))
        cells = "".join(_cell(key, row.get(key), best.get(key)) for _, _, key in columns)
        body.append(f'<tr><th scope="row" title="{name}">{swatch}{name}</th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Comparison of methods"><table>\n'
        f"<thead>{_head([(group, heading) for group, heading, _ in columns])}</thead>\n"
        "<tbody>" + "\n".join(body) + "</tbody>\n</table></div>"
    )


def _head(columns: Sequence[tuple[str, str]]) -> str:
    groups = ["<th></th>"]
    for group, members in groupby(columns, key=lambda column: column[0]):
        n = len(list(members))
        groups.append(
            f'<th colspan="{n}" scope="colgroup"><span>{html.escape(group)}</span></th>' if group else "<td></td>" * n
        )
    headings = "".join(f'<th scope="col">{html.escape(heading)}</th>' for _, heading in columns)
    return f'<tr>{"".join(groups)}</tr>\n<tr><th scope="col">Method</th>{headings}</tr>'


def _best(key: str, values: Sequence[object]) -> float | None:
    finite = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    return _BEST[key](finite) if len(finite) > 1 else None


def _cell(key: str, value: object, best: float | None) -> str:
    if value is None:
        return '<td class="none">–</td>'
    if not isinstance(value, (int, float)):
        return f"<td>{html.escape(str(value))}</td>"
    if key == "cost" or (key.startswith("n_") and key != "n_trials"):
        return f'<td title="{value:,.0f}">{theme.short(value)}</td>'
    marked = ' class="best"' if best is not None and value == best else ""
    return f"<td{marked}>{_number(key, value)}</td>"


def _number(key: str, value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if key == "seconds":
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    if key.endswith("accuracy"):
        return f"{value:.4f}"
    return (str(value) if isinstance(value, int) else f"{value:#.4g}").replace("-", "−")
