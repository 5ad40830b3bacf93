"""How figures look: colors for the colour-blind, and a template that reads on light and on dark pages.

Nothing has a background, and all text and lines are of a gray in the middle, so that a figure fits wherever it is put.
A page that knows its own colors may override them by style sheet.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from itertools import cycle

import plotly.graph_objects as go

# Okabe & Ito, 2008, without black and yellow, which vanish on one of the two backgrounds; the clearest come first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
NEUTRAL = "#7a7f88"
_GRID = "rgba(128, 132, 140, 0.22)"

TEMPLATE = go.layout.Template(
    layout=go.Layout(
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": NEUTRAL},
        colorway=PALETTE,
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        margin={"l": 56, "r": 16, "t": 32, "b": 48},
        hoverlabel={"bgcolor": "#22262e", "bordercolor": NEUTRAL, "font": {"color": "#f2f3f5"}, "align": "left"},
        legend={"orientation": "h", "x": 0.0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        xaxis={
            "gridcolor": _GRID,
            "zeroline": False,
            "automargin": True,
            "title": {"standoff": 10, "font": {"size": 13}},
        },
        yaxis={
            "gridcolor": _GRID,
            "zeroline": False,
            "automargin": True,
            "title": {"standoff": 8, "font": {"size": 13}},
        },
    )
)


def colors(names: Iterable[str]) -> dict[str, str]:
    """A color for each name, in their order, so that all figures of the same studies agree.

    There are six. The seventh name starts over, and needs another style of line, see :func:`dashes`.
    """
    return dict(zip(names, cycle(PALETTE), strict=False))


def dashes(names: Iterable[str]) -> dict[str, str]:
    """A style of line for each name, which tells names of the same color apart."""
    return {name: "solid" if k < len(PALETTE) else "longdashdot" for k, name in enumerate(names)}


def text(value: object, length: int = 60) -> str:
    """A value as plain text in a figure, whose labels are read as HTML: six digits, cut to a length, escaped."""
    plain = f"{value:.6g}" if isinstance(value, float) else str(value)
    return html.escape(plain if len(plain) <= length else plain[: length - 1] + "…", quote=False)


def short(count: float) -> str:
    """A count in three digits: 950, 12.3k, 4.56M."""
    for power, suffix in ((9, "G"), (6, "M"), (3, "k")):
        if abs(count) >= 0.9995 * 10**power:
            return f"{count / 10**power:#.3g}".rstrip(".") + suffix
    return f"{count:.0f}"


def note(figure: go.Figure, words: str) -> go.Figure:
    """The figure with words in the middle instead of axes, for when there is nothing to draw."""
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(text=text(words, 200), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return figure
