"""Statistics of paired runs, against SciPy's and published numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from optuna_greedyhg.report.statistics import (
    Ranking,
    alike,
    critical_difference,
    holm,
    paired,
    ranking,
    smallest_wilcoxon_p,
    spread,
)

ONE = [0.31, 0.42, 0.28, 0.55, 0.37]
OTHER = [0.35, 0.47, 0.27, 0.66, 0.41]


def test_a_spread_is_numpys_quantiles_and_students_interval():
    x = spread(ONE)
    assert (x.first_quartile, x.median, x.third_quartile) == pytest.approx((0.31, 0.37, 0.42))
    low, high = stats.t.interval(0.95, 4, loc=np.mean(ONE), scale=stats.sem(ONE))
    assert (x.mean - x.half_width, x.mean + x.half_width) == pytest.approx((low, high))
    assert math.isnan(spread([0.5]).half_width)
    assert spread([0.5]).median == spread([0.5]).mean == 0.5
    assert math.isnan(spread([]).median)


def test_a_paired_comparison_agrees_with_scipy():
    x = paired(ONE, OTHER)
    assert (x.wins, x.ties, x.losses) == (4, 0, 1)
    assert x.mean_difference == pytest.approx(np.mean(ONE) - np.mean(OTHER))
    reference = stats.ttest_rel(ONE, OTHER)
    assert x.p_t == pytest.approx(reference.pvalue)
    low, high = reference.confidence_interval(0.95)
    assert (x.mean_difference - x.half_width, x.mean_difference + x.half_width) == pytest.approx((low, high))
    assert x.p_wilcoxon == pytest.approx(stats.wilcoxon(ONE, OTHER).pvalue) == pytest.approx(0.125)
    assert paired(ONE, OTHER, maximize=True).wins == 1


def test_wilcoxon_on_five_seeds_cannot_be_significant():
    better = [x - 0.01 * (k + 1) for k, x in enumerate(ONE)]
    assert paired(better, ONE).p_wilcoxon == smallest_wilcoxon_p(5) == 0.0625


def test_what_does_not_differ_is_a_tie_and_what_is_not_finite_is_left_out():
    same = paired(ONE, [*ONE[:4], ONE[4] * (1 + 1e-12)])
    assert (same.ties, same.mean_difference, same.p_t, same.p_wilcoxon) == (5, 0.0, 1.0, 1.0)
    some = paired([math.nan, 1.0, 2.0], [1.0, 1.0, math.inf])
    assert (some.wins, some.ties, some.losses) == (0, 1, 0)
    assert math.isnan(paired([1.0], [2.0]).p_t)
    assert math.isnan(paired([], []).mean_difference)
    constant = paired([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert (constant.wins, constant.p_t) == (3, 0.0)
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


def test_holm_multiplies_the_smallest_by_the_number_of_tests():
    # 0.01·4, max(0.04, 0.02·3), max(0.06, 0.03·2), max(0.06, 0.04·1)
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    corrected = holm([0.5, math.nan, 0.6])
    assert corrected[0] == corrected[2] == 1.0
    assert math.isnan(corrected[1])


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)])
def test_critical_differences_are_those_of_demsars_table_5(k, q):
    assert critical_difference(k, 14) == pytest.approx(q * math.sqrt(k * (k + 1) / (6 * 14)), rel=5e-4)


def test_ranks_are_averaged_over_seeds_and_tested_by_friedman():
    scores = {"a": [1.0, 2.0, 1.0, 1.0], "b": [2.0, 1.0, 2.0, 2.0], "c": [3.0, 3.0, math.nan, 2.0]}
    ranks = ranking(scores)
    assert ranks.average_ranks == {"a": 1.25, "b": 1.875, "c": 2.875}
    known = [[*its] for its in scores.values()]
    known[2][2] = 9.0
    assert ranks.p_friedman == pytest.approx(stats.friedmanchisquare(*known).pvalue)
    assert ranks.critical_difference == critical_difference(3, 4)
    assert ranking({k: [-x for x in v] for k, v in scores.items()}, maximize=True) == ranks
    assert math.isnan(ranking({"a": [1.0, 2.0], "b": [2.0, 3.0]}).p_friedman)
    assert math.isnan(ranking({"a": [1.0], "b": [1.0], "c": [1.0]}).p_friedman)


def test_methods_are_alike_in_groups_that_overlap():
    ranks = Ranking({"c": 3.2, "a": 1.0, "b": 2.0, "d": 5.0}, 10, 0.01, 1.5)
    assert alike(ranks) == [("a", "b"), ("b", "c")]
    assert alike(Ranking({"a": 1.0, "b": 3.0}, 10, 0.01, 1.5)) == []
