import math

import torch
import torch.nn.functional as F
from torch import nn

from optuna_greedyhg.hypergrad.clock import side_by_side
from optuna_greedyhg.hypergrad.cost import Cost, Prices
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.prices import measured_prices
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.update_rules import SGD


def problem(*, reads_alpha=True):
    x, y = torch.randn(400, 50), torch.randn(400, 1)

    def train_loss(model, alpha, batch):
        factor = alpha["z"].exp() if reads_alpha else 1.0
        return factor * F.mse_loss(model(batch[0]), batch[1])

    def val_loss(model, alpha, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    model = nn.Sequential(nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
    # Four times as many for validation, so that a price for each example, and not for each pass, tells.
    return BilevelProblem(
        model=model,
        train_loss=train_loss,
        val_loss=val_loss,
        train_batches=(x, y),
        val_batches=(x.repeat(4, 1), y.repeat(4, 1)),
    )


def test_default_prices_count_passes():
    cost = Cost(n_train_gradients=10, n_val_gradients=20, n_products=30, n_evaluations=60)
    assert Prices().of(cost) == cost.total == 80
    assert Prices(val_gradient=0.5, product=2.0, evaluation=0.1).of(cost) == 10 + 10 + 60 + 6


def test_a_product_is_dearer_than_an_evaluation_and_all_have_a_price():
    prices = measured_prices(problem(), {"z": Hyperparameter(torch.zeros(()))}, SGD(lr=0.1))
    assert all(math.isfinite(x) and x > 0 for x in (prices.val_gradient, prices.product, prices.evaluation))
    assert prices.evaluation < prices.product
    assert prices.evaluation < prices.val_gradient


def test_a_product_has_its_price_where_the_loss_reads_no_hyperparameter():
    """Then v·B, which is the update rule's alone, costs no pass."""
    rule = SGD(lr="z")
    prices = measured_prices(problem(reads_alpha=False), {"z": Hyperparameter(torch.tensor(0.1))}, rule)
    assert prices.product > prices.evaluation


def test_functions_are_timed_in_turns():
    calls = []
    times = side_by_side([lambda: calls.append("a"), lambda: calls.append("b")], torch.device("cpu"), 2)
    assert calls == ["a", "b", "a", "b"]
    assert len(times) == 2
    assert all(t >= 0 for t in times)
