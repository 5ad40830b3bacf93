"""This package's own estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from methods.problem import GAMMA, LR, MOMENTUM, N_TERMS, SCALE, Method, Setting, train_loss, val_loss
from optuna_greedyhg.hypergrad.curvature import Neumann
from optuna_greedyhg.hypergrad.domains import Unbounded
from optuna_greedyhg.hypergrad.estimators import DrMAD, Estimator, Greedy, Implicit, Reverse, fold
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.products import Products
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import SGD

ESTIMATORS: dict[str, Estimator[Any]] = {
    "greedy": Greedy(GAMMA),
    "terminal": Greedy(GAMMA, terminal=True),
    "t1t2": Greedy(gamma=0.0),
    "implicit": Implicit(Neumann(N_TERMS, SCALE)),
    "implicit, no terms": Implicit(Neumann(n_terms=0, scale=1.0)),
    "drmad": DrMAD(),
    "reverse": Reverse(keep_graphs=True),
    "reverse, replayed": Reverse(),
}


def in_parts(
    setting: Setting, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[BilevelProblem, Products, Tensors]:
    """The problem, with its update rule, and α; further settings are those of ``BilevelProblem``."""
    train, val = (batch._replace(images=batch.images.to(dtype)) for batch in (setting.train, setting.val))
    problem = BilevelProblem(
        model=setting.net().to(dtype),
        train_loss=lambda model, alpha, batch: train_loss(model, alpha["logits"], batch),
        val_loss=lambda model, alpha, batch: val_loss(model, batch),
        train_batches=train,
        val_batches=val,
        **settings,
    )
    products = Products(problem, {"logits": Unbounded()}, SGD(lr=LR, momentum=MOMENTUM))
    return problem, products, {"logits": torch.zeros(setting.n_examples, dtype=dtype, device=problem.device)}


def hypergradient(
    setting: Setting, estimator: Estimator[Any], dtype: torch.dtype = torch.float32, **settings: Any
) -> Callable[[], Tensor]:
    """The work of one estimator; further settings are those of ``BilevelProblem``."""
    _, products, alpha = in_parts(setting, dtype, **settings)
    horizon = setting.horizon

    def run() -> Tensor:
        folded = fold(
            estimator,
            None,
            alpha,
            products.initial_state(),
            horizon,
            lambda before, t, keep_graph: products.step(
                before, alpha, next(products.train_stream), keep_graph=keep_graph, remaining=horizon - t
            ),
        )
        return folded.estimate["logits"]

    return run


def _method(name: str) -> Method:
    return Method(name, lambda setting: hypergradient(setting, ESTIMATORS[name]))


METHODS = {name: _method(name) for name in ESTIMATORS}
