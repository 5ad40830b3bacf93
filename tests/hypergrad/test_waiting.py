"""Nothing within an inner step asks a tensor for its value, for which a program waits where tensors are on a GPU."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from optuna_greedyhg.hypergrad import spectral
from optuna_greedyhg.hypergrad.curvature import Neumann
from optuna_greedyhg.hypergrad.estimators import DrMAD, FirstOrder, Greedy, Implicit, Reverse, fold
from optuna_greedyhg.hypergrad.spectral import Spectral
from tests.problems import SPECIMENS, UPDATE_RULES, Case

WAITING = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
ESTIMATORS = {
    "first-order": FirstOrder(),
    "t1t2": Greedy(gamma=0.0),
    "greedy": Greedy(0.9),
    "terminal": Greedy(0.9, terminal=True),
    "implicit": Implicit(Neumann()),
    "drmad": DrMAD(),
    "reverse": Reverse(),
}
HORIZON = 4


def waits_of(function):
    """How often the operations within a function would wait for a device, by operation."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    return Counter(event.name for event in recorded.events() if event.name in WAITING)


def horizon_of(estimator, case):
    """The work of one horizon."""
    products, alpha = case.products(), case.alpha()

    def make_step(before, t, keep_graph):
        batch = next(products.train_stream)
        return products.step(before, alpha, batch, keep_graph=keep_graph, remaining=HORIZON - t)

    return lambda: fold(estimator, None, alpha, products.initial_state(), HORIZON, make_step)


@pytest.mark.parametrize("rule", ["SGD", "momentum-decay"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_horizon_of_steps_and_products_waits_for_nothing(name, rule):
    run = horizon_of(ESTIMATORS[name], Case(SPECIMENS["dropout"](), UPDATE_RULES[rule]))
    assert waits_of(run) == {}


@pytest.mark.parametrize("rule", ["momentum-decay", "AdamW"])
def test_spectral_waits_once_for_the_eigenvalues_of_a_refresh(rule, monkeypatch):
    monkeypatch.setattr(spectral, "is_same", as_on_a_device)
    estimator = Greedy(propagator=Spectral(rank=2, refresh_every=2))  # in steps 1 and 3 of 4
    run = horizon_of(estimator, Case(SPECIMENS["dropout"](), UPDATE_RULES[rule]))
    assert waits_of(run) == waits_of(lambda: [torch.linalg.eigh(torch.eye(2)) for _ in range(2)])


def as_on_a_device(x, y, *, wait):
    """What ``is_same`` says of batches that lie on a GPU."""
    assert not wait, "batches are compared at the start of a horizon alone, with those of the one before"
    return x is y


def test_what_would_wait_is_seen():
    x = torch.ones(3)
    assert waits_of(lambda: float(x.sum())) == {"aten::item": 1, "aten::_local_scalar_dense": 1}
    assert "aten::is_nonzero" in waits_of(lambda: bool((x > 0).all()))
    assert "aten::nonzero" in waits_of(lambda: x[x > 0])
    assert "aten::equal" in waits_of(lambda: torch.equal(x, x + 1))
