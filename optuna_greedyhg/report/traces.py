"""The lines, dots and arrows that figures are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from optuna_greedyhg.report import theme
from optuna_greedyhg.report.history import Finish, number, score_of
from optuna_greedyhg.report.scale import Scale
from optuna_greedyhg.report.trajectory import Column, moves

SYMBOLS = {"circle": "complete", "circle-open": "pruned", "x-thin-open": "failed, or worse than shown"}
_HOVER_PARAMS = 12


def markers(name: str, points: Sequence[Finish], scale: Scale, color: str) -> go.Scatter:
    """The trials of a study, each at its score and the cost until then."""
    symbols = [
        "x-thin-open" if not scale.holds(p.score) else "circle-open" if p.trial.state == TrialState.PRUNED else "circle"
        for p in points
    ]
    return go.Scatter(
        name=theme.text(name),
        x=[point.cost for point in points],
        y=[scale.shown(point.score) for point in points],
        mode="markers",
        marker={"symbol": symbols, "color": color, "size": 8, "opacity": 0.6, "line": {"color": color, "width": 1.5}},
        legendgroup=name,
        showlegend=False,
        hovertext=[_hover(name, point) for point in points],
        hoverinfo="text",
        cliponaxis=False,
    )


def best_so_far(name: str, points: Sequence[Finish], color: str, dash: str) -> go.Scatter:
    """The step line of the best score."""
    return go.Scatter(
        name=theme.text(name),
        x=[point.cost for point in points],
        y=[score_of(point.best) for point in points if point.best is not None],
        mode="lines",
        line={"color": color, "width": 2.5, "shape": "hv", "dash": dash},
        legendgroup=name,
        hoverinfo="skip",
    )


def test_of_best(name: str, points: Sequence[Finish], attribute: str, color: str) -> go.Scatter:
    """The dashed step line of an attribute of the best trial."""
    return go.Scatter(
        name=f"{theme.text(name)}, test",
        x=[point.cost for point in points],
        y=[number(point.best.user_attrs.get(attribute)) for point in points if point.best is not None],
        mode="lines",
        line={"color": color, "width": 1.5, "shape": "hv", "dash": "dash"},
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )


def legend_key(label: str, symbol: str | None = None) -> go.Scatter:
    """An entry of the legend that belongs to no study: what a symbol means, or, without one, a dashed line."""
    dashed: dict[str, Any] = {"mode": "lines", "line": {"color": theme.NEUTRAL, "dash": "dash", "width": 1.5}}
    marker = {"symbol": symbol, "color": theme.NEUTRAL, "size": 8, "line": {"color": theme.NEUTRAL, "width": 1.5}}
    style = dashed if symbol is None else {"mode": "markers", "marker": marker}
    return go.Scatter(name=label, x=[None], y=[None], hoverinfo="skip", **style)


def _hover(name: str, point: Finish) -> str:
    trial = point.trial
    params = [f"{theme.text(key)} = {theme.text(value)}" for key, value in trial.params.items()]
    more = [f"and {len(params) - _HOVER_PARAMS} more"] if len(params) > _HOVER_PARAMS else []
    lines = [
        f"<b>{theme.text(name)}, trial {trial.number}</b>, {trial.state.name.lower()}",
        f"score {theme.text(score_of(trial) if trial.value is None else trial.value)}",
        *params[:_HOVER_PARAMS],
        *more,
        f"cost until then {theme.short(point.cost)}",
    ]
    return "<br>".join(lines)


def line(x: Sequence[float | None], y: Sequence[float | None], color: str, **settings: Any) -> go.Scatter:
    """A plain line; gaps where y is ``None``."""
    style = {"mode": "lines", "line_color": color, "line_width": 2, "hovertemplate": "%{y:.5g}<extra></extra>"}
    return go.Scatter(x=x, y=y, **{**style, **settings})


def band(x: Column, low: Column, median: Column, high: Column, color: str, opacity: float = 0.22) -> list[go.Scatter]:
    """A line of medians in a band between two quantiles."""
    red, green, blue = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    edge = {"line_width": 0, "hoverinfo": "skip", "hovertemplate": None}
    words = "%{y:.4g}, from %{customdata[0]:.4g} to %{customdata[1]:.4g}<extra></extra>"
    return [
        line(x, low, color, **edge),
        line(x, high, color, **edge, fill="tonexty", fillcolor=f"rgba({red}, {green}, {blue}, {opacity})"),
        line(x, median, color, customdata=list(zip(low, high, strict=True)), hovertemplate=words),
    ]


def mark(x: float | None, y: float | None, color: str, symbol: str = "circle-open") -> go.Scatter:
    """A single ring, or another symbol."""
    size = 13 if symbol == "star" else 9
    marker = {"symbol": symbol, "color": color, "size": size, "line": {"color": color, "width": 2}}
    return go.Scatter(x=[x], y=[y], mode="markers", marker=marker, hoverinfo="skip", cliponaxis=False)


def arrow(trial: FrozenTrial, name: str, color: str) -> go.Scatter:
    """A trial's way in one scalar, from seed to refined."""
    seed, refined = moves(trial)[name]
    head = "circle-open" if seed == refined else "arrow"
    words = f"<b>trial {trial.number}</b>, {trial.state.name.lower()}<br>{theme.text(name)} {seed:.4g} → {refined:.4g}"
    return go.Scatter(
        x=[seed, refined],
        y=[score_of(trial)] * 2,
        mode="lines+markers",
        line={"color": color, "width": 1.5},
        marker={
            "symbol": ["circle-open", head],
            "size": [5, 11],
            "angleref": "previous",
            "opacity": 1.0,
            "color": color,
            "line": {"color": color, "width": 1.2},
        },
        opacity=0.5 if trial.state == TrialState.PRUNED else 0.9,
        hovertext=f"{words}<br>score {theme.text(score_of(trial))}",
        hoverinfo="text",
    )
