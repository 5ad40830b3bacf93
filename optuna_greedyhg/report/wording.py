"""How the numbers of a comparison are put into words, on a page and in a terminal."""

from __future__ import annotations

import math

from optuna_greedyhg.report.comparison import JUDGED_BY, LABELS, MethodRow, Statistics
from optuna_greedyhg.report.statistics import LEVEL, Spread, alike, smallest_wilcoxon_p


def shown_scores(statistics: Statistics) -> list[str]:
    """The scores shown: validation accuracy, which chose nothing and judges nothing, is left to the file."""
    return [score for score in statistics.rows[0].scores if score != "val_accuracy"]


def spread_lines(score: str, x: Spread) -> tuple[str, str]:
    """The median with the quartiles, and the mean with its confidence interval."""
    quartiles = f"[{number(score, x.first_quartile)}, {number(score, x.third_quartile)}]"
    return f"{number(score, x.median)} {quartiles}", plus_minus(score, x.mean, x.half_width)


def against_cells(score: str, row: MethodRow) -> list[str]:
    """Wins, ties and losses of a method, the mean difference, and the p-values of both tests."""
    paired = row.against[score]
    return [
        f"{paired.wins}/{paired.ties}/{paired.losses}",
        plus_minus(score, paired.mean_difference, paired.half_width),
        p_value(row.p_corrected[score]),
        p_value(paired.p_wilcoxon),
    ]


def anytime_cells(score: str, row: MethodRow, n_seeds: int) -> list[str]:
    """When a method came to what the reference has ended with, and its mean along the way, alone and compared."""
    x = row.anytime[score]
    versus = (
        ["", ""]
        if x.against is None
        else [
            f"{x.against.wins}/{x.against.ties}/{x.against.losses}",
            plus_minus(score, x.against.mean_difference, x.against.half_width),
        ]
    )
    return [
        "never" if math.isinf(x.reached) else f"{100 * x.reached:.0f}%",
        f"{x.n_reached} of {n_seeds}",
        number(score, x.mean.median),
        *versus,
    ]


def anytime_note(statistics: Statistics) -> str:
    """What the numbers about the way are."""
    return (
        f"Reached is the share of the budget, in the median over seeds, after which the best so far was for good no "
        f"worse than what {statistics.reference} has ended with on that seed, and on how many seeds it ever was. The "
        "mean is that of the best so far along the way, from where all methods have found something to the end of the "
        "budget; won/tied/lost and the difference are to the reference's."
    )


def against_note(statistics: Statistics) -> str:
    """What the p-values are, and are not, with so few seeds."""
    n = statistics.n_seeds
    return (
        f"Wins, ties and losses count seeds, of which there are {n}. The difference is the mean one, with its 95% "
        "confidence interval by Student's t. p is that of the paired t-test, after Holm's correction for the number "
        "of methods. Wilcoxon's signed-rank test, not corrected, cannot go below "
        f"{smallest_wilcoxon_p(n):.3g} with {n} seeds."
    )


def ranking_note(statistics: Statistics) -> str:
    """What the average ranks tell apart."""
    ranking = statistics.ranking
    ordered = sorted(ranking.average_ranks.items(), key=lambda item: item[1])
    ranks = ", ".join(f"{name} {rank:.2f}" for name, rank in ordered)
    friedman = "" if math.isnan(ranking.p_friedman) else f" Friedman's test: p = {p_value(ranking.p_friedman)}."
    groups = " and ".join(f"({', '.join(group)})" for group in alike(ranking))
    return (
        f"Average ranks by {LABELS[JUDGED_BY]} over {ranking.n_blocks} seeds: {ranks}.{friedman} Nemenyi's critical "
        f"difference at the level {LEVEL} is {ranking.critical_difference:.2f}, which does not tell apart: "
        f"{groups or 'none'}."
    )


def p_value(p: float) -> str:
    """A p-value, or a dash where there is none."""
    return "–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def plus_minus(score: str, mean: float, half_width: float) -> str:
    """A mean and the half-width of its interval, of which two digits say enough."""
    if math.isnan(half_width) or score.endswith("accuracy"):
        return f"{number(score, mean)} ± {number(score, half_width)}"
    # Less than that is rounding, in which sums of equal numbers differ.
    decimals = 3 if half_width < 1e-9 else min(max(1 - math.floor(math.log10(half_width)), 0), 6)
    return f"{round(mean, decimals) + 0.0:.{decimals}f} ± {half_width:.{decimals}f}".replace("-", "−")


def number(score: str, x: float) -> str:
    """A score or a difference of scores, or a dash where there is none."""
    if math.isnan(x):
        return "–"
    return (f"{100 * x:.1f}%" if score.endswith("accuracy") else f"{x:#.3g}").replace("-", "−")
