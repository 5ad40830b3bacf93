"""An online estimator needs as much memory for a thousand steps as for ten."""

import pytest

from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, Reverse, fold
from optuna_greedyhg.hypergrad.peak_memory import peak_bytes
from optuna_greedyhg.hypergrad.update_rules import SGD
from tests.problems import CPU, Case, regression

ONLINE = [name for name, estimator in ESTIMATORS.items() if estimator.traits.online]

MOMENTUM = SGD(lr=0.01, momentum=0.9)
N_BYTES = sum(x.nbytes for x in Case(regression(), SGD()).state_after(0).parameters.values())


def peak(estimator, horizon, rule=MOMENTUM):
    """Of the first horizon, in which an estimator finds out what it carries on."""
    case = Case(regression(), rule)
    products, alpha, start = case.products(), case.alpha(), case.state_after(1)

    def make_step(before, t, keep_graph):
        batch = next(products.train_stream)
        return products.step(before, alpha, batch, keep_graph=keep_graph, remaining=horizon - t)

    return peak_bytes(lambda: fold(estimator, None, alpha, start, horizon, make_step), CPU)


@pytest.mark.parametrize("name", ONLINE)
def test_peak_memory_does_not_grow_with_the_horizon(name):
    assert peak(ESTIMATORS[name], 1000) <= 1.02 * peak(ESTIMATORS[name], 10)


@pytest.mark.parametrize(("rule", "n_trees"), [(MOMENTUM, 1), (SGD(lr="lr", momentum=0.9), 3)], ids=str)
def test_that_of_reverse_mode_grows_by_the_weights_and_by_what_the_rule_reads(rule, n_trees):
    """With the learning rate in α that is the gradient and the momentum."""
    grown = peak(Reverse(), 100, rule) - peak(Reverse(), 10, rule)
    assert 0.95 < grown / (90 * n_trees * N_BYTES) < 1.05


def test_with_graphs_kept_too():
    kept = Reverse(keep_graphs=True)
    by_numbers, by_alpha = (peak(kept, 100, r) - peak(kept, 10, r) for r in (MOMENTUM, SGD(lr="lr", momentum=0.9)))
    assert by_alpha - by_numbers > 90 * 1.9 * N_BYTES
