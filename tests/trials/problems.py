"""A bilevel problem that Optuna's side can be tested with in milliseconds, and whose optimum is known.

w ∈ R², L_train = ½‖w − c‖², L_val = ½‖w‖² + (log10 lr + 1)²: the tensor c wants to be 0 and lr wants to be 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
import torch
from torch import Tensor, nn

import optuna_greedyhg as ghg


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self) -> Tensor:
        return self.w


def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: Any) -> Tensor:
    return 0.5 * (model() - alpha["c"]).square().sum()


def val_loss(model: Any, alpha: Mapping[str, Tensor], batch: Any) -> Tensor:
    return 0.5 * model().square().sum() + (alpha["lr"].log10() + 1).square()


def make_problem(**replaced: Any) -> ghg.BilevelProblem:
    parts: dict[str, Any] = {
        "model": Weights(),
        "train_loss": train_loss,
        "val_loss": val_loss,
        "train_batches": [torch.zeros(4)],
        "val_batches": [torch.zeros(2)],
        "test_batches": [torch.zeros(3)],
        "metrics": {"score": lambda model, alpha, batch: -val_loss(model, alpha, batch)},
    }
    return ghg.BilevelProblem(**{**parts, **replaced})


def declare(trial: optuna.trial.BaseTrial) -> ghg.Alpha:
    alpha = ghg.Alpha(trial)
    alpha.suggest_float("lr", 1e-3, 1.0, log=True)
    alpha.tensor("c", torch.tensor([2.0, 1.0]))
    return alpha


def refine(trial: optuna.trial.BaseTrial, alpha: ghg.Alpha | None = None, **settings: Any) -> float:
    settings = {"n_outer_steps": 4, "evaluate_every": 2, "horizon": 2} | settings
    problem = settings.pop("problem", None) or make_problem()
    update_rule = settings.pop("update_rule", ghg.SGD(lr="lr"))
    return ghg.refine(trial, problem, alpha or declare(trial), update_rule=update_rule, **settings)


def retrained(lr: float, c: torch.Tensor, n_steps: int) -> float:
    """The validation loss after ``n_steps`` of gradient descent on ½‖w − c‖² from (1, −1), in closed form."""
    w = c + (1 - lr) ** n_steps * (torch.tensor([1.0, -1.0]) - c)
    return float(0.5 * w.square().sum()) + (math.log10(lr) + 1) ** 2


def diverging_loss(model: Any, alpha: Mapping[str, Tensor], batch: Any) -> Tensor:
    return train_loss(model, alpha, batch) * float("nan")
