"""Runs and their curves, read from studies made by hand."""

import json
import math
from datetime import timedelta

import pytest
from optuna.trial import TrialState

from optuna_greedyhg.hypergrad.cost import Cost, Prices
from optuna_greedyhg.report.anytime import common_start, mean_along_the_way, reached_for_good
from optuna_greedyhg.report.comparison import statistics_of
from optuna_greedyhg.report.comparison_figures import anytime, average_ranks, quartiles
from optuna_greedyhg.report.comparison_page import comparison_page
from optuna_greedyhg.report.runs import Point, Run, run_from_json, run_of
from optuna_greedyhg.report.wording import plus_minus
from tests.report.studies import HOSTILE, finished, study_of

PRICES = Prices(val_gradient=0.5, product=2.0, evaluation=0.0)


def row(loss, *, gradients, products=0, seconds=1.0, test=None):
    counts = {"n_train_gradients": gradients, "n_val_gradients": 0, "n_products": products, "n_evaluations": 7}
    return {"outer_step": 0, "seconds": seconds, **counts, "val_loss": loss, "test_loss": test}


def trial(*rows, minute, state=TrialState.COMPLETE):
    last = rows[-1]
    value = None if state == TrialState.FAIL else last["val_loss"]
    made = finished(value, state=state, minute=minute, cost=last["n_train_gradients"], cost_seconds=2.0)
    made.user_attrs["cost_n_products"] = last["n_products"]
    made.system_attrs["greedyhg:improvements"] = list(rows)
    made.datetime_start = made.datetime_complete - timedelta(seconds=2.5)  # of which half a second drew the seed
    return made


def test_a_curve_adds_what_earlier_trials_have_cost():
    first = trial(row(0.9, gradients=10, test=1.9), row(0.5, gradients=30, products=5, test=1.5), minute=1)
    worse = trial(row(0.7, gradients=10), minute=2)
    failed = trial(row(0.4, gradients=20, test=1.4), minute=3, state=TrialState.FAIL)
    run = run_of(study_of(first, worse, failed), method="m", seed=3, prices=PRICES, budget=1000)
    # Costs: 10; 30 + 2·5; (30 + 2·5) + 10 + 20. Seconds: those of the trials before, half a one, and one more.
    assert [(p.cost, p.scores["val_loss"], p.scores["test_loss"]) for p in run.curve] == [
        (10, 0.9, 1.9),
        (40, 0.5, 1.5),
        (70, 0.4, 1.4),
    ]
    assert [p.seconds for p in run.curve] == [1.5, 1.5, 6.5]
    assert (run.n_trials, run.cost, run.seconds) == (3, 70, 7.5)
    assert run.as_json()["best_value_curve"][1] == [40, 1.5, 0.5, 1.5]
    assert run.as_json()["test_loss"] == 1.4


def test_a_run_is_read_again_from_what_was_written():
    accurate = {**row(0.5, gradients=30, test=1.5), "val_accuracy": 0.8, "test_accuracy": 0.7}
    study = study_of(trial(row(0.9, gradients=10), accurate, minute=1))
    run = run_of(study, method="m", seed=3, prices=PRICES, budget=1000)
    assert run_from_json(json.loads(json.dumps(run.as_json()))) == run
    assert run.score("test_accuracy") == 0.7
    empty = Run("m", 0, 0, 0.0, 0.0, Cost(), ())
    assert run_from_json(empty.as_json()) == empty


def test_what_is_found_beyond_the_budget_does_not_count():
    study = study_of(trial(row(0.9, gradients=10), row(0.5, gradients=30), minute=1))
    assert run_of(study, method="m", seed=0, prices=PRICES, budget=29).score("val_loss") == 0.9
    assert run_of(study, method="m", seed=0, prices=PRICES, budget=30).score("val_loss") == 0.5
    assert run_of(study, method="m", seed=0, prices=PRICES, budget=9).curve == ()


def test_a_sum_that_rounding_keeps_from_the_budget_has_spent_it():
    run = Run("m", 0, 100, sum([30101.90453481171] * 100), 0.0, Cost(), ())
    budget = 100 * 30101.90453481171
    assert run.cost < budget
    assert run.has_spent(budget)
    assert not run.has_spent(1.001 * budget)


def test_values_that_are_missing_or_not_finite_are_no_improvement():
    study = study_of(trial(row(None, gradients=10), row(0.5, gradients=20), minute=1), finished(0.1, minute=2))
    (point,) = run_of(study, method="m", seed=0, prices=PRICES, budget=1000).curve
    assert point.scores == {"val_loss": 0.5}


def run(method, seed, *points):
    curve = tuple(Point(cost, cost / 10, {"val_loss": y, "test_loss": y + 1}) for cost, y in points)
    return Run(method, seed, 2, 100.0, 10.0, Cost(100), curve)


RUNS = [
    run("tpe", 0, (10, 0.8), (40, 0.6)),
    run("tpe", 1, (20, 0.4)),
    run(HOSTILE, 0, (10, 0.8), (30, 0.2)),
    run(HOSTILE, 1, (10, 0.5), (25, 0.3)),
]


def test_curves_are_held_between_their_steps_and_begin_where_all_have_a_value():
    x, low, median, high = quartiles(RUNS[:2], "cost", "val_loss", 100.0)
    assert x == [20, 40, 100]
    assert median == pytest.approx([0.6, 0.5, 0.5])
    assert low == pytest.approx([0.5, 0.45, 0.45])
    assert high == pytest.approx([0.7, 0.55, 0.55])
    assert quartiles([*RUNS[:2], run("tpe", 2)], "cost", "val_loss", 100.0) == ([], [], [], [])
    long = run("tpe", 0, *((k, 1 / k) for k in range(1, 1000)))
    x, _, median, _ = quartiles([long], "cost", "val_loss", 2000.0)
    assert len(x) == 200
    assert (x[-1], median[-1]) == (2000.0, 1 / 999)


