"""The page of a comparison of methods on several seeds."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from optuna_greedyhg.report import theme
from optuna_greedyhg.report.comparison import LABELS, Statistics
from optuna_greedyhg.report.comparison_figures import anytime, average_ranks
from optuna_greedyhg.report.html import figure_html, whole_page
from optuna_greedyhg.report.runs import Run
from optuna_greedyhg.report.statistics import Spread
from optuna_greedyhg.report.wording import (
    against_cells,
    against_note,
    anytime_cells,
    anytime_note,
    ranking_note,
    shown_scores,
    spread_lines,
)


def comparison_page(
    title: str,
    intro: str,
    runs: Sequence[Run],
    statistics: Statistics,
    *,
    full_training: float,
    budget: float,
    footer: str = "",
) -> str:
    """A page with scores, comparisons with the reference, anytime curves and average ranks.

    Args:
        title: Heading.
        intro: What was compared and how.
        runs: All of them.
        statistics: What they say together.
        full_training: The cost of one, in which costs are shown.
        budget: The cost at which curves end.
        footer: Small print.
    """
    by_method = {row.name: [run for run in runs if run.method == row.name] for row in statistics.rows}
    colors = theme.colors(by_method)
    parts = [
        "<h2>Scores</h2>",
        _scores_table(statistics, colors, full_training),
        f'<p class="note">{html.escape(_SCORES_NOTE)}</p>',
        f"<h2>Against {html.escape(statistics.reference)}</h2>",
        _against_table(statistics, colors),
        f'<p class="note">{html.escape(against_note(statistics))}</p>',
        "<h2>What was found at what cost</h2>",
        '<div class="pair">',
        figure_html(
            "cost", anytime(by_method, "cost", unit=full_training, end=budget), _CURVE_CAPTION, with_plotly=True
        ),
        figure_html("seconds", anytime(by_method, "seconds"), _SECONDS_CAPTION),
        "</div>",
        _anytime_table(statistics, colors),
        f'<p class="note">{html.escape(anytime_note(statistics))}</p>',
    ]
    if len(statistics.rows) > 1:
        figure, caption = average_ranks(statistics.ranking, colors), f"{ranking_note(statistics)} {_RANKS_CAPTION}"
        parts += [
            "<h2>Average ranks</h2>",
            figure_html("ranks", figure, caption),
        ]
    return whole_page(title, intro, parts, footer)


def _scores_table(statistics: Statistics, colors: Mapping[str, str], full_training: float) -> str:
    scores = shown_scores(statistics)
    header = ["Trials", *(LABELS[score].capitalize() for score in scores), "Full trainings", "Seconds", "Average rank"]
    lines = []
    for row in statistics.rows:
        low, high = row.n_trials
        cells = [
            f"{low}" if low == high else f"{low}–{high}",
            *(_spread_cell(score, row.scores[score]) for score in scores),
            f"{row.cost.median / full_training:,.1f}",
            f"{row.seconds.median:,.1f}",
            f"{statistics.ranking.average_ranks[row.name]:.2f}",
        ]
        lines.append((row.name, cells))
    return _table(header, lines, colors)


def _spread_cell(score: str, x: Spread) -> str:
    quartiles, interval = spread_lines(score, x)
    return f'{quartiles}<br><span class="note">{interval}</span>'


def _against_table(statistics: Statistics, colors: Mapping[str, str]) -> str:
    lines = [
        ("" if k else row.name, [LABELS[score].capitalize(), *against_cells(score, row)])
        for row in statistics.rows
        for k, score in enumerate(shown_scores(statistics) if row.against else ())
    ]
    header = ["Score", "Won/tied/lost", "Difference ± 95%", "p", "Wilcoxon's p"]
    return _table(header, lines, colors) if lines else "<p>There is no other method.</p>"


def _anytime_table(statistics: Statistics, colors: Mapping[str, str]) -> str:
    lines = [
        ("" if k else row.name, [LABELS[score].capitalize(), *anytime_cells(score, row, statistics.n_seeds)])
        for row in statistics.rows
        for k, score in enumerate(row.anytime)
    ]
    return _table(["Score", "Reached", "Seeds", "Mean on the way", "Won/tied/lost", "Difference ± 95%"], lines, colors)


def _table(header: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]], colors: Mapping[str, str]) -> str:
    head = "".join(f'<th scope="col">{html.escape(words)}</th>' for words in header)
    body = []
    for name, cells in lines:
        swatch = f'<span class="swatch" style="background: {colors[name]}"></span>' if name else ""
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f'<tr><th scope="row" title="{html.escape(name)}">{swatch}{html.escape(name)}</th>{row}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Comparison of methods"><table>\n'
        f'<thead><tr><th scope="col">Method</th>{head}</tr></thead>\n<tbody>' + "\n".join(body) + "</tbody>\n"
        "</table></div>"
    )


_SCORES_NOTE = (
    "Median over seeds and [quartiles]; below it the mean ± the half-width of its 95% confidence interval by Student's "
    "t. Scores are those of the best evaluation by validation loss within the budget; test data chose nothing."
)
_CURVE_CAPTION = "Line: median over seeds. Band: quartiles. Both begin where every seed has a value."
_RANKS_CAPTION = "Bars are as wide as the critical difference: methods whose bars overlap are not told apart."
_SECONDS_CAPTION = "The same against wall-clock time inside trials, that of drawing their seeds included."
