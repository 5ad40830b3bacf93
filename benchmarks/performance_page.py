"""Writes the tables of docs/performance.md anew, and its picture, from the results in benchmarks/results.

    python benchmarks/performance_page.py

The picture is taken by Chrome or Chromium.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import tables
from plotly.subplots import make_subplots

from optuna_greedyhg.report import theme
from optuna_greedyhg.report.browser import write_png
from optuna_greedyhg.report.html import figure_html, whole_page

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURE = DOCS / "performance.md", DOCS / "performance.png"

Result = dict[str, Any]


def main() -> None:
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    panels = figure(_read("growth")["rows"])
    write_png(
        PICTURE,
        whole_page(
            "How the cost of a hypergradient grows", "", [figure_html("growth", panels, CAPTION, with_plotly=True)]
        ),
    )


CAPTION = "Points are measured, lines are fitted: a + b·x, or flat. Both axes are logarithmic."


def updated(page: str) -> str:
    """The page with the tables of all results that there are written anew."""
    for name, written in {"peers": peers, "step_cost": step_cost, "growth": growth, "gpu": gpu}.items():
        if (RESULTS / f"{name}.json").exists():
            page = tables.updated(page, name, written(_read(name)))
    return page


def peers(result: Result) -> str:
    """One table for each network, horizon and batch, and what they were made with."""
    rows = result["rows"]
    (versions, machine), *others = ((row["result"]["versions"], _machine(row["made_by"])) for row in rows)
    assert all(other == (versions, machine) for other in others), "the rows must be of one machine and its packages"
    parts = [f"**{tables.setting(row['cell'])}**\n\n{tables.peers(row['result']['methods'])}" for row in rows]
    named = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    return "\n\n".join([*parts, f"{named}; {machine}."])


def step_cost(result: Result) -> str:
    """The ratios beside their floors, and what they were made with."""
    return f"{tables.steps(result)}\n\n{_machine(result)}:\n\n    {result['command']}"


def growth(result: Result) -> str:
    """The table of all series, and what it was made with."""
    return f"{tables.growth(result['rows'])}\n\n{_machine(result)}."


def gpu(result: Result) -> str:
    """Milliseconds of a step, and megabytes, of every problem; and what they were made with."""
    problems = {name: its for name, its in result.items() if isinstance(its, dict) and "peak_mb" in its}
    table = tables.gpu([{"problem": name, **its} for name, its in problems.items()])
    made_with = f"torch {result['versions']['torch']}, {result['machine']['gpu']}"
    return f"{table}\n\nT = {result['horizon']}; {made_with}:\n\n    {result['command']}"


def figure(rows: Sequence[Result]) -> go.Figure:
    """Seconds above, bytes below; one column for each axis."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    scale: dict[str, Callable[[float], float]] = {"seconds": lambda y: 1e3 * y, "bytes": lambda y: y / 1e6}
    panels = make_subplots(rows=2, cols=len(axes), shared_xaxes=True, horizontal_spacing=0.05, vertical_spacing=0.06)
    color = theme.colors(dict.fromkeys(row["estimator"] for row in rows))
    for row in rows:
        name, place = row["estimator"], {"row": [*scale].index(row["quantity"]) + 1, "col": axes.index(row["axis"]) + 1}
        first = not any(trace.name == name for trace in panels.data)
        for y, style in (
            ("y", {"mode": "markers", "showlegend": first}),
            ("expected", {"mode": "lines", "showlegend": False}),
        ):
            values = [scale[row["quantity"]](value) for value in row[y]]
            panels.add_trace(
                go.Scatter(x=row["x"], y=values, name=name, legendgroup=name, marker_color=color[name], **style),
                **place,
            )
    for k, axis in enumerate(axes, start=1):
        panels.update_xaxes(title_text=tables.axis_title(axis), row=2, col=k)
        panels.update_xaxes(type="log", tickvals=rows[[row["axis"] for row in rows].index(axis)]["x"], col=k)
    panels.update_yaxes(type="log", dtick="D2")
    panels.update_yaxes(title_text="ms", row=1, col=1)
    panels.update_yaxes(title_text="MB", row=2, col=1)
    return panels.update_layout(template=theme.TEMPLATE, height=640)


def _read(name: str) -> Result:
    result: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def _machine(result: Result) -> str:
    machine = result["machine"]
    return f"torch {result['versions']['torch']}, {machine['processor']}, {machine['threads']} thread(s)"


if __name__ == "__main__":
    main()
