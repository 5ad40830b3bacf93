"""Statistics of paired runs: every method has been run on the same seeds of a task, and there are few of them.

Sources: J. Demšar, "Statistical comparisons of classifiers over multiple data sets", JMLR 2006 (Friedman's test,
Nemenyi's critical difference); S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
_SAME = 1e-9  # relative difference of two scores that are a tie


@dataclass(frozen=True)
class Spread:
    """Where some numbers lie.

    Attributes:
        median, first_quartile, third_quartile: By linear interpolation.
        mean: Their mean.
        half_width: Of the mean's 95% confidence interval, by Student's t; NaN for a single number.
    """

    median: float
    first_quartile: float
    third_quartile: float
    mean: float
    half_width: float


@dataclass(frozen=True)
class Paired:
    """A method against a reference on the same seeds.

    Attributes:
        wins, ties, losses: On how many seeds the method is better, as good, worse.
        mean_difference: The method's score minus the reference's.
        half_width: Of the mean difference's 95% confidence interval, by Student's t; NaN for a single seed.
        p_t: Two-sided p-value of the paired t-test; NaN for a single seed.
        p_wilcoxon: Two-sided p-value of Wilcoxon's signed-rank test, which n seeds cannot bring below 2^(1−n).
    """

    wins: int
    ties: int
    losses: int
    mean_difference: float
    half_width: float
    p_t: float
    p_wilcoxon: float


@dataclass(frozen=True)
class Ranking:
    """Average ranks of methods over seeds; 1 is the best, and ties share their mean rank.

    Attributes:
        average_ranks: By method.
        n_blocks: Number of seeds.
        p_friedman: The p-value of Friedman's test of all methods being alike; NaN for fewer than three methods or two
            seeds, for which there is none.
        critical_difference: Nemenyi's, at the level 0.05: average ranks that differ by less are not told apart.
    """

    average_ranks: Mapping[str, float]
    n_blocks: int
    p_friedman: float
    critical_difference: float


def spread(values: Sequence[float]) -> Spread:
    """Where finite numbers lie; all NaN if there are none."""
    if not values:
        return Spread(*[math.nan] * 5)
    first, median, third = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    mean, half_width = mean_and_half_width(values)
    return Spread(median, first, third, mean, half_width)


def paired(values: Sequence[float], reference: Sequence[float], *, maximize: bool = False) -> Paired:
    """Compares scores seed by seed; pairs of which one is not finite are left out.

    Raises:
        ValueError: If there are not as many values as of the reference.
    """
    pairs = [(x, y) for x, y in zip(values, reference, strict=True) if math.isfinite(x) and math.isfinite(y)]
    differences = [0.0 if math.isclose(x, y, rel_tol=_SAME) else x - y for x, y in pairs]
    n, better = len(differences), 1 if maximize else -1
    signs = [better * float(np.sign(d)) for d in differences]
    if n == 0:
        return Paired(0, 0, 0, *[math.nan] * 4)
    mean, half_width = mean_and_half_width(differences)
    if not any(differences):
        p_t = p_wilcoxon = 1.0 if n > 1 else math.nan
    else:
        deviation = float(np.std(differences, ddof=1)) if n > 1 else math.nan
        p_t = 2 * float(stats.t.sf(abs(mean) * math.sqrt(n) / deviation, n - 1)) if deviation != 0 else 0.0
        p_wilcoxon = float(stats.wilcoxon(differences).pvalue) if n > 1 else math.nan
    return Paired(signs.count(1.0), signs.count(0.0), signs.count(-1.0), mean, half_width, p_t, p_wilcoxon)


def smallest_wilcoxon_p(n: int) -> float:
    """The smallest two-sided p-value that Wilcoxon's signed-rank test can have with n pairs."""
    return min(1.0, 2.0 ** (1 - n))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for there being several of them; NaN stays, and counts for none."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, at_least = list(p_values), 0.0
    for k, (p, i) in enumerate(known):
        at_least = max(at_least, min(1.0, (len(known) - k) * p))
        corrected[i] = at_least
    return corrected


def ranking(scores: Mapping[str, Sequence[float]], *, maximize: bool = False) -> Ranking:
    """Ranks methods on every seed; what is not finite ranks last.

    Args:
        scores: By method, those of the same seeds in the same order.
        maximize: Whether larger is better.
    """
    sign = -1.0 if maximize else 1.0
    losses = np.array([[sign * x if math.isfinite(x) else math.inf for x in row] for row in scores.values()]).T
    n_blocks, k = losses.shape
    ranks = stats.rankdata(losses, axis=1)
    testable = k >= 3 and n_blocks >= 2 and bool((ranks != ranks.mean()).any())
    return Ranking(
        average_ranks=dict(zip(scores, (float(x) for x in ranks.mean(axis=0)), strict=True)),
        n_blocks=n_blocks,
        p_friedman=float(stats.friedmanchisquare(*ranks.T).pvalue) if testable else math.nan,
        critical_difference=critical_difference(k, n_blocks) if k >= 2 else math.nan,
    )


def critical_difference(n_methods: int, n_blocks: int) -> float:
    """Nemenyi's: q/√2·√(k(k+1)/(6N)), with q of the studentized range for k methods at the level 0.05."""
    q = float(stats.studentized_range.ppf(1 - LEVEL, n_methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(n_methods * (n_methods + 1) / (6 * n_blocks))


def alike(ranking: Ranking) -> list[tuple[str, ...]]:
    """The largest groups of methods whose average ranks all differ by less than the critical difference."""
    ordered = sorted(ranking.average_ranks.items(), key=lambda item: item[1])
    groups: list[tuple[int, int]] = []
    for i, (_, low) in enumerate(ordered):
        end = max(j for j, (_, rank) in enumerate(ordered) if j == i or rank - low < ranking.critical_difference)
        if end > i and not (groups and groups[-1][1] >= end):
            groups.append((i, end))
    return [tuple(name for name, _ in ordered[i : j + 1]) for i, j in groups]


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the half-width of its confidence interval by Student's t; NaN for a single value."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return mean, math.nan
    return mean, float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
