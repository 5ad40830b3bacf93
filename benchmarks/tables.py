"""Results as tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

_GROWTH_HEADS = {
    "horizon": "T", "width": "P, the number of weights", "n_hyperparameters": "H", "batch": "examples in a batch",
    "n_lanes": "lanes"
}  # fmt: skip


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Cells that are written already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def of_columns(columns: Columns, rows: Sequence[Row]) -> str:
    """One line a row; each column makes its cell of the row."""
    return table([*columns], ([cell(row) for cell in columns.values()] for row in rows))


def peers(rows: Sequence[Row]) -> str:
    """The methods of ``peers.py`` on one problem; what fails says so in place of its numbers."""
    return of_columns(_PEERS, rows)


def setting(cell: Row) -> str:
    """The problem of one table of ``peers.py``."""
    return f"{cell['model']}, T = {cell['horizon']}, batches of {cell['n_examples']}"


def growth(rows: Sequence[Row]) -> str:
    """The series of ``growth.py``."""
    return of_columns(_GROWTH, rows)


def steps(result: Row) -> str:
    """The ratios of ``step_cost.py``, one line each."""
    models = [name for name, its in result.items() if isinstance(its, dict) and _FLOORS[0][0] in its]
    lines = ([ratio, floor, *(f"{result[model][ratio]:.2f}" for model in models)] for ratio, floor in _FLOORS)
    return table(["time of an outer step", "floor", *models], lines)


def gpu(rows: Sequence[Row]) -> str:
    """The problems of ``gpu.py``."""
    return of_columns(_GPU, rows)


def updated(page: str, name: str, content: str) -> str:
    """The page with what is between the marks of this name written anew.

    Raises:
        ValueError: If a mark is missing.
    """
    begin, end = f"<!-- {name}: written by benchmarks -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"The page must have the lines {begin!r} and {end!r}, between which the tables go.")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def axis_title(axis: str) -> str:
    return _GROWTH_HEADS[axis]


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else format(row[key], form)


def _formula(row: Row) -> str:
    if "error" in row:
        kind, _, message = row["error"].partition(": ")
        return message if kind == "NotImplementedError" else f"fails: {row['error']}"
    return f"{row['formula_error']:.0e}" + ("" if row["right"] else ", **off**")


def _quantity(value: float, quantity: str) -> str:
    return f"{1e3 * value:.3g} ms" if quantity == "seconds" else f"{value / 1e6:.3g} MB"


def _milliseconds(name: str) -> Callable[[Row], str]:
    return lambda row: format(row["milliseconds_of_a_step"][name], ".2f")


_FLOORS = (
    ("greedy / both gradients", "1.33"),
    ("greedy with a tenth of validation / training", "1.77"),
    ("terminal / training", "2.67"),
    ("stride of 5 / both gradients", "0.67"),
    ("forward mode / both gradients", ""),
    ("spectral / greedy", ""),
)
_GPU: Columns = {
    "ms a step": lambda row: row["problem"],
    "training gradient": _milliseconds("training"),
    "and validation gradient": _milliseconds("both gradients"),
    "t1t2": _milliseconds("t1t2"),
    "greedy": _milliseconds("greedy"),
    "greedy, recorded": _milliseconds("greedy, recorded"),
    "terminal": _milliseconds("terminal"),
    "terminal, recorded": _milliseconds("terminal, recorded"),
    "greedy: peak MB at T = 10, 100": lambda row: ", ".join(
        format(row["peak_mb"][f"greedy, T = {horizon}"], ".0f") for horizon in (10, 100)
    ),
}
_PEERS: Columns = {
    "method": lambda row: row["method"],
    "estimator": lambda row: row.get("estimator", ""),
    "time / plain training": _number("ratio", ".2f"),
    "time / ours": _number("ratio_to_ours", ".2f"),
    "seconds": _number("seconds", ".3f"),
    "peak MB": _number("peak_mb", ".0f"),
    "cosine with exact": _number("cosine", ".3f"),
    "error in its formula": _formula,
}
_GROWTH: Columns = {
    "estimator": lambda row: row["estimator"],
    "of": lambda row: row["quantity"],
    "against": lambda row: axis_title(row["axis"]),
    "from": lambda row: f"{row['x'][0]}: {_quantity(row['y'][0], row['quantity'])}",
    "to": lambda row: f"{row['x'][-1]}: {_quantity(row['y'][-1], row['quantity'])}",
    "should be": lambda row: "a + b·x" if row["line"] == "proportional" else "flat",
    "largest distance": lambda row: f"{row['distance']:.1%}",
}
