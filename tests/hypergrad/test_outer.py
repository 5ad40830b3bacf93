"""Wrappers of outer optimizers against their equations, alone, nested, taken back after failures, and resumed."""

from functools import partial

import pytest
import torch

from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.estimators import Greedy
from optuna_greedyhg.hypergrad.outer import Decaying, TrustRegion
from optuna_greedyhg.hypergrad.update_rules import SGD
from tests.hypergrad.test_resume import assert_resumes
from tests.problems import SPECIMENS, UPDATE_RULES, Case, cliff, float64

SLOPES = float64([3.0, -0.2], [0.5, 0.0], [1.0, 8.0])
"""Hypergradients that do not depend on where they are taken: three groups of two."""


def path(outer_optimizer, n_steps):
    """The coordinates before any and after each step, shape (1 + n_steps, 3, 2), from 0.5 on."""
    coordinates = [torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True) for _ in SLOPES]
    optimizer = outer_optimizer(coordinates)
    found = [torch.stack([z.detach().clone() for z in coordinates])]
    for _ in range(n_steps):
        for z, slope in zip(coordinates, SLOPES, strict=True):
            z.grad = slope.clone()
        optimizer.step()
        found.append(torch.stack([z.detach().clone() for z in coordinates]))
    return torch.stack(found)


def sgd(lr):
    return partial(torch.optim.SGD, lr=lr)


def test_steps_shrink_geometrically():
    found = path(Decaying(0.8, sgd(0.1)), 4)
    lengths = 0.1 * 0.8 ** torch.arange(4, dtype=torch.float64)
    expected = 0.5 - torch.cumsum(lengths, 0)[:, None, None] * SLOPES
    torch.testing.assert_close(found[1:], expected, rtol=1e-12, atol=0.0)


def test_a_rate_of_one_changes_nothing():
    torch.testing.assert_close(path(Decaying(1.0, sgd(0.1)), 3), path(sgd(0.1), 3), rtol=0.0, atol=0.0)


def test_the_path_of_adam_is_no_longer_than_the_sum_of_its_rates():
    found = path(Decaying(0.9, partial(torch.optim.Adam, lr=0.2)), 200)
    distances = (found[-1] - found[0]).abs()
    # Under a constant slope every step of Adam has the length of its learning rate: 0.2 / (1 − 0.9) in all.
    torch.testing.assert_close(distances, 2.0 * SLOPES.sign().abs(), rtol=1e-6, atol=0.0)


def test_every_coordinate_stays_within_the_radius_of_its_seed():
    found = path(TrustRegion(0.4, sgd(0.1)), 5)
    free = path(sgd(0.1), 5)
    torch.testing.assert_close(found, free.clamp(0.1, 0.9), rtol=1e-12, atol=0.0)
    assert (found != free).any()


def test_wrappers_nest():
    found = path(Decaying(0.5, TrustRegion(0.15, sgd(0.1))), 5)
    expected = path(Decaying(0.5, sgd(0.1)), 5).clamp(0.35, 0.65)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    other = path(TrustRegion(0.15, Decaying(0.5, sgd(0.1))), 5)
    torch.testing.assert_close(other, expected, rtol=1e-12, atol=0.0)


def test_a_step_that_is_taken_back_takes_its_decay_back():
    """Beyond 1.4 training is NaN: of steps 1, 1/2, 1/4 the second fails, and is halved until it is good."""
    case = Case(cliff(1.4), SGD(lr=0.5))
    steps = descend(
        case.specimen.problem(),
        case.hyperparameters,
        update_rule=case.rule,
        estimator=Greedy(gamma=0.0),
        horizon=1,
        n_outer_steps=3,
        evaluate="online",
        evaluate_every=10**6,
        outer_optimizer=Decaying(0.5, sgd(1.0 / 0.5)),
    )
    # 1; 1 + 1/2 is beyond, and half of that is good; then 1/4, of full length again.
    assert [float(step.values["target"]) for step in steps] == pytest.approx([0.0, 1.0, 1.5, 1.5])


@pytest.mark.parametrize("name", ["Decaying", "TrustRegion"])
def test_a_descent_resumes_where_it_was(name):
    adam = partial(torch.optim.Adam, lr=0.3)
    outer_optimizer = {"Decaying": Decaying(0.7, adam), "TrustRegion": TrustRegion(0.5, adam)}[name]
    case = Case(SPECIMENS["minibatches"](), UPDATE_RULES["momentum"])
    assert_resumes(case, outer_optimizer=outer_optimizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decaying(0.0), "rate must be above 0 and at most 1, but got 0.0"),
        (lambda: Decaying(1.1), "got 1.1"),
        (lambda: Decaying(float("nan")), "got nan"),
        (lambda: TrustRegion(0.0), "radius must be finite and above 0, but got 0.0"),
        (lambda: TrustRegion(float("inf")), "got inf"),
        (lambda: TrustRegion(float("nan")), "got nan"),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
