"""Figures of methods on several seeds: anytime curves, and average ranks with their critical difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from optuna_greedyhg.report import theme, traces
from optuna_greedyhg.report.runs import Run
from optuna_greedyhg.report.scale import Scale
from optuna_greedyhg.report.statistics import Ranking
from optuna_greedyhg.report.trajectory import Column

Axis = Literal["cost", "seconds"]

_PANELS = {"val_loss": "Best validation loss", "test_loss": "Test loss of the same"}
_MAX_POINTS = 200


def anytime(runs: Mapping[str, Sequence[Run]], axis: Axis, *, unit: float = 1.0, end: float | None = None) -> go.Figure:
    """The best validation loss so far, and the test loss at it, against cost or time.

    A line is the median over seeds, a band lies between the quartiles; both begin where every seed has a value.

    Args:
        runs: By method, one for each seed.
        axis: Cost, or seconds.
        unit: What cost is divided by: that of a full training.
        end: Where lines end, in the axis's own unit before the division; by default with the longest run.
    """
    colors, styles = theme.colors(runs), theme.dashes(runs)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.09, subplot_titles=[*_PANELS.values()])
    longest = max((getattr(run, axis) for its in runs.values() for run in its), default=0.0)
    for row, score in enumerate(_PANELS, start=1):
        medians, last = list[float | None](), list[float | None]()
        for name, its in runs.items():
            x, low, median, high = quartiles(its, axis, score, longest if end is None else end)
            medians, last = medians + median, last + median[-1:]
            band = traces.band([at / unit for at in x], low, median, high, colors[name], opacity=0.12)
            for trace in band:
                trace.update(line_shape="hv", legendgroup=name, name=theme.text(name), showlegend=False)
            band[-1].update(showlegend=row == 1, line_dash=styles[name])
            figure.add_traces(band, row, 1)
        figure.update_yaxes(row=row, **_scale(medians, last).axis())
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    title = "Cost, in full trainings" if axis == "cost" else "Seconds"
    figure.update_xaxes(title_text=title, row=2)
    figure.update_xaxes(rangemode="tozero", fixedrange=True)
    return figure.update_layout(
        template=theme.TEMPLATE, height=640, legend={"y": 1.06}, margin_t=72, hovermode="closest"
    )


def _scale(medians: Column, last: Column) -> Scale:
    """A range without the outliers of the beginning, and with the end of every line."""
    scale = Scale.around([y for y in medians if y is not None])
    return replace(scale, high=max([scale.high, *(y for y in last if y is not None)]))


def quartiles(runs: Sequence[Run], axis: Axis, score: str, end: float) -> tuple[list[float], Column, Column, Column]:
    """Where a step line over seeds has its steps, and the first quartile, the median and the third quartile there.

    It has at most two hundred steps, and is empty if a run has no value.
    """
    curves = [[(getattr(p, axis), p.scores[score]) for p in run.curve if score in p.scores] for run in runs]
    if not curves or not all(curves):
        return [], [], [], []
    start = max(curve[0][0] for curve in curves)
    steps = sorted({x for curve in curves for x, _ in curve if start <= x <= end} | {start, max(start, end)})
    if len(steps) > _MAX_POINTS:
        steps = [steps[round(i * (len(steps) - 1) / (_MAX_POINTS - 1))] for i in range(_MAX_POINTS)]
    at_steps = np.array([_held(curve, steps) for curve in curves])
    low, median, high = (q.tolist() for q in np.quantile(at_steps, [0.25, 0.5, 0.75], axis=0))
    return steps, low, median, high


def _held(curve: Sequence[tuple[float, float]], steps: Sequence[float]) -> list[float]:
    """The last value of a curve at or before each step."""
    index = np.searchsorted([x for x, _ in curve], steps, side="right") - 1
    return [curve[i][1] for i in index]


def average_ranks(ranking: Ranking, colors: Mapping[str, str]) -> go.Figure:
    """A dot for each method's average rank, with a bar as wide as Nemenyi's critical difference.

    Two methods whose bars do not overlap differ at the level 0.05.
    """
    ordered = sorted(ranking.average_ranks.items(), key=lambda item: -item[1])
    figure = go.Figure(layout={"template": theme.TEMPLATE, "height": 110 + 34 * len(ordered), "showlegend": False})
    half = 0.0 if math.isnan(ranking.critical_difference) else ranking.critical_difference / 2
    for name, rank in ordered:
        figure.add_trace(
            go.Scatter(
                x=[rank],
                y=[theme.text(name)],
                mode="markers",
                marker={"color": colors.get(name, theme.NEUTRAL), "size": 11},
                error_x={"type": "constant", "value": half, "color": colors.get(name, theme.NEUTRAL), "thickness": 2},
                hovertemplate=f"{rank:.2f}<extra></extra>",
                cliponaxis=False,
            )
        )
    figure.update_xaxes(title_text="Average rank, 1 is the best", fixedrange=True, dtick=1)
    figure.update_yaxes(fixedrange=True, showgrid=False)
    return figure