def test_costs_are_drawn_in_full_trainings_and_names_are_plain_text():
    figure = anytime({"tpe": RUNS[:2], HOSTILE: RUNS[2:]}, "cost", unit=10, end=100)
    assert max(x for trace in figure.data for x in trace.x) == 10
    assert len([trace for trace in figure.data if trace.showlegend]) == 2
    assert "<script>" not in figure.to_json()


def test_statistics_compare_with_the_reference_and_are_plain_json():
    statistics = statistics_of(RUNS, "tpe", 100)
    tpe, other = statistics.rows
    assert tpe.against == {}
    assert other.scores["val_loss"].median == pytest.approx(0.25)
    assert (other.against["test_loss"].wins, other.against["test_loss"].losses) == (2, 0)
    assert statistics.ranking.average_ranks == {"tpe": 2.0, HOSTILE: 1.0}
    content = json.loads(json.dumps(statistics.as_json(), allow_nan=False))
    assert content["ranking"]["p_friedman"] is None
    assert content["methods"]["tpe"]["scores"]["val_loss"]["median"] == pytest.approx(0.5)
    assert list(average_ranks(statistics.ranking, {}).data[0].x) == [2.0]


def test_the_mean_along_the_way_is_the_area_under_the_steps():
    its = run("m", 0, (10, 0.8), (40, 0.6), (90, 0.1))
    # (0.8·20 + 0.6·50 + 0.1·10) / 80
    assert mean_along_the_way(its, "val_loss", 20, 100) == pytest.approx(47 / 80)
    assert mean_along_the_way(its, "test_loss", 20, 100) == pytest.approx(1 + 47 / 80)
    assert mean_along_the_way(its, "val_loss", 10, 30) == pytest.approx(0.8)
    assert math.isnan(mean_along_the_way(its, "val_loss", 5, 100))
    assert math.isnan(mean_along_the_way(run("m", 0), "val_loss", 5, 100))
    assert common_start(RUNS) == 20
    assert common_start([*RUNS, run("m", 0)]) == math.inf


def test_what_was_reached_and_lost_again_counts_from_when_it_came_back():
    points = [
        Point(cost, cost, {"test_loss": y}) for cost, y in ((10, 0.8), (20, 0.3), (30, 0.5), (50, 0.4), (60, 0.2))
    ]
    its = Run("m", 0, 1, 100.0, 100.0, Cost(), tuple(points))
    assert [reached_for_good(its, "test_loss", y) for y in (0.8, 0.4, 0.3, 0.1)] == [10, 50, 60, math.inf]
    assert reached_for_good(its, "val_loss", 1.0) == math.inf


def test_statistics_say_when_the_end_of_the_reference_was_reached():
    statistics = statistics_of(RUNS, "tpe", 100)
    tpe, other = (row.anytime["val_loss"] for row in statistics.rows)
    assert (tpe.reached, tpe.n_reached, tpe.against) == (pytest.approx(0.3), 2, None)  # after 40 and 20 of 100
    assert (other.reached, other.n_reached) == (pytest.approx(0.275), 2)  # after 30 and 25
    # From where both have something: (0.8·30 + 0.6·60)/90 and 0.4, against (0.8·20 + 0.2·70)/90 and (0.5·5 + 0.3·75)/80
    assert tpe.mean.mean == pytest.approx((2 / 3 + 0.4) / 2)
    assert other.mean.mean == pytest.approx((1 / 3 + 0.3125) / 2)
    assert other.against.wins == 2
    reversed_ = statistics_of(RUNS, HOSTILE, 100)
    assert (reversed_.rows[0].anytime["val_loss"].reached, reversed_.rows[0].anytime["val_loss"].n_reached) == (
        math.inf,
        0,
    )
    assert reversed_.as_json()["methods"]["tpe"]["anytime"]["val_loss"]["reached"] is None


def test_the_page_says_all_and_obeys_nothing():
    statistics = statistics_of(RUNS, "tpe", 100)
    page = comparison_page("t", "one\n\ntwo", RUNS, statistics, full_training=10, budget=100, footer="f")
    body = page[page.rindex("<h1>") :]
    assert "<script>alert" not in page
    assert "cannot go below 0.5 with 2 seeds" in body
    assert "2/0/0" in body
    assert "<td>28%</td><td>2 of 2</td>" in body
    assert "Average ranks by test loss over 2 seeds" in body
    alone = comparison_page("t", "", RUNS[:2], statistics_of(RUNS[:2], "tpe", 100), full_training=10, budget=100)
    assert "There is no other method." in alone


@pytest.mark.parametrize(
    ("mean", "half_width", "words"),
    [
        (0.3291, 0.00942, "0.3291 ± 0.0094"),
        (-8.59e-05, 0.000123, "−0.00009 ± 0.00012"),
        (12.3, 45.0, "12 ± 45"),
        (0.25, 0.0, "0.250 ± 0.000"),
        (0.25, float("nan"), "0.250 ± –"),
    ],
)
def test_an_interval_has_as_many_digits_as_it_is_worth(mean, half_width, words):
    assert plus_minus("val_loss", mean, half_width) == words
    assert plus_minus("test_accuracy", 0.9012, 0.0034) == "90.1% ± 0.3%"
